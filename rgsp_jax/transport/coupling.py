"""The public Gromov-Wasserstein kernel: arguments in, one `Coupling` out, with the implicit derivative attached."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rgsp_jax.transport.implicit import differentiate_plan
from rgsp_jax.transport.problem import TransportProblem, compute_transport_cost
from rgsp_jax.transport.solvers import SOLVERS, Solution, finest_marginal_tolerance
from rgsp_jax.types import Coupling

# experiments/benchmarks/gromov_wasserstein.py compares them at equal plan error.
_AUTO = "stabilized"
_TOLERANCES = {"float32": 5e-6, "float64": 1e-9}


def gromov_wasserstein(
    cost_a: Float[Array, "ra ra"],
    cost_b: Float[Array, "rb rb"],
    a: Float[Array, "ra"] | None = None,
    b: Float[Array, "rb"] | None = None,
    epsilon: float | Float[Array, ""] = 0.05,
    linear_cost: Float[Array, "ra rb"] | None = None,
    fused_penalty: float | Float[Array, ""] = 0.0,
    *,
    initial: Float[Array, "ra rb"] | None = None,
    solver: str = "auto",
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> Coupling:
    """Entropic (fused) Gromov-Wasserstein coupling of two cost matrices (SPEC section 1, step 3).

    A stationary point, reached from the product plan `a b'` or another one, of

        min over P >= 0, P 1 = a, P' 1 = b of
            sum_ijkl |C_A(i,j) - C_B(k,l)|^2 P_ik P_jl + fused_penalty <M, P> - epsilon H(P),   H(P) = -sum P log P,

    which is a fixed point of `P = diag(u) exp(-(2 G(P) + fused_penalty M) / epsilon) diag(v)` with
    `G_ik = sum_jl |C_A(i,j) - C_B(k,l)|^2 P_jl`. In other conventions the same problem is

        POT plain: epsilon_pot = epsilon;
        POT fused: alpha = 1 / (1 + fused_penalty), epsilon_pot = alpha epsilon (its objective is alpha times this one);
        ott-jax: epsilon_ott = epsilon / 2, fused_penalty_ott = fused_penalty / 2.

    Derivatives of `plan` and `cost` in both modes are implicit, at the fixed point, with respect to cost_a, cost_b,
    linear_cost, a, b, epsilon and fused_penalty, in memory of a few plans; those of `marginal_error` and `plan_change`
    are zero. They are finite also where the plan is not converged or the costs are degenerate, but mean something only
    at a stable fixed point (`converged`). The derivatives with respect to masked weights and to `initial` are zero.

    Args:
        cost_a: [ra, ra], of order one (`normalize_jointly`), taken as symmetric: the symmetric part is used.
        cost_b: [rb, rb], likewise, in the units of cost_a.
        a: [ra], non-negative weights of the rows, divided by their sum here; uniform if None. Entries that are zero
            are masks: their rows of the plan are exactly zero, everything else is as if they were absent.
        b: [rb], likewise for the columns.
        epsilon: positive entropic regularisation in units of cost squared; may be traced. In float32 small values
            (below about 1e-3 for costs in [0, 1]) may end unconverged.
        linear_cost: [ra, rb], the M of the fused problem; None for the plain one.
        fused_penalty: factor of the linear term; without a linear_cost it has no effect.
        initial: [ra, rb], the plan to start from, with marginals a and b; None for `a b'`. There are many stationary
            points, and the nearest is found: see `anneal_gromov_wasserstein`.
        solver: "stabilized", "ott" (through ott-jax, the reference), or "auto" for the faster, "stabilized".
        tolerance: L1 change of the plan (whose mass is one) by one more outer step at which iteration stops; None for
            5e-6 in float32 and 1e-9 in float64.
        max_iterations: most outer steps.

    Returns:
        `Coupling`: plan [ra, rb]; cost, without the entropy, quadratic and linear part together:
        `sum |C_A - C_B|^2 P P + fused_penalty <M, P>`; marginal_error, plan_change (in one more outer step, projected
        exactly); converged: both at most `tolerance` (the marginal error at most what sums in this precision can reach,
        where that is more), and the problem is well posed (positive epsilon and mass).
        float64 if cost_a or cost_b is, else float32.

    Raises:
        ValueError: shapes that do not fit together, an unknown solver, settings out of range; all offenders are named.

    Source: Peyre, Cuturi, Solomon 2016 (projected gradient); Vayer et al. 2019 (fused).
    """
    optional = {"a": a, "b": b, "linear_cost": linear_cost, "initial": initial}
    _check_arguments(cost_a, cost_b, optional, epsilon, fused_penalty, solver, tolerance, max_iterations)
    dtype = jnp.float64 if jnp.float64 in (jnp.result_type(cost_a), jnp.result_type(cost_b)) else jnp.float32
    tolerance = _TOLERANCES[dtype.__name__] if tolerance is None else float(tolerance)
    cost_a, cost_b = jnp.asarray(cost_a, dtype), jnp.asarray(cost_b, dtype)
    shape = (cost_a.shape[0], cost_b.shape[0])
    if linear_cost is None:
        linear = jnp.zeros(shape, dtype)
    else:
        linear = jnp.asarray(fused_penalty, dtype) * jnp.asarray(linear_cost, dtype)
    a = jnp.ones(shape[0], dtype) if a is None else jnp.asarray(a, dtype)
    b = jnp.ones(shape[1], dtype) if b is None else jnp.asarray(b, dtype)
    arrays = TransportProblem(cost_a, cost_b, linear, a, b, jnp.asarray(epsilon, dtype))
    initial = None if initial is None else jnp.asarray(initial, dtype)
    return _couple(_AUTO if solver == "auto" else solver, tolerance, max_iterations, arrays, initial)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _couple(
    solver: str, tolerance: float, max_iterations: int, arrays: TransportProblem, initial: Array | None
) -> Coupling:
    a, mass_a = _normalize_weights(arrays.a)
    b, mass_b = _normalize_weights(arrays.b)
    well_posed = (arrays.epsilon > 0) & (mass_a > 0) & (mass_b > 0)
    problem = TransportProblem(
        cost_a=_symmetrize(arrays.cost_a),
        cost_b=_symmetrize(arrays.cost_b),
        linear=arrays.linear,
        a=a,
        b=b,
        epsilon=jnp.where(arrays.epsilon > 0, arrays.epsilon, 1),
    )
    start = a[:, None] * b[None, :]
    if initial is not None:
        start = jnp.where(start > 0, initial, 0)
    plan, plan_change = _solve(solver, tolerance, max_iterations, problem, jax.lax.stop_gradient(start))
    marginal_error = jnp.sum(jnp.abs(jnp.sum(plan, axis=1) - a)) + jnp.sum(jnp.abs(jnp.sum(plan, axis=0) - b))
    marginal_error = jax.lax.stop_gradient(marginal_error)
    attainable = max(tolerance, 2 * finest_marginal_tolerance(problem))
    converged = (plan_change <= tolerance) & (marginal_error <= attainable) & well_posed
    return Coupling(plan, compute_transport_cost(problem, plan), marginal_error, plan_change, converged)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _solve(solver: str, tolerance: float, max_iterations: int, problem: TransportProblem, initial: Array) -> Solution:
    return SOLVERS[solver](problem, initial, tolerance, max_iterations)


@_solve.defjvp
def _solve_jvp(solver, tolerance, max_iterations, primals, tangents) -> tuple[Solution, Solution]:
    (problem, initial), (tangent, _) = primals, tangents
    solution = _solve(solver, tolerance, max_iterations, problem, initial)
    change = differentiate_plan(problem, solution.plan, tangent)
    return solution, Solution(change, jnp.zeros_like(solution.plan_change))


def _symmetrize(cost: Array) -> Array:
    return (cost + cost.T) / 2


def _normalize_weights(weights: Array) -> tuple[Array, Array]:
    """Weights of total one, masked entries held at zero (also by their derivative), and the original total."""
    weights = jnp.where(weights > 0, weights, 0)
    mass = jnp.sum(weights)
    return weights / jnp.where(mass > 0, mass, 1), mass


def _check_arguments(cost_a, cost_b, optional, epsilon, fused_penalty, solver, tolerance, max_iterations) -> None:
    wrong = []
    for name, cost in (("cost_a", cost_a), ("cost_b", cost_b)):
        shape = jnp.shape(cost)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            wrong.append(f"{name} wants a square, non-empty matrix, got shape {shape}")
    if not wrong:
        ra, rb = jnp.shape(cost_a)[0], jnp.shape(cost_b)[0]
        wanted = {"a": (ra,), "b": (rb,), "linear_cost": (ra, rb), "initial": (ra, rb)}
        for name, shape in wanted.items():
            value = optional[name]
            if value is not None and jnp.shape(value) != shape:
                wrong.append(f"{name} wants shape {shape} beside these costs, got {jnp.shape(value)}")
    for name, value in (("epsilon", epsilon), ("fused_penalty", fused_penalty)):
        if jnp.ndim(value) != 0:
            wrong.append(f"{name} wants a scalar, got shape {jnp.shape(value)}")
    if isinstance(epsilon, int | float | np.number) and not epsilon > 0:
        wrong.append(f"epsilon wants a positive number, got {epsilon}")
    if solver not in ("auto", *SOLVERS):
        wrong.append(f"solver wants one of {', '.join(['auto', *SOLVERS])}, got {solver!r}")
    if tolerance is not None and not tolerance > 0:
        wrong.append(f"tolerance wants a positive number, got {tolerance}")
    if max_iterations < 1:
        wrong.append(f"max_iterations wants at least 1, got {max_iterations}")
    if wrong:
        raise ValueError("; ".join(wrong))
