"""Derivative of the plan at its fixed point, by the implicit function theorem."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.transport.problem import TransportProblem, dot, linearize
from rgsp_jax.transport.scaling import factor_marginal_system, solve_marginal_system

_MAX_RESIDUAL_STEPS = 300


def differentiate_plan(
    problem: TransportProblem, plan: Float[Array, "ra rb"], tangent: TransportProblem
) -> Float[Array, "ra rb"]:
    """Change dP of the plan when the problem changes by `tangent`.

    On the support, `log P = alpha_i + beta_k + (4 C_A P C_B - T) / epsilon`. With `S = sqrt(P)` and `dP = S * Y` this
    differentiates to

        Y = S * (dalpha + dbeta) + K Y + S * W,   K Y = (4 / epsilon) S * (C_A (S * Y) C_B),
        row sums of S * Y = da,   column sums of S * Y = db,

    where W is the explicit change of the last term. K is symmetric. Y is split into Y0 in V, the span of all
    S * (alpha + beta), which carries the change of the marginals, and Z orthogonal to V, on which
    `(I - Q K Q) Z = Q (S * W + K Y0)` with Q the projector off V: symmetric, positive definite at a stable fixed point.
    Masked rows and columns have S = 0, hence dP = 0. Memory is a few matrices of the plan's size.
    """
    root = jnp.sqrt(plan)
    rows, columns = jnp.sum(plan, axis=1), jnp.sum(plan, axis=0)
    inverse_rows = jnp.where(rows > 0, 1 / jnp.where(rows > 0, rows, 1), 0)
    system = factor_marginal_system(plan, rows)
    strength = 4 / problem.epsilon

    def marginal_element(row_change: Array, column_change: Array) -> Array:
        """The element of V whose product with S has the given row and column sums."""
        beta = solve_marginal_system(system, column_change - dot(row_change * inverse_rows, plan))
        alpha = (row_change - dot(plan, beta)) * inverse_rows
        return root * (alpha[:, None] + beta[None, :])

    def project(y: Array) -> Array:
        weighted = root * y
        return y - marginal_element(jnp.sum(weighted, axis=1), jnp.sum(weighted, axis=0))

    def interact(y: Array) -> Array:
        return strength * root * dot(dot(problem.cost_a, root * y), problem.cost_b)

    # The matching part of the change only: the total mass is one, whatever rounding says.
    da = jnp.where(rows > 0, tangent.a, 0)
    db = jnp.where(columns > 0, tangent.b, 0)
    base = marginal_element(da - problem.a * jnp.sum(da), db - problem.b * jnp.sum(db))
    explicit = strength * (
        dot(dot(tangent.cost_a, plan), problem.cost_b) + dot(dot(problem.cost_a, plan), tangent.cost_b)
    )
    explicit = explicit - tangent.linear / problem.epsilon
    log_kernel = linearize(problem).log_kernel(plan)
    log_kernel = jnp.where(plan > 0, log_kernel, 0)
    explicit = explicit - log_kernel * (tangent.epsilon / problem.epsilon)
    z = lax.custom_linear_solve(
        lambda y: y - project(interact(project(y))),
        project(root * explicit + interact(base)),
        _solve_symmetric,
        symmetric=True,
    )
    return root * (base + z)


def _solve_symmetric(matvec, rhs: Array) -> Array:
    """Conjugate residuals: like conjugate gradients, but the residual cannot grow where the matrix is indefinite.

    That happens at plans that are no stable fixed point (saddles held by symmetry, unconverged plans): the result is
    finite there too.
    """
    tolerance = 4 * float(jnp.finfo(rhs.dtype).eps)

    def inner(x: Array, y: Array) -> Array:
        return jnp.sum(x * y)

    def ratio(x: Array, y: Array) -> Array:
        return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))

    goal = tolerance * jnp.sqrt(inner(rhs, rhs))

    def body(state):
        count, x, residual, image, direction, moved, curvature = state
        step = ratio(curvature, inner(moved, moved))
        x, residual = x + step * direction, residual - step * moved
        image = matvec(residual)
        next_curvature = inner(residual, image)
        keep = ratio(next_curvature, curvature)
        return count + 1, x, residual, image, residual + keep * direction, image + keep * moved, next_curvature

    def unfinished(state):
        return (state[0] < _MAX_RESIDUAL_STEPS) & (jnp.sqrt(inner(state[2], state[2])) > goal)

    image = matvec(rhs)
    start = (0, jnp.zeros_like(rhs), rhs, image, rhs, image, inner(rhs, image))
    return lax.while_loop(unfinished, body, start)[1]
