"""Fisher-weighted averaging."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.merging.average import Coefficients
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Floor = Annotated[Any, Hyperparameter("smallest Fisher information that counts", low=0)]


def fisher(
    stack: Float[Array, "k m n"],
    fishers: Float[Array, "k m n"],
    coefficients: Coefficients = None,
    floor: Floor = 1e-6,
) -> MergeOutput:
    """`sum_i c_i F_i theta_i / sum_i c_i F_i`, entry by entry (Matena & Raffel 2022, arXiv 2111.09832).

    F_i is the diagonal of the i-th model's Fisher information, the mean squared gradient of its log-likelihood. Where
    no model has any above zero the weighted average is taken.

    Args:
        stack: K >= 1 models [K, m, n].
        fishers: [K, m, n], nonnegative.
        coefficients: [K] nonnegative importances of the models; None is uniform.
        floor: F_i is raised to it, so that entries without information are averaged.
    """
    if fishers.shape != stack.shape:
        raise ValueError(f"Fisher informations are {list(fishers.shape)} for models {list(stack.shape)}")
    count = stack.shape[0]
    shares = jnp.ones(count, stack.dtype) if coefficients is None else jnp.asarray(coefficients, stack.dtype)
    weights = shares[:, None, None] * jnp.maximum(fishers.astype(stack.dtype), jnp.asarray(floor, stack.dtype))
    mean = stack_mean(stack, None if coefficients is None else shares)
    total = weights.sum(0)
    departure = jnp.sum(weights * (stack - mean[None]), axis=0) / jnp.where(total > 0, total, 1)
    return MergeOutput(mean + departure, {})
