"""From the journal's pieces to the report: one record per tensor, and what went wrong in any of them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rgsp_jax.pipeline.plan import MergePlan, TensorTask
from rgsp_jax.registry import methods

Piece = Mapping[str, Any]


def collect_pieces(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[Piece]]:
    """Journal entries by tensor, each tensor's pieces in order."""
    pieces: defaultdict[str, list[Piece]] = defaultdict(list)
    for entry in entries:
        for piece in entry["records"]:
            pieces[piece["name"]].append(piece)
    return {name: sorted(found, key=lambda p: p["start"]) for name, found in pieces.items()}


def find_bad_inputs(plan: MergePlan, pieces: Mapping[str, Sequence[Piece]], paths: Sequence[str]) -> list[str]:
    """One sentence per source tensor with an infinity or a NaN."""
    return [
        f"{paths[source]}: tensor {name!r} holds values that are not finite: repair or exclude it"
        for name in plan.tasks
        for source in sorted({s for piece in pieces.get(name, ()) for s in piece.get("bad_inputs", ())})
    ]


def find_bad_outputs(plan: MergePlan, pieces: Mapping[str, Sequence[Piece]]) -> list[str]:
    """One sentence per tensor of the output that is not finite although what it was made of is."""
    return [
        f"the merge of {task.name!r} is not finite in {task.out_dtype}: try --dtype "
        + ("bfloat16 or float32" if task.out_dtype == np.float16 else "float64")
        + (" or a smaller --scale" if task.action != "copy" and "scale" in methods[task.method].hyperparameters else "")
        for task in plan.tasks.values()
        if any(piece.get("bad_output") for piece in pieces.get(task.name, ()))
    ]


def build_records(
    plan: MergePlan,
    pieces: Mapping[str, Sequence[Piece]],
    digests: Mapping[str, str],
    extra_flags: Mapping[str, list[str]],
) -> list[dict[str, Any]]:
    """The lines of report.jsonl, in the output's order."""
    return [build_record(t, pieces[t.name], digests[t.name], extra_flags.get(t.name, [])) for t in plan.tasks.values()]


def build_record(task: TensorTask, pieces: Sequence[Piece], digest: str, extra_flags: list[str]) -> dict[str, Any]:
    """One tensor: what was done to it, the method's stats and flags, and how far it is from each parent."""
    stats = [piece["stats"] for piece in pieces if "stats" in piece]
    flags = sorted({name for s in stats for name, value in s.items() if is_flag(value)})
    numbers = [{name: value for name, value in s.items() if not is_switch(value)} for s in stats]
    return {
        "name": task.name,
        "shape": list(task.shape),
        "dtype": task.out_dtype.name,
        "rule": task.kind,
        "method": task.method,
        "hyperparameters": dict(task.hyperparameters),
        "stats": merge_stats(numbers),
        "flags": sorted({*flags, *extra_flags, *(["no_covariance"] if task.kind == "uncovered" else [])}),
        "relative_change": relative_change(pieces),
        "digest": digest,
    }


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def is_flag(value: Any) -> bool:
    """Boolean stats are flags of trouble, True is bad."""
    return value is True


def merge_stats(stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A matrix's stats as they are; those of stacked matrices as lists."""
    if len(stats) <= 1:
        return dict(stats[0]) if stats else {}
    return {name: [s[name] for s in stats] for name in stats[0]}


def relative_change(pieces: Sequence[Piece]) -> list[float | None]:
    """`|W* - W_i| / |W_i|` for every parent; null where the parent is zero and the merge is not."""
    if not pieces or "change" not in pieces[0]:
        return []
    columns = zip(*(zip(p["change"], p["parents"], strict=True) for p in pieces), strict=True)
    return [divide(math.fsum(c for c, _ in col), math.fsum(p for _, p in col)) for col in map(tuple, columns)]


def divide(change: float, parent: float) -> float | None:
    if change == 0:
        return 0.0
    return float(f"{math.sqrt(change / parent):.7g}") if parent > 0 else None
