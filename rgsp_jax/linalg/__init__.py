"""Linear algebra of one matrix: truncated SVD, polar factor, subspace overlaps, the rank argument."""

from rgsp_jax.linalg.polar import polar_factor
from rgsp_jax.linalg.rank import resolve_rank
from rgsp_jax.linalg.subspaces import principal_angles, subspace_overlap
from rgsp_jax.linalg.svd import truncated_svd

__all__ = ["polar_factor", "principal_angles", "resolve_rank", "subspace_overlap", "truncated_svd"]
