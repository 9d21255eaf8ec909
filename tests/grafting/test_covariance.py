"""The covariance fold: equal to NumPy in float64, however the rows are split and masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.grafting.covariance import (
    combine_covariances,
    finish_covariance,
    initial_covariance,
    update_covariance,
)

WIDTHS = [5, 771]  # narrow; wide enough for strips, and no multiple of their number


def draw_rows(rows, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, n)) * np.linspace(0.1, 3, n) + 0.7


finish = jax.jit(finish_covariance)


def fold(chunks, n, dtype=jnp.float64):
    state = initial_covariance(n, dtype)
    for chunk in chunks:
        state = jax.jit(update_covariance)(state, jnp.asarray(chunk, dtype))
    return state


@pytest.mark.parametrize("n", WIDTHS)
def test_a_fold_is_the_mean_second_moment(n):
    k = draw_rows(60, n)
    found = finish(fold([k[:13], k[13:50], k[50:]], n))
    assert int(found.rows) == 60
    np.testing.assert_allclose(found.second, k.T @ k / 60, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.mean, k.mean(0), rtol=1e-12)
    assert np.array_equal(found.second, found.second.T)


@pytest.mark.parametrize("n", WIDTHS)
def test_two_halves_add_up_to_the_whole(n):
    k = draw_rows(64, n)
    whole = finish(fold([k], n))
    halves = finish(combine_covariances(fold([k[:40]], n), fold([k[40:], k[:0]], n)))
    assert int(halves.rows) == 64
    np.testing.assert_allclose(halves.second, whole.second, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(halves.mean, whole.mean, rtol=1e-13)


def test_compensation_keeps_what_float32_rounds_away():
    k = np.full((1, 1), np.sqrt(0.1), np.float32)
    start = update_covariance(initial_covariance(1), jnp.full((1, 1), 4096.0, jnp.float32))
    state, _ = jax.lax.scan(lambda s, x: (update_covariance(s, x), None), start, jnp.tile(jnp.asarray(k), (5000, 1, 1)))
    found = finish_covariance(state)
    exact = (4096.0**2 + 5000 * float(k[0, 0]) ** 2) / 5001
    assert found.second.dtype == jnp.float32
    assert abs(float(found.second[0, 0]) / exact - 1) < 1e-7
    assert float(state.second[0, 0]) == 4096.0**2  # what a plain sum would have kept


def test_masked_rows_do_not_count_even_when_they_are_not_numbers():
    k = draw_rows(20, 5)
    mask = np.arange(20) % 3 != 0
    spoiled = np.where(mask[:, None], k, np.nan)
    found = finish_covariance(
        update_covariance(initial_covariance(5, jnp.float64), jnp.asarray(spoiled), jnp.asarray(mask))
    )
    assert int(found.rows) == mask.sum()
    np.testing.assert_allclose(found.second, k[mask].T @ k[mask] / mask.sum(), rtol=1e-13)
    np.testing.assert_allclose(found.mean, k[mask].mean(0), rtol=1e-13)


def test_a_row_that_counts_and_is_not_a_number_shows():
    found = finish(fold([[[1.0, np.nan]]], 2))
    assert not np.isfinite(found.second).all()


def test_nothing_seen_is_zero():
    found = finish_covariance(initial_covariance(3))
    assert int(found.rows) == 0 and not np.any(found.second) and not np.any(found.mean)


def test_stacked_states_fold_like_single_ones():
    k = draw_rows(3 * 16, 4).reshape(3, 16, 4)
    mask = np.random.default_rng(1).random((3, 16)) < 0.5
    start = jax.vmap(lambda _: initial_covariance(4, jnp.float64))(jnp.arange(3))
    found = jax.vmap(finish_covariance)(jax.vmap(update_covariance)(start, jnp.asarray(k), jnp.asarray(mask)))
    for i in range(3):
        np.testing.assert_allclose(found.second[i], k[i][mask[i]].T @ k[i][mask[i]] / mask[i].sum(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_summed_in_float32(dtype):
    k = jnp.asarray(draw_rows(40, 6), dtype)
    found = finish_covariance(update_covariance(initial_covariance(6), k))
    exact = np.asarray(k, np.float64).T @ np.asarray(k, np.float64) / 40
    assert found.second.dtype == jnp.float32
    np.testing.assert_allclose(found.second, exact, rtol=3e-7 * 40, atol=1e-6)


def test_a_covariance_is_differentiable_in_its_inputs():
    k = jnp.asarray(draw_rows(6, 3))
    gradient = jax.grad(
        lambda x: jnp.sum(finish_covariance(update_covariance(initial_covariance(3, x.dtype), x)).second)
    )(k)
    np.testing.assert_allclose(gradient, np.tile(2 * np.asarray(k).sum(1, keepdims=True) / 6, 3), rtol=1e-12)


def test_shapes_that_do_not_fit_are_named():
    state = initial_covariance(4)
    with pytest.raises(ValueError, match=r"rows of 4 entries are added, got \[2, 3\]"):
        update_covariance(state, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"with a mask \[3\]"):
        update_covariance(state, jnp.zeros((2, 4)), jnp.ones(3, bool))
    with pytest.raises(ValueError, match="4 and 5 wide"):
        combine_covariances(state, initial_covariance(5))
