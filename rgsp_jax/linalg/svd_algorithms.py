"""Truncated SVD algorithms for one tall matrix, and the choice among them.

An algorithm maps a `Problem` to an `Attempt`: it may fail, but it has to know. `factorise` replaces a failed attempt
by the full SVD, so a tolerance that was missed costs time and never accuracy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rgsp_jax.linalg.block_lanczos import BLOCK, basis_size, golub_kahan_triples
from rgsp_jax.linalg.chebyshev import filtered_subspaces
from rgsp_jax.linalg.dense import (
    TallMatrix,
    is_orthonormal,
    matmul,
    orthonormalise_by_newton_schulz,
    power_of_two_scale,
    scale_columns,
)
from rgsp_jax.linalg.fallback import with_fallback

# Two singular values nearer than this, relative to the largest, count as one to a Krylov space.
_MULTIPLICITY_GAP = 1e-4


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

    Args:
      w: matrix in float32 or float64.
      rank: static, 1..min(m, n).
      algorithm: a key of `ALGORITHMS`, or "auto".
      tolerance: residual, relative to s_1, above which the full SVD takes over; raised to what rounding allows.
    """
    scale = power_of_two_scale(w)
    finite = jnp.isfinite(scale)
    a = TallMatrix(jnp.where(finite, w / scale, 0))
    # What rounding leaves of a flat spectrum's residual grows with the length of the sums; a tolerance below it would
    # send every large matrix to the full SVD, which does no better.
    reachable = max(64, 2 * math.sqrt(a.shape[0])) * float(jnp.finfo(w.dtype).eps)
    problem = Problem(a, rank, max(tolerance, reachable))
    factors = _attempt_then_fall_back(problem, algorithm)
    u, s, v = factors.u, factors.s * scale, factors.v
    if a.wide:
        u, v = v, u
    sign = _canonical_signs(u)
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
        done = trusted & (jnp.max(factors.residuals) <= problem.tolerance)
        done &= is_orthonormal(factors.u) & is_orthonormal(factors.v)
        return _full_svd_unless(problem.a.w, done, factors)

    return run


@with_fallback
def _full_svd_unless(w: Array, factors: Factors) -> Factors:
    return full(Problem(TallMatrix(w), factors.s.shape[-1], 0.0)).factors


def full(problem: Problem) -> Attempt:
    """The platform's own SVD, truncated."""
    u, _, vt = jnp.linalg.svd(problem.a.dense(), full_matrices=False)
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
    if n <= 64 and m <= 4 * n:
        return {"cpu": "full", "default": "full"}
    # Tight tolerances cost a Krylov method many restarts where the spectrum is flat, and the Gram matrix nothing.
    affordable = n <= 2048
    if problem.tolerance < 1e-8 and affordable:
        return {"cpu": "gram", "default": "gram" if n <= 512 else "full"}
    krylov = basis_size(problem.rank) <= 0.35 * n
    cpu = "lanczos" if krylov else "gram" if affordable else "full"
    accelerator = "gram" if n <= 512 else "subspace" if 4 * problem.rank <= n else "full"
    return {"cpu": cpu, "default": accelerator}


def _rayleigh_ritz(problem: Problem, v: Float[Array, "n r"]) -> Factors:
    """Best singular triples with right vectors in the span of v (orthonormal columns)."""
    q, triangle = jnp.linalg.qr(problem.a.times(v))
    left, _, right_t = jnp.linalg.svd(triangle)
    return _finish(problem, matmul(q, left), matmul(v, right_t.T))


def _finish(problem: Problem, u: Float[Array, "m r"], v: Float[Array, "n r"]) -> Factors:
    """Polish nearly singular vectors, take s_i = u_i^T a v_i and measure both residuals."""
    u, v = orthonormalise_by_newton_schulz(u), orthonormalise_by_newton_schulz(v)
    av, atu = problem.a.times(v), problem.a.transpose_times(u)
    s = jnp.maximum(jnp.sum(u * av, axis=0), 0)
    residuals = jnp.maximum(
        jnp.linalg.norm(av - scale_columns(u, s), axis=0), jnp.linalg.norm(atu - scale_columns(v, s), axis=0)
    )
    largest = jnp.max(s)
    residuals = residuals / jnp.where(largest > 0, largest, 1)
    order = jnp.argsort(s, descending=True, stable=True)
    return Factors(u[:, order], s[order], v[:, order], residuals[order])


def _canonical_signs(u: Float[Array, "m r"]) -> Float[Array, "1 r"]:
    """+-1 per column so that its largest entry becomes positive; entries equal up to rounding tie, the first counts."""
    size = jnp.abs(u)
    near = size >= (1 - 16 * float(jnp.finfo(u.dtype).eps)) * jnp.max(size, axis=0, keepdims=True)
    largest = jnp.take_along_axis(u, jnp.argmax(near, axis=0)[None, :], axis=0)
    return jnp.where(largest < 0, -1, 1).astype(u.dtype)
