"""Truncated SVD of one matrix: the public kernel and its derivative rule."""

from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rgsp_jax.linalg.dense import widen
from rgsp_jax.linalg.svd_algorithms import ALGORITHMS, Factors, factorise
from rgsp_jax.linalg.svd_derivative import singular_tangents
from rgsp_jax.types import TruncatedSVD

_NULL = 64  # times eps times the largest singular value, as for the polar factor
_DEFAULT_TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def truncated_svd(
    w: Float[Array, "m n"],
    rank: int,
    *,
    active_rank: int | Int[Array, ""] | None = None,
    tolerance: float | None = None,
    algorithm: str = "auto",
) -> TruncatedSVD:
    """The leading singular triples of w, `w ~= u diag(s) v^T`, signed by SPEC section 1, R1.

    Computed in float32 for 16-bit and float32 input, in float64 for float64 input. An algorithm that misses the
    tolerance is replaced by the full SVD, so the residual is above it only where rounding does not allow less.
    A matrix with non-finite entries gives all NaN.

    Derivatives, forward and reverse: the residual's is zero; those of u, s, v include the directions that the
    truncation discards. They are finite everywhere. Where singular values coincide, u and v have no derivative of
    their own: a function that does not depend on the choice of basis within the repeated value (a projector, the
    polar factor, the sum of g(s_i)) still gets its own. The one term that no rule on (u, s, v) can
    carry is f'(s) of `u diag(f(s)) v^T` between two different directions of one exactly repeated value; it is left out.

    Args:
      w: the matrix, of any float dtype.
      rank: number of triples, static, in 1..min(m, n).
      active_rank: optional run-time count: columns of u and v and entries of s at and past it are zero, the others
        those of the unmasked SVD, so that one SVD serves every smaller rank, derivatives included.
      tolerance: largest accepted residual (`TruncatedSVD.residual`), static and dimensionless; a larger one is
        cheaper. None is 1e-5 in float32 and 1e-12 in float64.
      algorithm: "auto" chooses by shape, rank and platform; "full", "gram", "lanczos", "subspace" force the first try.

    Raises:
      ValueError: w is not a float matrix, rank is out of range, tolerance is not positive, or the algorithm is unknown.

    Derivative: Wan & Zhang, arXiv 1909.02659; Francuz, Schuch & Vanhecke, Phys. Rev. Research 7, 013237.
    """
    w = jnp.asarray(w)
    _check_arguments(w, rank, tolerance, algorithm)
    w = widen(w)
    if tolerance is None:
        tolerance = _DEFAULT_TOLERANCE[w.dtype.name]
    active = jnp.asarray(rank if active_rank is None else active_rank, jnp.int32)
    return _masked_svd(w, active, int(rank), algorithm, float(tolerance))


def drop_null_directions(svd: TruncatedSVD, size: Float[Array, "..."] | None = None) -> TruncatedSVD:
    """Zero columns for the triples whose singular value is zero to rounding: at most `64 eps max(s_1, size)`.

    Their vectors are some completion to orthonormal ones, which another algorithm or mesh completes otherwise. What
    looks at vectors without their singular values, as a polar factor of several models' does, would depend on that.

    Args:
      svd: of one matrix, or of several on leading axes.
      size: Frobenius norm of what each matrix was the difference of, whose rounding it carries.
    """
    largest = svd.s[..., 0] if size is None else jnp.maximum(svd.s[..., 0], size)
    kept = svd.s > _NULL * float(jnp.finfo(svd.s.dtype).eps) * largest[..., None]
    u, v = (jnp.where(kept[..., None, :], x, 0) for x in (svd.u, svd.v))
    return TruncatedSVD(u, jnp.where(kept, svd.s, 0), v, svd.residual)


def _check_arguments(w: Array, rank: int, tolerance: float | None, algorithm: str) -> None:
    if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"truncated_svd takes a matrix of floats, got {w.dtype}{list(w.shape)}")
    if isinstance(rank, bool) or not isinstance(rank, Integral) or not 1 <= rank <= min(w.shape):
        raise ValueError(
            f"rank must be an integer in 1..{min(w.shape)} for a {w.shape[0]} x {w.shape[1]} matrix, got {rank!r}"
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(['auto', *ALGORITHMS])}, got {algorithm!r}")


@partial(jax.jit, static_argnames=("rank", "algorithm", "tolerance"))
def _masked_svd(w: Array, active: Array, rank: int, algorithm: str, tolerance: float) -> TruncatedSVD:
    u, s, v, residuals = _svd(w, active, rank, algorithm, tolerance)
    mask = jnp.arange(rank, dtype=jnp.int32) < active
    u, v = (jnp.where(mask[None, :], x, 0) for x in (u, v))
    s, residuals = (jnp.where(mask, x, 0) for x in (s, residuals))
    return TruncatedSVD(u, s, v, jnp.max(residuals))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _svd(w: Array, active: Array, rank: int, algorithm: str, tolerance: float) -> Factors:
    """Unmasked factors; `active` only tells the derivative which columns nobody reads."""
    del active
    return factorise(w, rank, algorithm, tolerance)


@_svd.defjvp
def _svd_jvp(rank: int, algorithm: str, tolerance: float, primals: tuple, tangents: tuple) -> tuple[Factors, Factors]:
    (w, active), (dw, _) = primals, tangents
    factors = _svd(w, active, rank, algorithm, tolerance)
    du, ds, dv = singular_tangents(w, factors.u, factors.s, factors.v, dw, active)
    return factors, Factors(du, ds, dv, jnp.zeros_like(factors.residuals))
