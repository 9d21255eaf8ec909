"""Second moments of a layer's inputs as a fold over rows: `C = mean k k^T`, uncentred (SPEC.md section 4).

Sums are compensated: what each addition rounds away is kept beside the sum and added at the end, so that a million
rows in float32 are summed as exactly as one chunk of them. Any split of the rows gives the same result up to that
rounding.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.linalg.dense import matmul, widen

WIDE, STRIPS = 768, 4


class CovarianceState(NamedTuple):
    """Sums over the rows seen so far; `*_error` is what the sums' additions rounded away."""

    second: Float[Array, "n n"]
    """sum k k^T, of which only the upper triangle is kept up to date."""
    second_error: Float[Array, "n n"]
    total: Float[Array, "n"]
    """sum k."""
    total_error: Float[Array, "n"]
    rows: Int[Array, ""]


class Covariance(NamedTuple):
    """Moments of the rows that counted; zero where there was none. Not finite where a row was not."""

    second: Float[Array, "n n"]
    """mean k k^T, exactly symmetric; units of the input squared."""
    mean: Float[Array, "n"]
    rows: Int[Array, ""]


def initial_covariance(n: int, dtype: jnp.dtype = jnp.float32) -> CovarianceState:
    """The fold's start for inputs of n entries: no rows.

    Args:
      n: width of an input.
      dtype: float32 or float64, in which the sums are kept.
    """
    # Buffers of their own, so that a state can be donated to the update.
    second, second_error = jnp.zeros((n, n), dtype), jnp.zeros((n, n), dtype)
    total, total_error = jnp.zeros(n, dtype), jnp.zeros(n, dtype)
    return CovarianceState(second, second_error, total, total_error, jnp.zeros((), jnp.int32))


def update_covariance(
    state: CovarianceState, x: Float[Array, "rows n"], mask: Bool[Array, "rows"] | None = None
) -> CovarianceState:
    """Add rows of inputs. Rows where `mask` is False do not count, whatever they hold.

    Args:
      state: of width n.
      x: inputs, any floating dtype; products are formed in the state's dtype.
      mask: True at the rows that count; None is all of them.

    Raises:
      ValueError: shapes that do not fit.
    """
    rows = keep_rows(x, mask, state.total)
    second, second_error = add_compensated(state.second, state.second_error, multiply_upper(rows))
    total, total_error = add_compensated(state.total, state.total_error, jnp.sum(rows, axis=0))
    return CovarianceState(second, second_error, total, total_error, state.rows + count_rows(x, mask))


def combine_covariances(a: CovarianceState, b: CovarianceState) -> CovarianceState:
    """The state of both sets of rows together.

    Raises:
      ValueError: states of different widths.
    """
    if a.total.shape != b.total.shape:
        raise ValueError(f"states of inputs {a.total.shape[-1]} and {b.total.shape[-1]} wide cannot be combined")
    second, second_error = add_compensated(a.second, a.second_error + b.second_error, b.second)
    total, total_error = add_compensated(a.total, a.total_error + b.total_error, b.total)
    return CovarianceState(second, second_error, total, total_error, a.rows + b.rows)


def finish_covariance(state: CovarianceState) -> Covariance:
    """`C = mean k k^T` and mean k of the rows that were added."""
    count = jnp.maximum(state.rows, 1).astype(state.total.dtype)
    upper = jnp.triu((state.second + state.second_error) / count)
    second = upper + jnp.triu(upper, 1).T
    return Covariance(second, (state.total + state.total_error) / count, state.rows)


def multiply_upper(rows: Float[Array, "rows n"]) -> Float[Array, "n n"]:
    """`rows^T rows` without most of what lies below the diagonal: strips from the diagonal to the right.

    For wide inputs this saves three eighths of the multiplications, which are most of what a fold costs.
    """
    n = rows.shape[1]
    if n < WIDE:
        return matmul(rows.T, rows)
    size = -(-n // STRIPS)
    strips = [
        jnp.pad(matmul(rows[:, start : start + size].T, rows[:, start:]), ((0, 0), (start, 0)))
        for start in range(0, n, size)
    ]
    return jnp.concatenate(strips)


def add_compensated(
    total: Float[Array, "..."], error: Float[Array, "..."], x: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`total + x` and the error so far with what this addition rounded away (Knuth's two-sum, exact in any order)."""
    added = total + x
    taken = added - total
    return added, error + ((total - (added - taken)) + (x - taken))


def keep_rows(
    x: Float[Array, "rows n"], mask: Bool[Array, "rows"] | None, like: Float[Array, "n"]
) -> Float[Array, "rows n"]:
    """The rows in the dtype of `like`, those that do not count as zeros; ValueError for shapes that do not fit."""
    if x.ndim != 2 or x.shape[1:] != like.shape or (mask is not None and mask.shape != x.shape[:1]):
        given = "" if mask is None else f" with a mask {list(mask.shape)}"
        raise ValueError(f"rows of {like.shape[-1]} entries are added, got {list(x.shape)}{given}")
    rows = widen(x).astype(like.dtype)
    return rows if mask is None else jnp.where(mask[:, None], rows, jnp.zeros_like(rows))


def count_rows(x: Float[Array, "rows n"], mask: Bool[Array, "rows"] | None) -> Int[Array, ""]:
    """How many rows count."""
    return jnp.asarray(x.shape[0], jnp.int32) if mask is None else jnp.sum(mask, dtype=jnp.int32)
