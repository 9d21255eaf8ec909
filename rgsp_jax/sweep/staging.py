"""How the settings of a sweep share work: each is cut along the stages of its method."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgsp_jax.linalg import resolve_rank
from rgsp_jax.method import MASKED, Method, Stages
from rgsp_jax.pipeline.kernels import Static, Traced, split_static
from rgsp_jax.registry import methods
from rgsp_jax.sweep.grid import Point, Range, SweepConfig, is_whole

Ranks = Mapping[str, tuple[int | float, ...]]
"""Method -> every rank that a sweep may ask for."""


@dataclass(frozen=True)
class Cut:
    """One setting on matrices of one shape: what each step is compiled with, and what it is passed at run time."""

    prepare: Static
    solve: tuple[Static, Traced]
    build: tuple[Static, Traced]

    @property
    def solution(self) -> Any:
        """What settings that share a solution agree in."""
        return self.prepare, self.solve[0], freeze(self.solve[1])

    @property
    def batch(self) -> Any:
        """What settings agree in whose solutions are computed in one call."""
        return self.prepare, self.solve[0], tuple((n, v.shape) for n, v in sorted(self.solve[1].items()))


def freeze(traced: Mapping[str, np.ndarray]) -> tuple[tuple[str, tuple[int, ...], bytes], ...]:
    """Arrays as a key."""
    return tuple((name, value.shape, value.tobytes()) for name, value in sorted(traced.items()))


def cut_setting(
    method: Method, stages: Stages, hyperparameters: Mapping[str, Any], ranks: Iterable[int | float], m: int, n: int
) -> Cut:
    """Cut a setting for m x n matrices: the rank becomes a mask on the largest of the sweep's ranks."""
    given = {**method.defaults, **hyperparameters}
    if "rank" in stages.arguments("prepare") and MASKED in method.hyperparameters:
        own = resolve_rank(given["rank"], m, n)
        limit = given.get(MASKED)
        given["rank"] = max([own, *(resolve_rank(rank, m, n) for rank in ranks)])
        given[MASKED] = own if limit is None else min(own, int(limit))
    else:
        given.pop(MASKED, None)
    steps = []
    for stage in ("prepare", "solve", "build"):
        taken = stages.arguments(stage)  # type: ignore[arg-type]
        skipped = {MASKED} if stage == "prepare" else set()
        steps.append(split_static(method, {name: v for name, v in given.items() if name in taken - skipped}))
    return Cut(steps[0][0], steps[1], steps[2])


def largest_ranks(points: Iterable[Point]) -> dict[str, tuple[int | float, ...]]:
    """Every rank that some points ask of their methods."""
    found: dict[str, dict[int | float, None]] = {}
    for point in points:
        method = methods[point.method]
        if "rank" in method.hyperparameters:
            rank = point.hyperparameters.get("rank", method.defaults["rank"])
            found.setdefault(point.method, {})[rank] = None
    return {name: tuple(ranks) for name, ranks in found.items()}


def ranks_of_space(config: SweepConfig) -> dict[str, tuple[int | float, ...]]:
    """Every rank that a study may ask for: of a range, the larger end."""
    found: dict[str, tuple[int | float, ...]] = {}
    for name in config.method_names:
        method = methods[name]
        if "rank" not in method.hyperparameters:
            continue
        axis = config.axes.get("rank")
        if isinstance(axis, Range):
            found[name] = (int(axis.high) if is_whole(method, "rank", axis) else float(axis.high),)
        else:
            found[name] = axis or (config.hyperparameters.get("rank", method.defaults["rank"]),)
    return found
