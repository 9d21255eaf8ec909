"""What every method built on truncated SVDs reports of them."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from rgsp_jax.linalg import subspace_overlap
from rgsp_jax.rgsp.alignment import active_mask
from rgsp_jax.types import TruncatedSVD

SVD_TOLERANCE = 1e-3
"""Residual relative to s_1 past which a decomposition is flagged; bf16 storage alone costs 1e-2 in angle."""


def mask_svd(svd: TruncatedSVD, active_rank: Array | int | None) -> TruncatedSVD:
    """The triples below the run-time rank, zeros past it; the residual is that of them all."""
    if active_rank is None:
        return svd
    active = active_mask(svd.s.shape[0], active_rank)
    u, v = (jnp.where(active[None, :], x, 0) for x in (svd.u, svd.v))
    return TruncatedSVD(u, jnp.where(active, svd.s, 0), v, svd.residual)


def svd_stats(svds: Sequence[TruncatedSVD], active_rank: Array | int | None) -> dict[str, Array]:
    """Residuals [K], a flag where one is too large, and the K x K overlap of the subspaces.

    The overlap of i and j is the mean of |U_i^T U_j|_F^2 / r and |V_i^T V_j|_F^2 / r: 1 where they coincide.
    """
    residual = jnp.stack([d.residual for d in svds])

    def share(i: TruncatedSVD, j: TruncatedSVD) -> Array:
        left, right = (subspace_overlap(x, y, active_rank=active_rank) for x, y in ((i.u, j.u), (i.v, j.v)))
        return (left + right) / 2

    overlap = jnp.stack([jnp.stack([share(i, j) for j in svds]) for i in svds])
    return {"residual": residual, "svd_inexact": ~(residual.max() <= SVD_TOLERANCE), "subspace_overlap": overlap}
