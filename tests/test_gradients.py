"""Gradients through whole merges, against float64 finite differences; finite where the mathematics degenerates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from references import directional_derivative
from rgsp_jax import methods
from test_methods import RANKED, count_for, every_method, options, siblings

LEARNABLE = {
    "average": {"coefficients": [1.0, 2.0, 0.5]},
    "slerp": {"t": 0.3},
    "rgsp": {"beta": 1.0, "epsilon": 0.05, "temperature": 0.3, "fused_penalty": 0.2},
    "rgsp_seed": {"beta": 1.0, "epsilon": 0.05},
    "dgsm": {"beta": 1.0, "epsilon": 0.05},
    "gsf": {"beta": 1.0, "epsilon": 0.05},
    "relative": {"scale": 1.5},
}


def scalar(name, probe, stack, hyperparameters):
    """A generic function of the merged matrix."""
    merged = methods[name](stack, **options(name), **hyperparameters).merged
    return jnp.sum(probe * merged) + jnp.sum(merged**2)


@every_method
def test_gradient_in_the_weights(name):
    rng = np.random.default_rng(0)
    stack, direction = siblings(7, count_for(name), (7, 5)), rng.normal(size=(count_for(name), 7, 5))
    probe = jnp.asarray(rng.normal(size=(7, 5)))
    f = jax.jit(lambda x: scalar(name, probe, x, {}))
    reverse = jnp.vdot(jax.jit(jax.grad(f))(stack), direction)
    expected = directional_derivative(f, stack, jnp.asarray(direction), 1e-5)
    np.testing.assert_allclose(reverse, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "hyperparameter"), [(n, h) for n, values in LEARNABLE.items() for h in values])
def test_gradient_in_the_hyperparameters(name, hyperparameter):
    rng = np.random.default_rng(1)
    stack, probe = siblings(8, count_for(name), (7, 5)), jnp.asarray(rng.normal(size=(7, 5)))
    values = {k: jnp.asarray(v) for k, v in LEARNABLE[name].items()}
    f = jax.jit(lambda x: scalar(name, probe, stack, values | {hyperparameter: x}))
    point = values[hyperparameter]
    direction = jnp.asarray(rng.normal(size=point.shape))
    reverse = jnp.vdot(jax.grad(f)(point), direction)
    expected = directional_derivative(f, point, direction, 1e-4 * max(1e-2, float(jnp.abs(point).max())))
    np.testing.assert_allclose(reverse, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["rgsp", "rgsp_seed", "dgsm"])
def test_gradient_in_the_learnable_maps(name):
    rng = np.random.default_rng(2)
    stack, probe = siblings(9, 2, (7, 5)), jnp.asarray(rng.normal(size=(7, 5)))
    maps = [jnp.eye(3) + 0.1 * jnp.asarray(rng.normal(size=(3, 3))) for _ in range(2)]
    f = jax.jit(lambda x: scalar(name, probe, stack, {"w_q": x[0], "w_k": x[1]}))
    direction = jnp.asarray(rng.normal(size=(2, 3, 3)))
    reverse = jnp.vdot(jax.grad(f)(jnp.stack(maps)), direction)
    np.testing.assert_allclose(reverse, directional_derivative(f, jnp.stack(maps), direction), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("kind", ["zero", "equal", "rank one", "orthogonal"])
def test_degenerate_layers_are_finite_in_value_and_gradient(name, kind):
    model = {
        "zero": jnp.zeros((6, 6)),
        "equal": siblings(1, 1, (6, 6))[0],
        "rank one": jnp.outer(jnp.arange(1.0, 7.0), jnp.ones(6)),
        "orthogonal": jnp.asarray(np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]),
    }[kind]
    other = model if kind in ("zero", "equal") else 1.1 * model
    stack = jnp.stack([model, other, *[model] * (count_for(name) - 2)])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: scalar(name, jnp.ones((6, 6)), x, {})))(stack)
    assert np.isfinite(value) and np.isfinite(gradient).all()
