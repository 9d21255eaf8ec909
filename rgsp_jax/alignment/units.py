"""A family's units found in a checkpoint: which tensors, which axes, how many."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rgsp_jax.alignment.families import FAMILIES, Place, Stack, Units
from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.errors import RefusedError


class Spot(NamedTuple):
    """A place in one model: the tensor and how its axis is divided."""

    name: str
    inner: str
    """From the root of its stack on: what it is called in any model."""
    place: Place
    blocks: int
    """In each part: units, or groups."""

    def to_blocks(self, x: np.ndarray) -> np.ndarray:
        """[blocks, everything that belongs to each]."""
        moved = np.moveaxis(x, self.place.axis, 0)
        divided = moved.reshape(self.place.parts, self.blocks, -1)
        return np.moveaxis(divided, 1, 0).reshape(self.blocks, -1)

    def reorder(self, x: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The tensor with block `order[i]` in place i of every part."""
        axis = self.place.axis
        parts = self.place.parts, self.blocks, x.shape[axis] // (self.place.parts * self.blocks)
        divided = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])
        return np.take(divided, order, axis=axis + 1).reshape(x.shape)


UnitKey = tuple[str, int | None, str]
"""Root of the stack, layer (None: all together), name of the units."""


@dataclass(frozen=True)
class UnitSet:
    """Units that share one order: where they lie in a model, and how many they are."""

    key: UnitKey
    count: int
    groups: int
    spots: tuple[Spot, ...]

    @property
    def label(self) -> str:
        """What the report calls it."""
        root, layer, name = self.key
        return f"{root.format(layer='*' if layer is None else layer)}{name}"


def find_units(checkpoint: Checkpoint) -> dict[UnitKey, UnitSet]:
    """Every set of units of a checkpoint, by key.

    Raises:
        RefusedError: no family is known for it, or its tensors are not the family's; everything at once.
    """
    model_type = find_model_type(checkpoint)
    found: dict[UnitKey, UnitSet] = {}
    problems: list[str] = []
    for stack in FAMILIES[model_type]:
        layers = find_layers(checkpoint, stack, problems)
        for units in stack.units:
            together = [list(layers)] if units.across_layers else [[layer] for layer in layers]
            for chosen in filter(None, together):
                present = [pair for layer in chosen for pair in find_places(checkpoint, units, layers[layer], problems)]
                key = stack.root, None if units.across_layers else chosen[0], units.name
                if present and (made := make_set(checkpoint, units, key, present, problems)):
                    found[key] = made
    if not found and not problems:
        problems.append(f"{checkpoint.path} has none of the layers of a {model_type}: are its tensors named otherwise?")
    if problems:
        raise RefusedError(problems)
    return found


def find_model_type(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint's family; RefusedError where none is known."""
    if checkpoint.format == "orbax":
        raise RefusedError(f"{checkpoint.path} is an Orbax checkpoint: `rgsp convert --to huggingface` it first")
    if checkpoint.config is None:
        raise RefusedError(f"{checkpoint.path} has no config.json, which names its architecture: give its directory")
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise RefusedError(
            f"{checkpoint.path} is of model_type {model_type!r}, whose hidden units are not known here; known are "
            f"{', '.join(FAMILIES)}"
        )
    return model_type


def find_layers(checkpoint: Checkpoint, stack: Stack, problems: list[str]) -> dict[int, dict[str, str]]:
    """Layer -> name within the layer -> name on disk, in the order of the layers."""
    root = re.escape(stack.root).replace(r"\{layer\}", r"(?P<layer>\d+)")
    pattern = re.compile(rf"(?P<prefix>(?:.*\.)?){root}(?P<rest>.+)")
    layers: dict[int, dict[str, str]] = {}
    prefixes: dict[str, None] = {}
    for name in checkpoint.specs:
        if match := pattern.fullmatch(name):
            layers.setdefault(int(match["layer"]), {})[match["rest"]] = name
            prefixes[match["prefix"]] = None
    if len(prefixes) > 1:
        named = ", ".join(map(repr, prefixes))
        problems.append(f"{checkpoint.path} has several stacks of layers {stack.root!r}, behind {named}")
    known = {place.name for units in stack.units for place in units.places}
    strangers = [
        f"{checkpoint.path}: {name!r} is not known here, and may depend on the order of the units of its layer"
        for names in layers.values()
        for rest, name in names.items()
        if rest not in known and not any(re.fullmatch(untouched, rest) for untouched in stack.untouched)
    ]
    problems += cap(strangers)
    return dict(sorted(layers.items()))


def find_places(
    checkpoint: Checkpoint, units: Units, names: Mapping[str, str], problems: list[str]
) -> list[tuple[Place, str]]:
    """The places that one layer has, with their names on disk."""
    present = [(place, names[place.name]) for place in units.places if place.name in names]
    beside = next(iter(names.values()))
    problems += [
        f"{checkpoint.path} has {beside!r}, but no {place.name!r} in that layer"
        for place in units.places
        if place.name not in names and not place.optional
    ]
    if present and not any(place.side == "incoming" for place, _ in present):
        problems.append(f"{checkpoint.path} has no weights into the {units.name} that {present[0][1]!r} reads")
    return present


def read_number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of these dotted settings that is a positive number."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def make_set(
    checkpoint: Checkpoint, units: Units, key: UnitKey, present: list[tuple[Place, str]], problems: list[str]
) -> UnitSet | None:
    """The set of units in these places; None, and a problem, where numbers or shapes do not fit."""
    config, (first, name) = checkpoint.config or {}, present[0]
    width = checkpoint.specs[name].shape[first.axis] if first.axis < len(checkpoint.specs[name].shape) else 0
    count = read_number(config, units.number) if units.number else width // first.parts
    if not count:
        problems.append(f"{checkpoint.path}: its config.json has no {' or '.join(units.number) or name}")
        return None
    groups = (read_number(config, units.groups) if units.groups else None) or count
    spots, unlike = [], []
    for place, name in present:
        spec, blocks = checkpoint.specs[name], groups if place.of == "group" else count
        length = spec.shape[place.axis] if place.axis < len(spec.shape) else 0
        divided = length % (place.parts * blocks) == 0 if units.number else length == place.parts * blocks
        if not (length and divided and spec.kind == "float" and count % groups == 0):
            unlike.append(f"{checkpoint.path}: {name!r} {list(spec.shape)} does not hold {blocks} {units.name}")
        inner = name[name.rindex(key[0].partition("{layer}")[0]) :]
        spots.append(Spot(name, inner, place, blocks))
    problems += unlike
    return None if unlike else UnitSet(key, count, groups, tuple(spots))
