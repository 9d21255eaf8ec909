"""`relative`: base-free fusion of K models (SPEC.md section 3)."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg import polar_factor
from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import ActiveRank, Hyperparameter, Rank
from rgsp_jax.rgsp.alignment import PRECISION
from rgsp_jax.rgsp.pairwise import decompose
from rgsp_jax.rgsp.stats import svd_stats
from rgsp_jax.types import MergeOutput

Scale = Annotated[
    Any,
    Hyperparameter('of the decorrelated task vectors; "auto" is 2 / (1 + 20 rho)', low=0, choices=("auto",)),
]


def frobenius_norm(x: Float[Array, "... m n"]) -> Float[Array, "..."]:
    """`|x|_F` with the zero matrix's derivative set to zero (it has none)."""
    square = jnp.sum(x**2, axis=(-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def relative_distance(stack: Float[Array, "k m n"], mean: Float[Array, "m n"]) -> Float[Array, ""]:
    """`rho = mean_i |theta_i - mean| / |mean|`, 0 where the mean is 0: how far the experts moved apart."""
    size = frobenius_norm(mean)
    return jnp.mean(frobenius_norm(stack - mean[None])) / jnp.where(size > 0, size, 1.0)


def automatic_scale(rho: Float[Array, ""]) -> Float[Array, ""]:
    """`2 / (1 + 20 rho)` (SPEC.md section 3)."""
    return 2 / (1 + 20 * rho)


def relative(
    stack: Float[Array, "k m n"],
    rank: Rank = 0.05,
    active_rank: ActiveRank = None,
    scale: Scale = "auto",
) -> MergeOutput:
    """Base-free K-way merge: `W* = mean + scale * U diag(S) V^T` (SPEC.md section 3).

    U and V are the polar factors of the stacked leading singular vectors of the relative task vectors
    `theta_i - mean`, S their stacked singular values. Directions the experts share beyond rounding are counted once
    (the polar factor is a partial isometry), so that equal copies return the copy. Two models give their mean:
    `theta_2 - mean = -(theta_1 - mean)`.

    Args:
        stack: K >= 2 models [K, m, n].
        rank: directions kept of each relative task vector; a fraction is of min(m, n).
        active_rank: run-time rank; the result equals that at this rank.
        scale: a number, or "auto": `2 / (1 + 20 rho)` with rho the mean of |theta_i - mean| / |mean|.
    """
    mean = stack_mean(stack)
    differences = stack - mean[None]
    rho = relative_distance(stack, mean)
    factor = automatic_scale(rho) if isinstance(scale, str) else jnp.asarray(scale, stack.dtype)
    svds = decompose(differences, rank, active_rank)
    stats = svd_stats(svds, active_rank) | {"rho": rho, "scale": factor}
    if stack.shape[0] == 2:  # the two task vectors cancel exactly; no rounding of theirs may leak in
        return MergeOutput(mean, stats)
    u = polar_factor(jnp.concatenate([d.u for d in svds], axis=1))
    v = polar_factor(jnp.concatenate([d.v for d in svds], axis=1))
    s = jnp.concatenate([d.s for d in svds])
    merged = mean + factor * jnp.matmul(u * s[None, :], v.T, precision=PRECISION)
    return MergeOutput(merged, stats)
