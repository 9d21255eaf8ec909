"""Gromov-Wasserstein couplings at an epsilon in the problem's own units, followed down from where structure appears."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.transport.coupling import gromov_wasserstein
from rgsp_jax.transport.problem import TransportProblem, centre_costs
from rgsp_jax.types import Coupling

_LOOSE = 1e-3
"""L1 change of the plan at which a stage on the way is done."""
_STEPS = 15
"""Most outer steps of a stage on the way."""


def critical_epsilon(
    cost_a: Float[Array, "ra ra"],
    cost_b: Float[Array, "rb rb"],
    a: Float[Array, "ra"] | None = None,
    b: Float[Array, "rb"] | None = None,
) -> Float[Array, ""]:
    """The epsilon at which the product plan `a b'` stops being a stable coupling.

    Where the linear terms vanish the product plan is a fixed point at every epsilon. To first order an outer step takes
    a deviation Y of it to `(4 / epsilon) a b' * (C_A' Y C_B')`, with C' the costs centred about their marginals; it
    grows where epsilon is below

        4 max { l m : l, m eigenvalues of sqrt(a) C_A' sqrt(a), sqrt(b) C_B' sqrt(b), of one sign }.

    Above it the coupling says no more than the marginals' first moments do. Distances concentrate: of n normal points
    in d dimensions, in units of their mean, the critical epsilon is about `4 (1 + sqrt(d / n))^4 / d^2` (the largest
    eigenvalue of a Wishart matrix, Marchenko & Pastur 1967), so that no one epsilon serves all widths.

    Args:
        cost_a, cost_b: as `gromov_wasserstein` takes them; in any units, the result is in the product of them.
        a, b: weights of rows and columns, divided by their sums; None for uniform ones.

    Returns:
        A positive number, or zero where a cost has no structure at all.
    """
    dtype = jnp.float64 if jnp.float64 in (jnp.result_type(cost_a), jnp.result_type(cost_b)) else jnp.float32
    cost_a, cost_b = ((cost + cost.T) / 2 for cost in (jnp.asarray(cost_a, dtype), jnp.asarray(cost_b, dtype)))
    weights = [
        jnp.ones(cost.shape[0], dtype) if w is None else jnp.where(w > 0, jnp.asarray(w, dtype), 0)
        for cost, w in ((cost_a, a), (cost_b, b))
    ]
    weights = [w / jnp.where(jnp.sum(w) > 0, jnp.sum(w), 1) for w in weights]
    linear, (a, b) = jnp.zeros((cost_a.shape[0], cost_b.shape[0]), dtype), weights
    problem = centre_costs(TransportProblem(cost_a, cost_b, linear, a, b, jnp.ones((), dtype)))
    extremes = []
    for cost, w in ((problem.cost_a, a), (problem.cost_b, b)):
        root = jnp.sqrt(w)
        values = jnp.linalg.eigvalsh(root[:, None] * cost * root[None, :])
        extremes.append((jnp.minimum(values[0], 0), jnp.maximum(values[-1], 0)))
    (low_a, high_a), (low_b, high_b) = extremes
    return 4 * jnp.maximum(low_a * low_b, high_a * high_b)


def anneal_gromov_wasserstein(
    cost_a: Float[Array, "ra ra"],
    cost_b: Float[Array, "rb rb"],
    a: Float[Array, "ra"] | None = None,
    b: Float[Array, "rb"] | None = None,
    linear_cost: Float[Array, "ra rb"] | None = None,
    fused_penalty: float | Float[Array, ""] = 0.0,
    *,
    start: float = 1.0,
    end: float = 0.1,
    stages: int = 8,
    initial: Float[Array, "ra rb"] | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
) -> Coupling:
    """`gromov_wasserstein` at an epsilon of `end` critical ones, reached from `start` in stages of equal ratio.

    Every stage begins with the plan of the one before, so that what costs say coarsely is settled before what they say
    finely; the derivative is that of the last stage.

    Args:
        cost_a, cost_b, a, b, linear_cost, fused_penalty: as `gromov_wasserstein` takes them.
        start, end: first and last epsilon in units of `critical_epsilon`, `start >= end > 0`.
        stages: how many epsilons, at least one (which is `end`).
        initial: plan to start from; None for `a b'`.
        tolerance, max_iterations: of the last stage.

    Raises:
        ValueError: shapes or settings out of range.
    """
    if not (stages >= 1 and start >= end > 0):
        raise ValueError(f"annealing wants start >= end > 0 and stages >= 1, got {start}, {end} and {stages}")
    size = jnp.shape(cost_a)[0], jnp.shape(cost_b)[0]
    linear_cost = jnp.zeros(size) if linear_cost is None else linear_cost
    ratios = np.geomspace(start, end, stages)
    return _anneal(cost_a, cost_b, a, b, linear_cost, fused_penalty, ratios, initial, tolerance, max_iterations)


@partial(jax.jit, static_argnames=("tolerance", "max_iterations"))
def _anneal(
    cost_a: Array,
    cost_b: Array,
    a: Array | None,
    b: Array | None,
    linear_cost: Array,
    fused_penalty: Array,
    ratios: Float[Array, "stages"],
    initial: Array | None,
    tolerance: float | None,
    max_iterations: int,
) -> Coupling:
    epsilon = lax.stop_gradient(critical_epsilon(cost_a, cost_b, a, b))
    epsilons = jnp.where(epsilon > 0, epsilon, 1) * ratios.astype(epsilon.dtype)
    solve = partial(gromov_wasserstein, cost_a, cost_b, a, b, linear_cost=linear_cost, fused_penalty=fused_penalty)
    if initial is None:
        rows, columns = (
            jnp.ones(cost.shape[0], epsilon.dtype) if w is None else jnp.asarray(w, epsilon.dtype)
            for cost, w in ((cost_a, a), (cost_b, b))
        )
        initial = rows[:, None] * columns[None, :] / (jnp.sum(rows) * jnp.sum(columns))

    def follow(plan: Array, epsilon: Array) -> tuple[Array, None]:
        return solve(epsilon=epsilon, initial=plan, tolerance=_LOOSE, max_iterations=_STEPS).plan, None

    start = lax.stop_gradient(lax.scan(follow, jnp.asarray(initial, epsilon.dtype), epsilons[:-1])[0])
    return solve(epsilon=epsilons[-1], initial=start, tolerance=tolerance, max_iterations=max_iterations)
