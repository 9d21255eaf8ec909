"""The family around `relative`: against a NumPy oracle, what stays the merge itself, pairs, and lists in a config."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from pipeline.toy_models import write_family
from rgsp_jax import methods
from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import merge_checkpoints, parse_config

RANK = 3
DIRECTIONS = np.array([[1.0, 0.5, 2.0], [0.3, -1.2, 0.8], [1.1, 0.9, 0.4]])
REST = np.array([0.3, -0.2, 0.1])
WHOLE = 1e9
"""A reach that leaves the correction as it is, however far apart the models are."""


def draw(shape=(12, 10), count=3):
    rng = np.random.default_rng(0)
    base = rng.normal(size=shape)
    return base + 0.2 * rng.normal(size=(count, *shape))


@functools.partial(jax.jit, static_argnames=("rank",))
def merge(stack, directions, rest, active_rank=None, rank=RANK, reach=WHOLE):
    settings = {"directions": directions, "rest": rest, "reach": reach}
    return methods["relative"](stack, rank=rank, active_rank=active_rank, scale=1.3, **settings).merged


@pytest.mark.parametrize("per", ["model", "direction"])
def test_against_the_oracle(per):
    stack = draw()
    directions = DIRECTIONS[:, 0] if per == "model" else DIRECTIONS
    expected = references.relative(stack, RANK, 1.3, directions, REST, WHOLE)
    assert np.abs(expected - references.relative(stack, RANK, 1.3, reach=WHOLE)).max() > 0.1
    np.testing.assert_allclose(merge(jnp.asarray(stack), directions, REST), expected, rtol=0, atol=1e-8)


def test_models_far_apart_that_agree_in_pairs_stay_near_their_mean():
    """At rho discord = reach half of the correction is left; what no direction reaches is not touched by it."""
    stack, directions = draw(), DIRECTIONS
    stats = methods["relative"](jnp.asarray(stack), rank=RANK).stats
    product = float(stats["rho"] * stats["discord"])
    assert product > 1e-4
    whole, half = (
        np.asarray(merge(jnp.asarray(stack), directions, 0.0, reach=reach)) - stack.mean(0)
        for reach in (WHOLE, product)
    )
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(half, whole / 2, rtol=0, atol=1e-8)
    expected = references.relative(stack, RANK, 1.3, directions, REST, 0.01)
    np.testing.assert_allclose(merge(jnp.asarray(stack), directions, REST, reach=0.01), expected, rtol=0, atol=1e-8)


def test_departures_that_a_pair_shares_are_discord():
    """Two of four models share half of what they moved by; independent ones of any size have next to none."""
    rng = np.random.default_rng(1)
    ancestor, moves = rng.normal(size=(64, 64)), rng.normal(size=(4, 64, 64))
    shared = moves.copy()
    shared[1] = (moves[0] + moves[1]) / np.sqrt(2)
    alone, paired = (
        float(methods["relative"](jnp.asarray(ancestor + 0.1 * x), rank=16).stats["discord"]) for x in (moves, shared)
    )
    assert alone < 0.05 < 0.1 < paired


def test_a_smaller_rank_at_run_time_is_that_rank():
    stack = jnp.asarray(draw())
    directions = DIRECTIONS[:, 0]
    expected = merge(stack, directions, REST, rank=2)
    np.testing.assert_allclose(merge(stack, directions, REST, active_rank=jnp.asarray(2)), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("count", [2, 3])
def test_ones_and_zeros_are_the_merge_bit_for_bit(count):
    stack = jnp.asarray(draw(count=count).astype(np.float32))
    untuned = jax.jit(lambda stack: methods["relative"](stack, rank=RANK, scale=1.3, reach=WHOLE).merged)(stack)
    np.testing.assert_array_equal(merge(stack, np.ones(count), np.zeros(count)), untuned)
    np.testing.assert_array_equal(merge(stack, np.ones((count, RANK)), np.zeros(count)), untuned)


def test_one_coefficient_for_all_of_the_rest_adds_nothing():
    """The models' differences from their mean sum to zero."""
    stack = jnp.asarray(draw())
    untuned = merge(stack, 1.0, 0.0)
    np.testing.assert_array_equal(merge(stack, 1.0, 0.4), untuned)
    np.testing.assert_allclose(merge(stack, 1.0, np.full(3, 0.4)), untuned, rtol=0, atol=1e-12)


def test_two_models_share_what_they_differ_by():
    """Each has half of the leading directions of their difference; the rest is what those leave."""
    stack = draw(count=2)
    half = (stack[0] - stack[1]) / 2
    u, s, v = references.signed_svd(half, RANK)
    for a in (np.array([2.0, 0.5]), DIRECTIONS[:2]):
        weights = (a[0] - a[1]) / 2
        expected = stack.mean(0) + 1.3 * (u * (s * weights)) @ v.T + 0.5 * (half - (u * s) @ v.T)
        found = merge(jnp.asarray(stack), a, np.array([0.3, -0.2]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_equal_copies_are_the_copy_whatever_the_coefficients():
    model = draw(count=1).astype(np.float32)[0]
    for count in (2, 3):
        stack = jnp.asarray(np.stack([model] * count))
        np.testing.assert_array_equal(merge(stack, DIRECTIONS[:count], REST[:count]), model)


def test_a_config_takes_a_number_or_lists(tmp_path):
    pairs = zip(draw().astype(np.float32), draw((11, 9)).astype(np.float32), strict=True)
    trees = [{"a.weight": first, "b.weight": second} for first, second in pairs]
    models = tuple(map(str, write_family(tmp_path, trees)))
    overrides = [{"pattern": "a.weight", "hyperparameters": {"directions": DIRECTIONS.tolist(), "rest": REST.tolist()}}]
    settings = {"rank": RANK, "directions": 0.8}
    config = {"models": models, "method": "relative", "hyperparameters": settings, "overrides": overrides}
    merge_checkpoints(parse_config(config, "test"), tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as merged:
        for name, directions, rest in (("a.weight", DIRECTIONS, REST), ("b.weight", 0.8, 0.0)):
            expected = references.relative(np.stack([t[name] for t in trees]), RANK, directions=directions, rest=rest)
            np.testing.assert_allclose(merged.read(name), expected, rtol=0, atol=1e-5)
    for value in ([1.0, 2.0], [[1.0], [1.0, 2.0], [1.0]], ["x", 1, 2]):
        with pytest.raises(RefusedError, match="per model"):
            parse_config({**config, "overrides": (), "hyperparameters": {"directions": value}}, "test")
