"""Block Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation and thick restarts.

Golub, Luk & Overton (ACM TOMS 7, 1981) for the block recurrence; Baglama & Reichel (SIAM J. Sci. Comput. 27, 2005)
for the restart. The invariant: with U, V orthonormal and B = U^T a V block upper triangular,
`a V = U B` and `a^T U = V B^T + V_next L E^T`, E the last block of the identity's columns. So the Ritz triples of
B have a zero residual on one side and `|L E^T x|` on the other, x their left vector in B.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rgsp_jax.linalg.dense import TallMatrix, matmul, multiply_transposed

# Wide enough that a product with the matrix reads it once per block and not once per vector, narrow enough that
# the Krylov space is hardly larger than a single vector's.
BLOCK = 8
_MAX_CYCLES = 16
_SEEDS = (20, 22)
# Rows by which the noise moves on from one use to the next before it repeats.
_SHIFTS = 512


class _Recurrence(NamedTuple):
    """Bases are kept as rows: products of a tall basis with a few columns are several times faster that way on CPU."""

    ut: Float[Array, "k m"]
    vt: Float[Array, "k n"]
    b: Float[Array, "k k"]
    next_v: Float[Array, "n b"]
    coupling: Float[Array, "b b"]
    steps: Int[Array, ""]


class _Cycle(NamedTuple):
    recurrence: _Recurrence
    filled: Int[Array, ""]
    cycles: Int[Array, ""]
    ritz_values: Float[Array, "k"]
    error: Float[Array, ""]


def basis_size(rank: int) -> int:
    """Columns of the Krylov basis for `rank` triples, a multiple of BLOCK: about what slowly decaying spectra need."""
    return BLOCK * -(-(2 * rank + 4 * BLOCK) // BLOCK)


def golub_kahan_triples(
    a: TallMatrix, rank: int, tolerance: float
) -> tuple[Float[Array, "m r"], Float[Array, "r"], Float[Array, "n r"]]:
    """Leading singular triples of a, to `tolerance` relative to s_1 or to the cycle limit.

    The basis is cut to what min(m, n) holds; the caller judges the result by its residuals.
    """
    m, n = a.shape
    size = min(basis_size(rank), BLOCK * (n // BLOCK))
    if size < rank + BLOCK:
        raise ValueError(f'algorithm "lanczos" needs min(m, n) >= rank + {2 * BLOCK}, got rank {rank} of {m} x {n}')
    kept = min(BLOCK * -(-(5 * rank + size) // (6 * BLOCK)), size - BLOCK)
    key, noise_key = (jax.random.key(seed) for seed in _SEEDS)
    start, _ = jnp.linalg.qr(jax.random.normal(key, (n, BLOCK), a.w.dtype))
    size_of_noise = float(jnp.finfo(a.w.dtype).eps) / math.sqrt(m)
    noise = size_of_noise * jax.random.normal(noise_key, (m + _SHIFTS, BLOCK), a.w.dtype)

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, a.w.dtype)

    empty = _Recurrence(
        zeros(size, m), zeros(size, n), zeros(size, size), start, zeros(BLOCK, BLOCK), jnp.asarray(0, jnp.int32)
    )
    first = _Cycle(empty, jnp.asarray(0), jnp.asarray(0), zeros(size), jnp.asarray(jnp.inf, a.w.dtype))

    def unfinished(cycle: _Cycle) -> Array:
        return (cycle.cycles < _MAX_CYCLES) & (cycle.error > tolerance)

    def run_cycle(cycle: _Cycle) -> _Cycle:
        recurrence = lax.fori_loop(
            cycle.filled // BLOCK, size // BLOCK, lambda j, state: _step(a, noise, state, j * BLOCK), cycle.recurrence
        )
        left, ritz_values, right_t = jnp.linalg.svd(recurrence.b)
        errors = jnp.linalg.norm(matmul(recurrence.coupling, left[-BLOCK:, :rank]), axis=0)
        largest = jnp.where(ritz_values[0] > 0, ritz_values[0], 1)
        return _Cycle(
            _restart(recurrence, left[:, :kept].T, ritz_values[:kept], right_t[:kept]),
            jnp.asarray(kept, cycle.filled.dtype),
            cycle.cycles + 1,
            ritz_values,
            jnp.max(errors) / largest,
        )

    last = lax.while_loop(unfinished, run_cycle, first)
    return last.recurrence.ut[:rank].T, last.ritz_values[:rank], last.recurrence.vt[:rank].T


def _step(a: TallMatrix, noise: Array, state: _Recurrence, filled: Int[Array, ""]) -> _Recurrence:
    """Append one block to both bases; rows of the buffers past `filled` are zero."""
    vt = lax.dynamic_update_slice(state.vt, state.next_v.T, (filled, 0))
    shift = state.steps % _SHIFTS
    noise_u, noise_v = (lax.dynamic_slice_in_dim(noise, shift, length) for length in a.shape)
    block_u, above, diagonal = _orthonormalise_against(state.ut, a.times(state.next_v), noise_u)
    ut = lax.dynamic_update_slice(state.ut, block_u.T, (filled, 0))
    b = lax.dynamic_update_slice(state.b, above, (0, filled))
    b = lax.dynamic_update_slice(b, diagonal, (filled, filled))
    next_v, _, coupling = _orthonormalise_against(vt, a.transpose_times(block_u), noise_v)
    return _Recurrence(ut, vt, b, next_v, coupling, state.steps + 1)


def _orthonormalise_against(rows: Array, x: Array, noise: Array) -> tuple[Array, Array, Array]:
    """q, c, r with `x = rows^T c + q r`, q orthonormal and orthogonal to the rows, also where x lies in their span.

    The QR between the two projections blows such an x up to some direction, which the second one cleans. Noise of
    rounding's size, different at every step, stands in where nothing is left: QR would complete a zero block by the
    same columns every time.
    """
    first = matmul(rows, x)
    q, r_first = jnp.linalg.qr(x - multiply_transposed(rows, first))
    q = q + noise
    second = matmul(rows, q)
    q, r_second = jnp.linalg.qr(q - multiply_transposed(rows, second))
    return q, first + matmul(second, r_first), matmul(r_second, r_first)


def _restart(state: _Recurrence, left_t: Array, values: Array, right_t: Array) -> _Recurrence:
    """Keep the leading Ritz triples as the start of the next basis; the next block couples to them all."""
    grow = (0, state.b.shape[0] - values.shape[0])
    return _Recurrence(
        jnp.pad(matmul(left_t, state.ut), (grow, (0, 0))),
        jnp.pad(matmul(right_t, state.vt), (grow, (0, 0))),
        jnp.diag(jnp.pad(values, grow)),
        state.next_v,
        state.coupling,
        state.steps,
    )
