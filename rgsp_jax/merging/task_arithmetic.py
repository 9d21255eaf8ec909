"""Task vectors and their plain sum; what every method with a base starts from."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Scale = Annotated[Any, Hyperparameter("factor on the merged task vector")]
TaskCoefficients = Annotated[
    Any, Hyperparameter("one factor per model on its task vector; null is 1 for each", optional=True)
]


def task_vectors(stack: Float[Array, "k m n"], base: Float[Array, "m n"]) -> Float[Array, "k m n"]:
    """`tau_i = theta_i - base`; ValueError where the base has another shape."""
    if base.shape != stack.shape[1:]:
        raise ValueError(f"the base is {list(base.shape)} and the models are {list(stack.shape[1:])}")
    return stack - base[None]


def sum_tasks(vectors: Float[Array, "k m n"], coefficients: Any = None) -> Float[Array, "m n"]:
    """`sum_i c_i tau_i`, c_i = 1 where there are no coefficients."""
    if coefficients is None:
        return vectors.sum(0)
    return jnp.tensordot(jnp.asarray(coefficients, vectors.dtype), vectors, axes=1)


def task_arithmetic(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    scale: Scale = 0.4,
    coefficients: TaskCoefficients = None,
) -> MergeOutput:
    """`base + scale * sum_i c_i (theta_i - base)` (Ilharco et al. 2023, arXiv 2212.04089, section 2).

    The paper tunes the scale on held-out data; 0.4 is what it is taken to be without (Yadav et al. 2023, arXiv
    2306.01708). At 1/K it is the average.

    Args:
        stack: K >= 1 models [K, m, n].
        base: their common ancestor [m, n].
        scale: factor on the sum; negative values unlearn.
        coefficients: [K] factors of the task vectors; they are not divided by their sum.
    """
    merged = sum_tasks(task_vectors(stack, base), coefficients)
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * merged, {})
