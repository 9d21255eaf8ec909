"""Cost matrices of point sets: squared distances between columns, and the joint normalisation of two of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_distances(x: Float[Array, "m r"]) -> Float[Array, "r r"]:
    """Squared Euclidean distances between the columns of x, the `C(i, j) = |x_i - x_j|^2` of SPEC section 1, step 3.

    Computed as `|x_i|^2 + |x_j|^2 - 2 x_i . x_j` about the mean column, clipped at 0; exactly symmetric with an exactly
    zero diagonal. The derivative is finite at coinciding columns (it is zero there, as the distance is squared).

    Args:
        x: [m, r], the points as columns; float64 is computed in float64, everything else in float32.

    Returns:
        [r, r], in squared units of x.

    Raises:
        ValueError: x is not a matrix.
    """
    if jnp.ndim(x) != 2:
        raise ValueError(f"squared_distances wants the points as columns of [m, r], got shape {jnp.shape(x)}")
    x = jnp.asarray(x)
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    x = x - jnp.mean(x, axis=1, keepdims=True)  # distances do not move, cancellation between norms shrinks
    gram = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
    gram = (gram + gram.T) / 2
    norms = jnp.diagonal(gram)
    distances = jnp.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)
    return jnp.where(jnp.eye(x.shape[1], dtype=bool), 0, distances)


def normalize_jointly(
    cost_a: Float[Array, "ra ra"], cost_b: Float[Array, "rb rb"]
) -> tuple[Float[Array, "ra ra"], Float[Array, "rb rb"]]:
    """Divide both cost matrices by their joint maximum, so that the transport cost lies in [0, 1] (SPEC R3).

    `C_A / s, C_B / s` with `s = max(max C_A, max C_B)`; where s is not positive (all points coincide) the matrices come
    back as they are. The derivative goes through s: where several entries attain the maximum (the degenerate costs of
    orthonormal points attain it everywhere) it is shared evenly between them, a subgradient.

    Args:
        cost_a: [ra, ra], non-negative.
        cost_b: [rb, rb], non-negative, in the units of cost_a.

    Returns:
        Both matrices divided by s, dimensionless.

    Raises:
        ValueError: an argument is not a non-empty matrix.
    """
    wrong = [
        f"{name} wants a non-empty matrix, got shape {jnp.shape(cost)}"
        for name, cost in (("cost_a", cost_a), ("cost_b", cost_b))
        if jnp.ndim(cost) != 2 or 0 in jnp.shape(cost)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    cost_a, cost_b = jnp.asarray(cost_a), jnp.asarray(cost_b)
    dtype = jnp.float64 if jnp.float64 in (cost_a.dtype, cost_b.dtype) else jnp.float32
    cost_a, cost_b = cost_a.astype(dtype), cost_b.astype(dtype)
    # One reduction over both, so that a maximum attained in both matrices is shared over all its places.
    largest = jnp.max(jnp.concatenate([cost_a.ravel(), cost_b.ravel()]))
    scale = jnp.where(largest > 0, largest, 1)
    return cost_a / scale, cost_b / scale
