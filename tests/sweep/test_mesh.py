"""Sweeps on a mesh: the trees of one device, every device by itself, even shares, one trace a shape."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pipeline.toy_models import read_model, toy_family, write_family
from rgsp_jax import methods
from rgsp_jax.errors import RefusedError
from rgsp_jax.learning.dealing import deal_rows
from rgsp_jax.pipeline.kernels import LAYERS
from rgsp_jax.sweep import checkpoints, merging, parse_sweep, run_sweep, sweep_merge
from rgsp_jax.sweep.mesh import POINTS, compile_collect, make_mesh, name_axes, split_devices
from sweep.test_merging import counted, make_trees

FIVE = {f"layer_{i}": {"kernel": (9, 7), "bias": (7,)} for i in range(5)}
TWO_SHAPES = FIVE | {"wide": {"kernel": (6, 8)}}
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-(?:permute|broadcast)|ragged")
RELATIVE = [{"method": "relative", "rank": r, "scale": s} for r in (1, 0.5, 4) for s in (0.7, 0.5)]
EXPERTS = "moe.experts.*"
"""Three matrices in one tensor."""
AVERAGES = [{"method": "average", "coefficients": c} for c in ((0.2, 0.5, 0.3), (0.1, 0.1, 0.8), (0.6, 0.2, 0.2))]
PAIRWISE = [
    {"method": "rgsp", "rank": r, "beta": b, "projection": p}
    for r, b, p in ((4, 1.0, "one_sided"), (2, 0.5, "one_sided"), (3, 1.0, "two_sided"), (2, 2.0, "two_sided"))
]


def mesh_of(points, layers):
    return make_mesh(jax.devices(), points, layers)


def largest_difference(found, expected):
    """Of two lists of (point, tree), relative to each leaf's largest entry; points may come in another order."""
    trees = {point.index: tree for point, tree in expected}
    assert len(found) == len(trees) == len({point.index for point, _ in found})
    differences = jax.tree.map(
        lambda x, y: float(jnp.abs(jnp.asarray(np.asarray(x) - np.asarray(y))).max() / np.abs(np.asarray(y)).max()),
        {point.index: tree for point, tree in found},
        trees,
    )
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize(
    ("points", "layers", "settings", "shapes", "dtype"),
    [
        (2, 4, RELATIVE[:4] + AVERAGES, FIVE, np.float32),
        pytest.param(4, 2, RELATIVE, TWO_SHAPES, np.float64, marks=pytest.mark.slow),
        pytest.param(3, 2, RELATIVE, TWO_SHAPES, np.float32, marks=pytest.mark.slow),
        pytest.param(2, 3, PAIRWISE, TWO_SHAPES, np.float64, marks=pytest.mark.slow),
    ],
)
def test_points_on_a_mesh_are_those_of_one_device(points, layers, settings, shapes, dtype):
    count = 2 if settings is PAIRWISE else 3
    trees = make_trees(count, dtype, shapes=shapes)
    expected = list(sweep_merge(trees, settings))
    found = list(sweep_merge(trees, settings, mesh=mesh_of(points, layers)))
    assert largest_difference(found, expected) <= 16 * np.finfo(dtype).eps
    for leaf in jax.tree.leaves(found[-1][1]):
        assert leaf.sharding.is_fully_replicated and len(leaf.devices()) == points * layers


def test_trees_that_a_study_asks_for_are_merged_on_a_mesh():
    trees = make_trees(3, shapes=FIVE)
    settings = [{"method": "task_arithmetic", "scale": s} for s in (0.5, 1.0)]
    expected = list(sweep_merge(trees[:2], settings, base=trees[2]))
    merger = merging.TreeMerger(trees[:2], {}, mesh=mesh_of(2, 4), base=trees[2])
    found = [(point, merger.merge(point)) for point, _ in expected]
    assert largest_difference(found, expected) <= 16 * np.finfo(np.float64).eps


@pytest.mark.parametrize(("name", "axes"), [(LAYERS, (1, 8)), (POINTS, (8, 1))])
def test_an_axis_may_be_missing(name, axes):
    named = name_axes(Mesh(np.array(jax.devices()), (name,)))
    assert named.axis_names == (POINTS, LAYERS) and named.devices.shape == axes
    swapped = name_axes(Mesh(np.array(jax.devices()).reshape(4, 2), (LAYERS, POINTS)))
    assert swapped.devices.shape == (2, 4) and swapped.devices[1, 0] == jax.devices()[1]
    with pytest.raises(ValueError, match=r"none like \{.rows.: 8\}"):
        next(sweep_merge(make_trees(2), [{"method": "slerp"}], mesh=Mesh(np.array(jax.devices()), ("rows",))))


def test_one_trace_a_shape_and_no_words_between_devices(monkeypatch):
    """Six solutions of five matrices: the steps are traced once for each shape and speak to no other device."""
    method, counts = counted(methods["relative"])
    monkeypatch.setattr(merging, "methods", {**methods, "relative": method})
    programs = []

    def watch(name):
        original = getattr(merging, name)

        def compile_step(*arguments):
            step = original(*arguments)

            def run(*operands):
                text = step.lower(*operands).compile().as_text()
                programs.append((name, set(COLLECTIVE.findall(text))))
                return step(*operands)

            run.eval_shape = step.eval_shape
            return run

        monkeypatch.setattr(merging, name, compile_step)

    for name in ("compile_prepare", "compile_solve", "compile_build", "compile_collect"):
        watch(name)
    monkeypatch.setattr(merging, "solution_bytes", lambda *_: 1)
    mesh = mesh_of(2, 4)
    points = [{"method": "relative", "rank": r, "scale": s} for r in (1, 2, 4) for s in (0.3, 0.5)]
    found = list(sweep_merge(make_trees(3, np.float32, shapes=TWO_SHAPES), points, mesh=mesh))
    assert len(found) == 6
    assert counts == {"prepare": 2, "solve": 2, "build": 2}
    alone = {"compile_prepare", "compile_solve", "compile_build"}
    assert {name for name, _ in programs} == alone | {"compile_collect"}
    assert all(not spoken for name, spoken in programs if name in alone)
    assert all(spoken == {"all-gather", "all-reduce"} for name, spoken in programs if name == "compile_collect")
    shapes = [5, 1]
    for count in shapes:
        local = jnp.zeros((2, 4 * -(-count // 4), 3, 3))
        assert compile_collect(mesh)(local, np.int32(0), deal_rows(count, 4).slots).shape == (count, 3, 3)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 16, 23])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_no_device_is_idle_while_another_has_two(count, parts):
    deal = deal_rows(count, parts)
    size = -(-count // parts)
    assert len(deal.rows) == parts * size
    np.testing.assert_array_equal(deal.rows[deal.slots], np.arange(count))
    held = np.bincount(deal.slots // size, minlength=parts)
    assert held.max() - held.min() <= 1
    if count % parts == 0:
        np.testing.assert_array_equal(deal.rows, np.arange(count))


def test_points_that_share_a_solution_are_built_on_all_devices():
    assert merging.split_groups([[0, 1, 2, 3, 4], [5]], 4) == [[0, 1], [2], [3, 4], [5]]
    assert merging.split_groups([[0], [1]], 4) == [[0], [1]]
    assert merging.split_groups([[0, 1], [2, 3], [4, 5]], 2) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.usefixtures("plain_report")
def test_checkpoints_on_several_devices(tmp_path, monkeypatch):
    """The merges are one device's; matrices are dealt out, and points to come are solved beside the first."""
    models = [str(path) for path in write_family(tmp_path, toy_family(3))]
    axes = {"rank": [1, 2, 3], "scale": [0.5, 0.7]}
    chosen = parse_sweep({"models": models, "include": [EXPERTS], "axes": axes})
    shapes, compile_solve = [], checkpoints.compile_solve

    def watch(*arguments):
        mesh = arguments[2]
        shapes.append(None if mesh is None else mesh.devices.shape)
        return compile_solve(*arguments)

    monkeypatch.setattr(checkpoints, "compile_solve", watch)

    def merge_on(devices):
        found = {}

        def evaluate(path):
            found[path.name] = read_model(path)
            return float(len(found))

        run_sweep(chosen, tmp_path / f"on{devices}", evaluate, devices=devices)
        return found

    expected = merge_on(1)
    assert shapes == [None] * 3 and len(expected) == 6
    shapes.clear()
    found = merge_on(8)
    assert shapes == [(2, 3), (1, 3)]  # three matrices each, two solutions at once, then the one that is left
    for name, model in expected.items():
        for tensor, x in model.items():
            bound = 16 * np.finfo(np.float32).eps * np.abs(x.astype(np.float32)).max(initial=0)
            np.testing.assert_allclose(found[name][tensor], x, rtol=0, atol=bound, err_msg=f"{name} {tensor}")
    with pytest.raises(RefusedError, match="--devices 9"):
        run_sweep(chosen, tmp_path / "none", len, devices=9)


def test_devices_are_split_by_the_work_there_is():
    assert split_devices(8, [4, 3], 1) == (1, 4)  # more would be idle
    assert split_devices(8, [16], 1) == (1, 8)
    assert split_devices(8, [1], 64) == (8, 1)
    assert split_devices(8, [2], 64) == (4, 2)
    assert split_devices(8, [4], 2) == (2, 4)
    assert split_devices(1, [5], 5) == (1, 1)
