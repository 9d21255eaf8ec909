"""Projectors and grafts against NumPy in float64 and the optimality conditions that define them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from references import directional_derivative
from rgsp_jax.grafting import (
    decompose_covariance,
    decompose_sketch,
    graft,
    graft_layer,
    null_space_projector,
    output_change,
    ridge_graft,
)
from rgsp_jax.types import InputStatistics

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())["graft"]
M, N = 6, 9


def problem(rank=4, rows=40, seed=0):
    """A, B, inputs K [rows, n] of the given rank with decaying scales, and their covariance."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(M, N))
    b = a + 0.3 * rng.normal(size=(M, N))
    k = rng.normal(size=(rows, rank)) * np.geomspace(2, 0.2, rank) @ rng.normal(size=(rank, N))
    return a, b, k, k.T @ k / rows


def test_goldens():
    a, b, c = (jnp.asarray(GOLDEN[key]) for key in ("base", "donor", "covariance"))
    np.testing.assert_allclose(
        graft(a, b, null_space_projector(c, energy=GOLDEN["hard_energy"])), GOLDEN["hard"], atol=1e-10
    )
    for soft in (graft(a, b, null_space_projector(c, ridge=GOLDEN["ridge"])), ridge_graft(a, b, c, GOLDEN["ridge"])):
        np.testing.assert_allclose(soft, GOLDEN["soft"], atol=1e-10)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_hard_projector_keeps_every_output_on_inputs_that_do_not_fill_the_space(rank):
    a, b, k, c = problem(rank)
    merged = graft(a, b, null_space_projector(c, energy=1.0))
    np.testing.assert_allclose(k @ (np.asarray(merged) - a).T, 0, atol=1e-10)
    # nearest to B among all that keep them: B - W* is orthogonal to every change that the inputs do not feel
    free = np.linalg.svd(k)[2][rank:]
    np.testing.assert_allclose((b - np.asarray(merged)) @ free.T, 0, atol=1e-10)
    rng = np.random.default_rng(1)
    for _ in range(5):
        other = merged + 0.1 * rng.normal(size=(M, N - rank)) @ free
        assert np.linalg.norm(other - b) > np.linalg.norm(merged - b)


@pytest.mark.parametrize("setting", [{"energy": 0.9}, {"energy": 1.0}, {"threshold": 0.05}])
def test_hard_projectors_are_symmetric_and_idempotent(setting):
    c = problem(6)[3]
    p = np.asarray(null_space_projector(c, **setting).matrix())
    np.testing.assert_allclose(p, p.T, atol=1e-14)
    np.testing.assert_allclose(p @ p, p, atol=1e-12)
    values = np.linalg.eigvalsh(c)[::-1]
    protected = N - round(np.trace(p))
    if "threshold" in setting:
        assert protected == np.sum(values > setting["threshold"])
    else:
        shares = np.cumsum(values) / values.sum()
        assert shares[protected - 1] >= setting["energy"] - 1e-12
        assert protected == 1 or shares[protected - 2] < setting["energy"]


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 3.0, 100.0])
def test_the_soft_graft_is_the_least_squares_solution(ridge):
    a, b, _, c = problem()
    values, basis = np.linalg.eigh(c)
    root = basis * np.sqrt(np.maximum(values, 0))
    weight = 1 / np.sqrt(ridge * np.trace(c) / N)
    system = np.concatenate([np.eye(N), weight * root], axis=1)  # |W - B|^2 + weight^2 |(W - A) root|^2
    expected = np.linalg.lstsq(system.T, np.concatenate([b, weight * a @ root], axis=1).T, rcond=None)[0].T
    np.testing.assert_allclose(ridge_graft(a, b, c, ridge), expected, atol=1e-10)
    np.testing.assert_allclose(graft(a, b, null_space_projector(c, ridge=ridge)), expected, atol=1e-10)


def test_limits():
    a, b, _, c = problem()
    np.testing.assert_allclose(ridge_graft(a, b, c, 1e9), b, atol=1e-7)
    zero = jnp.zeros((N, N))
    for setting in ({"energy": 0.9}, {"ridge": 3.0}, {"threshold": 0.02}):
        np.testing.assert_allclose(graft(a, b, null_space_projector(zero, **setting)), b, atol=1e-14)
    np.testing.assert_allclose(ridge_graft(a, b, zero, 3.0), b, atol=1e-14)
    np.testing.assert_allclose(graft(a, b, null_space_projector(c, threshold=0.0)) @ c, a @ c, atol=1e-10)


@pytest.mark.parametrize("setting", [{"energy": 0.5}, {"energy": 0.999}, {"ridge": 3.0}, {"energy": 1.0}])
def test_compact_projectors_are_the_same_on_fewer_columns(setting):
    c = problem(8)[3]
    x = np.random.default_rng(2).normal(size=(M, N))
    full = null_space_projector(c, **setting)
    compact = full.compact()
    np.testing.assert_allclose(compact.project(x), full.project(x), atol=1e-12)
    if "energy" in setting:
        protected = round(float(jnp.sum(full.gains == 0)))
        assert compact.basis.shape[1] == min(protected, N - protected)


@pytest.mark.parametrize("setting", [{"energy": 0.9}, {"ridge": 0.5}])
def test_a_sketch_that_holds_everything_is_the_covariance(setting):
    a, b, k, c = problem(4)
    sketch = np.linalg.svd(k / np.sqrt(len(k)), full_matrices=False)[1:]
    sketch = sketch[0][:6, None] * sketch[1][:6]
    spectrum = decompose_sketch(sketch, np.trace(c))
    whole = graft(a, b, null_space_projector(c, **setting))
    np.testing.assert_allclose(graft(a, b, null_space_projector(spectrum, **setting)), whole, atol=1e-10)


def test_what_a_sketch_leaves_out_is_spread_over_the_other_directions():
    c = np.diag([4.0, 2.0, 0.3, 0.2, 0.1])
    spectrum = decompose_sketch(np.diag([2.0, np.sqrt(2)])[:, [0, 1]] @ np.eye(5)[:2], np.trace(c))
    np.testing.assert_allclose(spectrum.rest, 0.2)
    assert np.isclose(spectrum.mean, np.trace(c) / 5)
    gains = 1 / (1 + np.array([4, 2, 0.2, 0.2, 0.2]) / np.mean(np.diag(c)))
    np.testing.assert_allclose(null_space_projector(spectrum, ridge=1.0).matrix(), np.diag(gains), atol=1e-12)


def test_the_share_left_of_the_disturbance():
    a, b, k, c = problem(N)
    merged = ridge_graft(a, b, c, 1.0)
    expected = np.linalg.norm((merged - a) @ k.T) / np.linalg.norm((b - a) @ k.T)
    np.testing.assert_allclose(output_change(a, b, merged, k), expected, rtol=1e-12)
    padded = np.concatenate([k, np.zeros((3, N))])
    np.testing.assert_allclose(output_change(a, b, merged, padded), expected, rtol=1e-12)
    assert output_change(a, a, a, k) == 0


def test_derivatives_in_the_ridge_and_in_everything():
    a, b, _, c = problem()
    rng = np.random.default_rng(3)
    da, db, root, weights = (rng.normal(size=s) for s in ((M, N), (M, N), (N, N), (M, N)))

    def by_projector(ridge):
        return jnp.sum(weights * graft(a, b, null_space_projector(c, ridge=ridge)) ** 2)

    expected = directional_derivative(lambda r: np.asarray(by_projector(r)), 3.0, 1.0, 1e-4)
    np.testing.assert_allclose(jax.grad(by_projector)(3.0), expected, rtol=1e-7)

    def by_solve(a, b, c, ridge):
        return jnp.sum(weights * ridge_graft(a, b, c, ridge) ** 2)

    found = jax.grad(by_solve, argnums=(0, 1, 2, 3))(a, b, c, 3.0)
    for i, (at, direction) in enumerate(((a, da), (b, db), (c, root @ root.T), (3.0, 1.0))):
        arguments = [a, b, c, 3.0]
        slope = directional_derivative(
            lambda x, i=i, rest=arguments: np.asarray(by_solve(*rest[:i], x, *rest[i + 1 :])), at, direction, 1e-5
        )
        np.testing.assert_allclose(np.sum(np.asarray(found[i]) * direction), slope, rtol=1e-6)
    # at a covariance with equal eigenvalues, where eigenvectors have no derivative
    assert np.isfinite(jax.grad(by_solve, argnums=2)(a, b, jnp.eye(N), 3.0)).all()


def test_a_layer_and_its_proof():
    a, b, k, _ = problem(rows=60)
    seen, held = k[:30], k[30:]
    inputs = InputStatistics(covariance=jnp.asarray(seen.T @ seen / 30)[None], held_back=jnp.asarray(held)[None])
    stack = jnp.asarray(np.stack([a, b]))
    for setting in ({}, {"ridge": 0.1}, {"energy": 0.9}, {"threshold": 0.1}):
        output = graft_layer(stack, inputs, **setting)
        merged = np.asarray(output.merged)
        change = {
            name: np.linalg.norm((merged - a) @ rows.T) / np.linalg.norm((b - a) @ rows.T)
            for name, rows in (("output_change_seen", seen), ("output_change", held))
        }
        for name, value in change.items():
            np.testing.assert_allclose(output.stats[name], value, atol=1e-7)
        np.testing.assert_allclose(
            output.stats["donor_share"], np.linalg.norm(merged - a) / np.linalg.norm(b - a), rtol=1e-10
        )
        assert not output.stats["calibration_too_small"]
    np.testing.assert_array_equal(graft_layer(stack, inputs).merged, graft_layer(stack, inputs, ridge=3.0).merged)


def test_calibration_that_is_too_small_is_flagged():
    a, b, k, _ = problem(rank=N, rows=200)
    few = InputStatistics(covariance=jnp.asarray(k[:2].T @ k[:2] / 2)[None], held_back=jnp.asarray(k[2:])[None])
    stack = jnp.asarray(np.stack([a, b]))
    for inputs in (few, few._replace(held_back=None)):
        assert graft_layer(stack, inputs, energy=1.0).stats["calibration_too_small"]
    assert graft_layer(stack, few, ridge=1e-3).stats["calibration_too_small"]


def test_settings_that_cannot_be():
    a, b, _, c = problem()
    with pytest.raises(ValueError, match="one of energy, ridge and threshold, got none"):
        null_space_projector(c)
    with pytest.raises(ValueError, match="got energy, ridge"):
        null_space_projector(c, energy=0.9, ridge=1.0)
    with pytest.raises(ValueError, match="not both"):
        graft_layer(jnp.stack([a, b]), InputStatistics(covariance=c[None]), threshold=1.0, energy=0.5)
    with pytest.raises(ValueError, match="needs the covariance"):
        graft_layer(jnp.stack([a, b]), InputStatistics(), energy=0.5)
    with pytest.raises(ValueError, match="square"):
        decompose_covariance(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="fewer rows"):
        decompose_sketch(jnp.zeros((4, 4)), 1.0)
    with pytest.raises(ValueError, match="9 columns"):
        graft(a[:, :5], b[:, :5], null_space_projector(c, ridge=1.0))


def test_float32_and_vmap():
    a, b, _, c = problem(8)
    expected = ridge_graft(a, b, c, 0.01)
    single = [jnp.asarray(x, jnp.float32) for x in (a, b, c)]
    assert ridge_graft(*single, 0.01).dtype == jnp.float32
    np.testing.assert_allclose(ridge_graft(*single, 0.01), expected, atol=1e-5)
    ridges = jnp.asarray([0.1, 1.0, 10.0])
    spectrum = decompose_covariance(c)
    sweep = jax.vmap(lambda r: graft(a, b, null_space_projector(spectrum, ridge=r)))(ridges)
    for merged, ridge in zip(sweep, ridges, strict=True):
        np.testing.assert_allclose(merged, ridge_graft(a, b, c, ridge), atol=1e-10)


def test_a_donor_metric_is_the_two_sided_least_squares_solution():
    a, b, k, c = problem(rank=6)
    rng = np.random.default_rng(4)
    other = rng.normal(size=(50, N)) * np.geomspace(1, 3, N)
    donor = other.T @ other / 50
    metric = 0.02 * np.eye(N) + 0.98 * donor / (np.trace(donor) / N)
    mu, ridge = np.trace(c) / N, 0.7
    expected = (a @ c + ridge * mu * b @ metric) @ np.linalg.inv(c + ridge * mu * metric)
    np.testing.assert_allclose(ridge_graft(a, b, c, ridge, donor), expected, atol=1e-9)
    # where both feel the same inputs it is an interpolation
    same = 0.3 * np.eye(N)
    np.testing.assert_allclose(ridge_graft(a, b, same, ridge, 5 * same), a + ridge / (1 + ridge) * (b - a), atol=1e-12)
    inputs = InputStatistics(covariance=jnp.asarray(np.stack([c, donor])), held_back=jnp.asarray(k)[None])
    output = graft_layer(jnp.asarray(np.stack([a, b])), inputs, ridge=ridge)
    np.testing.assert_allclose(output.merged, expected, atol=1e-9)


def test_a_spectrum_serves_as_its_covariance():
    a, b, _, c = problem()
    stack = jnp.asarray(np.stack([a, b]))
    spectrum = decompose_covariance(c)
    known = InputStatistics(values=spectrum.values[None], basis=spectrum.basis[None], rest=spectrum.rest[None])
    for setting in ({"ridge": 0.5}, {"energy": 0.9}, {"threshold": 0.1}):
        one = graft_layer(stack, known, **setting)
        two = graft_layer(stack, InputStatistics(covariance=jnp.asarray(c)[None]), **setting)
        np.testing.assert_allclose(one.merged, two.merged, atol=1e-10)
        for name in ("donor_share", "output_change_seen"):
            np.testing.assert_allclose(one.stats[name], two.stats[name], atol=1e-7)


def test_a_ridge_near_nothing_stays_finite_in_float32():
    """Inputs that span little: the least ridge a factor stands is used, and what they do not feel goes over."""
    a, b, k, c = (jnp.asarray(x, jnp.float32) for x in problem(rank=2))
    found = ridge_graft(a, b, c, 1e-12)
    assert jnp.isfinite(found).all()
    assert output_change(a, b, found, k) < 1e-3
    k = np.asarray(k)
    outside = np.eye(N) - np.linalg.pinv(k, rtol=1e-5) @ k
    missing = np.asarray(found - b) @ outside  # C's own rounding, in units of that ridge
    assert np.linalg.norm(missing) < 0.1 * np.linalg.norm(np.asarray(b - a) @ outside)
