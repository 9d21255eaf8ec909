"""Cost matrices and entropic (fused) Gromov-Wasserstein couplings."""

from rgsp_jax.transport.annealing import anneal_gromov_wasserstein, critical_epsilon
from rgsp_jax.transport.costs import normalize_jointly, squared_distances
from rgsp_jax.transport.coupling import gromov_wasserstein
from rgsp_jax.transport.problem import share_by_row

__all__ = [
    "anneal_gromov_wasserstein",
    "critical_epsilon",
    "gromov_wasserstein",
    "normalize_jointly",
    "share_by_row",
    "squared_distances",
]
