"""TIES: trim, elect signs, merge what agrees."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.merging.sparsity import entry_count, keep_largest
from rgsp_jax.merging.task_arithmetic import Scale, TaskCoefficients, task_vectors
from rgsp_jax.method import Hyperparameter, switch
from rgsp_jax.types import MergeOutput

Density = Annotated[Any, Hyperparameter("share of the entries of each task vector that is kept", low=0, high=1)]
Normalize = Annotated[bool, switch("divide by the coefficients that agree (disjoint mean), or sum them")]


def trim(vectors: Float[Array, "k m n"], density: Any) -> Float[Array, "k m n"]:
    """Every task vector with all but its largest entries set to zero, `floor(density * m n)` of them left.

    At least one is left at any density above 0: floor alone would set scalars and short vectors back to the base.
    """
    count = entry_count(density, vectors[0].size, vectors.dtype)
    count = jnp.maximum(count, (jnp.asarray(density, vectors.dtype) > 0).astype(count.dtype))
    return jax.vmap(lambda x: jnp.where(keep_largest(x, count), x, 0))(vectors)


def merge_by_sign(
    vectors: Float[Array, "k m n"], coefficients: Any = None, normalize: bool = True
) -> tuple[Float[Array, "m n"], Float[Array, ""]]:
    """Elect `sign(sum_i c_i tau_i)` entry by entry and merge the values that have it.

    Args:
        vectors: K task vectors.
        coefficients: [K] factors, also in the election; None is 1 for each.
        normalize: divide by the sum of the coefficients that took part.

    Returns:
        The merged task vector; and the share of the absolute mass that agrees with the elected signs, 1 where nothing
        conflicts or nothing is left.
    """
    count = vectors.shape[0]
    factors = jnp.ones(count, vectors.dtype) if coefficients is None else jnp.asarray(coefficients, vectors.dtype)
    factors = factors[:, None, None]
    weighted = factors * vectors
    elected = jnp.sign(weighted.sum(0))
    agrees = (jnp.sign(weighted) == elected[None]) & (weighted != 0)
    selected = jnp.where(agrees, weighted, 0)
    mass = jnp.sum(jnp.abs(weighted))
    agreement = jnp.where(mass > 0, jnp.sum(jnp.abs(selected)) / jnp.where(mass > 0, mass, 1), 1)
    merged = selected.sum(0)
    if normalize:
        shares = jnp.sum(jnp.where(agrees, factors, 0), axis=0)
        merged = merged / jnp.where(shares == 0, 1, shares)
    return merged, agreement


def ties(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    density: Density = 0.2,
    scale: Scale = 1.0,
    coefficients: TaskCoefficients = None,
    normalize: Normalize = True,
) -> MergeOutput:
    """`base + scale * disjoint_mean(trim(theta_i - base))` (Yadav et al. 2023, arXiv 2306.01708, algorithm 1).

    The signs are elected by total mass; where it cancels exactly nothing is elected and the base stays, as the paper's
    formula has it (its code takes the sign of the majority). The paper trims the whole model at once, this every
    tensor by itself, as merging tools that stream do; exactly `floor(density * m n)` entries are kept, at least one at
    a density above 0.

    Args:
        stack: K >= 1 models [K, m, n].
        base: their common ancestor [m, n].
        density: 0.2 and scale 1 are the paper's choice without validation data.
        scale: factor on the merged task vector.
        coefficients: [K] factors of the task vectors, also in the election.
        normalize: False sums the values that agree in place of averaging them.

    Returns:
        stats: `sign_agreement`, the share of the trimmed mass that has the elected sign.
    """
    vectors = trim(task_vectors(stack, base), density)
    merged, agreement = merge_by_sign(vectors, coefficients, normalize)
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * merged, {"sign_agreement": agreement})
