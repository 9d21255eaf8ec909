"""Dense pieces that the factorisations share, all at full float32 precision on every platform."""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rgsp_jax.linalg.rows import add_parts, count_parts, divide_side, is_divided, largest_part, on_all_parts

# The default precision is bfloat16 passes on TPU and TF32 on GPU: Gram matrices and Rayleigh-Ritz need all the bits.
matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in the dtype that kernels compute in: float64 stays, every narrower float becomes float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def multiply_transposed(a: Float[Array, "m n"], x: Float[Array, "m b"]) -> Float[Array, "n b"]:
    """`a.T @ x`, without a transposed copy of a.

    XLA on CPU multiplies by a transposed large operand several times slower than by a plain one, and rewrites
    `(x.T @ a).T` to just that unless barriers stand between.
    """
    return lax.optimization_barrier(matmul(lax.optimization_barrier(x).T, a)).T


@dataclass(frozen=True)
class TallMatrix:
    """A matrix w, or its transpose where w is wide, as a pair of products: neither is ever laid out anew.

    With an axis its long side is divided over that mesh axis and w is this device's part: vectors as long as the long
    side are divided alike, those as long as the short side are the same on all devices.
    """

    w: Float[Array, "m n"]
    axis: str | None = None
    lies: bool = False
    """The whole matrix is wide, whatever its parts are; read off w without an axis."""

    @property
    def shape(self) -> tuple[int, int]:
        """Long and short side of the whole matrix."""
        if self.axis is None:
            return max(self.w.shape), min(self.w.shape)
        long, short = self.w.shape[::-1] if self.lies else self.w.shape
        return long * lax.axis_size(self.axis), short

    @property
    def wide(self) -> bool:
        return self.lies if self.axis is not None else self.w.shape[0] < self.w.shape[1]

    def times(self, x: Float[Array, "n b"]) -> Float[Array, "m b"]:
        return multiply_transposed(self.w, x) if self.wide else matmul(self.w, x)

    def transpose_times(self, y: Float[Array, "m b"]) -> Float[Array, "n b"]:
        return add_parts(matmul(self.w, y) if self.wide else multiply_transposed(self.w, y), self.axis)

    def gram(self) -> Float[Array, "n n"]:
        """The smaller of w^T w and w w^T."""
        if self.wide:
            return add_parts(matmul(self.w, self.w.T), self.axis)
        return add_parts(matmul(lax.optimization_barrier(self.w.T), self.w), self.axis)

    def dense(self) -> Float[Array, "m n"]:
        return self.w.T if self.wide else self.w


def scale_columns(x: Float[Array, "m r"], factors: Float[Array, "r"]) -> Float[Array, "m r"]:
    """`x diag(factors)`."""
    return x * factors[None, :]


def column_norms(x: Float[Array, "m r"], axis: str | None = None) -> Float[Array, "r"]:
    """Euclidean norms of the columns, whose rows the devices of an axis share."""
    return jnp.sqrt(add_parts(jnp.sum(x * x, axis=0), axis))


def orthonormalise_by_newton_schulz(x: Float[Array, "m r"], axis: str | None = None) -> Float[Array, "m r"]:
    """One Newton-Schulz step, x (3 I - x^T x) / 2: squares the orthogonality error of a nearly orthonormal x."""
    identity = jnp.eye(x.shape[1], dtype=x.dtype)
    return matmul(x, 1.5 * identity - 0.5 * add_parts(matmul(x.T, x), axis))


def is_orthonormal(x: Float[Array, "m r"], axis: str | None = None) -> Bool[Array, ""]:
    """Whether x^T x is the identity up to rounding."""
    gap = jnp.abs(add_parts(matmul(x.T, x), axis) - jnp.eye(x.shape[1], dtype=x.dtype))
    return jnp.max(gap) <= 100 * float(jnp.finfo(x.dtype).eps)


def project_out(basis: Float[Array, "m k"], x: Float[Array, "m b"]) -> Float[Array, "m b"]:
    """`(I - basis basis^T) x` for orthonormal (or zero) columns of basis."""
    m, k = basis.shape
    if is_divided(*x.shape) and m < x.shape[1] and k * count_parts() > m:
        x = divide_side(x, 1)  # between rows lie k x b numbers, all but as many as x has
    return x - matmul(basis, matmul(basis.T, x))


def multiply_factors(left: Float[Array, "m q"], right: Float[Array, "n q"]) -> Float[Array, "m n"]:
    """`left right^T`. Where a mesh divides the rows of a wide product, its columns are made apart, if that is less to
    pass on than the right factor."""
    (m, q), n = left.shape, right.shape[0]
    if not is_divided(m, n) or q * (n - m) * count_parts() <= m * n:
        return matmul(left, right.T)
    return divide_side(matmul(divide_side(left, None), divide_side(right, 0).T), 1)


def power_of_two_scale(x: Float[Array, "m n"], axis: str | None = None) -> Float[Array, ""]:
    """A power of two within 2 of max |x|: dividing by it is exact and keeps squares in range.

    1 for the zero matrix; NaN where x is not finite.
    """
    largest = jnp.max(jnp.abs(x))
    finite = on_all_parts(jnp.isfinite(largest), axis)
    # What a maximum over devices makes of a NaN is the platform's affair.
    largest = largest_part(largest if axis is None else jnp.where(jnp.isfinite(largest), largest, 0), axis)
    limits = jnp.finfo(x.dtype)
    # Both the scale and its reciprocal have to be normal numbers.
    bounded = jnp.clip(largest, 4 * float(limits.tiny), float(limits.max) / 8)
    rounded = lax.reduce_precision(bounded, exponent_bits=limits.nexp, mantissa_bits=0)
    return jnp.where(finite, jnp.where(largest > 0, rounded, 1), jnp.nan)
