"""The critical epsilon is where the product plan loses its stability; annealing goes on from there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.transport import (
    anneal_gromov_wasserstein,
    critical_epsilon,
    gromov_wasserstein,
    normalize_jointly,
    squared_distances,
)


def points(seed, n, d):
    return np.random.default_rng(seed).normal(size=(n, d))


def ring(n, d, seed):
    """Squared distances that have no first moments: every row is the others', turned."""
    drawn = points(seed, n, d)
    row = ((drawn - np.roll(drawn, 1, 0)) ** 2).sum(1)
    row = row + row[(-np.arange(n)) % n]
    row[0] = 0
    return jnp.asarray(row[(np.arange(n)[:, None] - np.arange(n)[None]) % n] / row.mean())


@pytest.mark.parametrize(("share", "grows"), [(1.1, False), (0.9, True)])
def test_the_product_plan_is_stable_above_and_unstable_below(share, grows):
    cost_a, cost_b = ring(9, 3, 0), ring(9, 3, 1)
    product = jnp.full((9, 9), 1 / 81)
    noise = np.random.default_rng(2).normal(size=(9, 9))
    noise = noise - noise.mean(0) - noise.mean(1)[:, None] + noise.mean()
    near = product + 1e-4 / 81 * jnp.asarray(noise)
    epsilon = share * critical_epsilon(cost_a, cost_b)
    found = gromov_wasserstein(cost_a, cost_b, epsilon=epsilon, initial=near)
    away = float(jnp.sum(jnp.abs(found.plan - product)))
    assert (away > 0.1) if grows else (away < 1e-6), away
    held = gromov_wasserstein(cost_a, cost_b, epsilon=epsilon)
    np.testing.assert_allclose(held.plan, product, atol=1e-9)


def test_critical_epsilon_of_random_points_is_wishart():
    for n, d in ((200, 200), (150, 300), (300, 100)):
        costs = [squared_distances(jnp.asarray(points(seed, n, d).T)) / (2 * d) for seed in (0, 1)]
        expected = 4 * (1 + (d / n) ** 0.5) ** 4 / d**2
        assert critical_epsilon(*costs) == pytest.approx(expected, rel=0.15)


def test_critical_epsilon_has_the_units_of_the_costs_and_ignores_what_is_masked():
    cost_a, cost_b = (squared_distances(jnp.asarray(points(seed, 8, 4).T)) for seed in (0, 1))
    whole = critical_epsilon(cost_a, cost_b)
    assert critical_epsilon(3 * cost_a, 5 * cost_b) == pytest.approx(15 * whole)
    mask = jnp.asarray([1.0] * 8 + [0.0] * 3)
    padded = jnp.pad(cost_a, (0, 3), constant_values=7.0)
    assert critical_epsilon(padded, cost_b, mask) == pytest.approx(whole)
    weights = jnp.asarray([2.0, *[1.0] * 7])
    doubled = cost_a[jnp.asarray([0, 0, 1, 2, 3, 4, 5, 6, 7])][:, jnp.asarray([0, 0, 1, 2, 3, 4, 5, 6, 7])]
    assert critical_epsilon(cost_a, cost_b, weights) == pytest.approx(critical_epsilon(doubled, cost_b))
    assert critical_epsilon(jnp.zeros((4, 4)), cost_b) == 0


def test_annealing_recovers_points_that_a_fixed_epsilon_does_not_tell_apart():
    n = d = 160
    drawn, order = points(0, n, d).astype(np.float32), np.random.default_rng(1).permutation(n)
    rotation = np.linalg.qr(points(2, d, d))[0].astype(np.float32)
    costs = [squared_distances(jnp.asarray(x.T)) for x in (drawn, drawn[order] @ rotation)]
    found = jax.jit(anneal_gromov_wasserstein)(*costs)
    assert found.converged
    assert found.plan.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(found.plan).argmax(0), order)
    np.testing.assert_allclose(found.plan.max(0), 1 / n, rtol=0.05)
    scaled = normalize_jointly(*costs)
    epsilon = 1e-2
    assert epsilon > critical_epsilon(*scaled)
    fixed = gromov_wasserstein(*scaled, epsilon=epsilon)
    assert fixed.converged
    assert (np.asarray(fixed.plan).argmax(0) == order).mean() < 0.5
    assert fixed.plan.max() < 0.3 / n


def test_an_initial_plan_is_where_it_starts():
    """Between two twins of a symmetric set both isometries are fixed points; the start decides, without derivative."""
    cost = jnp.asarray([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]]) / 4
    flip = jnp.eye(3)[::-1] / 3
    for solver in ("stabilized", "ott"):
        for start in (jnp.eye(3) / 3, flip):
            mixed = 0.9 * start + 0.1 / 9
            found = gromov_wasserstein(cost, cost, epsilon=0.1, initial=mixed, solver=solver)
            assert found.converged
            np.testing.assert_allclose(found.plan, start, atol=1e-2)

    def mass(initial):
        return gromov_wasserstein(cost, cost, epsilon=0.05, initial=initial).plan[0, 0]

    np.testing.assert_array_equal(jax.grad(mass)(0.9 * flip + 0.1 / 9), jnp.zeros((3, 3)))


def test_the_derivative_is_that_of_the_last_stage():
    cost_a, cost_b = (squared_distances(jnp.asarray(points(seed, 5, 2).T)) for seed in (3, 4))
    end = 0.4 * critical_epsilon(cost_a, cost_b)

    def annealed(x):
        return anneal_gromov_wasserstein(cost_a, x, end=0.4, stages=4).cost

    plan = anneal_gromov_wasserstein(cost_a, cost_b, end=0.4, stages=4).plan

    def direct(x):
        return gromov_wasserstein(cost_a, x, epsilon=end, initial=plan).cost

    np.testing.assert_allclose(jax.grad(annealed)(cost_b), jax.grad(direct)(cost_b), atol=1e-7)
    assert float(jnp.abs(jax.grad(annealed)(cost_b)).max()) > 1e-3


def test_what_is_out_of_range_is_named():
    cost = jnp.ones((3, 3)) - jnp.eye(3)
    with pytest.raises(ValueError, match="start >= end > 0"):
        anneal_gromov_wasserstein(cost, cost, start=0.1, end=0.5)
    with pytest.raises(ValueError, match="stages >= 1"):
        anneal_gromov_wasserstein(cost, cost, stages=0)
    with pytest.raises(ValueError, match=r"initial wants shape \(3, 3\)"):
        gromov_wasserstein(cost, cost, initial=jnp.ones((3, 2)))
