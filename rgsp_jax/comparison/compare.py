"""`rgsp compare`: models in, records of every tensor and a verdict out; a few matrices in memory at a time."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from rgsp_jax.checkpoint import Checkpoint, check_output, find_problems, format_bytes, open_checkpoint
from rgsp_jax.comparison.answer import judge
from rgsp_jax.comparison.coordinates import MOST_TESTS, PairOrders
from rgsp_jax.comparison.measure import TensorMeasures, find_again, is_open, measure_tensor
from rgsp_jax.comparison.tensors import OVERHEAD, CommonTensor, find_common
from rgsp_jax.comparison.verdict import Verdict
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.overview import describe_parent, versions
from rgsp_jax.pipeline.report import Parent, name_parents
from rgsp_jax.rules import BUFFER_NAMES

MOST_MODELS = 8
LEAST_MEMORY = OVERHEAD + 50_000_000
LEVEL = 1e-3
"""Probability that independently trained models pass for relatives in any of a comparison's tests."""
OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """Everything that was found."""

    models: tuple[Parent, ...]
    codes: tuple[str, ...]
    """Short names, in order."""
    verdict: Verdict
    tensors: tuple[TensorMeasures, ...]
    differences: tuple[tuple[int, int, str], ...]
    """What stands against merging two of the models: their indices and a sentence."""
    level: float
    """Of one test of the coordinates: `LEVEL` shared out among all."""
    versions: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data."""
        return {
            "models": [asdict(model) | {"code": code} for model, code in zip(self.models, self.codes, strict=True)],
            "verdict": asdict(self.verdict),
            "differences": [{"models": [i, j], "problem": text} for i, j, text in self.differences],
            "tensors": len(self.tensors),
            "test_level": self.level,
            "versions": self.versions,
        }


def compare_checkpoints(
    models: Sequence[str | Path],
    *,
    out: Path | None = None,
    memory: int = 1_000_000_000,
    progress: OnTensor | None = None,
) -> Comparison:
    """Compare models with each other, tensor by tensor.

    Args:
        models: two to eight places that `open_checkpoint` reads.
        out: where the caller will write, to be refused before the work rather than after it.
        memory: bytes to take above the process's own; of matrices that do not fit, evenly spread rows are compared.
        progress: called with the numbers of tensors done and to do.

    Raises:
        RefusedError: a model cannot be opened, there are too few or too many, or `out` cannot be written.
    """
    problems = check_request(models, memory)
    checkpoints: list[Checkpoint] = []
    with ExitStack() as stack:
        for model in models:
            try:
                checkpoints.append(stack.enter_context(open_checkpoint(model)))
            except RefusedError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if out is not None:
            problems += check_output(out, checkpoints)
        if problems:
            raise RefusedError(problems)
        common = find_common(checkpoints)
        pairs = list(combinations(range(len(models)), 2))
        matrices = sum(tensor.view is not None for tensor in common)
        level = LEVEL / max(1, matrices * len(pairs) * MOST_TESTS)
        # Factorisations are small, and LAPACK's threads spin while they wait: many times the work where others run too.
        with threadpool_limits(1, user_api="blas"):
            tensors = measure_all(checkpoints, common, level, memory, progress)
        differences = [(i, j, problem) for i, j in pairs for problem in find_problems([checkpoints[i], checkpoints[j]])]
        codes = name_parents(len(models))
        parameters = [count_parameters(checkpoint) for checkpoint in checkpoints]
        return Comparison(
            models=tuple(
                describe(str(label), checkpoint) for label, checkpoint in zip(models, checkpoints, strict=True)
            ),
            codes=tuple(codes),
            verdict=judge(codes, tensors, parameters, differences),
            tensors=tuple(tensors),
            differences=tuple(differences),
            level=level,
            versions=versions(),
        )


def check_request(models: Sequence[str | Path], memory: int) -> list[str]:
    """What is wrong before anything is opened."""
    problems = []
    if len(models) < 2:
        problems.append(f"name two to {MOST_MODELS} models to compare, not {len(models)}")
    if len(models) > MOST_MODELS:
        problems.append(f"at most {MOST_MODELS} models are compared at once, not {len(models)}")
    if memory < LEAST_MEMORY:
        problems.append(f"--memory: comparing takes at least {format_bytes(LEAST_MEMORY)}, not {format_bytes(memory)}")
    return problems


def measure_all(
    checkpoints: Sequence[Checkpoint],
    common: Sequence[CommonTensor],
    level: float,
    memory: int,
    progress: OnTensor | None,
) -> list[TensorMeasures]:
    """Every tensor; then again those without shared coordinates, as long as new permutations turn up."""
    orders = {pair: PairOrders() for pair in combinations(range(len(checkpoints)), 2)}
    tensors = []
    for done, tensor in enumerate(common, start=1):
        tensors.append(measure_tensor(checkpoints, tensor, orders, level, memory))
        if progress:
            progress(done, len(common))
    seen = dict.fromkeys(orders, 0)
    while grown := {pair for pair, one in orders.items() if one.count > seen[pair]}:
        seen = {pair: one.count for pair, one in orders.items()}
        for i, tensor in enumerate(common):
            if any(is_open(pair) and pair.models in grown for pair in tensors[i].pairs):
                tensors[i] = find_again(checkpoints, tensor, tensors[i], {p: orders[p] for p in grown}, level, memory)
    return tensors


def count_parameters(checkpoint: Checkpoint) -> int:
    """Floating-point elements without buffers, tied ones once."""
    return sum(
        spec.size
        for name, spec in checkpoint.specs.items()
        if spec.kind == "float" and name not in checkpoint.aliases and not BUFFER_NAMES.search(name)
    )


def describe(label: str, checkpoint: Checkpoint) -> Parent:
    """The model, without the hashes of its files, which would take as long as the comparison."""
    return replace(describe_parent(label, checkpoint, [""] * len(checkpoint.weight_files)), files=())


def write_comparison(comparison: Comparison, out: Path) -> None:
    """compare.html to read, compare.jsonl with a line per tensor, compare.json with the verdict; equal runs agree."""
    from rgsp_jax.comparison.page import render_page  # templates and figures only where they are wanted

    out.mkdir(exist_ok=True)
    lines = "".join(json.dumps(tensor.record(), allow_nan=False) + "\n" for tensor in comparison.tensors)
    texts = {
        "compare.html": render_page(comparison),
        "compare.jsonl": lines,
        "compare.json": json.dumps(comparison.summary(), indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
