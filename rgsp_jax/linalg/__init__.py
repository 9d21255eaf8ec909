"""Linear algebra of one matrix, whole or divided: truncated SVD, polar factor, subspace overlaps, the rank argument."""

from rgsp_jax.linalg.polar import polar_factor
from rgsp_jax.linalg.qr import cholesky_qr, tsqr
from rgsp_jax.linalg.rank import resolve_rank
from rgsp_jax.linalg.rows import ROWS, rows_divided
from rgsp_jax.linalg.spectral import inverse_square_root, solve_sylvester
from rgsp_jax.linalg.subspaces import principal_angles, subspace_overlap
from rgsp_jax.linalg.svd import drop_null_directions, truncated_svd

__all__ = [
    "ROWS",
    "cholesky_qr",
    "drop_null_directions",
    "inverse_square_root",
    "polar_factor",
    "principal_angles",
    "resolve_rank",
    "rows_divided",
    "solve_sylvester",
    "subspace_overlap",
    "truncated_svd",
    "tsqr",
]
