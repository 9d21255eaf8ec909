"""The order of units that brings one model's nearest to another's: linear assignments, each solved exactly.

With the residual stream left as it is, no set of units sees the order of another. So Git Re-Basin's weight matching
(Ainsworth et al. 2023, arXiv 2209.04836), the order of largest inner product `sum <a, permuted b>`, falls apart into
one assignment for each set. OTFusion's exact transport (Singh & Jaggi 2020, arXiv 1910.05653) is the same over the
weights into the units alone: squared distances differ from inner products by what no permutation changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from rgsp_jax.alignment.units import Spot, UnitSet
from rgsp_jax.errors import RefusedError

Method = Literal["weights", "otfusion"]
METHODS: tuple[Method, ...] = ("weights", "otfusion")


@dataclass(frozen=True)
class Order:
    """For every place, the unit (and group) of the model that comes there."""

    units: np.ndarray
    groups: np.ndarray

    def of(self, spot: Spot) -> np.ndarray:
        return self.groups if spot.place.of == "group" else self.units

    @property
    def moved(self) -> int:
        """Units that change their place."""
        return int(np.count_nonzero(self.units != np.arange(len(self.units))))


class Matched(NamedTuple):
    """An order and what it does."""

    order: Order
    before: float
    """Mean cosine of units with what is in their place in the reference; all their weights count."""
    after: float


Gains = dict[str, np.ndarray]
"""Kind of block ("unit" or "group") -> what is known of its blocks."""
ReadPair = Callable[[Spot], tuple[np.ndarray, np.ndarray]]
"""The reference's and the model's tensor of a spot."""


def match_units(units: UnitSet, read: ReadPair, method: Method) -> Matched:
    """The best order of one set of units; the one it has, where no other is better beyond rounding.

    Args:
        units: where they lie in the model.
        read: gives a pair of tensors, one pair at a time.
        method: "weights" compares everything a unit lies in, "otfusion" what leads into it.

    Raises:
        RefusedError: a tensor holds values that are not finite.
    """
    compared: Gains = {}
    everything: Gains = {} if method == "otfusion" else compared
    sizes: tuple[Gains, Gains] = {}, {}
    for spot in units.spots:
        a, b = (spot.to_blocks(widen(x)) for x in read(spot))
        gain = a @ b.T
        if not np.isfinite(gain).all():
            raise RefusedError(f"tensor {spot.name!r} holds values that are not finite, here or in the reference")
        add(everything, spot, gain)
        if method == "otfusion" and spot.place.side == "incoming":
            add(compared, spot, gain)
        for total, x in zip(sizes, (a, b), strict=True):
            add(total, spot, np.einsum("ij,ij->i", x, x))
    stay = Order(np.arange(units.count), np.arange(units.groups))
    best = assign(compared, units.count, units.groups)
    rounding = float(np.finfo(np.float32).eps) * sum(float(np.abs(x).max(1).sum()) for x in compared.values())
    if total_gain(compared, best) <= total_gain(compared, stay) + rounding:
        best = stay
    return Matched(best, *(mean_cosine(everything, sizes, order) for order in (stay, best)))


def add(total: Gains, spot: Spot, x: np.ndarray) -> None:
    """Add to what was found for a spot's kind of blocks; most sets have one kind, and large ones large squares."""
    of = spot.place.of
    if of in total:
        total[of] += x
    else:
        total[of] = x.copy()


def widen(x: np.ndarray) -> np.ndarray:
    """In a dtype to compute in."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def assign(gains: Gains, count: int, groups: int) -> Order:
    """The order of largest total: units within their groups, and groups with what their units can gain at best.

    Args:
        gains: by kind of block, of every block of the model in every place: [units, units], [groups, groups].
        count, groups: how many there are; units of a group lie side by side.
    """
    members = count // groups
    if members == 1:
        order = best_rows(sum(gains.values(), start=np.zeros(())))
        return Order(order, order)
    blocks = gains["unit"].reshape(groups, members, groups, members).transpose(0, 2, 1, 3)
    inside = np.array([[best_rows(block) for block in row] for row in blocks])  # [groups, groups, members]
    reached = np.take_along_axis(blocks, inside[..., None], axis=3)[..., 0].sum(-1)
    order = best_rows(reached + gains.get("group", 0))
    chosen = inside[np.arange(groups), order]
    return Order((order[:, None] * members + chosen).reshape(-1), order)


def best_rows(gain: np.ndarray) -> np.ndarray:
    """For every row the column of the assignment of largest total."""
    best = gain.argmax(1)
    if len(np.unique(best)) == len(best):  # every row can have its best
        return best
    return linear_sum_assignment(gain, maximize=True)[1]


def total_gain(gains: Gains, order: Order) -> float:
    """What an order gains over all units and groups."""
    along = {"unit": order.units, "group": order.groups}
    return sum(float(gain[np.arange(len(gain)), along[of]].sum(dtype=np.float64)) for of, gain in gains.items())


def mean_cosine(gains: Gains, sizes: tuple[Gains, Gains], order: Order) -> float:
    """Mean cosine between units in their places; what a group shares counts for each of its units."""
    members = len(order.units) // len(order.groups)
    places = np.arange(len(order.units))
    along = {"unit": (places, order.units), "group": (places // members, order.units // members)}
    inner, ours, theirs = (np.zeros(len(places)) for _ in range(3))
    for of, gain in gains.items():
        here, there = along[of]
        inner += gain[here, there]
        ours += sizes[0][of][here]
        theirs += sizes[1][of][there]
    product = np.sqrt(ours * theirs)
    return float(np.mean(np.divide(inner, product, out=np.zeros_like(product), where=product > 0)))
