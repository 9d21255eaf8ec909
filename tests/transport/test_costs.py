"""Squared distances and joint normalisation against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgsp_jax.transport import normalize_jointly, squared_distances


def test_squared_distances_are_those_of_the_definition():
    x = np.random.default_rng(0).normal(size=(11, 6))
    expected = ((x[:, :, None] - x[:, None, :]) ** 2).sum(0)
    computed = squared_distances(jnp.asarray(x))
    np.testing.assert_allclose(computed, expected, rtol=1e-13, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-100, 100))
def test_squared_distances_are_a_cost(seed, shift):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5)) + shift, jnp.float32)
    x = x.at[:, 3].set(x[:, 1])
    computed = np.asarray(squared_distances(x))
    assert computed.dtype == np.float32
    assert (np.diag(computed) == 0).all() and (computed >= 0).all() and (computed == computed.T).all()
    assert computed[3, 1] < 1e-5


def test_columns_far_from_the_origin_keep_their_distances():
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    moved = squared_distances(jnp.asarray(x + np.float32(1000)))
    np.testing.assert_allclose(moved, ((x[:, :, None] - x[:, None, :]) ** 2).sum(0), atol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_half_precision_points_are_measured_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, 3)), dtype)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    computed = squared_distances(x)
    assert computed.dtype == jnp.float32
    np.testing.assert_allclose(computed, ((wide[:, :, None] - wide[:, None, :]) ** 2).sum(0), rtol=1e-5, atol=1e-5)


def test_derivative_of_squared_distances():
    rng = np.random.default_rng(3)
    x, weights, direction = rng.normal(size=(5, 4)), rng.normal(size=(4, 4)), rng.normal(size=(5, 4))

    def loss(points):
        return jnp.sum(weights * squared_distances(points))

    step = 1e-6
    difference = (loss(jnp.asarray(x + step * direction)) - loss(jnp.asarray(x - step * direction))) / (2 * step)
    slope = jnp.sum(jax.grad(loss)(jnp.asarray(x)) * direction)
    np.testing.assert_allclose(slope, difference, rtol=1e-7)


def test_derivative_is_finite_and_zero_at_coinciding_points():
    x = jnp.ones((4, 3))
    gradient = jax.grad(lambda points: jnp.sum(squared_distances(points)))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_joint_normalisation_divides_by_the_larger_maximum():
    rng = np.random.default_rng(4)
    cost_a, cost_b = rng.uniform(size=(3, 3)), 5 * rng.uniform(size=(4, 4))
    scaled_a, scaled_b = normalize_jointly(jnp.asarray(cost_a), jnp.asarray(cost_b))
    np.testing.assert_allclose(scaled_a, cost_a / cost_b.max(), rtol=1e-15)
    np.testing.assert_allclose(scaled_b, cost_b / cost_b.max(), rtol=1e-15)


def test_joint_normalisation_of_zero_costs_and_its_derivative_are_zero_and_finite():
    zero = jnp.zeros((3, 3))
    scaled = normalize_jointly(zero, zero)
    assert all((cost == 0).all() for cost in scaled)
    gradient = jax.grad(lambda cost: jnp.sum(normalize_jointly(cost, zero)[0]))(zero)
    assert jnp.isfinite(gradient).all()


def test_joint_normalisation_is_invariant_to_scale_and_so_is_its_derivative():
    rng = np.random.default_rng(5)
    cost_a, cost_b, weights = (jnp.asarray(rng.uniform(size=(4, 4))) for _ in range(3))

    def loss(scale):
        return jnp.sum(weights * normalize_jointly(scale * cost_a, scale * cost_b)[0])

    np.testing.assert_allclose(loss(3.0), loss(1.0), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(loss)(1.5), 0, atol=1e-14)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="columns of \\[m, r\\]"):
        squared_distances(jnp.ones(3))
    with pytest.raises(ValueError, match=r"cost_a.*\(3,\).*cost_b.*\(0, 0\)"):
        normalize_jointly(jnp.ones(3), jnp.ones((0, 0)))
