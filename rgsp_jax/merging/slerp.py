"""Spherical interpolation of two models."""

from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rgsp_jax.method import Combination, Hyperparameter
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
    inner = jnp.sum(a * b)
    products = jnp.stack([jnp.sum(a * a), inner, inner, jnp.sum(b * b)]).reshape(2, 2)
    weights, stats = solve_slerp(products, t, colinear_threshold)
    return MergeOutput(build_slerp(stack, weights), stats)


class SlerpWeights(NamedTuple):
    """What an entry of the merge is made with."""

    linear: Bool[Array, ""]
    on_a: Float[Array, ""]
    on_b: Float[Array, ""]


def solve_slerp(
    products: Float[Array, "2 2"], t: Array | float = 0.5, colinear_threshold: Array | float = 0.9995
) -> tuple[SlerpWeights, dict[str, Array]]:
    """The weights of A and B from their inner products."""
    t = jnp.asarray(t, products.dtype)
    size = products[0, 0] * products[1, 1]
    cosine = products[0, 1] / jnp.sqrt(jnp.where(size > 0, size, 1.0))
    linear = (jnp.abs(cosine) > jnp.asarray(colinear_threshold, products.dtype)) | (size == 0)
    angle = jnp.arccos(jnp.where(linear, 0.0, cosine))  # a safe angle where it is not used keeps gradients finite
    on_a = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    on_b = jnp.where(linear, t, jnp.sin(t * angle) / jnp.sin(angle))
    return SlerpWeights(linear, on_a, on_b), {"cosine": cosine}


def build_slerp(stack: Float[Array, "2 *shape"], weights: SlerpWeights) -> Float[Array, "*shape"]:
    """The merge of tensors, or of any part of them."""
    a, b = stack
    between = a + weights.on_b * (b - a)  # exact for equal models, as (1 - t) a + t b is not
    return jnp.where(weights.linear, between, weights.on_a * a + weights.on_b * b)


SLERP = Combination(solve_slerp, build_slerp)
