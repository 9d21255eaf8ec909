"""The weighted average of K models."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Coefficients = Annotated[
    Any, Hyperparameter("one number per model, divided by their sum; null is uniform", optional=True)
]


def average(stack: Float[Array, "k m n"], coefficients: Coefficients = None) -> MergeOutput:
    """`sum_i c_i theta_i / sum_i c_i` (Wortsman et al. 2022, Model soups, arXiv 2203.05482).

    Args:
        stack: K >= 1 tensors of one shape.
        coefficients: [K] numbers with a sum other than zero; None is uniform.
    """
    shares = None if coefficients is None else jnp.asarray(coefficients, stack.dtype)
    return MergeOutput(stack_mean(stack, shares), {})
