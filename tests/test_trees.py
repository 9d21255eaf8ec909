"""Merging pytrees: Flax modules, any-rank kernels, jit, and everything that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import references
import rgsp_jax
from rgsp_jax import merge, methods
from rgsp_jax.grafting import ridge_graft
from rgsp_jax.types import InputStatistics


def tree(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99)

    def near(*shape):
        return jnp.asarray((base.normal(size=shape) + 0.1 * rng.normal(size=shape)).astype(dtype))

    return {
        "token": {"embedding": near(11, 6)},
        "attention": {"query": {"kernel": near(6, 2, 3), "bias": near(2, 3)}, "out": {"kernel": near(2, 3, 6)}},
        "conv": {"kernel": near(2, 2, 3, 5)},
        "experts": {"kernel": near(4, 6, 5)},
        "norm": {"scale": near(6)},
        "count": jnp.asarray(3),
    }


@pytest.mark.parametrize("method", ["relative", "average"])
def test_every_leaf_is_merged_by_its_rule(method):
    trees = [tree(seed) for seed in range(3)]
    options = {"rank": 2} if method == "relative" else {}
    merged, report = merge(trees, method, **options)
    rules = dict(report.rules)
    assert rules["token/embedding"] == rules["norm/scale"] == rules["attention/query/bias"] == "average"
    assert rules["conv/kernel"] == rules["experts/kernel"] == rules["attention/out/kernel"] == method
    assert rules["count"] == "copy" and int(merged["count"]) == 3

    def by_hand(stack):
        return references.relative(stack, 2) if method == "relative" else np.mean(stack, 0)

    conv = by_hand([np.asarray(t["conv"]["kernel"]).reshape(12, 5).T for t in trees]).T.reshape(2, 2, 3, 5)
    np.testing.assert_allclose(merged["conv"]["kernel"], conv, atol=1e-9)
    query = by_hand([np.asarray(t["attention"]["query"]["kernel"]).reshape(6, 6).T for t in trees]).T.reshape(6, 2, 3)
    np.testing.assert_allclose(merged["attention"]["query"]["kernel"], query, atol=1e-9)
    for i in range(4):
        expert = by_hand([np.asarray(t["experts"]["kernel"][i]).T for t in trees]).T
        np.testing.assert_allclose(merged["experts"]["kernel"][i], expert, atol=1e-9)
    embedding = np.mean([t["token"]["embedding"] for t in trees], 0)
    np.testing.assert_allclose(merged["token"]["embedding"], embedding, atol=1e-12)
    if method == "relative":
        assert report.stats["experts/kernel"]["rho"].shape == (4,) and report.stats["conv/kernel"]["rho"].shape == ()


def test_jit_equals_eager_and_hyperparameters_trace():
    trees = [tree(seed) for seed in range(3)]
    jitted = jax.jit(lambda trees, scale: merge(trees, "relative", rank=2, scale=scale))
    eager, _ = merge(trees, "relative", rank=2, scale=0.5)
    merged, report = jitted(trees, 0.5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), merged, eager)
    assert dict(report.rules)["conv/kernel"] == "relative"
    other, _ = jitted(trees, 1.5)
    assert not np.allclose(other["conv"]["kernel"], merged["conv"]["kernel"])
    assert jitted._cache_size() == 1


def test_gradients_flow_through_a_tree():
    trees = [tree(seed) for seed in range(3)]

    @jax.jit
    def loss(scale):
        merged, _ = merge(trees, "relative", rank=2, scale=scale)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(merged) if jnp.issubdtype(x.dtype, jnp.floating))

    gradient = jax.grad(loss)(1.0)
    assert abs(gradient - references.directional_derivative(loss, 1.0, 1.0, 1e-4)) < 1e-5 * abs(gradient)


class Net(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.dense = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(self.embed(x)))


def test_flax_modules_merge_and_run():
    splits = [nnx.split(Net(seed)) for seed in range(3)]
    state, report = merge([state for _, state in splits], "relative", rank=2)
    rules = dict(report.rules)
    assert rules["dense/kernel"] == "relative" and rules["embed/embedding"] == "average"
    net = nnx.merge(splits[0][0], state)
    assert np.isfinite(net(jnp.arange(7))).all()
    kernels = [np.asarray(state["dense"]["kernel"][...]).T for _, state in splits]
    np.testing.assert_allclose(net.dense.kernel[...], references.relative(kernels, 2).T, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_the_first_trees(dtype):
    trees = [tree(0, np.float32), tree(1, np.float32), tree(2, np.float32)]
    trees[0] = jax.tree.map(lambda x: x.astype(dtype) if x.ndim else x, trees[0])
    merged, _ = merge(trees, "relative", rank=2)
    assert all(x.dtype == dtype for x in jax.tree.leaves(merged) if x.ndim)


def given_to(method, tree):
    """What the method needs beside the trees."""
    key = {"key": jax.random.key(0)} if "key" in method.needs else {}
    return (
        key
        | ({"base": tree} if "base" in method.needs else {})
        | ({"inputs": {}} if "covariances" in method.needs else {})
    )


def test_equal_trees_return_the_tree():
    one = tree(0, np.float32)
    for name in ("average", "slerp", "rgsp", "relative", "graft", "model_stock"):  # of every scope and need
        method = methods[name]
        assert method.keeps_copies
        merged, _ = merge([one] * (method.models[1] or 3), name, **given_to(method, one))
        jax.tree.map(np.testing.assert_array_equal, merged, one)


def test_buffers_that_differ_are_flagged():
    trees = [tree(0), tree(1) | {"count": jnp.asarray(4)}]
    merged, report = merge(trees, "average")
    assert int(merged["count"]) == 3 and bool(report.stats["count"]["buffer_differs"])


def test_all_offenders_at_once():
    other = tree(1)
    other["norm"]["scale"] = jnp.zeros(7)
    other["conv"]["kernel"] = jnp.zeros((2, 2, 3, 4))
    with pytest.raises(ValueError, match=r"conv/kernel is .* norm/scale is") as error:
        merge([tree(0), other, {"a": jnp.zeros(2)}], "rgsp", nonsense=1)
    for part in ("takes 2 models, not 3", "'nonsense'", "tree 3 has another structure"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no method 'blend'; there are average"):
        merge([tree(0)], "blend")


def test_public_names():
    assert {"average", "slerp", "rgsp", "rgsp_seed", "dgsm", "gsf", "relative", "graft"} <= set(rgsp_jax.methods)


def test_a_graft_takes_statistics_of_inputs_by_path():
    """Leaves without them, vectors and embeddings are the first tree's; kernels of several matrices share theirs."""
    a, b = tree(0), tree(1)
    rng = np.random.default_rng(5)

    def statistics(width):
        rows = rng.normal(size=(30, width)) * np.geomspace(2, 0.1, width)
        return InputStatistics(covariance=jnp.asarray(rows.T @ rows / 30)[None])

    inputs = {"conv/kernel": statistics(12), "experts/kernel": statistics(6)}
    merged, report = jax.jit(lambda a, b: merge([a, b], "graft", inputs=inputs, ridge=2.0))(a, b)
    rules = dict(report.rules)
    assert {path for path, rule in rules.items() if rule == "graft"} == set(inputs)
    assert {rule for path, rule in rules.items() if path not in inputs} == {"copy"}
    untouched = [key for key in a if key not in ("conv", "experts")]
    for left, right in zip(*(jax.tree.leaves({key: x[key] for key in untouched}) for x in (merged, a)), strict=True):
        np.testing.assert_array_equal(left, right)
    for i in range(4):
        expert = ridge_graft(
            a["experts"]["kernel"][i].T, b["experts"]["kernel"][i].T, inputs["experts/kernel"].covariance[0], 2.0
        )
        np.testing.assert_allclose(merged["experts"]["kernel"][i], expert.T, atol=1e-12)
    with pytest.raises(ValueError, match="method 'graft' needs inputs="):
        merge([a, b], "graft")
