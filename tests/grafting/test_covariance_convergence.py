"""The estimate of how much a leading subspace still moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.grafting.convergence import (
    count_leading,
    leading_rows,
    leading_subspace,
    orthonormalise,
    subspace_movement,
)


def draw_second_moment(rows, n=40, seed=0):
    k = np.random.default_rng(seed).standard_normal((rows, n)) / np.arange(1, n + 1)
    return k.T @ k / rows


def exact_leading(second, k):
    return np.linalg.eigh(second)[1][:, ::-1][:, :k]


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-3), (jnp.float32, 1e-3)])
def test_the_leading_subspace_is_that_of_the_eigenvectors(dtype, tolerance):
    second = draw_second_moment(500)
    found = np.asarray(jax.jit(leading_subspace)(jnp.asarray(second, dtype)), np.float64)
    assert found.shape == (40, count_leading(40)) == (40, 10)
    np.testing.assert_allclose(found.T @ found, np.eye(10), atol=1e-5)
    cosines = found.T @ exact_leading(second, 10)
    assert 1 - np.sum(cosines**2) / 10 < tolerance


def test_movement_is_the_mean_squared_sine():
    u, v = (np.linalg.qr(np.random.default_rng(seed).standard_normal((12, 3)))[0] for seed in range(2))
    sines = 1 - np.linalg.svd(u.T @ v)[1] ** 2
    np.testing.assert_allclose(subspace_movement(jnp.asarray(u), jnp.asarray(v)), sines.mean(), rtol=1e-12)
    assert float(subspace_movement(jnp.asarray(u), jnp.asarray(u))) < 1e-14


def test_movement_falls_as_the_data_grow():
    def move(rows):
        halves = [draw_second_moment(rows, seed=seed) for seed in range(2)]
        before, after = (leading_subspace(jnp.asarray(c)) for c in (halves[0], (halves[0] + halves[1]) / 2))
        return float(subspace_movement(before, after))

    few, many = move(60), move(6000)
    assert many < few / 5


def test_nearly_dependent_columns_are_made_orthonormal():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 1)) + 1e-3 * rng.standard_normal((30, 4))
    q = np.asarray(orthonormalise(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-5)


def test_a_zero_covariance_has_some_finite_subspace():
    assert np.isfinite(leading_subspace(jnp.zeros((8, 8)))).all()


def test_rows_of_a_sketch_are_its_directions():
    factor = np.diag([3.0, 2.0, 0.0]) @ np.linalg.qr(np.random.default_rng(0).standard_normal((12, 3)))[0].T
    found = np.asarray(leading_rows(jnp.asarray(factor)))
    np.testing.assert_allclose(found.T @ found, np.diag([1.0, 1.0, 0.0]), atol=1e-12)
