"""Core Space against an explicit construction from LoRA factors, as the paper writes it."""

import numpy as np
import pytest

from merging import oracles
from merging.problems import assert_close, merge

SHAPE = (14, 11)


def adapters(seed, ranks, shape=SHAPE):
    """(base, [(B, A)]) of LoRA updates `B A` in float64 NumPy."""
    rng = np.random.default_rng(seed)
    factors = [(rng.normal(size=(shape[0], r)), rng.normal(size=(r, shape[1]))) for r in ranks]
    return rng.normal(size=shape), factors


def models(base, factors):
    return np.stack([base + b @ a for b, a in factors])


def balance(b, a):
    """The same update with its singular values shared equally by the factors."""
    u, s, v = oracles.svd(b @ a, b.shape[1])
    return u * np.sqrt(s), np.sqrt(s)[:, None] * v.T


def core_space(base, factors, merge_cores):
    """Reference bases from the stacked factors, cores, their merge, and back."""
    left = np.linalg.svd(np.hstack([b for b, _ in factors]), full_matrices=False)[0]
    right = np.linalg.svd(np.vstack([a for _, a in factors]), full_matrices=False)[2].T
    cores = np.stack([left.T @ b @ a @ right for b, a in factors])
    return base + left @ merge_cores(cores) @ right.T


def flatten(core):
    return oracles.iso_c(core[None], 0 * core)


INNER = {
    "sum": lambda cores: cores.sum(0),
    "tsv_m": lambda cores: oracles.tsv_m(cores, 0 * cores[0]),
    "ties": lambda cores: oracles.ties(cores, 0 * cores[0], density=DENSITY),
}
DENSITY = 0.4


def run(base, stack, inner="sum", isotropic=False):
    """One compilation for each rule."""
    settings = {"rank": 3, "inner": inner, "isotropic": isotropic, "density": DENSITY}
    return merge("core_space", stack, settings, base=base)


@pytest.mark.parametrize(
    ("inner", "isotropic"), [("sum", False), ("sum", True), ("tsv_m", False), ("tsv_m", True), ("ties", False)]
)
def test_against_the_construction_from_factors(inner, isotropic):
    for seed in range(3):
        base, factors = adapters(seed, (3, 3, 3))
        given = [balance(*pair) for pair in factors] if inner == "ties" else factors  # others do not see the basis
        expected = core_space(base, given, lambda x: flatten(INNER[inner](x)) if isotropic else INNER[inner](x))
        merged, stats = run(base, models(base, factors), inner, isotropic)
        assert_close(merged, expected, 1e-9)
        np.testing.assert_allclose(stats["captured"], 1, rtol=1e-12)
        assert not stats["svd_inexact"]


def test_more_directions_than_the_matrix_has():
    """K r beyond m and n: the bases are whole, and TSV-M there is TSV-M."""
    base, factors = adapters(4, (3, 3, 3, 3), (12, 10))
    stack = models(base, factors)
    assert_close(run(base, stack, "tsv_m")[0], oracles.tsv_m(stack, base), 1e-9)


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 3, 2)])
def test_the_sum_is_task_arithmetic_of_low_rank_updates(ranks):
    base, factors = adapters(5, ranks)
    stack = models(base, factors)
    merged, stats = run(base, stack)
    assert_close(merged, merge("task_arithmetic", stack, {"scale": 1.0}, base=base)[0], 1e-12)
    np.testing.assert_allclose(stats["captured"], 1, rtol=1e-12)


@pytest.mark.parametrize(("inner", "times"), [("sum", 3), ("tsv_m", 1)])
def test_equal_copies(inner, times):
    """Their stacked factors have the rank of one: the bases' other directions must carry nothing."""
    base, factors = adapters(6, (3,))
    stack = np.repeat(models(base, factors), 3, axis=0)
    assert_close(run(base, stack, inner)[0], base + times * (stack[0] - base), 1e-12)


def test_the_order_does_not_matter_to_ties():
    """TIES depends on the bases, and these not on the order of what spans them."""
    base, factors = adapters(7, (2, 3, 3))
    there, back = (run(base, models(base, x), "ties")[0] for x in (factors, factors[::-1]))
    assert_close(there, back, 1e-11)


def test_of_a_higher_rank_the_leading_directions_are_merged():
    base, factors = adapters(8, (6, 6, 4))
    stack = models(base, factors)
    parts = [oracles.svd(x, 3) for x in stack - base]
    cut = np.stack([u * s @ v.T for u, s, v in parts])
    merged, stats = run(base, stack)
    assert_close(merged, base + cut.sum(0), 1e-11)
    shares = [(s**2).sum() / (x**2).sum() for (_, s, _), x in zip(parts, stack - base, strict=True)]
    np.testing.assert_allclose(stats["captured"], shares, rtol=1e-12)
    assert max(shares) < 0.99


def test_updates_rounded_with_their_base():
    """What a model in float32 keeps of an adapter is of full rank, by a little."""
    base, factors = adapters(9, (3, 3, 3))
    merged, stats = run(base.astype(np.float32), models(base, factors).astype(np.float32), "tsv_m")
    assert merged.dtype == np.float32 and not stats["svd_inexact"]
    assert_close(merged, core_space(base, factors, INNER["tsv_m"]), 1e-5)
