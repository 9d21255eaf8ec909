"""Gradients through whole merges, against float64 finite differences; finite where the mathematics degenerates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from references import directional_derivative
from test_methods import RANKED, count_for, every_method, run, siblings

LEARNABLE = {
    "average": {"coefficients": [1.0, 2.0, 0.5]},
    "slerp": {"t": 0.3},
    "rgsp": {"epsilon": 0.05, "temperature": 0.3, "fused_penalty": 0.2},
    "rgsp_seed": {},
    "dgsm": {},
    "gsf": {},
    "relative": {"scale": 1.5, "directions": [[1.0], [0.3], [1.1]], "rest": [0.3, -0.2, 0.1]},
    "relative_weighted": {"directions": [[1.0, 0.5, 2.0], [0.3, 1.2, 0.8], [1.1, 0.9, 0.4]], "rest": [0.3, -0.2, 0.1]},
    "graft": {"ridge": 2.0},
    "sequential_graft": {"share": 0.4, "pull": 0.1},
    "regmean": {"off_diagonal": 0.7, "coefficients": [1.0, 2.0, 0.5]},
    "karcher": {"coefficients": [1.0, 2.0, 0.5]},
    "task_arithmetic": {"scale": 0.7, "coefficients": [1.0, 2.0, 0.5]},
    "ties": {"scale": 0.7, "coefficients": [1.0, 1.1, 0.9]},
    "dare": {"scale": 0.7, "drop_rate": 0.4, "coefficients": [1.0, 2.0, 0.5]},
    "dare_ties": {"scale": 0.7, "drop_rate": 0.4},
    "della": {"scale": 0.7, "drop_rate": 0.4, "window": 0.2},
    "breadcrumbs": {"scale": 0.7, "coefficients": [1.0, 2.0, 0.5]},
    "model_stock": {},
    "tsv_m": {"scale": 0.7},
    "iso_c": {"scale": 0.7},
    "iso_cts": {"scale": 0.7},
    "wudi": {"scale": 0.7, "learning_rate": 1e-3},
    "knots": {"scale": 0.7, "coefficients": [1.0, 1.1, 0.9]},
    "core_space": {"scale": 0.7},
    "ace_merging": {"scale": 0.7, "ridge": 0.1},
}
"""Every traced hyperparameter with a derivative, at a point where the merge depends on it."""
MAPS = ("rgsp", "rgsp_seed", "dgsm")
SHAPE = (7, 5)


def probe(name, point):
    """A generic function of the merged matrix, of the weights and of everything learnable at once."""
    hyperparameters = {key: value for key, value in point.items() if key != "stack"}
    merged = run(name, point["stack"], **hyperparameters).merged
    weights = jnp.asarray(np.random.default_rng(0).normal(size=merged.shape))
    return jnp.sum(weights * merged) + jnp.sum(merged**2)


@functools.cache
def value_and_gradient(name):
    return jax.jit(functools.partial(probe, name)), jax.jit(jax.grad(functools.partial(probe, name)))


def generic_point(name):
    point = {key: jnp.asarray(value) for key, value in LEARNABLE[name].items()}
    if name in MAPS:
        rng = np.random.default_rng(2)
        point |= {key: jnp.eye(3) + 0.1 * jnp.asarray(rng.normal(size=(3, 3))) for key in ("w_q", "w_k")}
    return point | {"stack": siblings(7, count_for(name), SHAPE)}


@every_method
def test_gradients_in_the_weights_and_in_everything_learnable(name):
    point = generic_point(name)
    value, gradient = value_and_gradient(name)
    found = gradient(point)
    for key, at in point.items():
        direction = jnp.asarray(np.random.default_rng(1).normal(size=at.shape))
        step = 1e-5 if at.ndim > 1 else 1e-4 * max(1e-2, float(jnp.abs(at).max()))
        expected = directional_derivative(lambda x, key=key: value(point | {key: x}), at, direction, step)
        assert expected != 0, key
        np.testing.assert_allclose(jnp.vdot(found[key], direction), expected, rtol=1e-4, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", ["rgsp", "rgsp_seed", "dgsm", "gsf"])
def test_beta_cancels_and_epsilon_where_the_uniform_coupling_is_stationary(name):
    """exp(-beta d) is one number for a whole layer, and R5 divides every row of the weighed coupling by its sum.

    Orthonormal columns, which all but `rgsp` compare, are all equally far apart (SPEC R8): there the coupling stays
    uniform at any epsilon.
    """
    value, gradient = value_and_gradient(name)

    def at(beta, epsilon):
        return generic_point(name) | {"beta": jnp.asarray(beta), "epsilon": jnp.asarray(epsilon)}

    slopes = gradient(at(1.0, 0.05))
    np.testing.assert_allclose(value(at(1.0, 0.05)), value(at(5.0, 0.05)), rtol=1e-12)
    assert abs(slopes["beta"]) < 1e-12
    if name == "rgsp":
        return
    np.testing.assert_allclose(value(at(1.0, 0.05)), value(at(1.0, 0.5)), rtol=1e-12)
    assert abs(slopes["epsilon"]) < 1e-12


def degenerate_stack(name, kind):
    model = {
        "zero": jnp.zeros(SHAPE),
        "equal": siblings(1, 1, SHAPE)[0],
        "rank one": jnp.outer(jnp.arange(1.0, 8.0), jnp.ones(5)),
        "orthogonal": jnp.asarray(np.linalg.qr(np.random.default_rng(3).normal(size=SHAPE))[0]),
    }[kind]
    other = model if kind in ("zero", "equal") else 1.1 * model
    return jnp.stack([model, other, *[model] * (count_for(name) - 2)])


@pytest.mark.parametrize("kind", ["zero", "equal", "rank one", "orthogonal"])
@pytest.mark.parametrize("name", RANKED)
def test_degenerate_layers_are_finite_in_value_and_gradient(name, kind):
    value, gradient = value_and_gradient(name)
    point = generic_point(name) | {"stack": degenerate_stack(name, kind)}
    assert np.isfinite(value(point))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(point)))
