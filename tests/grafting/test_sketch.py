"""Sketches: exact where the rank fits, within their theorem's bound where it does not, and additive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.grafting.sketch import (
    combine_sketches,
    compress_factor,
    finish_sketch,
    initial_sketch,
    update_sketch,
)


def draw_decaying(rows, n, seed=0):
    """Inputs with a spectrum that falls by a power law, around a mean."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return rng.standard_normal((rows, n)) / np.arange(1, n + 1) @ basis.T + 0.1


finish = jax.jit(finish_sketch)


def fold(chunks, n, size, dtype=jnp.float64, seed=0):
    state = jax.jit(initial_sketch, static_argnums=(0, 1, 2))(n, size, dtype, seed=seed)
    for chunk in chunks:
        state = jax.jit(update_sketch)(state, jnp.asarray(chunk, dtype))
    return state


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-12), (jnp.float32, 2e-5)])
def test_inputs_of_low_rank_are_kept_exactly(dtype, tolerance):
    k = draw_decaying(90, 40)[:, :6] @ np.random.default_rng(1).standard_normal((6, 40))
    found = finish(fold([k[:50], k[50:]], 40, 9, dtype))
    exact = k.T @ k / 90
    factor = np.asarray(found.factor)
    error = np.linalg.norm(factor.T @ factor - exact, 2) / np.linalg.norm(exact, 2)
    assert error < tolerance
    np.testing.assert_allclose(found.trace, np.trace(exact), rtol=tolerance)
    np.testing.assert_allclose(found.mean, k.mean(0), rtol=1e-3 if dtype == jnp.float32 else 1e-10, atol=tolerance)


def test_the_error_is_within_the_bound_and_one_sided():
    n, size = 60, 24
    k = draw_decaying(300, n)
    exact = k.T @ k / 300
    values = np.linalg.eigvalsh(exact)[::-1]
    bound = min((1 + j / (size - j - 1)) * values[j:].sum() for j in range(size - 1))
    errors = []
    for seed in range(5):
        factor = np.asarray(finish(fold([k], n, size, seed=seed)).factor)
        left = np.linalg.eigvalsh(exact - factor.T @ factor)
        assert left.min() > -1e-10 * values[0]  # never larger than the truth
        errors.append(left.sum())
    assert values[size:].sum() < np.mean(errors) < bound


def test_two_halves_add_up_to_the_whole():
    k = draw_decaying(200, 30)
    whole = finish(fold([k], 30, 12))
    halves = finish(combine_sketches(fold([k[:77]], 30, 12), fold([k[77:]], 30, 12)))
    assert int(halves.rows) == 200
    product = np.asarray(halves.factor).T @ halves.factor
    np.testing.assert_allclose(product, np.asarray(whole.factor).T @ whole.factor, atol=1e-11)
    np.testing.assert_allclose(halves.trace, whole.trace, rtol=1e-13)


def test_masked_rows_do_not_count_even_when_they_are_not_numbers():
    k = draw_decaying(40, 10)
    mask = np.arange(40) % 2 == 0
    state = initial_sketch(10, 10, jnp.float64)
    state = update_sketch(state, jnp.asarray(np.where(mask[:, None], k, np.inf)), jnp.asarray(mask))
    found = finish(state)
    exact = k[mask].T @ k[mask] / 20
    assert int(found.rows) == 20
    np.testing.assert_allclose(np.asarray(found.factor).T @ found.factor, exact, atol=1e-10 * np.trace(exact))
    np.testing.assert_allclose(found.trace, np.trace(exact), rtol=1e-12)


def test_one_huge_direction_does_not_drown_the_others():
    rng = np.random.default_rng(3)
    k = rng.standard_normal((400, 50)) * (np.arange(50) < 10)
    k[:, 0] += 30  # the activations that transformers are known for
    found = np.asarray(finish(fold([k], 50, 20, jnp.float32)).factor, np.float64)
    exact = k.T @ k / 400
    rest = np.linalg.svd(found)[2][1:10]
    assert np.linalg.norm(rest[:, 10:]) < 1e-2, "what rounding leaks into directions that no input has"
    np.testing.assert_allclose(np.trace((found.T @ found)[1:10, 1:10]), np.trace(exact[1:10, 1:10]), rtol=2e-2)


def test_factors_are_orthogonal_and_descending():
    factor = np.asarray(finish(fold([draw_decaying(100, 20)], 20, 8)).factor)
    gram = factor @ factor.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
    assert (np.diff(np.diag(gram)) <= 0).all()


def test_nothing_seen_is_zero():
    found = finish_sketch(initial_sketch(5, 3))
    assert not np.any(found.factor) and float(found.trace) == 0 and int(found.rows) == 0


def test_stacked_factors_compress_to_the_best_of_their_size():
    stacked = np.random.default_rng(0).standard_normal((9, 6)) * np.logspace(0, -3, 6)
    found = np.asarray(compress_factor(jnp.asarray(stacked), size=4))
    values, vectors = np.linalg.eigh(stacked.T @ stacked)
    best = vectors[:, 2:] * values[2:] @ vectors[:, 2:].T
    np.testing.assert_allclose(found.T @ found, best, atol=1e-12)


def test_what_cannot_be_sketched_or_combined_is_named():
    with pytest.raises(ValueError, match="1 to 4 rows, not 5"):
        initial_sketch(4, 5)
    with pytest.raises(ValueError, match="cannot be combined"):
        combine_sketches(initial_sketch(4, 2), initial_sketch(4, 3))
