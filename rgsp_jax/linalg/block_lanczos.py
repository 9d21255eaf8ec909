"""Block Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation and thick restarts.

Golub, Luk & Overton (ACM TOMS 7, 1981) for the block recurrence; Baglama & Reichel (SIAM J. Sci. Comput. 27, 2005)
for the restart. The invariant: with U, V orthonormal and B = U^T a V block upper triangular,
`a V = U B` and `a^T U = V B^T + V_next L E^T`, E the last block of the identity's columns. So the Ritz triples of
B have a zero residual on one side and `|L E^T x|` on the other, x their left vector in B.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rgsp_jax.linalg.dense import matmul

# Wide enough that a product with the matrix reads it once per block and not once per vector, narrow enough that
# the Krylov space is hardly larger than a single vector's.
BLOCK = 8
_MAX_CYCLES = 10
_SEED = 20


class _Recurrence(NamedTuple):
    u: Float[Array, "m k"]
    v: Float[Array, "n k"]
    b: Float[Array, "k k"]
    next_v: Float[Array, "n b"]
    coupling: Float[Array, "b b"]


class _Cycle(NamedTuple):
    recurrence: _Recurrence
    filled: Int[Array, ""]
    count: Int[Array, ""]
    ritz_values: Float[Array, "k"]
    error: Float[Array, ""]


def basis_size(rank: int) -> int:
    """Columns of the Krylov basis for `rank` triples, a multiple of BLOCK: about what slowly decaying spectra need."""
    return BLOCK * -(-(3 * rank + 4 * BLOCK) // BLOCK)


def golub_kahan_subspace(
    a: Float[Array, "m n"], at: Float[Array, "n m"], rank: int, tolerance: float
) -> tuple[Float[Array, "n r"], Float[Array, "r"]]:
    """Right singular vectors and values of the tall matrix a, to `tolerance` relative to s_1 or to the cycle limit.

    The basis is cut to what min(m, n) holds; the caller judges the result by its residuals.
    """
    m, n = a.shape
    size = min(basis_size(rank), BLOCK * (n // BLOCK))
    if size < rank + BLOCK:
        raise ValueError(f'algorithm "lanczos" needs min(m, n) >= rank + {2 * BLOCK}, got rank {rank} of {m} x {n}')
    kept = min(BLOCK * -(-(5 * rank + size) // (6 * BLOCK)), size - BLOCK)
    start, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(_SEED), (n, BLOCK), a.dtype))

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, a.dtype)

    empty = _Recurrence(zeros(m, size), zeros(n, size), zeros(size, size), start, zeros(BLOCK, BLOCK))
    first = _Cycle(empty, jnp.asarray(0), jnp.asarray(0), zeros(size), jnp.asarray(jnp.inf, a.dtype))

    def unfinished(cycle: _Cycle) -> Array:
        return (cycle.count < _MAX_CYCLES) & (cycle.error > tolerance)

    def run_cycle(cycle: _Cycle) -> _Cycle:
        recurrence = lax.fori_loop(
            cycle.filled // BLOCK, size // BLOCK, lambda j, state: _step(a, at, state, j * BLOCK), cycle.recurrence
        )
        left, ritz_values, right_t = jnp.linalg.svd(recurrence.b)
        errors = jnp.linalg.norm(matmul(recurrence.coupling, left[-BLOCK:, :rank]), axis=0)
        largest = jnp.where(ritz_values[0] > 0, ritz_values[0], 1)
        return _Cycle(
            _restart(recurrence, left[:, :kept], ritz_values[:kept], right_t[:kept].T),
            jnp.asarray(kept, cycle.filled.dtype),
            cycle.count + 1,
            ritz_values,
            jnp.max(errors) / largest,
        )

    last = lax.while_loop(unfinished, run_cycle, first)
    return last.recurrence.v[:, :rank], last.ritz_values[:rank]


def _step(a: Array, at: Array, state: _Recurrence, filled: Int[Array, ""]) -> _Recurrence:
    """Append one block to both bases; columns of the buffers past `filled` are zero."""
    v = lax.dynamic_update_slice(state.v, state.next_v, (0, filled))
    block_u, above, diagonal = _orthonormalise_against(state.u, matmul(a, state.next_v))
    u = lax.dynamic_update_slice(state.u, block_u, (0, filled))
    b = lax.dynamic_update_slice(state.b, above, (0, filled))
    b = lax.dynamic_update_slice(b, diagonal, (filled, filled))
    next_v, _, coupling = _orthonormalise_against(v, matmul(at, block_u))
    return _Recurrence(u, v, b, next_v, coupling)


def _orthonormalise_against(basis: Array, x: Array) -> tuple[Array, Array, Array]:
    """q, c, r with `x = basis c + q r`, q orthonormal and orthogonal to the basis, also where x lies in its span.

    The QR between the two projections blows such an x up to a random direction, which the second one then cleans.
    """
    first = matmul(basis.T, x)
    q, r_first = jnp.linalg.qr(x - matmul(basis, first))
    second = matmul(basis.T, q)
    q, r_second = jnp.linalg.qr(q - matmul(basis, second))
    return q, first + matmul(second, r_first), matmul(r_second, r_first)


def _restart(state: _Recurrence, left: Array, values: Array, right: Array) -> _Recurrence:
    """Keep the leading Ritz triples as the start of the next basis; the next block couples to them all."""
    grow = ((0, 0), (0, state.b.shape[0] - values.shape[0]))
    return _Recurrence(
        jnp.pad(matmul(state.u, left), grow),
        jnp.pad(matmul(state.v, right), grow),
        jnp.diag(jnp.pad(values, grow[1])),
        state.next_v,
        state.coupling,
    )
