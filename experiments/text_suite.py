"""Every method on BERT encoders fine-tuned on text tasks, over several sets of experts.

    python experiments/text_suite.py --bench BENCH-0 BENCH-1 BENCH-2 --base BASE

Hardware: 2 CPU cores, 8 GB. Runtime: every setting of a method's grid is a pass over the validation rows of all tasks
(seconds each), so name the methods: `--methods average relative task_arithmetic tsv_m`.

A bench is a directory of task directories as `finetune_text.py` makes them and `text_encoders.py` describes them; each
bench is one seed: the same tasks, other experts. `--base` is what they were fine-tuned from, for methods that need it.
Test rows are the first 600 of `test.jsonl`; validation rows, which tuned settings are chosen by, are
`validation.jsonl`, or the last rows of `train.jsonl` where there is none (which the experts may have seen). Inputs for
methods that need covariances are rows of `train.jsonl`, unlabelled.

Expected: no run is recorded yet; `text_encoders.py` has the numbers of one set of experts.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from contenders import Problem, PyTree, make_contenders
from finetune_text import EVALUATED, Batch, Rows, load_base, load_tokenizer, pad, predict, read_rows
from harness import Outcome, draw, find_headline, run, tabulate, to_record
from jaxtyping import Array, Float
from tables import RESULTS, describe_command, write_results

from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.models import extract_parameters

SHOWN = ("individual", "average", "tsv_m", "relative")


class TextTask(NamedTuple):
    """One task's expert with its head, and rows to score it on."""

    name: str
    encoder: PyTree
    weight: Float[Array, "classes width"]
    bias: Float[Array, "classes"]
    rows: dict[str, Rows]


def read_task(directory: Path, tokenizer: Any, test: int, validation: int) -> TextTask:
    """Return a task of a bench; its encoder in float32."""
    model, _ = load_base(directory / "model")
    with open_checkpoint(directory / "head.safetensors") as head:
        weight, bias = (jnp.asarray(head.read(name), jnp.float32) for name in ("weight", "bias"))
    held_back = directory / "validation.jsonl"
    source = held_back if held_back.exists() else directory / "train.jsonl"
    seen = read_rows(source, tokenizer, None, None)
    last = Rows(*(part[-validation:] for part in seen))
    rows = {"test": read_rows(directory / "test.jsonl", tokenizer, None, test), "validation": last}
    return TextTask(directory.name, extract_parameters(model), weight, bias, rows)


def make_batches(rows: Rows) -> list[tuple[list[int], Batch]]:
    """Return the rows in batches of similar length, with their positions."""
    order = sorted(range(len(rows.texts)), key=lambda row: len(rows.ids[row]))
    parts = [order[start : start + EVALUATED] for start in range(0, len(order), EVALUATED)]
    return [(members, jax.tree.map(jnp.asarray, pad(rows, members, EVALUATED))) for members in parts]


def make_score(model: Any, tasks: Sequence[TextTask]) -> Any:
    """Return the problem's score: the share of rows that the encoder answers rightly with each task's head."""

    @jax.jit
    def count(tree: PyTree, weight: Array, bias: Array, batch: Batch) -> Array:
        answers = predict(model, {"encoder": tree, "weight": weight, "bias": bias}, batch.ids, batch.mask).argmax(1)
        return jnp.sum((answers == batch.labels) & (batch.mask[:, 0] > 0))

    batches = {(task.name, part): make_batches(rows) for task in tasks for part, rows in task.rows.items()}

    def score(tree: PyTree, part: str) -> list[float]:
        shares = []
        for task in tasks:
            right = sum(int(count(tree, task.weight, task.bias, batch)) for _, batch in batches[task.name, part])
            shares.append(right / len(task.rows[part].texts))
        return shares

    return score


def make_problem(experts: Sequence[Path], base: Path | None, seed: int, rows: tuple[int, int]) -> Problem:
    """Return the experts of some task directories and how they are scored."""
    tokenizer = load_tokenizer(experts[0] / "model")
    model, _ = load_base(experts[0] / "model")
    tasks = [read_task(expert, tokenizer, *rows) for expert in experts]
    names = [task.name for task in tasks]
    return Problem(
        experts=[task.encoder for task in tasks],
        tasks=names,
        score=make_score(model, tasks),
        seed=seed,
        group={"tasks": "+".join(names)},
        base=None if base is None else extract_parameters(load_base(base)[0]),
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, nargs="+", required=True, help="directories of task directories")
    parser.add_argument("--tasks", nargs="+", help="default: those that every bench has")
    parser.add_argument("--base", type=Path, help="what the experts were fine-tuned from")
    parser.add_argument("--rows", type=int, default=600, help="test rows of each task (default: 600)")
    parser.add_argument("--validation", type=int, default=200, help="validation rows of each task (default: 200)")
    parser.add_argument("--methods", nargs="+", help="default: every one that the models alone, or the base, allow")
    parser.add_argument("--out", type=Path, default=RESULTS / "text_suite")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Run the experiment and return its outcomes."""
    options = parse_arguments(arguments)
    contenders = make_contenders(options.methods)
    found = [{path.parent.name for path in bench.glob("*/head.safetensors")} for bench in options.bench]
    names = options.tasks or sorted(set.intersection(*found))
    if lacking := [bench.name for bench, tasks in zip(options.bench, found, strict=True) if set(names) - tasks]:
        raise SystemExit(f"{', '.join(lacking)}: not all of {', '.join(names)} are there")
    if len(names) < 2:
        raise SystemExit(f"the benches share {len(names)} tasks; two or more are merged")
    outcomes = []
    for seed, bench in enumerate(options.bench):
        started = time.monotonic()
        problem = make_problem([bench / name for name in names], options.base, seed, (options.rows, options.validation))
        own = run(problem, contenders)
        untuned = {o.method: o.mean for o in own if o.column == "untuned"}
        shown = "  ".join(f"{m} {untuned[m]:.4f}" for m in SHOWN if m in untuned)
        print(f"{bench.name}: {shown}  ({time.monotonic() - started:.0f} s)", flush=True)
        outcomes += own
    settings = {"tasks": names, "rows": options.rows, "validation": options.validation}
    settings |= {"methods": options.methods} if options.methods else {}
    named = [f"BENCH-{seed}" for seed in range(len(options.bench))]
    command = describe_command("text_suite", {"bench": named} | ({"base": "BASE"} if options.base else {}) | settings)
    write_results(
        options.out, command, find_headline(outcomes), {"settings": settings, **to_record(outcomes)}, tabulate(outcomes)
    )
    draw(outcomes, options.out.with_suffix(".png"))
    return outcomes


if __name__ == "__main__":
    main()
