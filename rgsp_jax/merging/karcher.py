"""The Karcher mean of K models on the sphere."""

from typing import Annotated, Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rgsp_jax.linalg.dense import matmul
from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.merging.average import Coefficients
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Iterations = Annotated[int, Hyperparameter("steps of the mean's iteration", low=1, static=True, whole=True)]


def karcher(
    stack: Float[Array, "k m n"], coefficients: Coefficients = None, iterations: Iterations = 10
) -> MergeOutput:
    """`(sum_i c_i |theta_i|) u`, u the Karcher mean of the directions theta_i / |theta_i| on the unit sphere.

    u solves `sum_i c_i log_u(theta_i / |theta_i|) = 0` (Karcher 1977) by fixed-point steps along the mean of the
    logarithms, from the normalised mean of the directions. u lies in the span of the models, so that everything
    iterated is K numbers and a K x K Gram matrix. Two models of one length give SLERP at c_2.

    Directions that rounding cannot tell from parallel are averaged linearly, which is the same mean. Models of zero
    have no direction: they count in the length alone.

    Args:
        stack: K >= 1 tensors of one shape, each taken as one vector.
        coefficients: [K] nonnegative numbers, divided by their sum; None is uniform.
        iterations: fixed-point steps; siblings need two or three.

    Returns:
        stats: `cosine`, the smallest between two models; `step`, the length of the last step, in radians; flags
        `unconverged`, where it is more than 1e-4, and `no_mean`, where the directions cancel and none is their mean.
    """
    count = stack.shape[0]
    uniform = jnp.full(count, 1 / count, stack.dtype)
    shares = uniform if coefficients is None else jnp.asarray(coefficients, stack.dtype)
    shares = shares / shares.sum()
    norms, inverse, cosines, parallel = compare_directions(stack)
    alive = norms > 0
    active = jnp.where(alive, shares, 0)
    total = active.sum()
    active = active / jnp.where(total > 0, total, 1)
    eps = float(jnp.finfo(stack.dtype).eps)

    def normalise(direction: Float[Array, "k"]) -> tuple[Array, Array]:
        square = direction @ matmul(cosines, direction)
        regular = square > eps
        return direction / jnp.sqrt(jnp.where(regular, square, 1)), regular

    def advance(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        direction, _ = state
        inner = jnp.clip(matmul(cosines, direction), -1, 1)
        factors = active * angle_over_sine(inner)
        # log_u(x) = theta / sin theta (x - cos theta u); exp_u of their mean.
        tangent = factors - jnp.sum(factors * inner) * direction
        square = tangent @ matmul(cosines, tangent)
        moving = square > eps**2
        step = jnp.where(moving, jnp.sqrt(jnp.where(moving, square, 1)), 0)
        along = jnp.where(moving, jnp.sin(step) / jnp.where(moving, step, 1), 1)
        return normalise(jnp.cos(step) * direction + along * tangent)[0], step

    start, regular = normalise(active)
    direction, step = lax.fori_loop(0, iterations, advance, (start, jnp.zeros((), stack.dtype)))
    smallest = jnp.min(jnp.where(alive[:, None] & alive[None, :], cosines, 1))
    parallel = parallel | (total == 0)
    factors = jnp.sum(shares * norms) * direction * inverse
    merged = jnp.where(parallel, stack_mean(stack, shares), jnp.tensordot(factors, stack, axes=1))
    stats = {
        "cosine": smallest,
        "step": step,
        "unconverged": (step > 1e-4) & ~parallel,
        "no_mean": ~regular & alive.any(),
    }
    return MergeOutput(merged, stats)


def compare_directions(
    stack: Float[Array, "k m n"],
) -> tuple[Float[Array, "k"], Float[Array, "k"], Float[Array, "k k"], Bool[Array, ""]]:
    """Lengths, their reciprocals (0 for 0), the cosines between models, and whether rounding tells no direction apart.

    Sines are measured against the first model that is not zero, since a cosine has no digits left near 1.
    """
    squares = jnp.sum(stack * stack, axis=(1, 2))
    alive = squares > 0
    norms = jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1)), 0)
    inverse = jnp.where(alive, 1 / jnp.where(alive, norms, 1), 0)
    inner = jnp.einsum("imn,jmn->ij", stack, stack, precision=lax.Precision.HIGHEST)
    cosines = jnp.clip(inner * inverse[:, None] * inverse[None, :], -1, 1)
    first = jnp.argmax(alive)
    ratios = norms * inverse[first]
    apart = jnp.sum((stack - ratios[:, None, None] * stack[first][None]) ** 2, axis=(1, 2))
    bound = 16 * float(jnp.finfo(stack.dtype).eps)  # of the squared sine; an eighth of it is what the length would lose
    return norms, inverse, cosines, jnp.all(apart <= bound * squares)


def angle_over_sine(cosine: Float[Array, "k"]) -> Float[Array, "k"]:
    """`theta / sin theta` of `cos theta`, by its series near 1, where arccos loses its digits and its derivative."""
    near = cosine > 1 - 1e-3
    angle = jnp.arccos(jnp.where(near, 0.0, jnp.maximum(cosine, -1 + 1e-6)))
    rest = 1 - cosine
    series = 1 + rest / 3 + 2 * rest**2 / 15 + 2 * rest**3 / 35 + 8 * rest**4 / 315
    return jnp.where(near, series, angle / jnp.sin(angle))
