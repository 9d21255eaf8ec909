"""Do two models number their neurons alike? Matrix by matrix, from the weights alone, with no map of the architecture.

A matrix's shorter axis is matched first, because the longer one is then what its rows are recognised by. Where the best
matching leaves rows in place, the coordinates are shared. Where it does not, even and odd columns are matched apart,
and rows that both send to the same new place show a permutation. The other axis is taken as it lies, or under a
permutation found elsewhere on an axis of that length: so the order of a residual stream is found at the embedding,
whose rows are tokens, and carried from there into every layer, as weight matching would along a chain it was told of.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from rgsp_jax.comparison.tensors import spread
from rgsp_jax.similarity import can_tell_apart, chance_of_coincidences, compare_rows

State = Literal["shared", "permuted", "unlike", "untestable"]
SAMPLED_ROWS = 256
"""Of the axis to be matched; a dozen would do, the rest is for the share of rows that is reported."""
HYPOTHESES = 4
"""Permutations of a length that are tried on the other axis, the most useful first."""
MOST_TESTS = 2 * (2 + HYPOTHESES)
"""Of one pair of matrices: either axis, as it lies and with the other under every hypothesis."""
LARGEST_GAIN = 64_000_000
"""Elements of the largest square of cosines from which a whole permutation is found, to be carried elsewhere."""
AXES = ("rows", "columns")

_compare_rows = jax.jit(compare_rows)


class Halves(NamedTuple):
    """`RowAgreement` on the host."""

    even: np.ndarray
    odd: np.ndarray


@dataclass(frozen=True)
class Finding:
    """What one pair of matrices says of the coordinates."""

    state: State
    axis: str | None = None
    """The axis that was matched: rows are outputs, columns inputs."""
    tested: int = 0
    """Rows of that axis that were looked at."""
    found: int = 0
    """Of these, how many the best matching leaves in place; where permuted, how many both halves agree on."""
    agreement: float | None = None
    """Mean cosine of rows with what lies in their place in the other model; 0 is chance."""
    matched: float | None = None
    """The same after matching, measured on columns that the matching did not see; 0 is chance."""
    chance: float | None = None
    """How often independently trained models would show `found` coincidences."""
    through: bool = False
    """The other axis had to be put into an order found in another tensor."""


@dataclass
class KnownOrder:
    """A permutation of an axis of the second model towards the first."""

    order: np.ndarray
    uses: int = 0


@dataclass
class PairOrders:
    """Permutations found so far between two models, by the length of the axis that they order."""

    by_length: dict[int, list[KnownOrder]] = field(default_factory=dict)

    def of_length(self, length: int) -> list[KnownOrder]:
        """At most `HYPOTHESES`, the most useful first."""
        return sorted(self.by_length.get(length, ()), key=lambda known: -known.uses)[:HYPOTHESES]

    def add(self, order: np.ndarray) -> None:
        """Remember an order; one that is known nearly so is not remembered twice."""
        known = self.by_length.setdefault(len(order), [])
        if not any(2 * np.count_nonzero(one.order == order) > len(order) for one in known):
            known.append(KnownOrder(order))

    @property
    def count(self) -> int:
        return sum(map(len, self.by_length.values()))


def needed_coincidences(level: float) -> int:
    """The fewest coincidences that chance exceeds with a probability below `level`."""
    return next(count for count in range(1, 400) if chance_of_coincidences(count) < level)


def find_coordinates(
    a: np.ndarray, b: np.ndarray, orders: PairOrders, level: float, partial_axis: int | None = None
) -> Finding:
    """Whether two matrices [m, n] share their coordinates; new permutations are added to `orders`.

    Args:
        a, b: of one shape, in a compute dtype.
        level: probability of one test to be wrong about independently trained models.
        partial_axis: the axis of which only some places were read: what lies in another place may be missing there.
    """
    needed = needed_coincidences(level)
    axes = [axis for axis in np.argsort(a.shape, kind="stable") if a.shape[axis] >= needed]
    findings = []
    for axis in axes:
        if can_tell_apart(a.shape[axis], a.shape[1 - axis]):
            finding = try_in_place(a, b, int(axis), level)
            if finding.state == "shared":
                return finding
            findings.append(finding)
    whole = partial_axis is None
    for carried in (False, True) if whole else (False,):
        for axis in axes:
            if axis == partial_axis or not can_tell_apart(a.shape[axis], a.shape[1 - axis] / 2):
                continue
            known = orders.of_length(a.shape[1 - axis]) if carried else (None,)
            for one in known:
                finding = try_permuted(a, b, int(axis), one, level)
                if finding.state == "permuted":
                    remember(a, b, int(axis), one, orders)
                    return finding
                findings.append(finding)
    return max(findings, key=lambda finding: finding.found / finding.tested) if findings else Finding("untestable")


def try_in_place(a: np.ndarray, b: np.ndarray, axis: int, level: float) -> Finding:
    """One axis matched with the other as it lies: at least half of the rows must stay where they are."""
    gains, rows = _agree(a, b, axis)
    whole = gains.even + gains.odd
    order = _assign(whole)
    found = int(np.count_nonzero(order == rows))
    agreement = float(whole[np.arange(len(rows)), rows].mean())
    matched = agreement if found == len(rows) else _held_out(gains, _assign(gains.even), _assign(gains.odd))
    chance = chance_of_coincidences(found)
    state: State = "shared" if 2 * found >= len(rows) and chance < level else "unlike"
    return Finding(state, AXES[axis], len(rows), found, agreement, matched, chance)


def try_permuted(a: np.ndarray, b: np.ndarray, axis: int, other: KnownOrder | None, level: float) -> Finding:
    """One axis matched with the other as it lies, or in a known order: two halves of it must say the same."""
    gains, rows = _agree(a, b, axis)
    agreement = float((gains.even + gains.odd)[np.arange(len(rows)), rows].mean())
    if other is not None:
        gains, _ = _agree(a, b, axis, other.order)
    halves = _assign(gains.even), _assign(gains.odd)
    found = int(np.count_nonzero(halves[0] == halves[1]))
    chance = chance_of_coincidences(found)
    state: State = "permuted" if 2 * found >= len(rows) and chance < level else "unlike"
    matched = _held_out(gains, *halves)
    return Finding(state, AXES[axis], len(rows), found, agreement, matched, chance, other is not None)


def remember(a: np.ndarray, b: np.ndarray, axis: int, other: KnownOrder | None, orders: PairOrders) -> None:
    """Keep the whole order of a permuted axis, for the tensors that share it."""
    if other is not None:
        other.uses += 1
    size = a.shape[axis]
    if size * size <= LARGEST_GAIN:
        gains, _ = _agree(a, b, axis, None if other is None else other.order, size)
        order = _assign(gains.even + gains.odd)
        if np.any(order != np.arange(size)):
            orders.add(order)


def _agree(
    a: np.ndarray, b: np.ndarray, axis: int, columns: np.ndarray | None = None, most: int = SAMPLED_ROWS
) -> tuple[Halves, np.ndarray]:
    """Cosines of evenly spread rows of an axis with all of the other model's, and which rows these are."""
    size = a.shape[axis]
    rows = spread(size, most).astype(np.int32)
    if axis == 1:
        a, b = a.T, b.T
    gains = _compare_rows(a, b, rows, None if columns is None else columns.astype(np.int32))
    return Halves(*(np.asarray(x) for x in gains)), rows


def _assign(gain: np.ndarray) -> np.ndarray:
    """For every row the column of the assignment of largest total."""
    best = gain.argmax(1)
    if len(np.unique(best)) == len(best):  # every row can have its best
        return best
    return linear_sum_assignment(gain, maximize=True)[1]


def _held_out(gains: Halves, from_even: np.ndarray, from_odd: np.ndarray) -> float:
    """Mean cosine under a matching, each half of the columns measured under the other half's matching."""
    rows = np.arange(len(from_even))
    return float((gains.even[rows, from_odd] + gains.odd[rows, from_even]).mean())
