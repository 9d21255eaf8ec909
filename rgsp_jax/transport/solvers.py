"""Solvers of the entropic Gromov-Wasserstein problem: projected gradient from a plan.

Both iterate `P <- projection of exp(-(2 G(P) + T) / epsilon) on the marginals` from the given plan, as POT and ott-jax
do from `a b'` (Peyre, Cuturi, Solomon 2016), so that they reach the same stationary point; they differ in how they
project.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.transport.problem import TransportProblem, centre_costs, linearize
from rgsp_jax.transport.scaling import fit_marginals, scale_to_marginals

# While the plan still moves, its marginals need be met to a hundredth of that move only (at most 1e-4 of the mass):
# looser than this, and the path can end at another stationary point than the one exact projections reach.
_FORCING = 1e-2
_LOOSEST = 1e-4


class Solution(NamedTuple):
    """A plan and the L1 change that one more outer step would make to it."""

    plan: Float[Array, "ra rb"]
    plan_change: Float[Array, ""]


Solver = Callable[[TransportProblem, Array, float, int], Solution]
"""Of a problem, the plan to start from, the tolerance of a step's change and the most steps."""


def finest_marginal_tolerance(problem: TransportProblem) -> float:
    """L1 error of the marginals that sums in this precision can still reach."""
    size = max(problem.cost_a.shape[0], problem.cost_b.shape[0])
    return float(jnp.finfo(problem.cost_a.dtype).eps) * (4 + size**0.5)


State = TypeVar("State", "_Stabilized", "_Ott")


class _Stabilized(NamedTuple):
    plan: Array
    upcoming: Array
    potential: Array
    change: Array


def solve_stabilized(
    problem: TransportProblem, initial: Float[Array, "ra rb"], tolerance: float, max_iterations: int
) -> Solution:
    """Outer steps on centred costs, each projected by Sinkhorn scalings and Newton steps from the last potentials."""
    linearization = linearize(problem)
    finest = max(finest_marginal_tolerance(problem), 1e-2 * tolerance)

    def step(last: _Stabilized) -> _Stabilized:
        wanted = jnp.clip(_FORCING * last.change, finest, max(_LOOSEST, finest))
        log_kernel = linearization.log_kernel(last.upcoming)
        scaled = scale_to_marginals(log_kernel, last.potential, problem.a, problem.b, wanted)
        change = jnp.sum(jnp.abs(scaled.plan - last.upcoming))
        return _Stabilized(last.upcoming, scaled.plan, scaled.potential, change)

    start = _Stabilized(initial, initial, jnp.zeros_like(problem.b), jnp.ones_like(problem.epsilon))
    # The step that shows a plan to be a fixed point is the one that measures its change: that plan is the answer.
    state = _iterate(step, start, tolerance, max_iterations)
    return Solution(state.plan, state.change)


class _Ott(NamedTuple):
    """A plan as ott's linearisation reads it."""

    matrix: Array
    f: Array
    g: Array
    change: Array

    def marginal(self, axis: int = 0) -> Array:
        return jnp.sum(self.matrix, axis=axis)

    def apply(self, inputs: Array, axis: int = 0) -> Array:
        return jnp.matmul(self.matrix.T if axis == 0 else self.matrix, inputs)


def solve_with_ott(
    problem: TransportProblem, initial: Float[Array, "ra rb"], tolerance: float, max_iterations: int
) -> Solution:
    """Outer steps through ott-jax: its linearisation and its log-domain Sinkhorn with warm potentials.

    The gradient that ott hands to Sinkhorn is half that of the objective, hence `epsilon_ott = epsilon / 2` and
    `fused_penalty_ott = 1 / 2` on T. Its own stopping rule watches the cost, which is flat at a stationary point (and
    adds an absolute tolerance), so that it declares plans converged that are far off: this one watches the plan.
    """
    # A second and a half that only who asks for this solver should wait.
    from ott.geometry import geometry
    from ott.problems.quadratic import quadratic_problem
    from ott.solvers.linear import sinkhorn

    # Its log-domain sums lose a digit to the size of their exponents; fit_marginals makes up for it afterwards.
    threshold = max(10 * finest_marginal_tolerance(problem), 1e-1 * tolerance)
    # ott mixes dtypes and ranks of scalars freely.
    centred = centre_costs(problem)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        quadratic = quadratic_problem.QuadraticProblem(
            geometry.Geometry(cost_matrix=centred.cost_a),
            geometry.Geometry(cost_matrix=centred.cost_b),
            geometry.Geometry(cost_matrix=centred.linear),
            fused_penalty=0.5,
            a=problem.a,
            b=problem.b,
        )
        solver = sinkhorn.Sinkhorn(threshold=threshold, max_iterations=2000, implicit_diff=None)

        def step(last: _Ott) -> _Ott:
            linear_problem = quadratic.update_linearization(last, epsilon=problem.epsilon / 2)  # type: ignore[arg-type]
            out = solver(linear_problem, init=(last.f, last.g))
            plan = out.matrix
            return _Ott(plan, out.f, out.g, jnp.sum(jnp.abs(plan - last.matrix)))

        f, g = (jnp.where(w > 0, jnp.zeros_like(w), -jnp.inf) for w in (problem.a, problem.b))
        start = _Ott(initial, f, g, jnp.ones_like(problem.epsilon))
        state = _iterate(step, start, tolerance, max_iterations)
    plan = fit_marginals(state.matrix, problem.a, problem.b)
    finest = jnp.full_like(problem.epsilon, finest_marginal_tolerance(problem))
    log_kernel = linearize(problem).log_kernel(plan)
    again = scale_to_marginals(log_kernel, jnp.zeros_like(problem.b), problem.a, problem.b, finest)
    return Solution(plan, jnp.sum(jnp.abs(again.plan - plan)))


def _iterate(step: Callable, start: State, tolerance: float, max_iterations: int) -> State:
    """Outer steps until one changes the plan by no more than tolerance, or by NaN."""

    def unfinished(state: tuple[Array, State]) -> Array:
        return (state[0] < max_iterations) & (state[1].change > tolerance)

    return lax.while_loop(unfinished, lambda state: (state[0] + 1, step(state[1])), (jnp.int32(0), start))[1]


SOLVERS: dict[str, Solver] = {"stabilized": solve_stabilized, "ott": solve_with_ott}
