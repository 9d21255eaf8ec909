"""ACE-Merging: RegMean with covariances estimated from the task vectors themselves."""

from typing import Annotated, Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rgsp_jax.linalg import truncated_svd
from rgsp_jax.linalg.dense import matmul
from rgsp_jax.merging.task_arithmetic import Scale, task_vectors
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Ridge = Annotated[Any, Hyperparameter("added to the covariances' diagonals, in squared weights", low=0)]
Threshold = Annotated[Any, Hyperparameter("heterogeneity past which the tasks are put on one scale", low=0)]
RefinedShare = Annotated[
    float,
    Hyperparameter("share of the directions that the refinement lifts", low=0, high=1, exclusive_low=True, static=True),
]

HIGHEST = lax.Precision.HIGHEST
_TINY = 1e-12
"""Added to traces before logarithms and divisions, as in the authors' code."""


def ace_merging(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    ridge: Ridge = 1e-2,
    threshold: Threshold = 0.3,
    refined_share: RefinedShare = 0.3,
    scale: Scale = 1.0,
) -> MergeOutput:
    """`base + scale * (sum_i T_i S_i) (sum_i S_i + C)^-1`: T_i are centred task vectors, S_i their covariances.

    Xu et al. 2026, arXiv 2603.02945 (CVPR), to the letter of the authors' code (github.com/unravel-xu/ACE-Merging at
    22d9dfe, `ace_merging`), defaults included:

        T_i = tau_i - mean of its rows,  S_i = T_i^T T_i + ridge I,
        C: every row the mean row of sum_i T_i^T T_i,
        heterogeneity = variance of ln |tau_i|^2 over K - 1, over the square of their mean.

    Where it passes the threshold, T_i^T T_i and the ridge are divided by |T_i|^2 each, C by the mean |tau_i|^2, and
    the leading directions of the merge M plus sum_i tau_i (T_i^T T_i / |T_i|^2 - mean_i S_i) are added to M with the
    mean of their singular values. The ridge and the threshold make it depend on the weights' units.

    Args:
        stack: K >= 2 models [K, m, n] (outputs x inputs).
        base: their common ancestor [m, n].
        ridge: eps of the code.
        threshold: of the heterogeneity.
        refined_share: of min(m, n), k_frac of the code.
        scale: factor on the merged task vector; 1 in the code.

    Returns:
        stats: `heterogeneity`; flag `singular`, where the system could not be solved.
    """
    vectors = task_vectors(stack, base)
    dtype = stack.dtype
    sizes = jnp.sum(vectors**2, axis=(1, 2))
    logarithms = jnp.log(sizes + _TINY)
    heterogeneity = jnp.var(logarithms, ddof=1) / (jnp.mean(logarithms) ** 2 + _TINY)
    uneven = heterogeneity > jnp.asarray(threshold, dtype)
    merged = weigh_by_covariances(vectors, jnp.asarray(ridge, dtype), uneven, jnp.mean(sizes), refined_share)
    bad = ~jnp.isfinite(merged).all() & jnp.isfinite(vectors).all()
    stats = {"heterogeneity": heterogeneity, "singular": bad}
    return MergeOutput(base + jnp.asarray(scale, dtype) * merged, stats)


def weigh_by_covariances(
    vectors: Float[Array, "k m n"],
    ridge: Float[Array, ""],
    uneven: Bool[Array, ""],
    mean_size: Float[Array, ""],
    refined_share: float,
) -> Float[Array, "m n"]:
    """The merged task vector; `uneven` normalises and refines."""
    count, _, n = vectors.shape
    centred = vectors - vectors.mean(1, keepdims=True)
    traces = jnp.sum(centred**2, axis=(1, 2)) + _TINY
    divisors = jnp.where(uneven, traces, 1)[:, None, None]
    raw = jnp.einsum("kmn,kmp->knp", centred, centred, precision=HIGHEST) / divisors
    covariances = raw + (ridge / divisors) * jnp.eye(n, dtype=centred.dtype)[None]
    prior = raw.sum(0).mean(0, keepdims=True) / jnp.where(uneven, mean_size + _TINY, 1)
    numerator = jnp.einsum("kmn,knp->mp", centred, covariances, precision=HIGHEST)
    total = covariances.sum(0)
    merged = jnp.linalg.solve((total + jnp.broadcast_to(prior, total.shape)).T, numerator.T).T

    def refine(merged: Float[Array, "m n"]) -> Float[Array, "m n"]:
        residue = jnp.einsum("kmn,knp->mp", vectors, raw - total[None] / count, precision=HIGHEST)
        rank = max(1, int(min(merged.shape) * refined_share))
        leading = truncated_svd(merged + residue, rank)
        return merged + leading.s.mean() * matmul(leading.u, leading.v.T)

    return lax.cond(uneven, refine, lambda merged: merged, merged)
