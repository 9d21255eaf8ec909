"""Whether matrices share their coordinates, without and with permutations found elsewhere."""

import numpy as np
import pytest

from rgsp_jax.comparison.coordinates import PairOrders, find_coordinates, needed_coincidences

LEVEL = 1e-6


def draw(seed, m=40, n=60):
    return np.random.default_rng(seed).normal(size=(m, n)).astype(np.float32)


def orders_of(*orders):
    known = PairOrders()
    for order in orders:
        known.add(np.asarray(order))
    return known


def test_needed_coincidences():
    assert needed_coincidences(0.7) == 1 and needed_coincidences(0.5) == 2
    assert needed_coincidences(LEVEL) == 10  # 1 / (e 9!) = 1.01e-6, 1 / (e 10!) = 1.01e-7


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_shared(noise):
    a = draw(0)
    finding = find_coordinates(a, a + noise * draw(1), PairOrders(), LEVEL)
    assert finding.state == "shared" and finding.axis == "rows" and finding.tested == 40
    assert finding.agreement == pytest.approx(1 / np.sqrt(1 + noise**2), abs=0.06)
    assert 2 * finding.found >= 40 and finding.chance < 1e-18


def test_rows_or_columns_in_another_order():
    a, rng = draw(0), np.random.default_rng(3)
    rows, columns = rng.permutation(40), rng.permutation(60)
    for b, axis, order in ((a[rows], "rows", rows), (a[:, columns], "columns", columns)):
        known = PairOrders()
        finding = find_coordinates(a, b + 0.1 * draw(2), known, LEVEL)
        assert (finding.state, finding.axis, finding.through) == ("permuted", axis, False)
        assert finding.matched > 0.9 and abs(finding.agreement) < 0.2
        (found,) = known.of_length(len(order))
        np.testing.assert_array_equal(found.order, np.argsort(order))


def test_both_in_another_order_needs_one_of_them():
    a, rng = draw(0), np.random.default_rng(4)
    rows, columns = rng.permutation(40), rng.permutation(60)
    b = a[rows][:, columns]
    assert find_coordinates(a, b, PairOrders(), LEVEL).state == "unlike"
    for others in ([], [rng.permutation(60), rng.permutation(60)]):
        known = orders_of(*others, np.argsort(columns))
        finding = find_coordinates(a, b, known, LEVEL)
        assert (finding.state, finding.axis, finding.through) == ("permuted", "rows", True)
        np.testing.assert_array_equal(known.of_length(40)[0].order, np.argsort(rows))
        assert known.of_length(60)[0].uses == 1
        np.testing.assert_array_equal(known.of_length(60)[0].order, np.argsort(columns))


def test_unlike():
    for seed in range(20):
        finding = find_coordinates(draw(seed), draw(100 + seed), PairOrders(), LEVEL)
        assert finding.state == "unlike" and finding.found < 9
        assert abs(finding.matched) < 0.15 and abs(finding.agreement) < 0.15


def test_too_small_to_tell():
    for shape in ((6, 8), (200, 2), (2, 200), (12, 4)):
        a = draw(0, *shape)
        assert find_coordinates(a, a[::-1].copy(), PairOrders(), LEVEL).state == "untestable"


def test_some_rows_only_say_nothing_of_their_order():
    """Of a matrix read in part, the other part may hold a row's twin; the whole axis can still be matched."""
    a, rng = draw(0), np.random.default_rng(5)
    rows, columns = rng.permutation(40), rng.permutation(60)
    assert find_coordinates(a, a, PairOrders(), LEVEL, partial_axis=0).state == "shared"
    assert find_coordinates(a, a[rows], PairOrders(), LEVEL, partial_axis=0).state == "unlike"
    assert find_coordinates(a, a[:, columns], PairOrders(), LEVEL, partial_axis=0).axis == "columns"
    known = orders_of(np.argsort(rows))
    assert find_coordinates(a, a[rows][:, columns], known, LEVEL, partial_axis=0).state == "unlike"


def test_large_axes_are_sampled():
    a = draw(0, 700, 300)
    order = np.random.default_rng(6).permutation(300)
    known = PairOrders()
    finding = find_coordinates(a, a[:, order], known, LEVEL)
    assert finding.state == "permuted" and finding.tested == 256 and finding.found == 256
    np.testing.assert_array_equal(known.of_length(300)[0].order, np.argsort(order))


def test_an_order_is_remembered_once():
    rng = np.random.default_rng(7)
    order = rng.permutation(30)
    nearly = order.copy()
    nearly[:2] = nearly[1::-1]
    known = orders_of(order, nearly, rng.permutation(30))
    assert known.count == 2 and known.of_length(31) == []
