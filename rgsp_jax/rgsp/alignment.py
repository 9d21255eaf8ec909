"""Steps 1 and 2 of RGSP-TEFM: the two subspaces and the dynamic map between them (SPEC.md section 1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rgsp_jax.types import TruncatedSVD

PRECISION = jax.lax.Precision.HIGHEST


def active_mask(rank: int, active_rank: Array | int | None) -> Bool[Array, "r"]:
    """True for the directions below the run-time rank (all of them where it is None)."""
    if active_rank is None:
        return jnp.ones(rank, bool)
    return jnp.arange(rank) < active_rank


def overlap_one_sided(a: TruncatedSVD, b: TruncatedSVD, w_q: Array | None, w_k: Array | None) -> Float[Array, "r r"]:
    """`(U_A W_q)^T (U_B W_k)`: the source's logits before the temperature (SPEC R2); not invariant to pair signs."""
    overlap = jnp.matmul(a.u.T, b.u, precision=PRECISION)
    if w_q is not None:
        overlap = jnp.matmul(w_q.T, overlap, precision=PRECISION)
    if w_k is not None:
        overlap = jnp.matmul(overlap, w_k, precision=PRECISION)
    return overlap


def overlap_two_sided(a: TruncatedSVD, b: TruncatedSVD, w_q: Array | None, w_k: Array | None) -> Float[Array, "r r"]:
    """`(u_Ai . u_Bj)(v_Ai . v_Bj)`: the Frobenius inner product of two rank-one pieces, so pair signs cancel."""
    left = overlap_one_sided(a, b, w_q, w_k)
    return left * jnp.matmul(a.v.T, b.v, precision=PRECISION)


OVERLAPS = {"one_sided": overlap_one_sided, "two_sided": overlap_two_sided}


def dynamic_map(
    overlap: Float[Array, "r r"], temperature: Float[Array, ""], active: Bool[Array, "r"]
) -> Float[Array, "r r"]:
    """`M = softmax_rows(overlap / temperature)` over the active columns; masked rows are zero (SPEC step 2)."""
    rows = jax.nn.softmax(overlap / temperature, axis=-1, where=active[None, :])
    return jnp.where(active[:, None], rows, 0.0)


def pair_signs(a: TruncatedSVD, b: TruncatedSVD) -> Float[Array, "r r"]:
    """Sign that turns pair j of B towards pair i of A, for every i and j.

    Flipping any pair (u, v) -> (-u, -v) of A or B flips its row or column here, so `M * signs` mixes B's pairs the
    same way whatever signs the SVD chose.
    """
    agreement = jnp.matmul(a.u.T, b.u, precision=PRECISION) + jnp.matmul(a.v.T, b.v, precision=PRECISION)
    return jax.lax.stop_gradient(jnp.where(agreement < 0, -1.0, 1.0).astype(agreement.dtype))
