"""Permuted twins: the function is kept, the permutation is found, and what does not fit is named."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.perceptrons import INPUTS, SIZES, SPEC, mlp, outputs, shuffle
from rgsp_jax.merging import match_weights, permute, transport_neurons

MATCHING = jax.jit(lambda a, b: match_weights(a, b, SPEC))
EXACT = jax.jit(lambda a, b: transport_neurons(a, b, SPEC))


def inverse(permutations):
    return {name: np.argsort(p) for name, p in permutations.items()}


def test_a_permuted_model_is_the_same_function():
    model, order = mlp(0), shuffle(0)
    twin = permute(model, SPEC, order)
    np.testing.assert_allclose(outputs(twin, INPUTS), outputs(model, INPUTS), atol=1e-12)
    np.testing.assert_array_equal(twin["mid.weight"], np.asarray(model["mid.weight"])[order["h2"]][:, order["h1"]])
    back = permute(twin, SPEC, {name: jnp.asarray(p) for name, p in inverse(order).items()})
    for name in SPEC:
        np.testing.assert_array_equal(back[name], model[name])


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_weight_matching_finds_the_twin(noise):
    for seed in range(5):
        model = mlp(seed)
        order = shuffle(seed)
        twin = permute(mlp(100 + seed, noise, model), SPEC, order)
        found = MATCHING(model, twin)
        assert found.converged
        for name, p in found.permutations.items():
            np.testing.assert_array_equal(p, inverse(order)[name])
        if not noise:
            merged = {n: (model[n] + x) / 2 for n, x in permute(twin, SPEC, found.permutations).items()}
            np.testing.assert_allclose(outputs(merged, INPUTS), outputs(model, INPUTS), atol=1e-12)
            assert found.similarity == pytest.approx(sum(float(jnp.sum(x**2)) for x in model.values()))


def test_weight_matching_ends_where_no_single_permutation_helps():
    """A small problem by brute force: no other order of either layer, the other kept, is more similar."""
    spec = {"a": ("h", None), "b": ("g", "h"), "c": (None, "g")}
    rng = np.random.default_rng(3)
    models = [
        {n: jnp.asarray(rng.normal(size=s)) for n, s in (("a", (4, 3)), ("b", (4, 4)), ("c", (2, 4)))} for _ in range(2)
    ]
    found = jax.jit(lambda a, b: match_weights(a, b, spec))(*models)

    def similarity(h, g):
        a, b = ({n: np.asarray(x) for n, x in model.items()} for model in models)
        return np.sum(a["a"] * b["a"][h]) + np.sum(a["b"] * b["b"][g][:, h]) + np.sum(a["c"] * b["c"][:, g])

    h, g = (np.asarray(found.permutations[name]) for name in ("h", "g"))
    orders = [np.array(p) for p in itertools.permutations(range(4))]
    assert found.similarity == pytest.approx(similarity(h, g))
    assert similarity(h, g) >= max(*(similarity(p, g) for p in orders), *(similarity(h, p) for p in orders)) - 1e-9
    assert similarity(h, g) > similarity(np.arange(4), np.arange(4))


def test_axes_that_share_a_permutation():
    """A residual stream: one permutation on both sides of a square weight."""
    spec = {"embed": (None, "stream"), "square": ("stream", "stream"), "read": (None, "stream")}
    rng = np.random.default_rng(4)
    model = {n: jnp.asarray(rng.normal(size=s)) for n, s in (("embed", (7, 6)), ("square", (6, 6)), ("read", (2, 6)))}
    order = {"stream": jnp.asarray(rng.permutation(6))}
    twin = permute(model, spec, order)
    np.testing.assert_array_equal(twin["square"], np.asarray(model["square"])[np.ix_(order["stream"], order["stream"])])
    found = jax.jit(lambda a, b: match_weights(a, b, spec))(model, twin)
    np.testing.assert_array_equal(found.permutations["stream"], np.argsort(order["stream"]))


@pytest.mark.parametrize(("coupling", "bound"), [("exact", 1e-12), ("sinkhorn", 1e-2), ("gromov_wasserstein", 1e-2)])
def test_transport_carries_the_twin_back(coupling, bound):
    model = mlp(1)
    twin = permute(model, SPEC, shuffle(1))
    run = EXACT if coupling == "exact" else jax.jit(lambda a, b: transport_neurons(a, b, SPEC, coupling))
    carried = run(model, twin)
    assert all(c.converged for c in carried.couplings.values())
    for name in SPEC:
        np.testing.assert_allclose(carried.params[name], model[name], atol=bound)
    for layer, c in carried.couplings.items():
        np.testing.assert_allclose(c.plan.sum(0), 1 / SIZES[layer], atol=1e-3)
        np.testing.assert_allclose(c.plan.sum(1), 1 / SIZES[layer], atol=1e-3)


def test_exact_transport_is_the_best_assignment_of_the_first_layer():
    a, b = mlp(5), mlp(6)
    carried = EXACT(a, b)
    plan = np.asarray(carried.couplings["h1"].plan)
    rows = [np.concatenate([m["in.weight"], m["in.bias"][:, None]], axis=1) for m in (a, b)]
    cost = ((rows[0][:, None] - rows[1][None]) ** 2).sum(-1)
    assert set(np.unique(plan)) == {0.0, 1 / 12}
    rng = np.random.default_rng(0)
    best = 12 * (plan * cost).sum()
    assert all(best <= cost[np.arange(12), rng.permutation(12)].sum() for _ in range(2000))
    swaps = [cost[np.arange(12), swap(plan.argmax(1), i, j)].sum() for i, j in itertools.combinations(range(12), 2)]
    assert best <= min(swaps)
    np.testing.assert_allclose(carried.params["in.weight"], np.asarray(b["in.weight"])[plan.argmax(1)], atol=1e-12)
    np.testing.assert_allclose(outputs(carried.params, INPUTS), outputs(b, INPUTS), atol=1e-10)


def swap(order, i, j):
    order = order.copy()
    order[[i, j]] = order[[j, i]]
    return order


def test_a_spec_that_does_not_fit_names_everything():
    model = mlp(0)
    wrong = {**SPEC, "in.bias": ("h1", None), "mid.bias": ("h1",), "extra": (None,)}
    del wrong["out.bias"]
    with pytest.raises(ValueError) as error:
        permute(model, wrong, shuffle(0))
    for part in (
        "out.bias is not in the spec",
        "extra is in the spec but not in the model",
        "in.bias has 1 axes and its spec 2",
        "h1 orders 12 neurons in in.weight and 9 in mid.bias",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="coupling must be one of exact"):
        transport_neurons(model, model, SPEC, "nearest")
    with pytest.raises(ValueError, match=r"out.weight is \(3, 9\) and \(4, 9\)"):
        match_weights(model, {**model, "out.weight": jnp.ones((4, 9))}, SPEC)
    backwards = {name: SPEC[name] for name in reversed(SPEC)}
    with pytest.raises(ValueError, match="h2 has no incoming weights from the layers before it"):
        transport_neurons(model, model, backwards)


def test_flax_kernels_are_transported_by_their_last_axis():
    model = mlp(7)
    spec = {name: tuple(reversed(axes)) for name, axes in SPEC.items()}
    turned = {name: x.T for name, x in model.items()}
    twin = permute(turned, spec, shuffle(7))
    carried = jax.jit(lambda a, b: transport_neurons(a, b, spec, output_axis=-1))(turned, twin)
    for name, x in turned.items():
        np.testing.assert_allclose(carried.params[name], x, atol=1e-12)
