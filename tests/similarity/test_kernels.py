"""Every statistic against float64 NumPy, and what chance gives against counting and simulation."""

import math
from itertools import combinations, permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from rgsp_jax import truncated_svd
from rgsp_jax.similarity import (
    can_tell_apart,
    chance_of_coincidences,
    compare_rows,
    compare_subspaces,
    share_basis,
    sum_elements,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
def test_sums_over_elements(dtype, tolerance):
    stack = RNG.normal(size=(4, 3, 50)).astype(dtype)
    stack[1, :, :7] = 0
    stack[2, 0, 40:] = 0
    stack[3] = stack[0]
    sums = jax.jit(sum_elements)(jnp.asarray(stack))
    exact = stack.astype(np.float64)
    mean = exact.mean(0)
    np.testing.assert_allclose(sums.squares, (exact**2).sum(-1), rtol=tolerance)
    np.testing.assert_allclose(sums.mean_square, (mean**2).sum(-1), rtol=tolerance)
    np.testing.assert_allclose(sums.departures, ((exact - mean) ** 2).sum(-1), rtol=tolerance)
    for p, (i, j) in enumerate(combinations(range(4), 2)):
        a, b = exact[i], exact[j]
        np.testing.assert_allclose(sums.differences[p], ((a - b) ** 2).sum(-1), rtol=tolerance)
        np.testing.assert_allclose(sums.products[p], (a * b).sum(-1), rtol=tolerance, atol=50 * tolerance)
        np.testing.assert_array_equal(sums.unequal[p], (a != b).sum(-1))
        np.testing.assert_array_equal(sums.same_sign[p], (a * b > 0).sum(-1))
        np.testing.assert_array_equal(sums.signed[p], (a * b != 0).sum(-1))
    assert sums.differences.dtype == dtype and not np.any(sums.differences[2])


def test_near_copies_keep_their_digits():
    """Differences derived from products would be all rounding here."""
    a = RNG.normal(size=(1, 1, 4096)).astype(np.float32)
    b = (a + 1e-5 * RNG.normal(size=a.shape)).astype(np.float32)
    sums = sum_elements(jnp.concatenate([a, b]))
    exact = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()
    assert float(sums.differences[0, 0]) == pytest.approx(exact, rel=1e-5)


def test_sums_want_a_stack():
    with pytest.raises(ValueError, match=r"\[k >= 2, rows, width\]"):
        sum_elements(jnp.ones((1, 2, 3)))


@pytest.fixture(scope="module")
def factors():
    a = RNG.normal(size=(30, 20))
    b = a + 0.5 * RNG.normal(size=a.shape)
    return (a, b), tuple(truncated_svd(jnp.asarray(x), 4) for x in (a, b))


def test_angles_between_leading_subspaces(factors):
    (a, b), svds = factors
    angles = compare_subspaces(*svds)
    for side, found, overlap in ((0, angles.left, angles.left_overlap), (1, angles.right, angles.right_overlap)):
        bases = [np.linalg.svd(x)[0][:, :4] if side == 0 else np.linalg.svd(x)[2][:4].T for x in (a, b)]
        cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
        np.testing.assert_allclose(found, np.arccos(np.minimum(cosines, 1)), atol=1e-9)
        assert float(overlap) == pytest.approx((cosines**2).mean(), abs=1e-12)


def test_a_shared_basis_changes_no_inner_product(factors):
    _, (a, b) = factors
    small = share_basis(a, b)
    assert small[0].u.shape == (8, 4) and small[1].v.shape == (8, 4)
    for name in ("u", "v"):
        for x, y in ((a, a), (a, b), (b, b)):
            p, q = (small[0 if one is a else 1] for one in (x, y))
            np.testing.assert_allclose(
                getattr(p, name).T @ getattr(q, name), getattr(x, name).T @ getattr(y, name), atol=1e-12
            )
    with pytest.raises(ValueError, match="one shape"):
        share_basis(a, a._replace(u=a.u[:-1]))


@pytest.mark.parametrize("columns", [None, np.random.default_rng(1).permutation(11).astype(np.int32)])
def test_cosines_of_centred_rows(columns):
    a, b = RNG.normal(size=(2, 9, 11)) + 3
    rows = np.array([0, 3, 8], np.int32)
    found = jax.jit(compare_rows)(a, b, rows, columns)
    unit = [x - x.mean(0) for x in (a, b)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    other = unit[1] if columns is None else unit[1][:, columns]
    np.testing.assert_allclose(found.even, unit[0][rows][:, ::2] @ other[:, ::2].T, atol=1e-12)
    np.testing.assert_allclose(found.odd, unit[0][rows][:, 1::2] @ other[:, 1::2].T, atol=1e-12)
    assert np.isfinite(compare_rows(np.ones((3, 4)), b[:3, :4], rows[:1]).even).all()
    with pytest.raises(ValueError, match="one shape"):
        compare_rows(a, b[:-1], rows)


def test_chance_counts_the_fixed_points_of_permutations():
    size = 7
    fixed = [sum(i == j for i, j in enumerate(order)) for order in permutations(range(size))]
    for count in range(5):
        exact = sum(n >= count for n in fixed) / math.factorial(size)
        assert chance_of_coincidences(count) == pytest.approx(exact, abs=2**size / math.factorial(size))
    assert chance_of_coincidences(0) == 1.0
    assert chance_of_coincidences(1) == pytest.approx(1 - math.exp(-1), rel=1e-14)
    for count in (9, 40):  # far in the tail the first term is nearly all
        first = math.exp(-1) / math.factorial(count)
        assert first < chance_of_coincidences(count) < first * (1 + 1.2 / count)


def skewed(rng, m, n):
    """Independent rows as unlike noise as weights get: heavy tails, long rows, strong columns, a common mean."""
    return rng.standard_t(3, size=(m, n)) * rng.lognormal(sigma=1, size=(m, 1)) * rng.lognormal(size=(1, n)) + 0.3


def test_independent_matrices_coincide_as_chance_says():
    """Fixed points of the best matching, and rows that two halves agree on, are Poisson with mean 1 (+-4 sigma)."""
    rng, trials, m, n = np.random.default_rng(5), 400, 24, 20
    compare = jax.jit(compare_rows)
    rows = np.arange(m, dtype=np.int32)
    counts = np.zeros((trials, 2), int)

    def match(gain):
        return linear_sum_assignment(np.asarray(gain), maximize=True)[1]

    for t in range(trials):
        gains = compare(skewed(rng, m, n), skewed(rng, m, n), rows)
        counts[t, 0] = np.count_nonzero(match(gains.even + gains.odd) == rows)
        counts[t, 1] = np.count_nonzero(match(gains.even) == match(gains.odd))
    for column in counts.T:
        assert abs(column.mean() - 1) < 4 / math.sqrt(trials)
        assert np.mean(column >= 4) < chance_of_coincidences(4) + 4 * math.sqrt(0.019 / trials)


def test_rows_that_can_be_told_apart():
    """A row is nearest to itself among m others where the largest cosine, about sqrt(2 ln m / n), is below 1."""
    assert can_tell_apart(384, 12) and not can_tell_apart(384, 11)
    assert not can_tell_apart(1, 1) and can_tell_apart(1, 2)
    rng = np.random.default_rng(6)
    x = rng.normal(size=(384, 200))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    largest = np.sort(x @ x.T, axis=1)[:, -2].mean()
    assert largest == pytest.approx(math.sqrt(2 * math.log(384) / 200), rel=0.2)
