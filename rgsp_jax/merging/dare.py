"""DARE: drop entries of the task vectors at random and rescale the rest."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.merging.sparsity import drop_at_random
from rgsp_jax.merging.task_arithmetic import Scale, TaskCoefficients, sum_tasks, task_vectors
from rgsp_jax.merging.ties import Normalize, merge_by_sign
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

DropRate = Annotated[Any, Hyperparameter("probability that an entry of a task vector is dropped", low=0, high=1)]


def dare(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    key: Array,
    drop_rate: DropRate = 0.9,
    scale: Scale = 0.4,
    coefficients: TaskCoefficients = None,
) -> MergeOutput:
    """`base + scale * sum_i c_i b_i tau_i / (1 - p)`, with b_i ~ Bernoulli(1 - p).

    Yu et al. 2024, Language models are super Mario, arXiv 2311.03099. Task arithmetic on what is left; the same at a
    drop rate of 0. The paper tunes p and the scale: 0.9 is the rate that it shows to be harmless to one model, the
    scale is that of task arithmetic.

    Args:
        stack: K >= 1 models [K, m, n].
        base: their common ancestor [m, n].
        key: PRNG key; the i-th model draws from `fold_in(key, i)`.
        drop_rate: p, a probability; 1 gives the base.
        scale, coefficients: see `task_arithmetic`.
    """
    vectors = drop_at_random(task_vectors(stack, base), key, jnp.asarray(drop_rate, stack.dtype))
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * sum_tasks(vectors, coefficients), {})


def dare_ties(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    key: Array,
    drop_rate: DropRate = 0.9,
    scale: Scale = 1.0,
    coefficients: TaskCoefficients = None,
    normalize: Normalize = True,
) -> MergeOutput:
    """DARE's random dropping in place of TIES' trimming, then its sign election and disjoint mean.

    Yu et al. 2024, arXiv 2311.03099. A trim after it would change nothing from a drop rate of one minus
    TIES' density on, and is left out.

    Args:
        stack, base, key, drop_rate: see `dare`.
        scale, coefficients, normalize: see `ties`.
    """
    vectors = drop_at_random(task_vectors(stack, base), key, jnp.asarray(drop_rate, stack.dtype))
    merged, agreement = merge_by_sign(vectors, coefficients, normalize)
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * merged, {"sign_agreement": agreement})
