"""sweep.html: the results of a sweep as one page that loads nothing."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgsp_jax.pipeline.report import load_templates, make_encodable
from rgsp_jax.sweep.grid import SweepConfig
from rgsp_jax.sweep.results import (
    Direction,
    Result,
    as_cell,
    find_best,
    finite,
    list_hyperparameters,
    list_metrics,
    written_whole,
)
from rgsp_jax.version import __version__

PAGE = "sweep.html"
MOST_MAPS = 15
"""Pairs of axes drawn; more are in the table."""


def write_page(
    results: Sequence[Result],
    out: Path,
    config: SweepConfig,
    directions: Mapping[str, Direction],
    *,
    kind: str = "Sweep",
) -> Path:
    """Write the page; its path."""
    page = out / PAGE
    with written_whole(page) as fresh:
        fresh.write_text(render_page(results, config, directions, kind), encoding="utf-8")
    return page


def render_page(
    results: Sequence[Result], config: SweepConfig, directions: Mapping[str, Direction], kind: str = "Sweep"
) -> str:
    """Table, profiles, heat maps of every pair of numeric axes, parallel coordinates, trade-off of two metrics."""
    rows = sorted(results, key=lambda r: r.point)
    metrics = list_metrics(rows)
    axes = find_axes(rows)
    numeric = [i for i, name in enumerate(axes) if all(map(is_number, column(rows, name)))]
    together = [{axes[i] for i in numeric} & r.hyperparameters.keys() for r in rows]
    pairs = [
        (i, j) for i, j in itertools.combinations(numeric, 2) if any({axes[i], axes[j]} <= names for names in together)
    ][:MOST_MAPS]
    methods = list(dict.fromkeys(r.method for r in rows))
    toward = {name: directions.get(name, "maximise") for name in metrics}
    view = {
        "title": f"{', '.join(methods) or 'No method'}: {len(rows)} points",
        "kind": kind,
        "lead": f"Merges of {len(config.models)} models, each with other hyperparameters, scored by one evaluator.",
        "tiles": list_tiles(rows, toward),
        "axes": axes,
        "pairs": pairs,
        "metrics": metrics,
        "methods": methods,
        "best": [describe_best(rows, name, toward[name]) for name in metrics if find_best(rows, name, toward[name])],
        "problems": [(r.point, r.problem) for r in rows if r.problem],
        "config": config.to_yaml(),
        "version": __version__,
        "data": {
            "axes": [{"name": name} for name in axes],
            "pairs": pairs,
            "metrics": metrics,
            "directions": [toward[name] for name in metrics],
            "methods": methods,
            "rows": [
                {
                    "point": r.point,
                    "method": r.method,
                    "values": [as_value(r.hyperparameters.get(name)) for name in axes],
                    "metrics": [r.metrics.get(name) for name in metrics],
                    "merge_seconds": finite(r.merge_seconds),
                    "score_seconds": finite(r.score_seconds),
                    "problem": r.problem,
                }
                for r in rows
            ],
        },
    }
    return make_encodable(load_templates().get_template("sweep.html.j2").render(view))


def find_axes(results: Sequence[Result]) -> list[str]:
    """Hyperparameters that differ between points of one method."""
    found = []
    for name in list_hyperparameters(results):
        seen: dict[str, set[str]] = {}
        for r in results:
            if name in r.hyperparameters:
                seen.setdefault(r.method, set()).add(repr(r.hyperparameters[name]))
        if any(len(values) > 1 for values in seen.values()):
            found.append(name)
    return found


def column(results: Sequence[Result], name: str) -> list[Any]:
    """Values of one hyperparameter where there is one."""
    return [r.hyperparameters[name] for r in results if name in r.hyperparameters]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_value(value: Any) -> Any:
    """A number, or text."""
    cell = as_cell(value)
    return str(cell).lower() if isinstance(cell, bool) else cell


def describe_best(results: Sequence[Result], metric: str, direction: Direction) -> dict[str, Any]:
    """A row of the table of best points."""
    best = find_best(results, metric, direction)
    assert best is not None
    setting = " ".join([best.method, *(f"{name}={as_cell(v)}" for name, v in best.hyperparameters.items())])
    value = f"{best.metrics[metric]:.6g}"
    return {"metric": metric, "direction": direction, "value": value, "point": best.point, "setting": setting}


def list_tiles(results: Sequence[Result], toward: Mapping[str, Direction]) -> list[tuple[str, str]]:
    """Numbers on top of the page."""
    tiles = [("Points", str(len(results)))]
    for name, direction in list(toward.items())[:3]:
        if best := find_best(results, name, direction):
            tiles.append((f"Best {name}", f"{best.metrics[name]:.4g}"))
    for title, key in (("Merging", "merge_seconds"), ("Scoring", "score_seconds")):
        seconds = [s for s in (finite(getattr(r, key)) for r in results) if s is not None]
        if seconds:
            tiles.append((title, f"{sum(seconds):.3g} s"))
    return tiles
