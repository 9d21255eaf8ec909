"""The mean of models, exact where they are equal."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def stack_mean(
    stack: Float[Array, "k *shape"], coefficients: Float[Array, "k"] | None = None
) -> Float[Array, "*shape"]:
    """`theta_1 + sum_i c_i (theta_i - theta_1)`, the mean with coefficients c that sum to 1 (uniform by default).

    Summing the differences, not the models, returns equal models bit for bit (a third of `3 x` need not be x) and
    rounds at the size of what the models differ by.
    """
    difference = stack[1:] - stack[:1]
    if coefficients is None:
        return stack[0] + difference.sum(0) / stack.shape[0]
    shares = coefficients[1:] / coefficients.sum()
    return stack[0] + jnp.tensordot(shares, difference, axes=1)
