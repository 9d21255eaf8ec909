"""Spherical interpolation of two models."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Position = Annotated[Any, Hyperparameter("0 is the first model, 1 the second", low=0, high=1)]
Threshold = Annotated[Any, Hyperparameter("cosine past which slerp is linear", low=0, high=1)]


def slerp(stack: Float[Array, "2 m n"], t: Position = 0.5, colinear_threshold: Threshold = 0.9995) -> MergeOutput:
    """`(sin((1 - t) w) A + sin(t w) B) / sin w`, w the angle between A and B as flat vectors (Shoemake 1985).

    Linear interpolation where |cos w| passes `colinear_threshold` (the common convention of merging tools: siblings
    of one ancestor usually do) or a model is zero.

    Args:
        stack: A and B, tensors of one shape, each taken as one vector.
        t: position between A and B; dimensionless.
    """
    a, b = stack
    t = jnp.asarray(t, stack.dtype)
    square_a, square_b, inner = jnp.sum(a * a), jnp.sum(b * b), jnp.sum(a * b)
    size = square_a * square_b
    cosine = inner / jnp.sqrt(jnp.where(size > 0, size, 1.0))
    linear = (jnp.abs(cosine) > jnp.asarray(colinear_threshold, stack.dtype)) | (size == 0)
    angle = jnp.arccos(jnp.where(linear, 0.0, cosine))  # a safe angle where it is not used keeps gradients finite
    on_a = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    on_b = jnp.where(linear, t, jnp.sin(t * angle) / jnp.sin(angle))
    between = a + t * (b - a)  # exact for equal models, as (1 - t) a + t b is not
    merged = jnp.where(linear, between, on_a * a + on_b * b)
    return MergeOutput(merged, {"cosine": cosine})
