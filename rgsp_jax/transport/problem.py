"""The entropic Gromov-Wasserstein problem as an array record, its cost and its linearisation at a plan."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(x: Array, y: Array) -> Array:
    """Matrix product in the full precision of its dtype, on accelerators too."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


class TransportProblem(NamedTuple):
    """min over plans P with marginals a, b of `sum |C_A(i,j) - C_B(k,l)|^2 P_ik P_jl + <T, P> - epsilon H(P)`."""

    cost_a: Float[Array, "ra ra"]
    """Symmetric."""
    cost_b: Float[Array, "rb rb"]
    """Symmetric."""
    linear: Float[Array, "ra rb"]
    """T, the linear cost times its penalty."""
    a: Float[Array, "ra"]
    """Sums to one; zeros are masks."""
    b: Float[Array, "rb"]
    """Sums to one; zeros are masks."""
    epsilon: Float[Array, ""]


class Linearization(NamedTuple):
    """The logarithm of the Gibbs kernel at a plan, `constant + left @ P @ right`, up to terms of one index only."""

    left: Float[Array, "ra ra"]
    right: Float[Array, "rb rb"]
    constant: Float[Array, "ra rb"]

    def log_kernel(self, plan: Float[Array, "ra rb"]) -> Float[Array, "ra rb"]:
        return self.constant + dot(dot(self.left, plan), self.right)


def centre_costs(problem: TransportProblem) -> TransportProblem:
    """The same problem with centred costs: what the potentials absorb anyway is taken out beforehand.

    The gradient of the objective's smooth part at P is `2 G(P) + T` with `2 G = -4 C_A P C_B` plus terms of one index,
    which the potentials absorb. With `C = C' + x 1' + 1 x'` and `C' a = 0`, all that is left of the product for plans
    with the given marginals is `C_A' P C_B' + x y'`, where x and y may be shifted too. The small deviations of a plan
    are then not lost beside large terms, and at the product plan, or for costs with equal off-diagonals anywhere,
    rounding has nothing to amplify.
    """
    cost_a, x = _centre(problem.cost_a, problem.a)
    cost_b, y = _centre(problem.cost_b, problem.b)
    return problem._replace(cost_a=cost_a, cost_b=cost_b, linear=problem.linear - 4 * x[:, None] * y[None, :])


def linearize(problem: TransportProblem) -> Linearization:
    """The log Gibbs kernel `-(2 G(P) + T) / epsilon` as a function of the plan, on centred costs."""
    centred = centre_costs(problem)
    # A masked column must take no mass; masked rows are emptied by their zero row sum.
    constant = jnp.where(problem.b[None, :] > 0, -centred.linear / problem.epsilon, -jnp.inf)
    return Linearization(left=centred.cost_a * (4 / problem.epsilon), right=centred.cost_b, constant=constant)


def _centre(cost: Array, weights: Array) -> tuple[Array, Array]:
    mean = dot(cost, weights)
    x = mean - dot(mean, weights) / 2
    return cost - x[:, None] - x[None, :], x - dot(x, weights)


def compute_transport_cost(problem: TransportProblem, plan: Float[Array, "ra rb"]) -> Float[Array, ""]:
    """`sum |C_A(i,j) - C_B(k,l)|^2 P_ik P_jl + <T, P>`, the objective without its entropy."""
    return jnp.sum(share_by_row(problem.cost_a, problem.cost_b, plan)) + jnp.sum(problem.linear * plan)


def share_by_row(cost_a: Array, cost_b: Array, plan: Array) -> Array:
    """[ra], the share of the quadratic cost that each row of the plan carries: `sum_jkl |..|^2 P_ik P_jl`."""
    rows, columns = jnp.sum(plan, axis=1), jnp.sum(plan, axis=0)
    cross = jnp.sum(dot(dot(cost_a, plan), cost_b) * plan, axis=1)
    return rows * dot(cost_a**2, rows) + dot(plan, dot(cost_b**2, columns)) - 2 * cross
