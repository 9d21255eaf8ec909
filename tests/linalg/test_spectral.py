"""Inverse square roots and Sylvester equations: against dense systems, derivatives at equal eigenvalues, vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rgsp_jax.linalg import inverse_square_root, solve_sylvester


def positive(n, seed=0, condition=50.0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return (q * np.geomspace(1, condition, n)) @ q.T


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-12), (np.float32, 1e-4), (jnp.bfloat16, 1e-4)])
def test_the_inverse_square_root(dtype, bound):
    h = jnp.asarray(positive(7), dtype)
    root = inverse_square_root(h)
    assert root.dtype == (np.float64 if dtype == np.float64 else np.float32)
    product = np.asarray(root, np.float64) @ np.asarray(h, np.float64) @ np.asarray(root, np.float64)
    np.testing.assert_allclose((product + product.T) / 2, np.eye(7), atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-11), (np.float32, 1e-4)])
def test_solutions_of_sylvester_equations(dtype, bound):
    a, b, right = positive(5), positive(8, 2) - 0.5 * np.eye(8), normal(5, 8)
    expected = references.sylvester(a, b, right)
    found = solve_sylvester(*(jnp.asarray(x, dtype) for x in (a, b, right)))
    np.testing.assert_allclose(found, expected, atol=bound)


def total_of_root(h):
    return jnp.sum(jnp.sin(inverse_square_root((h + h.T) / 2)) * normal(6, 6))


def total_of_sylvester(a):
    return jnp.sum(jnp.sin(solve_sylvester((a + a.T) / 2, a.T @ a, jnp.asarray(normal(6, 6)))))


@pytest.mark.parametrize("function", [total_of_root, total_of_sylvester])
@pytest.mark.parametrize("condition", [1.0, 50.0])
def test_first_and_second_derivatives_also_at_equal_eigenvalues(function, condition):
    h, step = jnp.asarray(positive(6, condition=condition)), jnp.asarray(normal(6, 6, seed=3))
    gradient = jax.jit(jax.grad(function))
    expected = references.directional_derivative(function, h, step, 1e-4)
    np.testing.assert_allclose(jnp.sum(gradient(h) * step), expected, rtol=1e-6)
    second = jax.grad(lambda x: jnp.sum(gradient(x) * step))(h)
    expected = references.directional_derivative(lambda x: jnp.sum(gradient(x) * step), h, step, 1e-4)
    np.testing.assert_allclose(jnp.sum(second * step), expected, rtol=1e-5)


def test_vmap_is_the_loop():
    a, b, right = (jnp.asarray(np.stack(x)) for x in ([positive(4, i) for i in range(3)],) * 2 + (normal(3, 4, 4),))
    np.testing.assert_allclose(
        jax.vmap(solve_sylvester)(a, b, right), [solve_sylvester(*x) for x in zip(a, b, right, strict=True)], atol=1e-12
    )
    np.testing.assert_allclose(jax.vmap(inverse_square_root)(a), [inverse_square_root(x) for x in a], atol=1e-12)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="square matrix"):
        inverse_square_root(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="do not fit a right side"):
        solve_sylvester(jnp.eye(3), jnp.eye(4), jnp.ones((4, 3)))
