"""Sums over the elements of K models from which distances, cosines and sign agreements follow, a chunk at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rgsp_jax.linalg.mean import stack_mean


class ElementSums(NamedTuple):
    """Sums over the last axis; `p` counts the pairs (0, 1), (0, 2) ... (k - 2, k - 1). Sums over chunks add up."""

    squares: Float[Array, "k rows"]
    """`sum theta_i^2`."""
    mean_square: Float[Array, "rows"]
    """`sum mean^2`."""
    departures: Float[Array, "k rows"]
    """`sum (theta_i - mean)^2`."""
    differences: Float[Array, "p rows"]
    """`sum (theta_i - theta_j)^2`."""
    products: Float[Array, "p rows"]
    """`sum theta_i theta_j`."""
    unequal: Int[Array, "p rows"]
    """Elements that differ; NaN differs from all."""
    same_sign: Int[Array, "p rows"]
    signed: Int[Array, "p rows"]
    """Elements that are not zero in both."""


def list_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (i, j) of all pairs i < j, in order."""
    first, second = np.triu_indices(count, 1)
    return first, second


def sum_elements(stack: Float[Array, "k rows width"]) -> ElementSums:
    """Everything that distances, cosines and sign agreements of K models are made of, row by row.

    `rho = mean_i sqrt(sum departures_i) / sqrt(sum mean_square)` is SPEC.md section 3's; for two models it is
    `|A - B| / |A + B|`. Differences are summed, not derived from products, so that near copies keep their digits.
    Rows are summed apart for the caller to add up in float64. Zeros that pad a chunk count for nothing.

    Args:
        stack: [k, rows, width], elements of K models in any order that they share; compute dtype.

    Raises:
        ValueError: not [k, rows, width] with k >= 2.
    """
    if stack.ndim != 3 or stack.shape[0] < 2:
        raise ValueError(f"sum_elements wants [k >= 2, rows, width], got shape {stack.shape}")
    mean = stack_mean(stack)

    def compare(pair: Int[Array, "2"]) -> tuple[Array, ...]:
        a, b = stack[pair[0]], stack[pair[1]]
        signed = (a != 0) & (b != 0)
        same = signed & ((a > 0) == (b > 0))
        unequal = a != b
        counts = (jnp.sum(x, -1, dtype=jnp.int32) for x in (unequal, same, signed))
        return (jnp.sum((a - b) ** 2, -1), jnp.sum(a * b, -1), *counts)

    pairs = jnp.stack([jnp.asarray(x, jnp.int32) for x in list_pairs(stack.shape[0])], axis=1)
    return ElementSums(
        jnp.sum(stack**2, -1),
        jnp.sum(mean**2, -1),
        jnp.sum((stack - mean[None]) ** 2, -1),
        *jax.lax.map(compare, pairs),
    )
