"""The refit of a layer against least squares on the inputs themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax import methods
from rgsp_jax.grafting import interpolation_weights, refit, sequential_graft
from rgsp_jax.types import InputStatistics

M, N = 4, 7


def problem(count=2, rows=9, drift=0.3, seed=0):
    """Matrices, the merged model's inputs k and the models' own k_i [rows, n] on the same data."""
    rng = np.random.default_rng(seed)
    stack = rng.normal(size=(count, M, N))
    merged = rng.normal(size=(count, rows, N))
    return stack, merged, merged + drift * rng.normal(size=merged.shape)


def moments(merged, own, weights):
    """C_i and D_i of rows of inputs."""
    covariance = np.einsum("k,kri,krj->kij", weights, merged, merged)
    return jnp.asarray(covariance), jnp.asarray(np.einsum("k,kri,krj->kij", weights, own - merged, merged))


@pytest.mark.parametrize("count", [2, 3])
def test_refit_is_the_weighted_least_squares_solution(count):
    stack, merged, own = problem(count)
    weights, pull = np.array([1.0, 0.5, 2.0])[:count], 0.3
    start = np.random.default_rng(1).normal(size=(M, N))
    covariance, drift = moments(merged, own, weights)
    found = refit(jnp.asarray(stack), covariance, drift, jnp.asarray(start), pull)
    holds = np.sqrt(pull * np.trace(covariance.sum(0)) / N)
    rows = [np.sqrt(w) * k for w, k in zip(weights, merged, strict=True)] + [holds * np.eye(N)]
    right = [np.sqrt(w) * k @ x.T for w, k, x in zip(weights, own, stack, strict=True)] + [holds * start.T]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(right), rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_without_drift_it_is_regmean():
    stack, merged, _ = problem(3)
    covariance, drift = moments(merged, merged, np.ones(3))
    found = refit(jnp.asarray(stack), covariance, drift, jnp.asarray(stack.mean(0)), 0.0)
    expected = methods["regmean"](jnp.asarray(stack), inputs=InputStatistics(covariance=covariance), off_diagonal=1.0)
    np.testing.assert_allclose(found, expected.merged, atol=1e-10)


def test_answers_are_kept_exactly_where_there_is_room():
    """Three inputs each of seven entries: both models' answers at once, whatever they drifted."""
    stack, merged, own = problem(rows=3)
    covariance, drift = moments(merged, own, np.array([1.0, 0.7]))
    found = refit(jnp.asarray(stack), covariance, drift, jnp.asarray(stack[0]), 0.0)
    for matrix, k, its in zip(stack, merged, own, strict=True):
        np.testing.assert_allclose(k @ np.asarray(found).T, its @ matrix.T, atol=1e-9)


def test_the_start_stands_where_no_input_says_anything():
    stack, merged, own = problem()
    merged[..., 3:], own[..., 3:] = 0, 0
    inputs = InputStatistics(*moments(merged, own, np.ones(2)))
    found = sequential_graft(jnp.asarray(stack), inputs, share=0.5).merged
    start = np.tensordot(interpolation_weights(0.5), stack, 1)
    np.testing.assert_allclose(np.asarray(found)[:, 3:], start[:, 3:], atol=1e-12)
    assert np.abs(np.asarray(found)[:, :3] - start[:, :3]).min() > 1e-3


def test_stats_tell_what_became_of_the_recipients_answers():
    stack, merged, own = problem(rows=40, drift=0.0)
    covariance, drift = moments(merged, own, np.array([1.0, 0.2]))
    held_back = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, N)))
    output = sequential_graft(jnp.asarray(stack), InputStatistics(covariance, drift, held_back=held_back))
    change = np.asarray(output.merged) - stack[0]
    whole = stack[1] - stack[0]
    k = np.asarray(held_back[0])
    np.testing.assert_allclose(
        output.stats["output_change"], np.linalg.norm(k @ change.T) / np.linalg.norm(k @ whole.T), rtol=1e-10
    )
    np.testing.assert_allclose(output.stats["donor_share"], np.linalg.norm(change) / np.linalg.norm(whole), rtol=1e-10)
    assert not output.stats["refit_singular"]


def test_a_system_that_overflows_keeps_the_interpolation():
    stack, merged, own = (jnp.asarray(x, jnp.float32) for x in problem())
    covariance, drift = moments(merged, own, np.ones(2))
    covariance = covariance.astype(jnp.float32).at[0].multiply(jnp.inf)
    output = sequential_graft(stack, InputStatistics(covariance, drift.astype(jnp.float32)))
    assert output.stats["refit_singular"]
    np.testing.assert_allclose(output.merged, 0.8 * stack[0] + 0.2 * stack[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "inputs",
    [
        InputStatistics(covariance=jnp.zeros((2, N, N))),
        InputStatistics(jnp.zeros((1, N, N)), jnp.zeros((1, N, N))),
        InputStatistics(),
    ],
)
def test_other_inputs_are_refused(inputs):
    with pytest.raises(ValueError, match="drifts of every model"):
        sequential_graft(jnp.zeros((2, M, N)), inputs)
