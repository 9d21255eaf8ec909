"""The peers' side of `agreement`: runs in their environment, without jax or rgsp_jax.

    python -m experiments.benchmarks.agreement_peers FOLDER

FOLDER holds the problems and the YAMLs; every result is written beside them.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from experiments.benchmarks.agreement_cases import PROBLEMS, ROWS, SEED, TINY, Problem, Row, cut

RECORDED = ("mergekit", "fusion-bench", "torch", "transformers", "numpy")


@dataclass
class Draws:
    """Every mask that torch.bernoulli draws, in order."""

    divide: bool
    masks: list[np.ndarray] = field(default_factory=list)

    def bernoulli(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def draw(probabilities: Any, *args: Any, **kwargs: Any) -> Any:
            mask = original(probabilities, *args, **kwargs)
            self.masks.append(mask.numpy().astype(bool))
            return mask / probabilities if self.divide else mask

        return draw


def run_mergekit(row: Row, problem: Problem, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mergekit's registered method on one tensor group; the masks it drew."""
    import torch
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    method = registry.get(row.function)
    base, stack = (torch.from_numpy(arrays[name]) for name in ("base", "stack"))
    if problem.m == 1:
        base, stack = base[0], stack[:, 0]
    needs_base = row.function not in ("linear", "slerp", "karcher")
    tensors = [base, *stack] if needs_base else [*stack]
    group = TensorGroup.from_tensors(tensors, base_index=0 if needs_base or row.function == "slerp" else None)
    draws = Draws(row.paper_rescale)
    torch.manual_seed(SEED)
    with mock.patch("torch.bernoulli", draws.bernoulli(torch.bernoulli)):
        (merged,) = method([group], parameters=cut(row.theirs, problem.count))
    shape = (problem.count, problem.m, problem.n)
    masks = {"mask": np.stack(draws.masks).reshape(shape)} if draws.masks else {}
    return {"merged": merged.numpy().reshape(problem.m, problem.n), **masks}


def run_fusion_bench(row: Row, problem: Problem, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """fusion_bench's function on one weight."""
    import torch
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.method.wudi.wudi import wudi_merging

    base, stack, covariances = (torch.from_numpy(arrays[name]) for name in ("base", "stack", "covariances"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if row.function == "regmean":
            weights = [{"layer": x} for x in covariances]
            merged = merging_with_regmean_weights({"layer.weight": list(stack)}, weights, **row.theirs)["layer.weight"]
        else:
            functions = {"tsv_m": compute_and_sum_svd_mem_reduction, "iso_c": iso_c, "iso_cts": iso_cts}
            function = {**functions, "wudi": wudi_merging}[row.function]
            vectors = [{"layer.weight": x} for x in stack - base]
            merged = base + function(vectors, accelerator="cpu", **row.theirs)["layer.weight"].detach()
    return {"merged": merged.numpy()}


RUN = {"mergekit": run_mergekit, "fusion_bench": run_fusion_bench}


def write_peers(directory: Path) -> None:
    """Every row on every problem of a directory, and the merges of its YAMLs; versions."""
    from importlib.metadata import version

    import torch

    torch.set_num_threads(2)
    for part, problems in (("problems", PROBLEMS), ("tiny", TINY)):
        for p, problem in enumerate(problems):
            arrays = dict(np.load(directory / f"{part}_{p}.npz"))
            for r, row in enumerate(ROWS):
                if row.takes(problem):
                    np.savez(directory / f"{part}_{p}_{r}.npz", **RUN[row.peer](row, problem, arrays))
    merge_yamls(directory)
    (directory / "versions.json").write_text(json.dumps({name: version(name) for name in RECORDED}))


def merge_yamls(directory: Path) -> None:
    """`mergekit-yaml` for every YAML, in this process."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, random_seed=SEED, quiet=True)
    for path in sorted(directory.glob("*.yaml")):
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(path.read_text())), str(path.with_suffix("")), options
        )


if __name__ == "__main__":
    write_peers(Path(sys.argv[1]))
