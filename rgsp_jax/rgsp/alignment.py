"""Steps 1 and 2 of RGSP-TEFM: the two subspaces and the dynamic map between them (SPEC.md section 1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import resolve_rank, truncated_svd
from rgsp_jax.types import TruncatedSVD

PRECISION = jax.lax.Precision.HIGHEST


def decompose(stack: Float[Array, "k m n"], rank: int | float, active_rank: Array | int | None) -> TruncatedSVD:
    """Truncated SVD of every matrix of the stack, on a leading axis, masked at the run-time rank."""
    rank = resolve_rank(rank, *stack.shape[1:])
    return map_batch(lambda w: truncated_svd(w, rank, active_rank=active_rank), stack)  # compiled once, not K times


def unstack(svds: TruncatedSVD) -> list[TruncatedSVD]:
    """Records of a leading axis one by one."""
    return [jax.tree.map(lambda x, k=k: x[k], svds) for k in range(svds.s.shape[0])]


def active_mask(rank: int, active_rank: Array | int | None) -> Bool[Array, "r"]:
    """True for the directions below the run-time rank (all of them where it is None)."""
    if active_rank is None:
        return jnp.ones(rank, bool)
    return jnp.arange(rank) < active_rank


def overlap_one_sided(
    left: Float[Array, "r r"], right: Float[Array, "r r"], w_q: Array | None, w_k: Array | None
) -> Float[Array, "r r"]:
    """`(U_A W_q)^T (U_B W_k)`: the source's logits before the temperature (SPEC R2); not invariant to pair signs.

    `left` is `U_A^T U_B`, `right` `V_A^T V_B`.
    """
    del right
    if w_q is not None:
        left = jnp.matmul(w_q.T, left, precision=PRECISION)
    if w_k is not None:
        left = jnp.matmul(left, w_k, precision=PRECISION)
    return left


def overlap_two_sided(
    left: Float[Array, "r r"], right: Float[Array, "r r"], w_q: Array | None, w_k: Array | None
) -> Float[Array, "r r"]:
    """`(u_Ai . u_Bj)(v_Ai . v_Bj)`: the Frobenius inner product of two rank-one pieces, so pair signs cancel."""
    return overlap_one_sided(left, right, w_q, w_k) * right


OVERLAPS = {"one_sided": overlap_one_sided, "two_sided": overlap_two_sided}


def dynamic_map(
    overlap: Float[Array, "r r"], temperature: Float[Array, ""], active: Bool[Array, "r"]
) -> Float[Array, "r r"]:
    """`M = softmax_rows(overlap / temperature)` over the active columns; masked rows are zero (SPEC step 2)."""
    rows = jax.nn.softmax(overlap / temperature, axis=-1, where=active[None, :])
    return jnp.where(active[:, None], rows, 0.0)


def pair_signs(left: Float[Array, "r r"], right: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Sign that turns pair j of B towards pair i of A, for every i and j.

    Flipping any pair (u, v) -> (-u, -v) of A or B flips its row or column here, so `M * signs` mixes B's pairs the
    same way whatever signs the SVD chose.
    """
    agreement = left + right
    return jax.lax.stop_gradient(jnp.where(agreement < 0, -1.0, 1.0).astype(agreement.dtype))
