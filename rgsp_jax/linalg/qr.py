"""QR factors of long matrices, whole or divided by rows over a mesh axis."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.linalg.dense import column_norms, is_orthonormal, matmul
from rgsp_jax.linalg.rows import add_parts, on_all_parts

Factors = tuple[Float[Array, "m p"], Float[Array, "p p"]]


def orthonormalise(x: Float[Array, "m p"]) -> Float[Array, "m p"]:
    """Orthonormal columns spanning x's, completed where x is rank deficient."""
    return thin_qr(x)[0]


def thin_qr(x: Float[Array, "m p"], axis: str | None = None) -> Factors:
    """The platform's best QR; with an axis, of the matrix whose rows its devices share."""
    if axis is not None:
        return cholesky_qr(x, axis)
    return lax.platform_dependent(x, cpu=householder_qr, default=cholesky_qr)


def householder_qr(x: Float[Array, "m p"]) -> Factors:
    """LAPACK's, or what the platform has in its place."""
    q, r = jnp.linalg.qr(x)
    return q, r


def cholesky_qr(x: Float[Array, "m p"], axis: str | None = None) -> Factors:
    """CholeskyQR2 on column-scaled x, Householder QR (`tsqr`, over an axis) where that breaks down.

    Householder QR is a chain of small steps, slow on accelerators. Over an axis two sums of p x p numbers and a few
    smaller ones are all that devices exchange. Fukaya et al., ScalA 2014.

    Args:
      x: at least as long as it is wide; over an axis, this device's rows of it.
      axis: of the surrounding `shard_map` or `pmap`; None is a whole matrix.

    Returns:
      q like x, and r [p, p], upper triangular, the same on all devices: `x = q r`, q^T q = I.
    """
    norms = column_norms(x, axis)[None, :]
    norms = jnp.where(norms > 0, norms, 1)
    q, first = _cholesky_round(x / norms, axis)
    q, second = _cholesky_round(q, axis)
    r = matmul(second, first) * norms
    # A loop of at most one turn, not lax.cond, which under vmap would run the Householder QR for every lane.
    _, q, r = lax.while_loop(
        lambda state: ~state[0],
        lambda _: (jnp.asarray(True), *(householder_qr(x) if axis is None else tsqr(x, axis))),
        (on_all_parts(is_orthonormal(q, axis), axis), q, r),
    )
    return q, r


def _cholesky_round(x: Array, axis: str | None) -> tuple[Array, Array]:
    lower = jnp.linalg.cholesky(add_parts(matmul(x.T, x), axis))
    q = lax.linalg.triangular_solve(lower, x, left_side=False, lower=True, transpose_a=True)
    return q, lower.T


def tsqr(x: Float[Array, "b p"], axis: str) -> Factors:
    """Householder QR of a matrix whose rows the devices of a mesh axis share: stable whatever its rank.

    Each device factorises its own rows; then pairs of devices factorise their two triangles one on top of the other,
    in log2(P) rounds of p x p numbers after which all have the last triangle. Where P is no power of two every device
    gathers the P triangles. Columns without a direction of their own are completed to orthonormal ones, and rows of
    zeros behind the last true one stay zero. Demmel, Grigori, Hoemmen & Langou, SIAM J. Sci. Comput. 34 (2012).

    Args:
      x: this device's rows; all devices together have p or more.
      axis: of the surrounding `shard_map` or `pmap`.

    Returns:
      this device's rows of q [b, p], and r [p, p], upper triangular, the same on all: `x = q r`, q^T q = I.

    Raises:
      ValueError: fewer rows on all devices together than columns.
    """
    parts = lax.axis_size(axis)
    if parts * x.shape[0] < x.shape[1]:
        raise ValueError(f"tsqr takes a matrix no wider than long, got {parts} parts of {x.shape[0]} x {x.shape[1]}")
    q, r = householder_qr(x)
    index = lax.axis_index(axis)
    if parts & (parts - 1):
        top, r = householder_qr(lax.all_gather(r, axis).reshape(-1, r.shape[1]))
        return matmul(q, lax.dynamic_slice_in_dim(top, index * q.shape[1], q.shape[1])), r
    turn = None
    for bit in range(parts.bit_length() - 1):
        other = lax.ppermute(r, axis, [(i, i ^ (1 << bit)) for i in range(parts)])
        below = (index >> bit) & 1 == 1
        # Both of a pair stack in one order, so that both get the same triangle.
        halves, r = householder_qr(jnp.where(below, jnp.concatenate([other, r]), jnp.concatenate([r, other])))
        own = jnp.where(below, halves[other.shape[0] :], halves[: other.shape[0]])
        turn = own if turn is None else matmul(turn, own)
    return q if turn is None else matmul(q, turn), r
