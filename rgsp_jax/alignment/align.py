"""`rgsp align`: a model's hidden units in a reference's order, streamed; the function stays what it was."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.alignment.matching import METHODS, Method, Order, match_units
from rgsp_jax.alignment.units import Spot, UnitKey, UnitSet, find_units
from rgsp_jax.checkpoint import Checkpoint, check_output, copy_companions, open_checkpoint
from rgsp_jax.checkpoint.convert import write_directory
from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.checkpoint.shard_plan import keep_shards
from rgsp_jax.errors import RefusedError

REPORT = "alignment.json"
Progress = Callable[[str, int, int, tuple[str, ...]], None]
"""`progress(stage, bytes just done, bytes of the stage, tensors just done)`; stages are "match" and "align"."""


@dataclass(frozen=True)
class UnitAgreement:
    """What was found for one set of units."""

    label: str
    units: int
    groups: int
    moved: int
    """Units that changed their place."""
    before: float
    """Mean cosine with the reference's units in the same places, over all weights of a unit; 0 is chance."""
    after: float


@dataclass(frozen=True)
class Alignment:
    """What an alignment did."""

    out: Path
    model: str
    reference: str
    method: Method
    units: tuple[UnitAgreement, ...]
    tensors: int
    bytes_out: int

    @property
    def moved(self) -> int:
        return sum(x.moved for x in self.units)

    @property
    def before(self) -> float:
        """Mean over all units."""
        return float(np.average([x.before for x in self.units], weights=[x.units for x in self.units]))

    @property
    def after(self) -> float:
        return float(np.average([x.after for x in self.units], weights=[x.units for x in self.units]))

    def summary(self) -> dict[str, Any]:
        """Everything as plain data, without the place it was written to."""
        total = {"units": sum(x.units for x in self.units), "moved": self.moved}
        return {
            "model": self.model,
            "reference": self.reference,
            "method": self.method,
            "all": {**total, "before": self.before, "after": self.after},
            "sets": [asdict(x) for x in self.units],
        }


def align_checkpoints(
    model: str | Path,
    reference: str | Path,
    out: str | Path,
    *,
    method: Method = "weights",
    progress: Progress | None = None,
) -> Alignment:
    """Write `model` with its MLP units and attention heads in the order that brings them nearest to the reference's.

    Every tensor of the output holds the model's own values, bit for bit, in another order along some axes, and the
    model computes what it did: only sums over units are taken in another order. The residual stream, and what lies
    within a head, keep their order. See `alignment.matching` for the methods, `alignment.families` for what is known.

    Args:
        model: what `open_checkpoint` reads, with a config.json: Hugging Face directories, adapters on one.
        reference: the same; of the same architecture and sizes, its head apart.
        out: directory to create, complete or not at all; `alignment.json` in it says what was done.
        method: "weights" (Git Re-Basin's weight matching) or "otfusion" (exact transport of incoming weights).
        progress: called as bytes are done.

    Raises:
        RefusedError: everything that stands against it, at once; nothing is left behind.
    """
    out = Path(out)
    if method not in METHODS:
        raise RefusedError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    with ExitStack() as opened:
        checkpoints, found, problems = [], [], []
        for label in (model, reference):
            try:
                checkpoints.append(opened.enter_context(open_checkpoint(label)))
                found.append(find_units(checkpoints[-1]))
            except RefusedError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        problems += check_output(out, checkpoints)
        if len(found) == 2:
            problems += compare_units(checkpoints[0], found[0], checkpoints[1], found[1])
        if problems:
            raise RefusedError(problems)
        orders, agreements = match_all(checkpoints[0], found[0], checkpoints[1], found[1], method, progress)
        return write(checkpoints[0], str(model), str(reference), out, method, orders, agreements, progress)


def compare_units(
    model: Checkpoint, units: Mapping[UnitKey, UnitSet], reference: Checkpoint, others: Mapping[UnitKey, UnitSet]
) -> list[str]:
    """Why the units of one model cannot be compared with the other's."""
    theirs, ours = ((c.config or {}).get("model_type") for c in (reference, model))
    if theirs != ours:
        return [f"{model.path} is of model_type {ours!r}, {reference.path} of {theirs!r}"]
    missing = [f"{model.path} has {units[key].label!r}, {reference.path} has not" for key in units if key not in others]
    missing += [
        f"{reference.path} has {others[key].label!r}, {model.path} has not" for key in others if key not in units
    ]
    unlike = []
    for key in [key for key in units if key in others]:
        a, b = units[key], others[key]
        if (a.count, a.groups) != (b.count, b.groups):
            unlike.append(
                f"{a.label!r}: {a.count} units in {a.groups} groups in {model.path}, "
                f"{b.count} units in {b.groups} groups in {reference.path}"
            )
            continue
        pairs = pair_spots(a, b)
        unlike += [
            f"{spot.name!r} is {list(model.specs[spot.name].shape)} in {model.path} and "
            f"{list(reference.specs[other.name].shape)} in {reference.path}"
            for spot, other in pairs
            if model.specs[spot.name].shape != reference.specs[other.name].shape
        ]
        if len(pairs) < max(len(a.spots), len(b.spots)):
            unlike.append(
                f"{a.label!r} lies in {len(a.spots)} tensors of {model.path} and {len(b.spots)} of {reference.path}"
            )
    return cap(missing) + cap(unlike)


def pair_spots(a: UnitSet, b: UnitSet) -> list[tuple[Spot, Spot]]:
    """Spots of two models that are the same place; names may differ in what stands before the stack's root."""
    theirs = {spot.inner: spot for spot in b.spots}
    return [(spot, theirs[spot.inner]) for spot in a.spots if spot.inner in theirs]


def match_all(
    model: Checkpoint,
    units: Mapping[UnitKey, UnitSet],
    reference: Checkpoint,
    others: Mapping[UnitKey, UnitSet],
    method: Method,
    progress: Progress | None,
) -> tuple[dict[str, list[tuple[Spot, Order]]], list[UnitAgreement]]:
    """Tensor name -> what to reorder in it; and what was found for every set of units."""
    orders: dict[str, list[tuple[Spot, Order]]] = {}
    agreements = []
    total = sum(model.specs[spot.name].nbytes for one in units.values() for spot in one.spots)
    for key, one in units.items():
        names = {spot.name: other.name for spot, other in pair_spots(one, others[key])}

        def read(spot: Spot, names: Mapping[str, str] = names) -> tuple[np.ndarray, np.ndarray]:
            return reference.read(names[spot.name]), model.read(spot.name)

        matched = match_units(one, read, method)
        for spot in one.spots:
            orders.setdefault(spot.name, []).append((spot, matched.order))
        agreements.append(
            UnitAgreement(one.label, one.count, one.groups, matched.order.moved, matched.before, matched.after)
        )
        if progress is not None:
            done = sum(model.specs[spot.name].nbytes for spot in one.spots)
            progress("match", done, total, tuple(spot.name for spot in one.spots))
    return orders, agreements


def write(
    model: Checkpoint,
    label: str,
    reference: str,
    out: Path,
    method: Method,
    orders: Mapping[str, list[tuple[Spot, Order]]],
    agreements: list[UnitAgreement],
    progress: Progress | None,
) -> Alignment:
    """The permuted model as a directory of the model's own files and dtypes."""
    plan = keep_shards(model.specs.values(), map(model.shard_of, model.specs))
    alignment = Alignment(
        out.absolute(), label, reference, method, tuple(agreements), len(model.specs), plan.total_size
    )

    def permuted() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in model.specs.items():
            array = model.read(name)
            for spot, order in orders.get(name, ()):
                array = spot.reorder(array, order.of(spot))
            yield name, array
            if progress is not None:
                progress("align", spec.nbytes, plan.total_size, (name,))

    def copy_rest(directory: Path) -> None:
        copy_companions(model, directory)
        text = json.dumps(alignment.summary(), indent=2, allow_nan=False) + "\n"
        (directory / REPORT).write_text(text, encoding="utf-8")

    write_directory(out, plan, permuted(), copy_rest, [])
    return alignment
