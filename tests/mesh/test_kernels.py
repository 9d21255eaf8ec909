"""Every public kernel under vmap, pmap and shard_map over eight devices is the loop over its lanes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import rgsp_jax.grafting as grafting
import rgsp_jax.learning as learning
import rgsp_jax.linalg as linalg
import rgsp_jax.merging as merging
import rgsp_jax.rgsp as rgsp
import rgsp_jax.similarity as similarity
import rgsp_jax.transport as transport
from mesh.kernels import KERNELS, M, N, R, matrices, normals
from mesh.problems import list_collectives, make_mesh
from rgsp_jax import methods
from rgsp_jax.batching import map_batch

LANES = 8
slow = pytest.mark.slow

ELSEWHERE = {
    "tsqr": "has an axis of its own: tests/linalg/test_rows.py",
    "rows_divided": "reads the mesh",
    "resolve_rank": "of Python numbers",
    "can_tell_apart": "of Python numbers",
    "count_relative": "of Python numbers",
    "limit_relative_rank": "of Python numbers",
    "is_mean": "of Python numbers",
    "chance_of_coincidences": "of Python numbers",
    "interpolation_weights": "of Python numbers",
    "check_learned": "of settings",
    "compose_tree": "of whole models: tests/learning",
    "expert_tree": "of whole models: tests/learning",
    "export_settings": "of whole models: tests/learning",
    "learn": "of whole models: tests/learning",
    "list_learnable": "of settings",
    "make_step": "of whole models: tests/learning",
    "place_family": "places whole models: tests/learning",
    "place_rows": "places arrays: tests/learning",
    "prepare_family": "of whole models: tests/learning",
    "start_coefficients": "of whole models: tests/learning",
    "start_learning": "of whole models: tests/learning",
}


def batch_by(transform, run):
    """The kernel over a leading axis of lanes."""
    if transform == "vmap":
        return jax.jit(jax.vmap(run))
    if transform == "pmap":
        return jax.pmap(run)

    def on_own_lane(*lanes):
        result = run(*jax.tree.map(lambda x: x[0], lanes))
        return jax.tree.map(lambda x: x[None], result)

    mesh = make_mesh(lanes=LANES)
    return jax.jit(jax.shard_map(on_own_lane, mesh=mesh, in_specs=P("lanes"), out_specs=P("lanes"), check_vma=False))


def stack_lanes(draw):
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *[draw(seed) for seed in range(LANES)])


def loop(run, lanes):
    compiled = jax.jit(run)
    results = [compiled(*jax.tree.map(lambda x, i=i: x[i], lanes)) for i in range(LANES)]
    return jax.tree.map(lambda *x: np.stack(x), *results)


def check_equal(found, expected, bound=1e-9):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape and x.dtype == y.dtype
        if np.issubdtype(y.dtype, np.inexact):
            np.testing.assert_allclose(
                x, y, rtol=bound, atol=bound * max(float(np.abs(y[np.isfinite(y)]).max(initial=0)), 1e-3)
            )
        else:
            np.testing.assert_array_equal(x, y)


QUICK = {
    ("truncated_svd", "shard_map"),
    ("truncated_svd gram", "pmap"),
    ("polar_factor", "vmap"),
    ("polar_factor", "pmap"),
    ("cholesky_qr", "shard_map"),
    ("bases", "vmap"),
    ("gromov_wasserstein", "pmap"),
    ("elements", "pmap"),
    ("graft by covariance", "shard_map"),
    ("fisher", "pmap"),
    ("search_alpha", "shard_map"),
    ("losses", "pmap"),
    *((f"method {name}", "shard_map") for name in ("average", "slerp", "karcher", "ties", "della", "regmean", "graft")),
    *((f"method {name}", "pmap") for name in ("relative", "task_arithmetic", "model_stock", "dare", "iso_c")),
}


@pytest.mark.parametrize(
    "name, transform",
    [
        pytest.param(name, transform, marks=() if (name, transform) in QUICK else slow, id=f"{name}-{transform}")
        for name in KERNELS
        for transform in ("vmap", "pmap", "shard_map")
    ],
)
def test_a_batch_is_a_loop(name, transform):
    kernel = KERNELS[name]
    lanes = stack_lanes(kernel.draw)
    batched = batch_by(transform, kernel.run)
    found = batched(*lanes)
    check_equal(found, loop_of(name))
    if transform == "shard_map":
        assert not list_collectives(batched.lower(*lanes).compile().as_text())


@functools.cache
def loop_of(name):
    return loop(KERNELS[name].run, stack_lanes(KERNELS[name].draw))


def test_quick_ones_are_in_the_table():
    assert {name for name, _ in QUICK} <= set(KERNELS)


def test_the_table_covers_every_public_function():
    covered = frozenset().union(*(kernel.covers for kernel in KERNELS.values())) | set(ELSEWHERE)
    for package in (linalg, transport, rgsp, merging, grafting, similarity, learning):
        functions = {name for name in package.__all__ if inspect.isfunction(inspect.unwrap(getattr(package, name)))}
        assert functions <= covered, f"{package.__name__}: {sorted(functions - covered)}"
    assert {f"method {name}" for name in methods} <= set(KERNELS)


def sum_of_svd(x):
    svd = linalg.truncated_svd(x, R)
    return jnp.sum(jnp.sin(jnp.matmul(svd.u * svd.s[None, :], svd.v.T)))


def sum_of_plan(a, b):
    costs = transport.normalize_jointly(transport.squared_distances(a.T), transport.squared_distances(b.T))
    plan = transport.gromov_wasserstein(*costs, epsilon=0.1).plan
    return jnp.sum(plan * jnp.cos(a[:, :4]))


GRADIENTS = {
    "truncated_svd": (sum_of_svd, matrices((M, N))),
    "polar_factor": (lambda x: jnp.sum(jnp.sin(linalg.polar_factor(x))), matrices((M, N))),
    "gromov_wasserstein": (sum_of_plan, normals((4, 4), (4, 4))),
    "relative": (
        lambda stack: jnp.sum(jnp.sin(methods["relative"](stack, rank=R).merged)),
        lambda seed: normals((3, M, N))(seed),
    ),
}


@pytest.mark.parametrize(
    "name, transform",
    [
        pytest.param(
            name,
            transform,
            marks=() if (name, transform) in {("truncated_svd", "pmap"), ("polar_factor", "shard_map")} else slow,
        )
        for name in GRADIENTS
        for transform in ("vmap", "pmap", "shard_map")
    ],
)
def test_gradients_of_a_batch_are_those_of_a_loop(name, transform):
    run, draw = GRADIENTS[name]
    lanes = stack_lanes(draw)
    derivative = jax.grad(run)
    expected = loop(derivative, lanes)
    assert np.isfinite(expected).all() and np.abs(expected).max() > 1e-3
    check_equal(batch_by(transform, derivative)(*lanes), expected, 1e-7)


@pytest.mark.parametrize("transform", ["vmap", "pmap", "shard_map"])
def test_map_batch_inside_a_batch(transform):
    """What runs one after the other on a CPU does so on each device."""

    def run(batch):
        return map_batch(lambda x, y: (jnp.matmul(x, y), x.sum()), batch, jnp.swapaxes(batch, 1, 2))

    lanes = stack_lanes(normals((3, 4, 5)))
    check_equal(batch_by(transform, run)(*lanes), loop(run, lanes))
