"""Every comparator against float64 NumPy from its paper's formulas."""

import numpy as np
import pytest

from merging import oracles
from merging.problems import SHAPES, assert_close, experts, merge

CASES = [
    ("ties", {}, 1e-12),
    ("ties", {"density": 0.5, "scale": 0.7, "coefficients": [1.0, 0.4, 2.0]}, 1e-12),
    ("ties", {"density": 0.5, "coefficients": [1.0, 0.4, 2.0], "normalize": False}, 1e-12),
    ("breadcrumbs", {}, 1e-12),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.2, "scale": 1.0}, 1e-12),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.3, "scale": 1.0}, 1e-12),
    ("model_stock", {}, 1e-12),
    ("tsv_m", {}, 1e-10),
    ("tsv_m", {"scale": 0.5}, 1e-10),
    ("iso_c", {"scale": 1.3}, 1e-10),
    ("iso_cts", {"common_share": 0.4}, 1e-10),
    ("wudi", {}, 1e-9),
    ("wudi", {"iterations": 50, "learning_rate": 1e-2}, 1e-8),
    ("knots", {}, 1e-10),
    ("knots", {"density": 0.6, "scale": 0.5}, 1e-10),
]


TALL, WIDE = SHAPES


@pytest.mark.parametrize(
    ("name", "settings", "bound", "shape"),
    [(*case, TALL) for case in CASES] + [(*case, WIDE) for case in CASES if case[0] not in ("ties", "breadcrumbs")],
)
def test_methods_with_a_base(name, settings, bound, shape):
    for seed in range(3):
        stack, base = experts(seed, shape=shape)
        merged, stats = merge(name, stack, settings, base=base)
        assert_close(merged, getattr(oracles, name)(stack, base, **settings), bound)
        assert not any(value.any() for value in stats.values() if value.dtype == bool)


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1.0, 0.02, 6.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ace_merging_on_even_and_on_uneven_tasks(sizes, shape):
    stack, base = experts(4, shape=(12, 10) if shape == TALL else shape)
    stack = base + np.reshape(sizes, (3, 1, 1)) * (stack - base)
    expected, uneven = oracles.ace_merging(stack, base)
    assert uneven == (len(set(sizes)) > 1)
    merged, stats = merge("ace_merging", stack, base=base)
    assert_close(merged, expected, 1e-9)
    assert not stats["singular"]


@pytest.mark.parametrize("coefficients", [None, [0.5, 0.2, 0.3]])
@pytest.mark.parametrize("spread", [1e-4, 0.05, 0.5, 3.0])
def test_karcher_mean(coefficients, spread):
    stack, _ = experts(1, spread=spread)
    merged, stats = merge("karcher", stack, {"coefficients": coefficients, "iterations": 60})
    assert_close(merged, oracles.karcher(stack, coefficients), 1e-11)
    assert not stats["unconverged"] and not stats["no_mean"]
    few, stats = merge("karcher", stack, {"coefficients": coefficients})
    assert stats["step"] < 1e-3
    assert_close(few, oracles.karcher(stack, coefficients), 2 * stats["step"] + 1e-11)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean(off_diagonal):
    rng = np.random.default_rng(6)
    stack, _ = experts(6)
    rows = rng.normal(size=(3, 40, 6)) @ rng.normal(size=(3, 6, 6))
    covariances = np.einsum("kin,kim->knm", rows, rows) / 40
    merged, stats = merge("regmean", stack, {"off_diagonal": off_diagonal}, covariances=covariances)
    assert_close(merged, oracles.regmean(stack, covariances, off_diagonal), 1e-9)
    assert not stats["covariance_singular"]
    if off_diagonal == 1:  # what it is for: least squares over everybody's inputs and outputs
        outputs = np.concatenate([x @ w.T for x, w in zip(rows, stack, strict=True)])
        best = np.linalg.lstsq(np.concatenate(list(rows)), outputs, rcond=None)[0].T
        assert_close(merged, best, 1e-9)


def test_fisher():
    rng = np.random.default_rng(7)
    stack, _ = experts(7)
    fishers = rng.uniform(size=stack.shape) ** 4
    fishers[:, 0] = 0
    fishers[0, 1] = 1e9
    merged, _ = merge("fisher", stack, fishers=fishers)
    assert_close(merged[2:], ((np.maximum(fishers, 1e-6) * stack).sum(0) / np.maximum(fishers, 1e-6).sum(0))[2:], 1e-12)
    assert_close(merged[0], stack.mean(0)[0], 1e-12)
    assert_close(merged[1], stack[0, 1], 1e-6)
    weighted, _ = merge("fisher", stack, {"coefficients": [1.0, 2.0, 0.0], "floor": 0.0}, fishers=np.ones_like(stack))
    assert_close(weighted, (stack[0] + 2 * stack[1]) / 3, 1e-12)
