"""Implicit derivatives of the coupling against float64 finite differences, in both modes, masks included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.transport import gromov_wasserstein
from transport.problems import make_problem

ARGUMENTS = ("cost_a", "cost_b", "a", "b", "linear_cost", "epsilon", "fused_penalty")
WEIGHTS = jnp.asarray(np.random.default_rng(99).normal(size=(9, 7)))


def loss(cost_a, cost_b, a, b, linear_cost, epsilon, fused_penalty, solver="stabilized"):
    coupling = gromov_wasserstein(
        cost_a, cost_b, a, b, epsilon, linear_cost, fused_penalty, solver=solver, tolerance=1e-13
    )
    return jnp.sum(WEIGHTS * coupling.plan) + coupling.cost


value = jax.jit(loss)
gradient = jax.jit(jax.grad(loss, argnums=tuple(range(7))))
slope = jax.jit(lambda point, direction: jax.jvp(loss, point, direction)[1])


def make_point(masked, seed=21):
    cost_a, cost_b, a, b, linear_cost = make_problem(seed)
    if masked:
        a[[2, 8]], b[0] = 0, 0
    return tuple(jnp.asarray(np.asarray(x)) for x in (cost_a, cost_b, a, b, linear_cost, 0.04, 0.3))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_derivatives_match_finite_differences(argument, masked):
    point = make_point(masked)
    index = ARGUMENTS.index(argument)
    rng = np.random.default_rng(index)
    direction = jnp.asarray(np.asarray(rng.normal(size=point[index].shape)))
    if argument in ("a", "b"):
        direction = jnp.where(point[index] > 0, direction, 0)  # a mask is held
    step = 1e-6 if argument == "epsilon" else 1e-5

    def move(distance):
        return tuple(x + distance * direction if i == index else x for i, x in enumerate(point))

    difference = (value(*move(step)) - value(*move(-step))) / (2 * step)
    tangents = tuple(direction if i == index else jnp.zeros_like(x) for i, x in enumerate(point))
    np.testing.assert_allclose(slope(point, tangents), difference, rtol=2e-7)
    np.testing.assert_allclose(jnp.sum(gradient(*point)[index] * direction), difference, rtol=2e-7)


def test_masked_entries_get_no_derivative_and_the_rest_that_of_the_smaller_problem():
    point = make_point(masked=True)
    rows, columns = np.asarray(point[2]) > 0, np.asarray(point[3]) > 0
    masked = [np.asarray(x) for x in gradient(*point)]
    for cost, kept in ((masked[0], rows), (masked[1], columns)):
        assert (cost[~kept] == 0).all() and (cost[:, ~kept] == 0).all()
    assert (masked[2][~rows] == 0).all() and (masked[3][~columns] == 0).all()
    assert (masked[4][~rows] == 0).all() and (masked[4][:, ~columns] == 0).all()

    def smaller_loss(cost_a, cost_b, a, b, linear_cost, epsilon, fused_penalty):
        coupling = gromov_wasserstein(cost_a, cost_b, a, b, epsilon, linear_cost, fused_penalty, tolerance=1e-13)
        return jnp.sum(WEIGHTS[rows][:, columns] * coupling.plan) + coupling.cost

    cost_a, cost_b, a, b, linear_cost, *scalars = point
    smaller_point = (
        cost_a[rows][:, rows],
        cost_b[columns][:, columns],
        a[rows],
        b[columns],
        linear_cost[rows][:, columns],
    )
    smaller = jax.grad(smaller_loss, argnums=tuple(range(7)))(*smaller_point, *scalars)
    kept = (np.ix_(rows, rows), np.ix_(columns, columns), rows, columns, np.ix_(rows, columns), (), ())
    for big, small, where in zip(masked, smaller, kept, strict=True):
        np.testing.assert_allclose(big[where], small, rtol=1e-8, atol=1e-11)


def test_solvers_share_their_derivative():
    point = make_point(masked=True)
    through_ott = jax.jit(jax.grad(lambda *x: loss(*x, solver="ott"), argnums=(0, 1, 5)))(*point)
    ours = gradient(*point)
    for computed, index in zip(through_ott, (0, 1, 5), strict=True):
        np.testing.assert_allclose(computed, ours[index], rtol=1e-8, atol=1e-11)


def test_diagnostics_have_no_derivative():
    cost_a, cost_b, a, b, *_ = make_point(masked=False)

    def diagnostics(cost):
        coupling = gromov_wasserstein(cost, cost_b, a, b)
        return coupling.marginal_error + coupling.plan_change

    np.testing.assert_array_equal(jax.jit(jax.grad(diagnostics))(cost_a), 0)


def test_vmapped_gradients_are_those_of_a_loop():
    points = [make_point(masked, seed) for masked, seed in ((False, 21), (True, 22), (True, 23))]
    stacked = [jnp.stack(x) for x in zip(*points, strict=True)]
    together = jax.jit(jax.vmap(jax.grad(loss, argnums=tuple(range(7)))))(*stacked)
    for index, point in enumerate(points):
        for batched, alone in zip(together, gradient(*point), strict=True):
            np.testing.assert_allclose(batched[index], alone, rtol=1e-7, atol=1e-10)


@jax.jit
@jax.vmap
@partial(jax.grad, argnums=(0, 1, 2, 3, 4))
def wide_gradient(cost_a, cost_b, a, b, epsilon):
    coupling = gromov_wasserstein(cost_a, cost_b, a, b, epsilon)
    return jnp.sum(coupling.plan**2) + coupling.cost


@pytest.mark.parametrize("epsilon", [0.05, 1e-3, 1e-5])
def test_float32_gradients_are_finite_on_degenerate_masked_and_ordinary_costs(epsilon):
    degenerate = np.ones((9, 9)) - np.eye(9)
    cost_a, cost_b, a, b, _ = make_problem(24, 9, 9)
    a[4], b[[0, 7]] = 0, 0
    ones = np.ones(9)
    points = [(degenerate, degenerate, ones, ones), (cost_a, cost_b, ones, ones), (cost_a, degenerate, a, b)]
    points.append((0 * degenerate, cost_b, a, b))
    stacked = [jnp.asarray(np.stack(x), jnp.float32) for x in zip(*points, strict=True)]

    gradients = wide_gradient(*stacked, jnp.full(4, epsilon, jnp.float32))
    assert all(jnp.isfinite(x).all() for x in gradients)


def test_float32_gradients_agree_with_float64():
    problems = [(*make_problem(seed, 9, 9)[:4], np.asarray(0.03)) for seed in range(25, 29)]
    stacked = [np.stack(x) for x in zip(*problems, strict=True)]
    reference = wide_gradient(*map(jnp.asarray, stacked))
    narrow = wide_gradient(*(jnp.asarray(x, jnp.float32) for x in stacked))
    for wide, short in zip(reference, narrow, strict=True):
        assert np.abs(np.asarray(short, np.float64) - wide).max() < 2e-3 * jnp.abs(wide).max()
