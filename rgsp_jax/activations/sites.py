"""Which checkpoint tensors a model in memory computes with: told by their bytes, never by their names alone.

Libraries rename weights as they load them, stack experts and fuse projections. A tensor on disk and a stretch of a
parameter in memory that hold the same bytes are the same weight, whatever both are called.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from rgsp_jax.checkpoint import Checkpoint, TensorSpec, digest
from rgsp_jax.rules import TensorRule, classify


@dataclass(frozen=True)
class InputSite:
    """A place in a model where one input is seen, by all the checkpoint tensors that it meets."""

    name: str
    weights: tuple[str, ...]
    kind: Literal["rows", "ids"]
    """Rows of numbers that are multiplied, or row numbers of a table that is looked up."""
    width: int
    """Entries of a row; of a table, its rows."""


class Place(NamedTuple):
    """A stretch of one parameter's elements in C order that holds a checkpoint tensor."""

    parameter: str
    start: int
    size: int


class WeightMap(NamedTuple):
    """Where the checkpoint's tensors are in memory."""

    places: dict[str, Place]
    digests: dict[str, str]
    """Of every tensor's bytes as they lie on disk."""


MAX_PIECES = 3
"""Projections that a library may fuse into one parameter: query, key and value."""

STACKED = "its stacked matrices see different inputs"


def match_weights(checkpoint: Checkpoint, parameters: Mapping[str, np.ndarray], dtype: np.dtype) -> WeightMap:
    """Find every floating tensor of rank 2 and more in the parameters.

    Args:
        checkpoint: opened; its tensors are read one at a time. Aliases are left out: they are their owners.
        parameters: name -> array in memory, C-contiguous, of `dtype`; tied ones once.
        dtype: in which the model computes; the tensors are rounded to it before they are compared.
    """
    by_content: dict[tuple[Any, ...], list[Place]] = {}
    for name, array in parameters.items():
        if array.ndim >= 2:
            place = Place(name, 0, array.size)
            by_content.setdefault((digest(array), array.shape), []).append(place)
    pieces: dict[tuple[Any, ...], list[Place]] | None = None
    places: dict[str, Place] = {}
    digests: dict[str, str] = {}
    for spec in weights_of(checkpoint):
        stored = checkpoint.read(spec.name)
        digests[spec.name] = digest(stored)
        content = (digest(stored.astype(dtype)), stored.shape)
        found = by_content.get(content)
        if not found:
            pieces = cut_parameters(parameters) if pieces is None else pieces
            found = pieces.get(content)
        if found:
            places[spec.name] = max(found, key=lambda place: count_common_endings(spec.name, place.parameter))
    return WeightMap(places, digests)


def weights_of(checkpoint: Checkpoint) -> Iterable[TensorSpec]:
    """The checkpoint's floating tensors of rank 2 and more, aliases left out."""
    for name, spec in checkpoint.specs.items():
        if spec.kind == "float" and len(spec.shape) >= 2 and name not in checkpoint.aliases and spec.size:
            yield spec


def cut_parameters(parameters: Mapping[str, np.ndarray]) -> dict[tuple[Any, ...], list[Place]]:
    """Content -> places of what is stacked or fused: slices along a leading axis of experts, equal blocks of rows."""
    found: dict[tuple[Any, ...], list[Place]] = {}
    for name, array in parameters.items():
        if array.ndim not in (2, 3):
            continue
        stack = array if array.ndim == 3 else array[None]
        _, rows, columns = stack.shape
        for number, matrix in enumerate(stack):
            for count in range(1 if array.ndim == 3 else 2, MAX_PIECES + 1):
                if rows % count:
                    continue
                for piece, block in enumerate(matrix.reshape(count, rows // count, columns)):
                    place = Place(name, (number * count + piece) * block.size, block.size)
                    found.setdefault((digest(block), block.shape), []).append(place)
    return found


def count_common_endings(a: str, b: str) -> int:
    """How many dotted parts two names share from the end: breaks ties between equal tensors."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def find_rule(checkpoint: Checkpoint, name: str) -> TensorRule:
    """What a tensor of the checkpoint is."""
    spec = checkpoint.specs[name]
    return classify(name, spec.shape, spec.dtype, "pytorch", (checkpoint.config or {}).get("model_type"))


def find_mismatch(checkpoint: Checkpoint, name: str, width: int) -> str | None:
    """Why a weight's inputs, `width` wide, are not those that its rule says; None where they are."""
    rule = find_rule(checkpoint, name)
    if rule.kind != "matrix":
        return None
    assert rule.view is not None
    batch, _, inputs = rule.view.matrices
    if batch > 1:
        return STACKED
    if inputs != width:
        return f"its inputs are {width} wide, its rule says {inputs}"
    return None


def explain_missing(checkpoint: Checkpoint, weights: WeightMap, covered: Iterable[str]) -> dict[str, str]:
    """Matrices that no site covers -> why."""
    taken = set(covered)
    reasons = {}
    for spec in weights_of(checkpoint):
        rule = find_rule(checkpoint, spec.name)
        if spec.name in taken or rule.kind != "matrix" or rule.view is None:
            continue
        if rule.view.matrices[0] > 1:
            reasons[spec.name] = STACKED
        elif spec.name in weights.places:
            reasons[spec.name] = "these data never reached it, or it is no linear layer, convolution or table"
        else:
            reasons[spec.name] = "the model that was run does not have it"
    return reasons
