"""Rows of arrays dealt out evenly over an axis of a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


class Axis(NamedTuple):
    """An axis of a mesh."""

    mesh: Mesh
    name: str

    @property
    def size(self) -> int:
        """How many devices share what is divided over it."""
        return self.mesh.shape[self.name]

    @property
    def divided(self) -> NamedSharding:
        """Of arrays whose first axis is divided over this one."""
        return NamedSharding(self.mesh, PartitionSpec(self.name))

    @property
    def whole(self) -> NamedSharding:
        """Of arrays that every device of the mesh has."""
        return NamedSharding(self.mesh, PartitionSpec())


class Deal(NamedTuple):
    """Where rows lie when every part has equally many slots."""

    rows: np.ndarray
    """[parts * size]: the row in each slot; slots with none of their own repeat one."""
    slots: np.ndarray
    """[count]: the slot of each row."""


def deal_rows(count: int, parts: int, size: int | None = None) -> Deal:
    """Rows in order over parts, to each as many as to the next or one more.

    Args:
        count: of rows, 1 or more.
        parts: of the axis.
        size: slots of each part; as few as are needed if None.
    """
    held = np.full(parts, count // parts) + (np.arange(parts) < count % parts)
    first = np.cumsum(held) - held
    size = int(held[0]) if size is None else size
    part, place = np.divmod(np.arange(parts * size), size)
    rows = np.clip(first[part] + np.minimum(place, held[part] - 1), 0, count - 1)
    owner = np.repeat(np.arange(parts), held)
    return Deal(rows, owner * size + np.arange(count) - first[owner])


def divide_rows(tree: Any, axis: Axis) -> Any:
    """A pytree whose leaves share their first axis, dealt out over an axis of a mesh (see `deal_rows`)."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return tree
    count = leaves[0].shape[0]
    deal = deal_rows(count, axis.size)
    in_order = len(deal.rows) == count
    return jax.tree.map(lambda x: jax.device_put(x if in_order else x[deal.rows], axis.divided), tree)


def gather_rows(x: Array, axis: Axis | None) -> Array:
    """An array that is divided over an axis, or not at all, on every device; the same under and outside of jit."""
    return x if axis is None else jax.lax.with_sharding_constraint(x, axis.whole)


def map_rows(fn: Callable[..., Any], axis: Axis) -> Any:
    """Jit a function of arrays divided over an axis: every device runs it on its own rows, by itself."""
    rows = PartitionSpec(axis.name)
    return jax.jit(jax.shard_map(fn, mesh=axis.mesh, in_specs=rows, out_specs=rows, check_vma=False))
