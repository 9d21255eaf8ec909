"""Model breadcrumbs: task vectors without their smallest and their largest entries."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.merging.sparsity import entry_count, keep_largest
from rgsp_jax.merging.task_arithmetic import Scale, TaskCoefficients, sum_tasks, task_vectors
from rgsp_jax.merging.ties import Density
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Gamma = Annotated[Any, Hyperparameter("share of each task vector's largest entries that is dropped", low=0, high=1)]


def keep_middle(vectors: Float[Array, "k m n"], density: Any, gamma: Any) -> Float[Array, "k m n"]:
    """Task vectors with `floor(density * m n)` entries left: the largest `floor(gamma * m n)` go, then the smallest.

    Where both do not fit, fewer of the largest go and none of the smallest.
    """
    size = vectors[0].size
    left = entry_count(density, size, vectors.dtype)
    largest = jnp.minimum(entry_count(gamma, size, vectors.dtype), size - left)

    def mask(x: Array) -> Array:
        return jnp.where(keep_largest(x, left + largest) & ~keep_largest(x, largest), x, 0)

    return jax.vmap(mask)(vectors)


def breadcrumbs(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    density: Density = 0.9,
    gamma: Gamma = 0.01,
    scale: Scale = 0.4,
    coefficients: TaskCoefficients = None,
) -> MergeOutput:
    """`base + scale * sum_i c_i m_i tau_i`, the mask m_i trimming both ends.

    Davari & Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795. The masks are per tensor, as the paper's layer-wise
    ones. The paper tunes both shares; density and gamma are by default those that mergekit's documentation gives, the
    scale is that of task arithmetic and of the paper's script.

    Args:
        stack: K >= 1 models [K, m, n].
        base: their common ancestor [m, n].
        density: share of the entries left after both cuts.
        gamma: share of the largest entries, dropped as outliers.
        scale, coefficients: see `task_arithmetic`.
    """
    vectors = keep_middle(task_vectors(stack, base), density, gamma)
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * sum_tasks(vectors, coefficients), {})
