"""Orthogonal polar factor of one matrix, as a partial isometry, with its derivative."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.linalg.dense import (
    TallMatrix,
    column_norms,
    matmul,
    orthonormalise_by_newton_schulz,
    power_of_two_scale,
    project_out,
    scale_columns,
    widen,
)
from rgsp_jax.linalg.fallback import with_fallback
from rgsp_jax.linalg.qr import tsqr
from rgsp_jax.linalg.rows import ROWS, add_parts, is_divided, largest_part, map_parts, on_all_parts

_MAX_POLISH = 12
_CUTOFF = 64  # times eps times the largest singular value: what rounding leaves of a zero one, with room


class _Triples(NamedTuple):
    u: Float[Array, "m q"]
    s: Float[Array, "q"]
    v: Float[Array, "q q"]


class _Polar(NamedTuple):
    """The factor, with the eigenvectors and square-rooted eigenvalues of x^T x that its derivative divides by.

    The latter two only ever enter the solution of a linear equation, never the equation, so they carry no tangent.
    """

    factor: Float[Array, "m q"]
    v: Float[Array, "q q"]
    s: Float[Array, "q"]


def polar_factor(x: Float[Array, "m q"]) -> Float[Array, "m q"]:
    """The orthogonal polar factor `x (x^T x)^(-1/2)`, with the pseudo-inverse: `u v^T` over the singular triples of x.

    Directions whose singular value is at most 64 eps of the largest contribute zero, so a rank-deficient x gives
    a partial isometry (`y^T y` a projector), never an arbitrary completion, and the zero matrix gives zero. Any shape;
    computed in float32 for 16-bit and float32 input. A matrix with non-finite entries gives all NaN.

    From the eigenvectors of x^T x, which tell singular values apart down to about sqrt(eps) of the largest. An x with
    some between the two bounds takes a full SVD (under vmap: its whole batch does).

    Derivatives, forward and reverse, of any order, are those at fixed rank: finite at equal singular values, which
    enter as 1 / (s_i + s_j) only. Between kept and dropped directions the dropped ones count as exactly zero.

    Raises:
      ValueError: x is not a matrix of floats.

    Higham, Functions of Matrices (SIAM 2008), chapter 8, for the factor and the Newton-Schulz polish.
    """
    x = jnp.asarray(x)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"polar_factor takes a matrix of floats, got {x.dtype}{list(x.shape)}")
    return _any_shape(widen(x))


@jax.jit
def _any_shape(x: Array) -> Array:
    scale = lax.stop_gradient(power_of_two_scale(x))
    finite = jnp.isfinite(scale)
    x = jnp.where(finite, x / scale, 0)
    factor = _tall(x).factor if x.shape[0] >= x.shape[1] else _tall(x.T).factor.T
    return jnp.where(finite, factor, jnp.nan)


@jax.custom_jvp
def _tall(x: Array) -> _Polar:
    if is_divided(*x.shape):
        return _Polar(*map_parts(lambda part: _factorise(part, ROWS), x, long=(True, False, False)))
    return _factorise(x, None)


def _factorise(x: Array, axis: str | None) -> _Polar:
    """Of one matrix, or of that whose rows the devices of an axis share."""
    _, v = jnp.linalg.eigh(TallMatrix(x, axis).gram(), symmetrize_input=False)
    xv = matmul(x, v)
    # Not the roots of the eigenvalues: in those of a null direction, the rounding of s_1^2 shows as sqrt(eps) s_1.
    norms = column_norms(xv, axis)
    relative = norms / jnp.maximum(jnp.max(norms), jnp.finfo(x.dtype).tiny)
    eps = float(jnp.finfo(x.dtype).eps)
    kept = relative > _CUTOFF * eps
    told_apart = jnp.all(~kept | (relative > 4 * math.sqrt(eps)))
    found = _Triples(scale_columns(xv, jnp.where(kept, 1 / jnp.where(kept, norms, 1), 0)), jnp.where(kept, norms, 0), v)
    if axis is None:
        u, s, v = _full_svd_unless(x, told_apart, found)
    else:
        done = on_all_parts(told_apart, axis)
        # A loop of at most one turn: all devices take it or none does.
        _, (u, s, v) = lax.while_loop(
            lambda state: ~state[0], lambda _: (jnp.asarray(True), _full_svd(x, axis)), (done, found)
        )
    xv = matmul(x, v)
    u = _polish(u, axis)
    # The eigenvectors carry the rounding of the squared matrix. The factor is the one y for which y^T x is
    # symmetric: one Newton step towards that, with x itself, takes the error from eps k^2 to eps k, k the condition.
    product = add_parts(matmul(u.T, xv), axis)
    total = s[:, None] + s[None, :]
    turn = jnp.where(total > 0, (product - product.T) / jnp.where(total > 0, total, 1), 0)
    factor = matmul(u + matmul(u, turn), v.T)
    return _Polar(orthonormalise_by_newton_schulz(factor, axis), v, s)


@with_fallback
def _full_svd_unless(x: Array, _: _Triples) -> _Triples:
    return _full_svd(x, None)


def _full_svd(x: Array, axis: str | None) -> _Triples:
    if axis is None:
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    else:
        q, triangle = tsqr(x, axis)
        left, s, vt = jnp.linalg.svd(triangle)
        u = matmul(q, left)
    kept = s > _CUTOFF * float(jnp.finfo(x.dtype).eps) * s[0]
    return _Triples(jnp.where(kept, u, 0), jnp.where(kept, s, 0), vt.T)


def _polish(u: Array, axis: str | None) -> Array:
    """Newton-Schulz until orthonormal; zero columns stay zero."""
    kept = largest_part(jnp.any(u != 0, axis=0).astype(u.dtype), axis)
    goal = 32 * float(jnp.finfo(u.dtype).eps)

    def gram_of(u: Array) -> Array:
        return add_parts(matmul(u.T, u), axis)

    def is_polished(u: Array) -> Array:
        return on_all_parts(~(jnp.max(jnp.abs(gram_of(u) - jnp.diag(kept))) > goal), axis)

    # Newton-Schulz converges from singular values under sqrt(3).
    bound = jnp.max(jnp.sum(jnp.abs(gram_of(u)), axis=0))
    u = u * jnp.minimum(1, jnp.sqrt(2.5 / jnp.maximum(bound, 1)))

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, count, polished = state
        return (count < _MAX_POLISH) & ~polished

    def polish(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, count, _ = state
        u = orthonormalise_by_newton_schulz(u, axis)
        return u, count + 1, is_polished(u)

    return lax.while_loop(unfinished, polish, (u, jnp.asarray(0), is_polished(u)))[0]


@_tall.defjvp
def _tall_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[_Polar, _Polar]:
    """With h = sym(y^T x): `dy = y t + (I - y y^T) dx h^+`, where `h t + t h = y^T dx - dx^T y`."""
    (x,), (dx,) = primals, tangents
    polar = _tall(x)
    y, v, s = polar
    h = matmul(y.T, x)
    h = (h + h.T) / 2
    support = matmul(y.T, y)
    dropped = jnp.eye(y.shape[1], dtype=y.dtype) - support
    total = s[:, None] + s[None, :]
    total = jnp.where(total > 0, total, 1)

    def lyapunov(t: Array) -> Array:
        return matmul(h, t) + matmul(t, h) + matmul(dropped, matmul(t, dropped))

    def solve_lyapunov(_, b: Array) -> Array:
        return matmul(v, matmul(matmul(v.T, matmul(b, v)) / total, v.T))

    def times_h(z: Array) -> Array:
        return matmul(z, h + dropped)

    def divide_by_h(_, b: Array) -> Array:
        return matmul(scale_columns(matmul(b, v), 1 / jnp.where(s > 0, s, 1)), v.T)

    skew = matmul(y.T, dx)
    skew = skew - skew.T
    turn = lax.custom_linear_solve(lyapunov, skew, solve_lyapunov, symmetric=True)
    leaving = lax.custom_linear_solve(times_h, project_out(y, dx), divide_by_h, symmetric=True)
    dy = matmul(y, turn) + matmul(leaving, support)
    return polar, _Polar(dy, jnp.zeros_like(v), jnp.zeros_like(s))
