"""Moments of what a merged model feeds a layer, and of how far other models' inputs have drifted from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.activations.accumulators import join_rows

MERGED = -1
ROWS = 512
"""Inputs are summed in multiples of so many, so that few shapes are compiled."""


class PassName(NamedTuple):
    """Which model runs on what: 0 is the recipient, 1 and more are the donors."""

    model: int
    """Or MERGED."""
    part: int
    """The model whose data they are."""
    batch: int


@dataclass
class Moments:
    """Sums over one part of the data at one site."""

    covariance: Any
    drifts: tuple[Any, ...]
    """Of every model that was asked for, from the merged model's inputs."""
    rows: int = 0

    def scaled(self, factor: Any = 1.0) -> "Moments":
        """The same with a covariance of trace `factor`."""
        trace = jnp.trace(self.covariance)
        unit = jnp.where(trace > 0, factor / jnp.where(trace > 0, trace, 1), 0)
        return Moments(unit * self.covariance, tuple(unit * drift for drift in self.drifts), self.rows)


@jax.jit
def add_moments(
    covariance: Float[Array, "n n"],
    drifts: tuple[Float[Array, "n n"], ...],
    merged: Float[Array, "rows n"],
    others: tuple[Float[Array, "rows n"], ...],
) -> tuple[Float[Array, "n n"], tuple[Float[Array, "n n"], ...]]:
    """Add `k k^T` and `(k_i - k) k^T` of rows of inputs; rows of zeros do not count."""
    product = partial(jnp.matmul, precision="highest")
    moved = tuple(d + product((k - merged).T, merged) for d, k in zip(drifts, others, strict=True))
    return covariance + product(merged.T, merged), moved


def sum_moments(here: Mapping[PassName, Any], part: int, models: Sequence[int], width: int) -> Moments | None:
    """The moments of one part of the data with the drifts of these models, None where no pass of it came here."""
    zero = jnp.zeros((width, width), jnp.float32)
    total = Moments(zero, (zero,) * len(models))
    for name in sorted(name for name in here if name.model == MERGED and name.part == part):
        rows = [here.get(name._replace(model=model)) for model in models]
        count = here[name].shape[0]
        if any(r is None or r.shape[0] != count for r in rows):
            continue
        merged, *seen = (join_rows([r], -(-count // ROWS) * ROWS) for r in (here[name], *rows))
        total.covariance, total.drifts = add_moments(total.covariance, total.drifts, merged, tuple(seen))
        total.rows += count
    return total if total.rows else None


def weigh_moments(own: Moments, others: Sequence[Moments | None], share: float) -> list[Moments]:
    """Every model's side of the fit, weighted as `sequential_graft` takes them, with one drift each.

    The recipient's inputs have trace 1 on its own side and `share` over all the donors'; each donor's have 1 on its.

    Args:
        own: of the recipient's inputs, with the drifts of the recipient and of all donors.
        others: of every donor's inputs, with its drift; None where they do not come to the site.
        share: 0 or more.
    """
    unit = own.scaled()
    sides = [Moments(unit.covariance, unit.drifts[:1], own.rows)]
    part = share / len(others)
    for its, drift in zip(others, unit.drifts[1:], strict=True):
        covariance, drift = part * unit.covariance, part * drift
        if its is not None:
            whole = its.scaled()
            covariance, drift = covariance + whole.covariance, drift + whole.drifts[0]
        sides.append(Moments(covariance, (drift,), own.rows if its is None else its.rows))
    return sides
