"""What every experiment writes: numbers with their errors, Markdown tables, JSON records and figures."""

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rgsp_jax.version import __version__

RESULTS = Path(__file__).parent / "results"


class Estimate(NamedTuple):
    """A mean over repetitions."""

    mean: float
    standard_error: float | None
    """Of the mean, `std(ddof=1) / sqrt(n)`; None for one repetition."""
    repetitions: int
    least: float
    """The smallest of the repetitions: the worst case where larger is better."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.standard_error is None else f" ({self.standard_error:.3f})")

    @property
    def signed(self) -> str:
        """As a difference, with its sign."""
        return f"{self.mean:+.3f}" + ("" if self.standard_error is None else f" ({self.standard_error:.3f})")


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of repetitions with its standard error; ValueError where there are none."""
    if not len(values):
        raise ValueError("no repetitions to average")
    spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), spread, len(values), float(np.min(values)))


def compare(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Estimate | None:
    """Return ours minus theirs over the repetitions that both have, paired by key; None where they share none."""
    shared = [key for key in ours if key in theirs]
    return estimate([ours[key] - theirs[key] for key in shared]) if shared else None


def table_line(cells: Sequence[Any]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; ValueError where a line has another number of cells than the head."""
    if wrong := [line for line in lines if len(line) != len(head)]:
        raise ValueError(f"{wrong[0]} does not have the {len(head)} cells of {head}")
    return "\n".join([table_line(head), f"|{'---|' * len(head)}", *map(table_line, lines)])


def describe_versions() -> dict[str, str]:
    """Return what a number may depend on."""
    return {"rgsp_jax": __version__, "jax": jax.__version__, "python": platform.python_version()}


def describe_command(script: str, settings: Mapping[str, Any]) -> str:
    """Return the command that repeats a run: `--name value ...` for every setting; paths have no place in it."""
    parts = ["python", f"experiments/{script}.py"]
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        parts += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return shlex.join(parts)


def write_results(out: Path, command: str, headline: str, record: Mapping[str, Any], text: Sequence[str]) -> None:
    """Write `out`.json with command, headline, versions and record, and `out`.md with the text under the command."""
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"command": command, "headline": headline, "versions": describe_versions(), **record}
    out.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")
    lines = [f"# {out.name}", "", f"    {command}", "", headline, "", *text]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def make_figure(width: float, height: float) -> Any:
    """Return a figure that needs no display; `savefig` writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
