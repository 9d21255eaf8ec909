"""Closed forms, and settings under which one comparator is another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging import oracles
from merging.problems import SHAPES, assert_close, experts, merge
from rgsp_jax import methods
from rgsp_jax.merging.sparsity import drop_at_random, keep_largest, rank_in_rows
from rgsp_jax.merging.ties import trim

KEY = jax.random.key(0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_task_arithmetic_at_one_over_k_is_the_average(count):
    stack, base = experts(0, count)
    merged, _ = merge("task_arithmetic", stack, {"scale": 1 / count}, base=base)
    assert_close(merged, merge("average", stack)[0], 1e-14)
    doubled, _ = merge("task_arithmetic", stack, {"scale": 1.0, "coefficients": [2.0 / count] * count}, base=base)
    assert_close(doubled - base, 2 * (merged - base), 1e-14)


@pytest.mark.parametrize("name", ["ties", "knots"])
def test_ties_at_density_one_with_agreeing_signs_is_the_mean(name):
    rng = np.random.default_rng(1)
    base = rng.normal(size=(9, 6))
    signs = rng.choice([-1.0, 1.0], size=base.shape)
    if name == "knots":  # multiples of one task vector agree in every basis
        vectors = np.array([0.3, 1.0, 2.0])[:, None, None] * rng.normal(size=base.shape)
    else:
        vectors = signs * rng.uniform(0.1, 1, size=(3, *base.shape))
    merged, stats = merge(name, base + vectors, {"density": 1.0}, base=base)
    assert_close(merged, base + vectors.mean(0), 1e-12)
    assert stats["sign_agreement"] == pytest.approx(1)


def test_ties_where_signs_conflict():
    base = np.zeros((2, 2))
    stack = np.array([[[3.0, 1.0], [0.0, 2.0]], [[-1.0, 1.0], [0.0, -2.0]], [[-1.0, 4.0], [0.0, 0.0]]])
    merged, stats = merge("ties", stack, {"density": 1.0}, base=base)
    np.testing.assert_array_equal(merged, [[3, 2], [0, 0]])  # mass elects, not the majority; a draw elects nothing
    assert stats["sign_agreement"] == pytest.approx(9 / 15)
    merged, _ = merge("ties", stack, {"density": 0.0}, base=base)
    np.testing.assert_array_equal(merged, base)


def test_dropping_nothing_is_task_arithmetic_and_ties():
    stack, base = experts(2)
    plain, _ = merge("task_arithmetic", stack, base=base)
    assert_close(merge("dare", stack, {"drop_rate": 0.0}, base=base, key=KEY)[0], plain, 1e-14)
    assert_close(merge("breadcrumbs", stack, {"density": 1.0, "gamma": 0.0}, base=base)[0], plain, 1e-14)
    whole, _ = merge("ties", stack, {"density": 1.0}, base=base)
    assert_close(merge("dare_ties", stack, {"drop_rate": 0.0}, base=base, key=KEY)[0], whole, 1e-14)
    settings = {"drop_rate": 0.0, "window": 0.0}
    assert_close(merge("della", stack, settings, base=base, key=KEY)[0], whole, 1e-14)
    for name in ("dare", "dare_ties"):
        assert_close(merge(name, stack, {"drop_rate": 1.0}, base=base, key=KEY)[0], base, 0)


def test_a_window_of_nothing_makes_della_dare_with_ties():
    stack, base = experts(3)
    della, stats = merge("della", stack, {"drop_rate": 0.6, "window": 0.0}, base=base, key=KEY)
    assert_close(della, merge("dare_ties", stack, {"drop_rate": 0.6}, base=base, key=KEY)[0], 1e-13)
    assert not stats["drop_rates_clipped"]
    assert merge("della", stack, {"drop_rate": 0.9, "window": 0.3}, base=base, key=KEY)[1]["drop_rates_clipped"]


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della"])
def test_a_key_is_a_merge(name):
    stack, base = experts(4)
    first, again = (merge(name, stack, base=base, key=KEY)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(merge(name, stack, base=base, key=jax.random.key(1))[0] - first).max() > 0.1


def test_dare_is_task_arithmetic_of_what_is_left():
    stack, base = experts(5)
    left = np.asarray(drop_at_random(jnp.asarray(stack - base), KEY, jnp.asarray(0.6)))
    kept = left != 0
    assert_close(left[kept], ((stack - base) / 0.4)[kept], 1e-14)
    assert_close(merge("dare", stack, {"drop_rate": 0.6}, base=base, key=KEY)[0], base + 0.4 * left.sum(0), 1e-14)
    expected = base + oracles.merge_by_sign(left)
    assert_close(merge("dare_ties", stack, {"drop_rate": 0.6}, base=base, key=KEY)[0], expected, 1e-14)
    more = np.asarray(drop_at_random(jnp.asarray(np.concatenate([stack - base, stack])), KEY, jnp.asarray(0.6)))
    np.testing.assert_array_equal(more[:3], left)  # another model changes nothing for those before it
    assert (kept[0] != kept[1]).any()


def test_drop_rates_and_their_fall_with_the_rank():
    rates = np.array([0.1, 0.5, 0.9])
    vectors = jnp.broadcast_to(jnp.asarray([1.0, -2.0, 3.0])[None, None, :], (1, 20_000, 3))
    left = np.asarray(drop_at_random(vectors, KEY, jnp.asarray(rates)[None, None, :]))[0]
    found = (left == 0).mean(0)
    assert np.all(np.abs(found - rates) < 4 * np.sqrt(rates * (1 - rates) / 20_000))
    assert_close(left.mean(0), [1, -2, 3], 0.1)  # the expectation stays
    ranks = rank_in_rows(jnp.asarray([[0.1, -5.0, 2.0], [3.0, 0.0, -1.0]]))
    np.testing.assert_allclose(ranks, [[0, 1, 0.5], [1, 0, 0.5]])
    np.testing.assert_allclose(rank_in_rows(jnp.ones((2, 1))), 0.5)


def test_della_drops_small_entries_more_often():
    base = np.zeros((4000, 3))
    row = np.array([0.5, -4.0, 2.0])
    merged, _ = merge(
        "della", np.broadcast_to(row, (1, 4000, 3)), {"drop_rate": 0.5, "window": 0.8}, base=base, key=KEY
    )
    expected = np.array([0.9, 0.1, 0.5])
    assert np.all(np.abs((merged == 0).mean(0) - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))
    for column, rate in enumerate(expected):
        values = merged[merged[:, column] != 0, column]
        assert_close(values, np.full_like(values, row[column] / (1 - rate)), 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_the_largest_are_kept(dtype, ties):
    rng = np.random.default_rng(8)
    keep = jax.jit(keep_largest)
    for shape in ((7, 5), (1, 1), (1, 64)):
        x = rng.integers(-2, 3, size=shape) if ties else rng.normal(size=shape)
        for count in {0, 1, x.size // 3, x.size - 1, x.size} - {-1}:
            mask = keep(jnp.asarray(x.astype(dtype)), count)
            np.testing.assert_array_equal(mask, oracles.keep_largest(x.astype(dtype), count))


def test_the_threshold_is_the_entry_s_whatever_is_fused_with_it():
    """A difference that the compiler contracts to one rounding in one place and not in another."""
    kept = jax.jit(lambda s: trim(s - 0.9 * s.mean(0)[None], 0.2).sum(0))
    for seed in range(30):
        stack, _ = experts(seed, shape=(5, 8))
        assert_close(kept(jnp.asarray(stack)), oracles.trim(stack - 0.9 * stack.mean(0), 0.2).sum(0), 1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_by_its_angle(count):
    base = np.zeros((4, 4))
    orthogonal = np.eye(4)[:count, :, None] * np.arange(1.0, 5.0)[None, None, :]
    merged, stats = merge("model_stock", base + orthogonal, base=base)
    assert_close(merged, base, 1e-15)
    assert stats["interpolation"] == 0 and not stats["extrapolated"]
    angle = np.pi / 3  # two vectors of one length at 60 degrees: t = 2 / 3
    pair = np.zeros((2, 4, 4))
    pair[0, 0, 0], pair[1, 0, 0], pair[1, 0, 1] = 1, np.cos(angle), np.sin(angle)
    merged, stats = merge("model_stock", pair, base=base)
    assert stats["interpolation"] == pytest.approx(2 / 3)
    assert_close(merged, 2 / 3 * pair.mean(0), 1e-15)
    opposed, stats = merge("model_stock", np.stack([pair[0], -pair[0]]), base=base)
    assert_close(opposed, base, 1e-15)
    pair[1, 0, 0] *= -1
    assert merge("model_stock", pair, base=base)[1]["extrapolated"]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_model_merges_to_itself(shape):
    stack, base = experts(9, 1, shape)
    for name, settings in (("tsv_m", {}), ("task_arithmetic", {"scale": 1.0}), ("ties", {"density": 1.0})):
        assert_close(merge(name, stack, settings, base=base)[0], stack[0], 1e-12)
    assert_close(merge("knots", stack, {"density": 1.0}, base=base)[0], stack[0], 1e-12)
    assert_close(merge("wudi", stack, base=base)[0], stack[0], 1e-6)  # at its minimum: Adam steps on rounding


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_a_flat_spectrum_stays(name):
    rng = np.random.default_rng(10)
    base = rng.normal(size=(9, 6))
    flat = np.linalg.qr(rng.normal(size=(9, 6)))[0]
    merged, stats = merge(name, (base + 0.7 * flat)[None], base=base)
    assert_close(merged, base + 0.7 * flat, 1e-12)
    assert stats["mean_singular_value"] == pytest.approx(0.7)


def test_orthogonal_tasks_do_not_disturb_each_other():
    """Task vectors that live on different inputs and outputs add up in TSV-M, and WUDI finds the sum at its minimum."""
    rng = np.random.default_rng(11)
    base, vectors = rng.normal(size=(8, 8)), np.zeros((2, 8, 8))
    for k in range(2):
        vectors[k, 4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = rng.normal(size=(4, 4))
    for name, bound in (("tsv_m", 1e-10), ("wudi", 1e-6)):
        assert_close(merge(name, base + vectors, base=base)[0], base + vectors.sum(0), bound)


def test_wudi_lowers_the_interference_it_reports():
    stack, base = experts(12)
    merged, stats = merge("wudi", stack, {"learning_rate": 1e-3, "iterations": 300}, base=base)
    at_base = oracles.wudi_loss(0 * base, stack - base)
    expected = [oracles.wudi_loss(tau, stack - base) / at_base for tau in ((stack - base).sum(0), merged - base)]
    np.testing.assert_allclose(stats["interference"], expected, rtol=1e-9)
    assert expected[1] < 0.6 * expected[0]


def test_knots_before_trimming_is_linear():
    """A linear merge commutes with the change of basis: only trimming and election see it."""
    stack, base = experts(13)
    signs = {"density": 1.0, "normalize": False}
    one_sided = base + np.abs(stack - base)
    assert_close(merge("ties", one_sided, signs, base=base)[0], base + (one_sided - base).sum(0), 1e-13)
    assert np.abs(merge("knots", stack, base=base)[0] - merge("ties", stack, base=base)[0]).max() > 1e-2


def test_knots_of_low_rank_updates():
    rng = np.random.default_rng(14)
    base = rng.normal(size=(12, 10))
    vectors = rng.normal(size=(2, 12, 2)) @ rng.normal(size=(2, 2, 10))
    merged, stats = merge("knots", base + vectors, base=base)
    assert_close(merged, oracles.knots(base + vectors, base), 1e-9)
    assert np.linalg.matrix_rank(merged - base, tol=1e-9) <= 4 and not stats["svd_inexact"]


@pytest.mark.parametrize(
    "name", ["tsv_m", "iso_c", "iso_cts", "wudi", "knots", "core_space", "ties", "breadcrumbs", "model_stock"]
)
def test_no_task_vectors_give_the_base(name):
    _, base = experts(15)
    merged, _ = merge(name, np.stack([base] * 3), base=base)
    assert_close(merged, base, 1e-12)


@pytest.mark.parametrize("name", ["wudi", "iso_c", "model_stock", "ties", "karcher"])
def test_derivatives_are_finite_where_the_models_do_not_differ(name):
    _, base = experts(15)
    needed = {"base": jnp.asarray(base)} if "base" in methods[name].needs else {}
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(methods[name](s, **needed).merged ** 2)))
    assert np.isfinite(gradient(jnp.stack([jnp.asarray(base)] * 3))).all()


def test_karcher_of_equal_directions_is_their_mean_and_of_two_models_is_slerp():
    rng = np.random.default_rng(16)
    model = rng.normal(size=(9, 6))
    merged, _ = merge("karcher", np.array([1.0, 2.0, 6.0])[:, None, None] * model)
    assert_close(merged, 3 * model, 1e-12)
    pair = rng.normal(size=(2, 9, 6))
    pair /= np.linalg.norm(pair, axis=(1, 2), keepdims=True)
    for t in (0.5, 0.2):
        weighted, _ = merge("karcher", pair, {"coefficients": [1 - t, t], "iterations": 60})
        assert_close(weighted, merge("slerp", pair, {"t": t})[0], 1e-11)
    kept, _ = merge("karcher", np.stack([pair[0], 0 * pair[0]]))
    assert_close(kept, pair[0] / 2, 1e-12)  # a model of zero has no direction
    assert merge("karcher", np.stack([pair[0], -pair[0]]))[1]["no_mean"]


def test_karcher_keeps_the_mean_length():
    stack, _ = experts(17, spread=2.0)
    merged, _ = merge("karcher", stack)
    assert np.linalg.norm(merged) == pytest.approx(np.linalg.norm(stack, axis=(1, 2)).mean())


def test_regmean_s_coefficients_weigh_the_covariances():
    stack, _ = experts(18)
    factors = np.random.default_rng(7).normal(size=(3, 9, stack.shape[2]))
    covariances = np.einsum("krn,krp->knp", factors, factors)
    plain = merge("regmean", stack, covariances=covariances)[0]
    weights = np.array([2.0, 0.5, 3.0])
    weighed = merge("regmean", stack, {"coefficients": tuple(weights)}, covariances=covariances)[0]
    assert_close(weighed, merge("regmean", stack, covariances=weights[:, None, None] * covariances)[0], 1e-12)
    same = merge("regmean", stack, {"coefficients": (7.0,) * 3}, covariances=covariances)[0]
    assert_close(same, plain, 1e-12)
    assert np.abs(weighed - plain).max() > 1e-3


def test_regmean_with_equal_covariances_is_the_average():
    stack, _ = experts(18)
    rows = np.random.default_rng(18).normal(size=(30, 6))
    covariances = np.stack([rows.T @ rows] * 3)
    assert_close(merge("regmean", stack, covariances=covariances)[0], stack.mean(0), 1e-13)
    model = np.stack([stack[0]] * 3)
    different = covariances * np.array([1.0, 5.0, 0.2])[:, None, None]
    np.testing.assert_array_equal(merge("regmean", model, covariances=different)[0], stack[0])


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_regmean_of_inputs_never_seen_and_of_fewer_rows_than_inputs(off_diagonal, dtype):
    stack, _ = experts(19, shape=(5, 12))
    rows = np.random.default_rng(19).normal(size=(3, 3, 12))
    rows[:, :, 4] = 0
    covariances = np.einsum("kin,kim->knm", rows, rows).astype(dtype)
    settings = {"off_diagonal": off_diagonal}
    merged, stats = merge("regmean", stack.astype(dtype), settings, covariances=covariances)
    assert np.isfinite(merged).all() and not stats["covariance_singular"]
    assert_close(merged[:, 4], stack[:, :, 4].mean(0), 1e-5)
    nothing, _ = merge("regmean", stack.astype(dtype), settings, covariances=0 * covariances)
    assert_close(nothing, stack.mean(0), 1e-6)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "iso_c", "tsv_m", "core_space", "model_stock"])
def test_a_base_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"the base is \[3, 4\] and the models are \[4, 3\]"):
        merge(name, np.ones((2, 4, 3)), base=np.ones((3, 4)))


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"covariances are \[2, 4, 4\]"):
        merge("regmean", np.ones((2, 4, 3)), covariances=np.ones((2, 4, 4)))
    with pytest.raises(ValueError, match="Fisher informations are"):
        merge("fisher", np.ones((2, 4, 3)), fishers=np.ones((4, 3)))
