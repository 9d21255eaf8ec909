"""Chebyshev-filtered subspace iteration for the leading right singular vectors: matrix products and small QRs only.

Zhou & Saad, SIAM J. Matrix Anal. Appl. 29 (2007), for the scaled filter on a^T a.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rgsp_jax.linalg.dense import TallMatrix, column_norms, matmul, scale_columns
from rgsp_jax.linalg.qr import orthonormalise, thin_qr
from rgsp_jax.linalg.rows import largest_part

_MAX_ROUNDS = 20
_MAX_DEGREE = 10
_SEED = 21


class _Round(NamedTuple):
    u: Float[Array, "m r"]
    v: Float[Array, "n p"]
    s: Float[Array, "p"]
    error: Float[Array, ""]
    rounds: Int[Array, ""]


def subspace_size(rank: int, n: int) -> int:
    """Columns iterated for `rank` triples: as many spare ones buy more on slow decay than further iterations."""
    return min(n, 2 * rank + 8)


def filtered_subspaces(a: TallMatrix, rank: int, tolerance: float) -> tuple[Float[Array, "m r"], Float[Array, "n r"]]:
    """Leading left and right singular vectors of a, to `tolerance` relative to s_1 or to the round limit."""
    n = a.shape[1]
    start = jax.random.normal(jax.random.key(_SEED), (n, subspace_size(rank, n)), a.w.dtype)
    start = orthonormalise(a.transpose_times(a.times(start)))

    def rayleigh_ritz(v: Array, rounds: Array) -> _Round:
        q, triangle = thin_qr(a.times(v), a.axis)
        left, s, right_t = jnp.linalg.svd(triangle)
        u, v = matmul(q, left[:, :rank]), matmul(v, right_t.T)
        residual = a.transpose_times(u) - scale_columns(v[:, :rank], s[:rank])
        error = jnp.max(column_norms(residual)) / jnp.where(s[0] > 0, s[0], 1)
        return _Round(u, v, s, largest_part(error, a.axis), rounds)

    def unfinished(state: _Round) -> Array:
        return (state.rounds < _MAX_ROUNDS) & (state.error > tolerance)

    def run_round(state: _Round) -> _Round:
        filtered = _filter(a, state.v, state.s, rank)
        return rayleigh_ritz(orthonormalise(filtered), state.rounds + 1)

    last = lax.while_loop(unfinished, run_round, rayleigh_ritz(start, jnp.asarray(0)))
    return last.u, last.v[:, :rank]


def _filter(a: TallMatrix, v: Array, s: Array, rank: int) -> Array:
    """A Chebyshev polynomial of a^T a applied to v, small on [0, s_p^2] and 1 at s_1^2.

    Its degree is bounded so that s_1 outgrows s_rank by no more than float32 can still separate.
    """
    smallest = jnp.finfo(s.dtype).tiny
    top = jnp.maximum(s[0] ** 2, smallest)
    half = jnp.maximum(s[-1] ** 2, jnp.finfo(s.dtype).eps * top) / 2
    growth = jnp.log(_growth(top / half - 1) / _growth(jnp.maximum(s[rank - 1] ** 2 / half - 1, 1)))
    headroom = -0.5 * jnp.log(jnp.asarray(jnp.finfo(s.dtype).eps, s.dtype))
    degree = jnp.clip(jnp.floor(headroom / jnp.maximum(growth, smallest)), 2, _MAX_DEGREE).astype(jnp.int32)
    degree = largest_part(degree, a.axis)  # what devices do in turns they do equally often

    def operator(x: Array) -> Array:
        return a.transpose_times(a.times(x)) / half - x

    first = 1 / (top / half - 1)

    def step(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, now, ratio = state
        next_ratio = 1 / (2 / first - ratio)
        return now, 2 * next_ratio * operator(now) - ratio * next_ratio * before, next_ratio

    return lax.fori_loop(1, degree, step, (v, first * operator(v), first))[1]


def _growth(x: Array) -> Array:
    """Growth per degree of a Chebyshev polynomial at x >= 1."""
    return x + jnp.sqrt(jnp.maximum(x * x - 1, 0))
