"""The assignments behind an alignment: against all orders there are, and against the kernels of the library."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.alignment.families import Place
from rgsp_jax.alignment.matching import assign, match_units
from rgsp_jax.alignment.units import Spot, UnitSet
from rgsp_jax.merging import match_weights, transport_neurons

UNITS, WIDTH = 7, 5
SHAPES = {"up.weight": (UNITS, WIDTH), "up.bias": (UNITS,), "down.weight": (WIDTH, UNITS)}
SPEC = {"up.weight": ("h", None), "up.bias": ("h",), "down.weight": (None, "h")}
SPOTS = (
    Spot("up.weight", "up.weight", Place("up.weight", 0), UNITS),
    Spot("up.bias", "up.bias", Place("up.bias", 0), UNITS),
    Spot("down.weight", "down.weight", Place("down.weight", 1, side="outgoing"), UNITS),
)
LAYER = UnitSet(("layers.{layer}.", 0, "mlp"), UNITS, UNITS, SPOTS)


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("method", ["weights", "otfusion"])
def test_against_the_kernels_with_the_stream_left_alone(method):
    run = jax.jit(lambda a, b: match_weights(a, b, SPEC).permutations["h"])
    if method == "otfusion":
        run = jax.jit(lambda a, b: transport_neurons(a, b, SPEC).couplings["h"].plan.argmax(1))
    for seed in range(4):
        a, b = draw(seed), draw(100 + seed)
        found = match_units(LAYER, lambda spot, a=a, b=b: (a[spot.name], b[spot.name]), method)
        expected = run(*({n: jnp.asarray(x) for n, x in model.items()} for model in (a, b)))
        np.testing.assert_array_equal(found.order.units, expected)
        rows = [np.concatenate([m["up.weight"], m["up.bias"][:, None], m["down.weight"].T], axis=1) for m in (a, b)]
        units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
        assert found.before == pytest.approx((units[0] * units[1]).sum(1).mean())
        assert found.after == pytest.approx((units[0] * units[1][found.order.units]).sum(1).mean())


def test_grouped_units_against_every_order():
    """Three groups of two: whatever keeps groups together."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        gain, shared = rng.normal(size=(6, 6)), rng.normal(size=(3, 3))
        found = assign({"unit": gain, "group": shared}, 6, 3)
        best = -np.inf
        for groups in itertools.permutations(range(3)):
            for inside in itertools.product(itertools.permutations(range(2)), repeat=3):
                order = np.array([2 * g + i for g, pair in zip(groups, inside, strict=True) for i in pair])
                best = max(best, gain[np.arange(6), order].sum() + shared[np.arange(3), list(groups)].sum())
        reached = gain[np.arange(6), found.units].sum() + shared[np.arange(3), found.groups].sum()
        assert reached == pytest.approx(best)
        np.testing.assert_array_equal(found.units.reshape(3, 2) // 2, np.repeat(found.groups[:, None], 2, axis=1))


def test_units_that_cannot_be_told_apart_stay():
    model = draw(0)
    for x in model.values():
        x[...] = 1.5
    matched = match_units(LAYER, lambda spot: (model[spot.name], model[spot.name]), "weights")
    assert matched.order.moved == 0 and matched.after == pytest.approx(1)
    dead = match_units(LAYER, lambda spot: (0 * model[spot.name], model[spot.name]), "weights")
    assert dead.order.moved == 0 and dead.after == 0


def test_blocks_of_fused_projections():
    spot = Spot("fused", "fused", Place("fused", 1, parts=3), 2)
    x = np.arange(24).reshape(2, 12)  # three parts of two units of two columns
    order = np.array([1, 0])
    np.testing.assert_array_equal(spot.reorder(x, order)[0], [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9])
    np.testing.assert_array_equal(spot.to_blocks(spot.reorder(x, order)), spot.to_blocks(x)[order])
    np.testing.assert_array_equal(sorted(spot.to_blocks(x)[0]), [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21])
