"""Neurons found by their geometry and carried between widths, without common coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.perceptrons import INPUTS, SIZES, SPEC, mlp, outputs, shuffle
from rgsp_jax.merging import carry_neurons, couple_neurons, permute, round_coupling
from rgsp_jax.merging.neuron_geometry import SIDES, TOLERANCE, find_geometry, find_linear_cost, find_places

APART = jax.jit(lambda a, b: couple_neurons(a, b, SPEC, common_ends=False))
JOINT = jax.jit(lambda a, b: couple_neurons(a, b, SPEC))


def rotate_ends(model, seed):
    """Inputs and outputs in other coordinates, which no neuron sees."""
    rng = np.random.default_rng(seed)
    first, last = (jnp.asarray(np.linalg.qr(rng.normal(size=(n, n)))[0]) for n in (16, 3))
    return {**model, "in.weight": model["in.weight"] @ first, "out.weight": last @ model["out.weight"]}


def split(model, seed):
    """The same function with every neuron twice, at half its outgoing weights, in random order."""
    rng = np.random.default_rng(seed)
    halves = {layer: np.repeat(np.arange(size), 2)[rng.permutation(2 * size)] for layer, size in SIZES.items()}
    wide = {
        name: x[halves["h1"]] if name.startswith("in") else x[halves["h2"]] if name.startswith("mid") else x
        for name, x in model.items()
    }
    wide["mid.weight"] = wide["mid.weight"][:, halves["h1"]] / 2
    wide["out.weight"] = wide["out.weight"][:, halves["h2"]] / 2
    return wide, halves


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_geometry_finds_a_twin_whose_ends_are_rotated(noise):
    for seed in range(3):
        model, order = mlp(seed), shuffle(seed)
        noisy = {name: x + noise * y for (name, x), y in zip(model.items(), mlp(50 + seed).values(), strict=True)}
        found = APART(model, rotate_ends(permute(noisy, SPEC, order), seed))
        for layer, coupling in found.items():
            assert coupling.converged
            np.testing.assert_array_equal(round_coupling(coupling.plan), np.argsort(order[layer]))
            assert jnp.abs(coupling.plan.sum(0) - 1 / SIZES[layer]).sum() <= TOLERANCE
            np.testing.assert_allclose(coupling.plan.sum(1), 1 / SIZES[layer], rtol=1e-9)


def test_a_split_twin_is_joined_and_split_again():
    model = mlp(3)
    wide, halves = split(model, 3)
    np.testing.assert_allclose(outputs(wide, INPUTS), outputs(model, INPUTS), atol=1e-12)
    found = {layer: c.plan for layer, c in JOINT(model, wide).items()}
    for layer, plan in found.items():
        assert plan.shape == (SIZES[layer], 2 * SIZES[layer])
        np.testing.assert_array_equal(plan.argmax(0), halves[layer])
    joined = carry_neurons(wide, SPEC, found)
    for name, x in model.items():
        np.testing.assert_allclose(joined[name], x, atol=1e-3)
    back = {layer: plan.T for layer, plan in found.items()}
    apart = carry_neurons(model, SPEC, back)
    for name, x in wide.items():
        np.testing.assert_allclose(apart[name], x, atol=1e-3)


def test_carrying_by_a_permutation_is_the_permutation():
    model, order = mlp(4), shuffle(4)
    plans = {layer: jax.nn.one_hot(p, p.shape[0]) / 7 for layer, p in order.items()}
    carried, permuted = carry_neurons(model, SPEC, plans), permute(model, SPEC, order)
    for name, x in permuted.items():
        np.testing.assert_allclose(carried[name], x, atol=1e-12)
    one = carry_neurons(model, SPEC, {"h1": plans["h1"]})
    np.testing.assert_allclose(outputs(one, INPUTS), outputs(model, INPUTS), atol=1e-12)
    np.testing.assert_array_equal(one["out.weight"], model["out.weight"])


def test_costs_are_what_they_say():
    model = mlp(5)
    places = find_places(SPEC, 0)
    assert places["h1"] == {"incoming": [("in.weight", 0), ("in.bias", 0)], "outgoing": [("mid.weight", 1)]}
    geometry = find_geometry(model, places["h2"])
    rows = np.concatenate([model["mid.weight"], np.asarray(model["mid.bias"])[:, None]], 1)
    for part in (rows, np.asarray(model["out.weight"]).T):
        distances = ((part[:, None] - part[None]) ** 2).sum(-1)
        centred = distances - distances.mean(0) - distances.mean(1)[:, None] + distances.mean()
        geometry = geometry - distances / np.sqrt((centred**2).mean())
    np.testing.assert_allclose(geometry, 0, atol=1e-9)
    rotated = rotate_ends(model, 5)
    for layer in SIZES:
        np.testing.assert_allclose(
            find_geometry(rotated, places[layer]), find_geometry(model, places[layer]), atol=1e-9
        )
        known = {other: jnp.eye(size) / size for other, size in SIZES.items()}
        linear = find_linear_cost(model, model, SPEC, places[layer], known, True, 0)
        assert jnp.trace(linear) / SIZES[layer] == pytest.approx(-len(SIDES))
        blind = find_linear_cost(model, rotated, SPEC, places[layer], {}, False, 0)
        np.testing.assert_allclose(blind, find_linear_cost(model, model, SPEC, places[layer], {}, False, 0))


def test_flax_kernels_are_coupled_by_their_last_axis():
    model, order = mlp(7), shuffle(7)
    twin = permute(model, SPEC, order)
    spec = {name: tuple(reversed(axes)) for name, axes in SPEC.items()}
    turned = [{name: x.T for name, x in m.items()} for m in (model, twin)]
    found = jax.jit(lambda a, b: couple_neurons(a, b, spec, output_axis=-1))(*turned)
    for layer, coupling in JOINT(model, twin).items():
        np.testing.assert_allclose(found[layer].plan, coupling.plan, atol=1e-6)
    carried = carry_neurons(turned[1], spec, {layer: c.plan for layer, c in found.items()}, output_axis=-1)
    for name, x in turned[0].items():
        np.testing.assert_allclose(carried[name], x, atol=1e-3)


def test_without_geometry_it_is_entropic_weight_matching():
    model, order = mlp(8), shuffle(8)
    twin = permute(model, SPEC, order)
    linear = jax.jit(lambda a, b: couple_neurons(a, b, SPEC, geometry=False))
    for layer, coupling in linear(model, twin).items():
        np.testing.assert_array_equal(round_coupling(coupling.plan), np.argsort(order[layer]))


def test_rounding_takes_the_permutation_of_most_mass():
    plan = jnp.asarray([[0.2, 0.1, 0.0], [0.1, 0.0, 0.2], [0.0, 0.3, 0.1]])
    np.testing.assert_array_equal(round_coupling(plan), [0, 2, 1])


def test_what_does_not_fit_is_named():
    model = mlp(0)
    with pytest.raises(ValueError, match="sweeps wants at least 1"):
        couple_neurons(model, model, SPEC, sweeps=0)
    with pytest.raises(ValueError, match=r"in.weight is \(12, 16\) and \(12, 5\); out.bias is \(3,\) and \(4,\)"):
        couple_neurons(
            model,
            {**model, "in.weight": jnp.ones((12, 5)), "out.weight": jnp.ones((3, 9)), "out.bias": jnp.ones(4)},
            SPEC,
        )
    with pytest.raises(ValueError, match="no matrix leads into or out of h3"):
        couple_neurons({**model, "scale": jnp.ones(4)}, {**model, "scale": jnp.ones(4)}, {**SPEC, "scale": ("h3",)})
