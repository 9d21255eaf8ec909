"""A slow exact solution in place of a fast one that failed, paid only by batches that need it."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

T = TypeVar("T")


def with_fallback(solve: Callable[[Array, T], T]) -> Callable[[Array, Bool[Array, ""], T], T]:
    """A function `(x, done, found)` that returns found where done, else `solve(x, found)` of the same structure.

    Under vmap the whole batch is solved again if one member failed, and nothing is if none did: one cond for the
    batch, since a cond that vmap has batched runs both branches always.
    """

    @jax.custom_batching.custom_vmap
    def replace_failed(xs: Array, done: Bool[Array, "k"], found: T) -> T:
        def replace() -> T:
            solved = jax.vmap(solve)(xs, found)
            return jax.tree.map(
                lambda own, new: jnp.where(jnp.expand_dims(done, range(1, own.ndim)), own, new), found, solved
            )

        return lax.cond(jnp.all(done), lambda: found, replace)

    @replace_failed.def_vmap
    def replace_failed_under_vmap(axis_size: int, in_batched: list[Any], *arguments: Any) -> tuple[T, Any]:
        def merge_axes(x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        flat = replace_failed(*jax.tree.map(merge_axes, arguments, tuple(in_batched)))
        return jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), flat), jax.tree.map(lambda _: True, flat)

    def one(x: Array, done: Bool[Array, ""], found: T) -> T:
        stacked = replace_failed(x[None], done[None], jax.tree.map(lambda leaf: leaf[None], found))
        return jax.tree.map(lambda leaf: leaf[0], stacked)

    return one
