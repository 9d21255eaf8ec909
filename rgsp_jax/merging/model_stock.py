"""Model stock: how far to go from the base to the average, by the angle between the models."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.merging.task_arithmetic import task_vectors
from rgsp_jax.types import MergeOutput


def model_stock(stack: Float[Array, "k m n"], base: Float[Array, "m n"]) -> MergeOutput:
    """`t mean + (1 - t) base` with `t = K cos / (1 + (K - 1) cos)` (Jang et al. 2024, arXiv 2403.19522).

    cos is the cosine between task vectors, each tensor taken as one vector; for more than two models, where the paper
    has a single angle, the mean over the pairs, as merging tools take it. Orthogonal task vectors give the base,
    parallel ones the average. A task vector of zero counts as orthogonal; where 1 + (K - 1) cos is 0, t is.

    Args:
        stack: K >= 2 models [K, m, n].
        base: their common ancestor [m, n].

    Returns:
        stats: `cosine`; `interpolation`, t; `extrapolated`, a flag, where the angle is obtuse and t leaves [0, 1].
    """
    vectors = task_vectors(stack, base)
    count = stack.shape[0]
    squares = [jnp.sum(x * x) for x in vectors]
    cosines = []
    for i, j in itertools.combinations(range(count), 2):
        size = squares[i] * squares[j]
        inner = jnp.sum(vectors[i] * vectors[j])
        cosines.append(jnp.where(size > 0, inner / jnp.sqrt(jnp.where(size > 0, size, 1)), 0))
    cosine = jnp.mean(jnp.stack(cosines))
    divisor = 1 + (count - 1) * cosine
    regular = jnp.abs(divisor) > 8 * float(jnp.finfo(stack.dtype).eps)
    t = jnp.where(regular, count * cosine / jnp.where(regular, divisor, 1), 0)
    mean = stack_mean(stack)
    stats = {"cosine": cosine, "interpolation": t, "extrapolated": (t < 0) | (t > 1 + 1e-3)}
    return MergeOutput(mean + (1 - t) * (base - mean), stats)
