"""Sweeps of trees: every point is the merge it says, and what points share is computed once."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax import merge, methods
from rgsp_jax.sweep import merging, sweep_merge
from rgsp_jax.types import InputStatistics

DENSE = {"dense": {"kernel": (9, 7), "bias": (7,)}, "other": {"kernel": (9, 7)}}
WITH_CONVOLUTION = DENSE | {"conv": {"kernel": (3, 2, 4, 6)}}


def make_trees(count, dtype=np.float64, seed=0, shapes=DENSE):
    rng = np.random.default_rng(seed)

    def siblings(shape):
        ancestor = rng.normal(size=shape)
        return [jnp.asarray((ancestor + 0.3 * rng.normal(size=shape)).astype(dtype)) for _ in range(count)]

    found = {layer: {name: siblings(shape) for name, shape in own.items()} for layer, own in shapes.items()}
    return [jax.tree.map(lambda x, k=k: x[k], found, is_leaf=lambda x: isinstance(x, list)) for k in range(count)]


def assert_points_are_merges(trees, points, bound, **beside):
    wanted = dict(enumerate(points))
    for point, tree in sweep_merge(trees, points, **beside):
        setting = dict(wanted.pop(point.index))
        expected, _ = merge(trees, setting.pop("method"), **beside, **setting)
        for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), rtol=0, atol=bound)
    assert not wanted


RGSP = [
    {"method": "rgsp", "rank": 4, "beta": 1.0, "temperature": 0.05},
    {"method": "rgsp", "rank": 0.4, "beta": 0.0, "temperature": 0.2, "epsilon": 0.1},
    {"method": "rgsp", "rank": 4, "beta": 3.0, "fused_penalty": 0.5, "projection": "one_sided"},
    {"method": "rgsp", "rank": 2, "beta": 2.0, "temperature": None, "symmetric": False, "rest_term": True},
]


def test_points_of_two_models_are_their_merges():
    assert_points_are_merges(make_trees(2), [RGSP[1], {"method": "slerp", "t": 0.3}], 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-7), (np.float32, 2e-4)])
def test_points_of_every_shape_and_setting_are_their_merges(dtype, bound):
    assert_points_are_merges(make_trees(2, dtype, shapes=WITH_CONVOLUTION), RGSP, bound)
    points = [{"method": "relative", "rank": r, "scale": s} for r in (1, 0.5, 5) for s in (0.7, 0.5)]
    assert_points_are_merges(make_trees(3, dtype, shapes=WITH_CONVOLUTION), points, bound)


@pytest.mark.slow
def test_points_of_three_models_are_their_merges():
    points = [{"method": "relative", "rank": r, "scale": s} for r, s in ((1, 0.7), (0.5, 0.5))]
    weighted = [
        {"method": "relative_weighted", "rank": r, "directions": d, "rest": (0.1, 0.0, 0.2)}
        for r, d in ((3, (1.0, 0.2, 0.4)),)
    ]
    assert_points_are_merges(make_trees(3), points + weighted, 1e-8)


def test_points_on_a_base_and_with_a_key_are_their_merges():
    trees = make_trees(4)
    points = [{"method": "tsv_m", "scale": s} for s in (0.5, 1.0)]
    points += [{"method": "dare", "scale": 0.5, "drop_rate": d} for d in (0.2, 0.6)]
    assert_points_are_merges(trees[:3], points, 1e-9, base=trees[3], key=jax.random.key(3))


@pytest.mark.slow
def test_static_settings_have_decompositions_of_their_own():
    trees = make_trees(4)
    points = [{"method": "iso_cts", "scale": s, "common_share": c} for s in (0.5, 1.0) for c in (0.4, 0.8)]
    points += [{"method": "iso_c", "scale": s} for s in (0.5, 1.0)]
    assert_points_are_merges(trees[:3], points, 1e-9, base=trees[3], key=jax.random.key(3))


def test_points_with_covariances_are_their_merges():
    trees = make_trees(2)
    rows = np.random.default_rng(5).normal(size=(2, 30, 9))
    inputs = {"dense/kernel": InputStatistics(covariance=jnp.asarray(np.einsum("cin,cim->cnm", rows, rows) / 30))}
    points = [{"method": "regmean", "off_diagonal": x} for x in (0.2, 0.9)]
    assert_points_are_merges(trees, points, 1e-9, inputs=inputs)


def counted(method):
    """The method, counting how often each of its steps is traced."""
    counts = {"prepare": 0, "solve": 0, "build": 0}

    def count(name):
        step = getattr(method.stages, name)

        def counting(*arguments, **named):
            counts[name] += 1
            return step(*arguments, **named)

        counting.__signature__ = inspect.signature(step)
        return counting

    stages = dataclasses.replace(method.stages, **{name: count(name) for name in counts})
    return dataclasses.replace(method, stages=stages), counts


def test_one_compilation_and_one_decomposition_for_the_grid(monkeypatch):
    """Each step is traced once for each of the two shapes, whatever the memory; solutions are as few as they can be."""
    method, counts = counted(methods["rgsp"])
    monkeypatch.setattr(merging, "methods", {**methods, "rgsp": method})
    lanes = []
    stack = merging.stack_settings
    monkeypatch.setattr(merging, "stack_settings", lambda s: lanes.append(len(s)) or stack(s))
    points = [{"rank": r, "beta": b, "epsilon": e} for r in (1, 2, 4) for b in (0.5, 1.0, 2.0) for e in (0.05, 0.1)]
    trees = make_trees(2, np.float32, shapes=WITH_CONVOLUTION)
    first = {p.index: tree for p, tree in sweep_merge(trees, points)}
    assert set(first) == set(range(18))
    assert counts["prepare"] == counts["build"] == 2 and counts["solve"] <= 4  # its shape alone once more
    assert lanes == [1, 1, 6, 6]  # ranks times epsilons: beta comes later
    lanes.clear()
    for point, tree in sweep_merge(trees, points, memory=5_000):  # less than all solutions take
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), tree, first[point.index])
    assert max(lanes) < 6 and len(set(lanes[2:])) == 1
    assert counts["prepare"] == 2 and counts["build"] <= 4  # chunks of another size


def test_every_mistake_at_once_before_anything_is_computed():
    points = [{"rank": 0}, {"method": "nothing"}, {"beta": -1}]
    with pytest.raises(ValueError, match="no method 'nothing'"):
        next(sweep_merge(make_trees(2), points))
    with pytest.raises(ValueError, match=r"rank of method 'rgsp' must be .*; beta of method 'rgsp' must be"):
        next(sweep_merge(make_trees(2), points[::2]))
    with pytest.raises(ValueError, match="needs base="):
        next(sweep_merge(make_trees(2), [{"method": "tsv_m"}]))
