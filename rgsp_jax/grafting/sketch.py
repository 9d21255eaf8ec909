"""Low-rank sketches of second moments, for inputs too wide to keep n x n numbers: the same fold in n x l.

The sum kept is `Y = sum k (k^T O)` with a fixed orthonormal test matrix O [n, l]. It is linear in the rows, so sketches
add up like covariances do; at the end the Nystrom approximation `Y (O^T Y)^-1 Y^T` of `sum k k^T` is taken, which is
never larger than the truth and whose expected error is a small multiple of the best rank-k error for every k < l - 1:
`E |C - C_l|_* <= (1 + k / (l - k - 1)) sum_{i > k} lambda_i`.

Tropp, Yurtsever, Udell & Cevher, NeurIPS 2017, algorithm 3 and theorem 4.1. Frequent directions (Liberty, KDD 2013) has
the better worst case, but needs a factorisation per l rows and its sums cannot be added exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.grafting.covariance import add_compensated, count_rows, keep_rows
from rgsp_jax.linalg.dense import matmul


class SketchState(NamedTuple):
    """Sums over the rows seen so far; `*_error` is what the sums' additions rounded away."""

    test: Float[Array, "n l"]
    """O: orthonormal columns, fixed at the start."""
    product: Float[Array, "n l"]
    """sum k (k^T O)."""
    product_error: Float[Array, "n l"]
    total: Float[Array, "n"]
    """sum k."""
    total_error: Float[Array, "n"]
    squares: Float[Array, ""]
    """sum |k|^2."""
    squares_error: Float[Array, ""]
    rows: Int[Array, ""]


class Sketch(NamedTuple):
    """`factor^T factor ~ mean k k^T`, rows of `factor` orthogonal and of descending norm."""

    factor: Float[Array, "l n"]
    trace: Float[Array, ""]
    """mean |k|^2, exact: what the factor misses of the energy is `trace - |factor|^2`."""
    mean: Float[Array, "n"]
    rows: Int[Array, ""]


def initial_sketch(n: int, size: int, dtype: jnp.dtype = jnp.float32, *, seed: int = 0) -> SketchState:
    """The fold's start for inputs of n entries.

    Args:
      n: width of an input.
      size: l, rows of the sketch, at most n.
      dtype: float32 or float64, in which the sums are kept.
      seed: of the test matrix; only states of one seed may be combined.

    Raises:
      ValueError: a size outside 1..n.
    """
    if not 1 <= size <= n:
        raise ValueError(f"a sketch of inputs {n} wide has 1 to {n} rows, not {size}")
    test, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (n, size), dtype))
    tall, vector, scalar = jnp.zeros((n, size), dtype), jnp.zeros(n, dtype), jnp.zeros((), dtype)
    return SketchState(test, tall, tall, vector, vector, scalar, scalar, jnp.zeros((), jnp.int32))


def update_sketch(
    state: SketchState, x: Float[Array, "rows n"], mask: Bool[Array, "rows"] | None = None
) -> SketchState:
    """Add rows of inputs. Rows where `mask` is False do not count, whatever they hold.

    Args:
      state: of width n.
      x: inputs, any floating dtype; products are formed in the state's dtype.
      mask: True at the rows that count; None is all of them.

    Raises:
      ValueError: shapes that do not fit.
    """
    rows = keep_rows(x, mask, state.total)
    product = matmul(rows.T, matmul(rows, state.test))
    return SketchState(
        state.test,
        *add_compensated(state.product, state.product_error, product),
        *add_compensated(state.total, state.total_error, jnp.sum(rows, axis=0)),
        *add_compensated(state.squares, state.squares_error, jnp.sum(rows * rows)),
        state.rows + count_rows(x, mask),
    )


def combine_sketches(a: SketchState, b: SketchState) -> SketchState:
    """The state of both sets of rows together; both must have started from one seed.

    Raises:
      ValueError: states of different widths or sizes.
    """
    if a.product.shape != b.product.shape:
        raise ValueError(f"sketches {list(a.product.shape)} and {list(b.product.shape)} cannot be combined")
    return SketchState(
        a.test,
        *add_compensated(a.product, a.product_error + b.product_error, b.product),
        *add_compensated(a.total, a.total_error + b.total_error, b.total),
        *add_compensated(a.squares, a.squares_error + b.squares_error, b.squares),
        a.rows + b.rows,
    )


def finish_sketch(state: SketchState) -> Sketch:
    """The Nystrom factor of the mean second moment, with the exact trace and mean."""
    dtype = state.total.dtype
    n, _ = state.product.shape
    count = jnp.maximum(state.rows, 1).astype(dtype)
    product = (state.product + state.product_error) / count
    # A small multiple of the identity makes O^T Y safely positive; it is taken off the result's eigenvalues again.
    shift = jnp.asarray(n**0.5 * jnp.finfo(dtype).eps, dtype) * jnp.linalg.norm(product)
    shifted = product + shift * state.test
    core = matmul(state.test.T, shifted)
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    kept = values > shift / 2
    scale = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    factor = compress_factor(matmul(shifted, vectors * scale[None, :]).T, shift)
    trace = (state.squares + state.squares_error) / count
    return Sketch(factor, trace, (state.total + state.total_error) / count, state.rows)


def compress_factor(
    factor: Float[Array, "q n"], shift: float | Float[Array, ""] = 0.0, size: int | None = None
) -> Float[Array, "l n"]:
    """The best l rows F with `F^T F ~ factor^T factor - shift I` on the factor's span: orthogonal, descending norms.

    Args:
      factor: any rows.
      shift: taken off every eigenvalue, none of which falls below 0.
      size: l, at most min(q, n); None is that.
    """
    q, r = jnp.linalg.qr(factor.T)
    left, s, _ = jnp.linalg.svd(r, full_matrices=False)
    lengths = jnp.sqrt(jnp.maximum(s * s - jnp.asarray(shift, s.dtype), 0))
    return (matmul(q, left) * lengths[None, :]).T[:size]
