"""Truncated SVD algorithms for one tall matrix, and the choice among them.

An algorithm maps a `Problem` to an `Attempt`: it may fail, but it has to know. `factorise` replaces a failed attempt
by the full SVD, so a tolerance that was missed costs time and never accuracy.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rgsp_jax.linalg.block_lanczos import BLOCK, basis_size, golub_kahan_triples
from rgsp_jax.linalg.chebyshev import filtered_subspaces
from rgsp_jax.linalg.dense import (
    TallMatrix,
    column_norms,
    is_orthonormal,
    matmul,
    orthonormalise_by_newton_schulz,
    power_of_two_scale,
    scale_columns,
)
from rgsp_jax.linalg.fallback import with_fallback
from rgsp_jax.linalg.qr import householder_qr, thin_qr, tsqr
from rgsp_jax.linalg.rows import ROWS, add_parts, is_divided, largest_part, map_parts, on_all_parts

# Two singular values nearer than this, relative to the largest, count as one to a Krylov space.
_MULTIPLICITY_GAP = 1e-4
# Sides of Gram matrices that cost next to nothing, and that cost less than iterating to a tight tolerance.
_SMALL_SIDE, _AFFORDABLE_SIDE = 512, 2048


class Problem(NamedTuple):
    """A matrix of entries around 1 at most, and what is asked of its factors."""

    a: TallMatrix
    rank: int
    tolerance: float


class Factors(NamedTuple):
    """Singular triples, descending, with each one's residual relative to the largest singular value."""

    u: Float[Array, "m r"]
    s: Float[Array, "r"]
    v: Float[Array, "n r"]
    residuals: Float[Array, "r"]


class Attempt(NamedTuple):
    factors: Factors
    trusted: Bool[Array, ""]
    """False where the algorithm may have missed a singular value, whatever the residuals say."""


Algorithm = Callable[[Problem], Attempt]


def factorise(w: Float[Array, "m n"], rank: int, algorithm: str, tolerance: float) -> Factors:
    """The `rank` leading singular triples of w, signed by SPEC R1; all NaN where w is not finite.

    Where the ambient mesh divides w (`rgsp_jax.linalg.rows`), the devices work on it together, along its longer side;
    the singular vectors of that side are divided alike.

    Args:
      w: matrix in float32 or float64.
      rank: static, 1..min(m, n).
      algorithm: a key of `ALGORITHMS`, or "auto".
      tolerance: residual, relative to s_1, above which the full SVD takes over; raised to what rounding allows.

    Raises:
      ValueError: the mesh divides w and the algorithm is "lanczos".
    """
    wide = w.shape[0] < w.shape[1]
    if not is_divided(*w.shape):
        return _factorise(TallMatrix(w), rank, algorithm, tolerance)
    if algorithm == "lanczos":
        raise ValueError('algorithm "lanczos" takes whole matrices: on a mesh that divides rows use "auto"')
    factors = map_parts(
        lambda part: _factorise(TallMatrix(part, ROWS, wide), rank, algorithm, tolerance),
        w,
        long=(not wide, False, wide, False),
        dimension=int(wide),
    )
    return Factors(*factors)


def _factorise(a: TallMatrix, rank: int, algorithm: str, tolerance: float) -> Factors:
    """The same for one matrix, or for one device's part of it."""
    scale = power_of_two_scale(a.w, a.axis)
    finite = jnp.isfinite(scale)
    a = replace(a, w=jnp.where(finite, a.w / scale, 0))
    # What rounding leaves of a flat spectrum's residual grows with the length of the sums; a tolerance below it would
    # send every large matrix to the full SVD, which does no better.
    reachable = max(64, 2 * math.sqrt(a.shape[0])) * float(jnp.finfo(a.w.dtype).eps)
    problem = Problem(a, rank, max(tolerance, reachable))
    factors = _attempt_then_fall_back(problem, algorithm)
    u, s, v = factors.u, factors.s * scale, factors.v
    if a.wide:
        u, v = v, u
    sign = _canonical_signs(u, None if a.wide else a.axis)
    factors = Factors(u * sign, s, v * sign, factors.residuals)
    return jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), factors)


def _attempt_then_fall_back(problem: Problem, algorithm: str) -> Factors:
    if algorithm == "auto":
        choice = choose_algorithms(problem)
        if len(set(choice.values())) > 1:
            return lax.platform_dependent(**{platform: _attempt(problem, name) for platform, name in choice.items()})
        algorithm = choice["cpu"]
    return _attempt(problem, algorithm)()


def _attempt(problem: Problem, algorithm: str) -> Callable[[], Factors]:
    def run() -> Factors:
        factors, trusted = ALGORITHMS[algorithm](problem)
        if algorithm == "full":
            return factors
        a = problem.a
        done = trusted & (jnp.max(factors.residuals) <= problem.tolerance)
        done &= is_orthonormal(factors.u, a.axis) & is_orthonormal(factors.v)
        if a.axis is None:
            return _full_svd_unless(a.w, done, factors)
        if algorithm == "subspace" and a.shape[1] > _AFFORDABLE_SIDE:
            return factors  # the full SVD's n x n numbers are what this algorithm is there to avoid: the residual tells
        # A loop of at most one turn, as in `cholesky_qr`; all devices take it or none does.
        done = on_all_parts(done, a.axis)
        return lax.while_loop(
            lambda state: ~state[0], lambda _: (jnp.asarray(True), full(problem).factors), (done, factors)
        )[1]

    return run


@with_fallback
def _full_svd_unless(w: Array, factors: Factors) -> Factors:
    return full(Problem(TallMatrix(w), factors.s.shape[-1], 0.0)).factors


def full(problem: Problem) -> Attempt:
    """The platform's own SVD, truncated; over an axis, that of the triangle of a TSQR."""
    a = problem.a
    if a.axis is None:
        u, _, vt = jnp.linalg.svd(a.dense(), full_matrices=False)
    else:
        q, triangle = tsqr(a.dense(), a.axis)
        left, _, vt = jnp.linalg.svd(triangle)
        u = matmul(q, left)
    return Attempt(_finish(problem, u[:, : problem.rank], vt[: problem.rank].T), jnp.asarray(True))


def gram(problem: Problem) -> Attempt:
    """Eigenvectors of a^T a, then Rayleigh-Ritz on a itself, which gives back the digits that the squaring costs.

    What it cannot give back: directions whose eigenvalue drowns in the rounding of s_1^2.
    """
    _, eigenvectors = jnp.linalg.eigh(problem.a.gram(), symmetrize_input=False)
    factors = _rayleigh_ritz(problem, eigenvectors[:, ::-1][:, : problem.rank])
    cutoff = 30 * math.sqrt(float(jnp.finfo(problem.a.w.dtype).eps))
    trusted = (factors.s[-1] >= cutoff * factors.s[0]) | (factors.s[0] == 0)
    return Attempt(factors, trusted)


def lanczos(problem: Problem) -> Attempt:
    """Block Golub-Kahan-Lanczos with full reorthogonalisation and thick restarts."""
    a, rank, tolerance = problem
    u, ritz_values, v = golub_kahan_triples(a, rank, tolerance)
    # A Krylov space grown from BLOCK vectors holds at most BLOCK copies of a repeated singular value, each with a
    # perfect residual: where that many came out, and smaller values after them, more copies may be missing.
    count = max(rank - BLOCK, 0)
    first, last = ritz_values[:count], ritz_values[BLOCK - 1 : BLOCK - 1 + count]
    missed = (first - last <= _MULTIPLICITY_GAP * ritz_values[0]) & (first > tolerance * ritz_values[0])
    return Attempt(_finish(problem, u, v), ~jnp.any(missed))


def subspace(problem: Problem) -> Attempt:
    """Chebyshev-filtered subspace iteration: matrix products only."""
    u, v = filtered_subspaces(*problem)
    return Attempt(_finish(problem, u, v), jnp.asarray(True))


ALGORITHMS: dict[str, Algorithm] = {"full": full, "gram": gram, "lanczos": lanczos, "subspace": subspace}


def choose_algorithms(problem: Problem) -> dict[str, str]:
    """The algorithm per platform, by shape, rank and tolerance: thresholds are where measured times cross
    (`python -m experiments.benchmarks.svd --sweep`)."""
    m, n = problem.a.shape
    # Tight tolerances cost a Krylov method many restarts where the spectrum is flat, and the Gram matrix nothing.
    affordable = n <= _AFFORDABLE_SIDE
    if problem.a.axis is not None:
        # Every device decomposes the Gram matrix for itself, so that it pays where it is small or has to be.
        small = n <= _SMALL_SIDE or (problem.tolerance < 1e-8 and affordable) or 4 * problem.rank > n
        return {"cpu": "gram" if small else "subspace", "default": "gram" if small else "subspace"}
    if n <= 64 and m <= 4 * n:
        return {"cpu": "full", "default": "full"}
    if problem.tolerance < 1e-8 and affordable:
        return {"cpu": "gram", "default": "gram" if n <= _SMALL_SIDE else "full"}
    krylov = basis_size(problem.rank) <= 0.35 * n
    cpu = "lanczos" if krylov else "gram" if affordable else "full"
    accelerator = "gram" if n <= _SMALL_SIDE else "subspace" if 4 * problem.rank <= n else "full"
    return {"cpu": cpu, "default": accelerator}


def _rayleigh_ritz(problem: Problem, v: Float[Array, "n r"]) -> Factors:
    """Best singular triples with right vectors in the span of v (orthonormal columns)."""
    av, axis = problem.a.times(v), problem.a.axis
    q, triangle = householder_qr(av) if axis is None else thin_qr(av, axis)
    left, _, right_t = jnp.linalg.svd(triangle)
    return _finish(problem, matmul(q, left), matmul(v, right_t.T))


def _finish(problem: Problem, u: Float[Array, "m r"], v: Float[Array, "n r"]) -> Factors:
    """Polish nearly singular vectors, take s_i = u_i^T a v_i and measure both residuals."""
    axis = problem.a.axis
    u, v = orthonormalise_by_newton_schulz(u, axis), orthonormalise_by_newton_schulz(v)
    av, atu = problem.a.times(v), problem.a.transpose_times(u)
    s = jnp.maximum(add_parts(jnp.sum(u * av, axis=0), axis), 0)
    residuals = jnp.maximum(column_norms(av - scale_columns(u, s), axis), column_norms(atu - scale_columns(v, s)))
    largest = jnp.max(s)
    residuals = residuals / jnp.where(largest > 0, largest, 1)
    order = jnp.argsort(s, descending=True, stable=True)
    return Factors(u[:, order], s[order], v[:, order], residuals[order])


def _canonical_signs(u: Float[Array, "m r"], axis: str | None) -> Float[Array, "1 r"]:
    """+-1 per column so that its largest entry becomes positive; entries equal up to rounding tie, the first counts."""
    size = jnp.abs(u)
    top = largest_part(jnp.max(size, axis=0, keepdims=True), axis)
    near = size >= (1 - 16 * float(jnp.finfo(u.dtype).eps)) * top
    first = jnp.argmax(near, axis=0)[None, :]
    entry = jnp.take_along_axis(u, first, axis=0)
    if axis is not None:
        index, parts = lax.axis_index(axis), lax.axis_size(axis)
        holder = lax.pmin(jnp.where(jnp.any(near, axis=0, keepdims=True), index, parts), axis)
        entry = lax.psum(jnp.where(holder == index, entry, 0), axis)
    return jnp.where(entry < 0, -1, 1).astype(u.dtype)
