"""Learning on a mesh: each device composes its own matrices and answers its own rows; values are one device's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rgsp_jax import learning

RANK, ROWS, CLASSES = 2, 10, 6
GATHER = re.compile(r"= \w+\[([\d,]*)\]\S* all-gather")
OTHERS = re.compile(r"all-to-all|collective-permute|collective-broadcast|ragged")


def make_trees(count=3, seed=0):
    """Six matrices of one shape, an embedding, biases and a counter."""
    rng = np.random.default_rng(seed)
    shapes = {f"layer_{i}": {"kernel": (6, 6), "bias": (6,)} for i in range(5)}
    shapes |= {"head": {"kernel": (6, CLASSES)}, "word": {"embedding": (11, 8)}}
    base = jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    return [
        jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape)), base) | {"steps": jnp.arange(3)}
        for _ in range(count)
    ]


def mesh_of(**axes):
    """Of the first devices."""
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


def draw_coefficients(family, per="direction"):
    rng = np.random.default_rng(5)
    start = learning.start_coefficients(family, per)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape)), start)


def assert_close(found, expected, atol=1e-12):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=atol), found, expected
    )


def make_batch(rows=ROWS, seed=2):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, 6)),
        "teacher": rng.normal(size=(rows, CLASSES)),
        "labels": rng.integers(0, CLASSES, rows),
        "where": np.arange(rows) % 4 != 1,
    }


def answer(tree, x):
    for i in range(5):
        x = jnp.tanh(x @ tree[f"layer_{i}"]["kernel"] + tree[f"layer_{i}"]["bias"][None])
    return x @ tree["head"]["kernel"]


def loss(coefficients, family, batch):
    """Everything a loss may read: answers, labels, features, a pull."""
    tree = learning.compose_tree(family, coefficients)
    logits = answer(tree, batch["x"])
    taught = learning.distillation(logits, batch["teacher"], 2.0, batch["where"])
    known = learning.cross_entropy(logits, batch["labels"], batch["where"])
    near = learning.feature_distance(logits, batch["teacher"], batch["where"])
    return taught + known + near + 0.1 * jnp.sum(tree["word"]["embedding"] ** 2)


@pytest.fixture(scope="module")
def family():
    return learning.prepare_family(make_trees(), rank=RANK)


@pytest.mark.parametrize("devices", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_a_divided_family_is_the_family(family, devices):
    mesh = mesh_of(layers=devices)
    placed = learning.place_family(family, mesh)
    coefficients = draw_coefficients(family)
    held = {shard.data.shape[0] for group in placed.groups for shard in group.stack.addressable_shards}
    assert held == {-(-6 // devices)}
    compose = jax.jit(learning.compose_tree)
    assert_close(compose(placed, coefficients), compose(family, coefficients))
    assert_close(learning.compose_tree(placed, coefficients), compose(family, coefficients))  # without jit too
    for k in range(3):
        assert_close(learning.expert_tree(placed, k), learning.expert_tree(family, k), 0)
    assert learning.export_settings(placed, coefficients) == learning.export_settings(family, coefficients)
    assert learning.start_coefficients(placed).keys() == learning.start_coefficients(family).keys()
    if devices == 8:  # the embedding's second dimension is the first that eight devices share evenly
        assert {s.data.shape for s in placed.tensors["word/embedding"].addressable_shards} == {(3, 11, 1)}


def test_a_family_is_decomposed_where_it_lies(family):
    """Every device decomposes its own matrices: what comes out is divided, and the members are the same."""
    mesh = mesh_of(layers=4)
    found = learning.prepare_family(make_trees(), rank=RANK, mesh=mesh)
    for group in found.groups:
        for leaf in jax.tree.leaves((group.stack, group.parts)):
            assert len({shard.index[0].start for shard in leaf.addressable_shards}) == 4
    assert_close(found.starts, family.starts)
    coefficients = draw_coefficients(family)
    compose = jax.jit(learning.compose_tree)
    assert_close(compose(found, coefficients), compose(family, coefficients))


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 4},
        pytest.param({"data": 2, "layers": 4}, marks=pytest.mark.slow),
        pytest.param({"data": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda axes: "x".join(map(str, axes.values())),
)
def test_steps_are_those_of_one_device_and_resume_exactly(family, axes):
    """Rows that fill up a device's share do not count: sums and counts are of all devices."""
    mesh = mesh_of(**axes)
    placed = learning.place_family(family, mesh, list(axes)[-1])
    batches = [make_batch(seed=seed) for seed in range(4)]
    divided = [learning.place_rows(batch, mesh) for batch in batches]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(divided)} == {-(-ROWS // axes["data"]) * axes["data"]}

    # Where directions reach everything, the gradient of the rest is rounding, of which a smaller eps makes whole steps.
    optimiser = optax.adam(0.05, eps=1e-5)
    step = learning.make_step(loss, optimiser)
    start = learning.start_learning(learning.start_coefficients(family), optimiser)
    expected = list(learning.learn(start, step, [(family, batch) for batch in batches]))
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed_start = jax.device_put(start, everywhere)
    found = list(learning.learn(placed_start, step, [(placed, batch) for batch in divided]))
    assert_close([value for _, value in found], [value for _, value in expected], 1e-11)
    assert_close(found[-1][0], expected[-1][0], 1e-9)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found[-1][0]))

    restored = jax.device_put(jax.tree.map(np.asarray, found[1][0]), everywhere)  # as if saved and loaded
    *_, (resumed, _) = learning.learn(restored, step, [(placed, batch) for batch in divided[2:]])
    jax.tree.map(np.testing.assert_array_equal, resumed, found[-1][0])

    text = step.lower(placed_start, placed, divided[0]).compile().as_text()
    gathered = {tuple(int(n) for n in shape.split(",")) for shape in GATHER.findall(text)}
    rows = divided[0]["x"].shape[0]
    assert gathered and not any(rows in shape for shape in gathered), gathered  # weights, no inputs, no answers
    assert not OTHERS.search(text)


LOSSES = {
    "cross-entropy": lambda x, y, labels, where: learning.cross_entropy(x, labels, where),
    "entropy": lambda x, y, labels, where: learning.entropy(x, where),
    "weighted entropy": lambda x, y, labels, where: learning.weighted_entropy(x, where),
    "distillation": lambda x, y, labels, where: learning.distillation(x, y, 2.0, where),
    "feature distance": lambda x, y, labels, where: learning.feature_distance(x, y, where),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_divided_rows(name):
    """Value and gradient are those of the rows that count, and only sums travel."""
    rng = np.random.default_rng(1)
    operands = rng.normal(size=(13, 3, CLASSES)), rng.normal(size=(13, 3, CLASSES))
    operands = (*operands, rng.integers(0, CLASSES, (13, 3)), rng.random((13, 3)) < 0.6)
    both = jax.jit(jax.value_and_grad(LOSSES[name]))
    divided = learning.place_rows(operands, mesh_of(data=8))
    value, gradient = both(*divided)
    expected, slope = both(*operands)
    assert_close((value, np.asarray(gradient)[:13]), (expected, slope))
    assert not np.asarray(gradient)[13:].any()
    text = both.lower(*divided).compile().as_text()
    assert "all-reduce" in text and not GATHER.search(text) and not OTHERS.search(text)
