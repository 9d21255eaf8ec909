"""Projection of a Gibbs kernel on given marginals: Sinkhorn scalings, finished by damped Newton steps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.transport.problem import dot

# Scalings are matrix-vector products: nearly free beside one Newton step (a product, a Cholesky factorisation), which
# is worth its price only where they converge slowly.
_SCALINGS_PER_PASS = 32
_MAX_PASSES = 50


class MarginalSystem(NamedTuple):
    """Inverse of the dual Hessian after eliminating the row potentials, `diag(P'1) - P' diag(1/P1) P`.

    It is the Laplacian of a graph on the columns, so its diagonal is computed as minus the sum of the off-diagonals:
    these are sums of non-negative terms, accurate to the last digit even where the plan is nearly a permutation and
    every one of them is tiny. Scaled to unit diagonal it is then well conditioned in float32 as well.
    """

    factor: Float[Array, "rb rb"]
    """Lower Cholesky factor of the scaled matrix; its null vector (a common shift) is filled in."""
    scale: Float[Array, "rb"]
    """Diagonal scaling; zero at isolated columns, which no potential can change."""


def factor_marginal_system(plan: Float[Array, "ra rb"], row_sums: Float[Array, "ra"]) -> MarginalSystem:
    size = plan.shape[1]
    eye = jnp.eye(size, dtype=plan.dtype)
    links = dot(plan.T, plan * _reciprocal(row_sums)[:, None]) * (1 - eye)
    links = (links + links.T) / 2
    degree = jnp.sum(links, axis=1)
    scale = jnp.sqrt(_reciprocal(degree))
    null = jnp.sqrt(degree)
    null = null * _reciprocal(jnp.sqrt(jnp.sum(degree)))
    ridge = 8 * float(jnp.finfo(plan.dtype).eps)
    scaled = (1 + ridge) * eye - scale[:, None] * links * scale[None, :] + null[:, None] * null[None, :]
    factor = lax.linalg.cholesky(scaled, symmetrize_input=False)
    # Judged here and not at the solution, which has to stay linear in its right-hand side.
    sound = jnp.all(jnp.isfinite(factor))
    return MarginalSystem(jnp.where(sound, factor, eye), jnp.where(sound, scale, 0))


def solve_marginal_system(system: MarginalSystem, rhs: Float[Array, "rb"]) -> Float[Array, "rb"]:
    """Change of the column potentials that moves the column sums by rhs, to first order; 0 where the system broke."""
    return jax.scipy.linalg.cho_solve((system.factor, True), rhs * system.scale) * system.scale


class Scaled(NamedTuple):
    """A plan with exact row sums, and the potentials to start the next projection from."""

    plan: Float[Array, "ra rb"]
    potential: Float[Array, "rb"]
    """Logarithm of the column scaling."""
    error: Float[Array, ""]
    """L1 distance of the column sums from b."""


def scale_to_marginals(
    log_kernel: Float[Array, "ra rb"],
    potential: Float[Array, "rb"],
    a: Float[Array, "ra"],
    b: Float[Array, "rb"],
    tolerance: Float[Array, ""],
) -> Scaled:
    """The plan `diag(u) exp(log_kernel) diag(v)` with row sums a and column sums b within tolerance (L1).

    Each pass normalises the rows in the log domain (one exponential, no overflow at any epsilon), then scales by
    matrix-vector products, and takes one Newton step on the column potentials if that was not enough. The Newton step
    is damped by log(1 + d) / d, d its largest change of a log ratio between entries, which suffices for descent
    on sums of exponentials. At most 50 passes; the remaining error comes back.
    """

    def one_pass(state: tuple[Array, Scaled]) -> tuple[Array, Scaled]:
        count, (_, potential, _) = state
        logits = log_kernel + potential[None, :]
        largest = jnp.max(logits, axis=1)
        logits = logits - jnp.where(jnp.isfinite(largest), largest, 0)[:, None]
        plan = _normalize_rows(jnp.exp(logits), a)
        u, v, columns = _scale(plan, a, b, tolerance)
        potential = potential + jnp.log(jnp.where(b > 0, jnp.maximum(v, jnp.finfo(v.dtype).tiny), 1))
        scaled = Scaled(plan * u[:, None] * v[None, :], potential, _distance(columns, b))
        return count + 1, _run_where(scaled.error > tolerance, lambda s: _newton_step(s, a, b), scaled)

    start = Scaled(jnp.zeros_like(log_kernel), potential, jnp.full_like(a, jnp.inf, shape=()))
    return lax.while_loop(lambda s: (s[0] < _MAX_PASSES) & (s[1].error > tolerance), one_pass, (jnp.int32(0), start))[1]


def fit_marginals(plan: Float[Array, "ra rb"], a: Float[Array, "ra"], b: Float[Array, "rb"]) -> Float[Array, "ra rb"]:
    """The plan rescaled, row by row and column by column, to the given marginals; a few steps, zeros stay zero."""

    def one_pass(_: int, plan: Array) -> Array:
        u, v, columns = _scale(plan, a, b, jnp.zeros_like(a, shape=()))
        scaled = Scaled(plan * u[:, None] * v[None, :], jnp.zeros_like(b), _distance(columns, b))
        better = _newton_step(scaled, a, b)
        return jnp.where(better.error < scaled.error, better.plan, scaled.plan)

    return lax.fori_loop(0, 3, one_pass, _normalize_rows(plan, a))


def _scale(plan: Array, a: Array, b: Array, tolerance: Array) -> tuple[Array, Array, Array]:
    """Sinkhorn scalings u, v of a plan with row sums a, and the column sums they reach (row sums stay exact)."""
    tiny = jnp.finfo(plan.dtype).tiny

    def body(state):
        count, _, _, columns, _ = state
        v = b / jnp.maximum(columns, tiny)
        u = a / jnp.maximum(dot(plan, v), tiny)
        columns = dot(u, plan)
        return count + 1, u, v, columns, _distance(v * columns, b)

    columns = jnp.sum(plan, axis=0)
    start = (0, jnp.ones_like(a), jnp.ones_like(b), columns, _distance(columns, b))
    _, u, v, columns, _ = lax.while_loop(lambda s: (s[0] < _SCALINGS_PER_PASS) & (s[4] > tolerance), body, start)
    return u, v, v * columns


def _newton_step(scaled: Scaled, a: Array, b: Array) -> Scaled:
    plan, potential, _ = scaled
    system = factor_marginal_system(plan, a)
    step = solve_marginal_system(system, b - jnp.sum(plan, axis=0))
    span = jnp.max(step) - jnp.min(step)
    step = jnp.where(jnp.isfinite(span), step, 0)  # columns all but cut off from the rest can ask for an infinite step
    span = jnp.where(jnp.isfinite(span), span, 0)
    step = step * jnp.where(span > 1e-3, jnp.log1p(span) / jnp.maximum(span, 1e-3), 1)
    step = step - jnp.max(step)
    plan = _normalize_rows(plan * jnp.exp(step)[None, :], a)
    return Scaled(plan, potential + step, _distance(jnp.sum(plan, axis=0), b))


def _run_where(wanted: Array, function: Callable[[Scaled], Scaled], argument: Scaled) -> Scaled:
    """function(argument) where wanted, else argument: a loop of at most one turn instead of a `cond`.

    Under vmap a `cond` computes both sides always, this only while some lane wants it.
    """

    def turn(state: tuple[Array, Scaled]) -> tuple[Array, Scaled]:
        return jnp.zeros_like(state[0]), function(state[1])

    return lax.while_loop(lambda state: state[0], turn, (wanted, argument))[1]


def _normalize_rows(plan: Array, a: Array) -> Array:
    return plan * (a * _reciprocal(jnp.sum(plan, axis=1)))[:, None]


def _distance(x: Array, y: Array) -> Array:
    return jnp.sum(jnp.abs(x - y))


def _reciprocal(x: Array) -> Array:
    """1 / x where x is positive (and its reciprocal finite), 0 elsewhere."""
    positive = x >= jnp.finfo(x.dtype).tiny
    return jnp.where(positive, 1 / jnp.where(positive, x, 1), 0)
