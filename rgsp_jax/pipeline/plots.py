"""Figures of the merge report, drawn by matplotlib as SVG that the page themes.

No text of the user's reaches matplotlib; the page writes titles and legends, so the figures hold axes and marks only.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from rgsp_jax.pipeline.tensor_rows import LayerAxis

MARKERS = "os^DvPX*"
"""One per colour of the page's series palette, so that no series is told apart by colour alone."""


@dataclass(frozen=True)
class Line:
    """One series over the layer axis: at a position, the values of the tensors found there."""

    style: int
    values: Mapping[int, Sequence[float]]


# Colours that matplotlib writes and the page replaces by its own, light or dark.
_INK, _MUTED, _GRID, _HEAT, _HEAT_INK, _HEAT_MIDDLE_INK, _SURFACE = (f"#0{i}0{i}0{i}" for i in range(1, 8))
_SERIES = tuple(f"#0a0b{i:02x}" for i in range(len(MARKERS)))
_THEME = {
    **{_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _SURFACE: "--card"},
    **{_HEAT: "--heat", _HEAT_INK: "--heat-ink", _HEAT_MIDDLE_INK: "--heat-middle-ink"},
    **{color: f"--s{i}" for i, color in enumerate(_SERIES)},
}
_DASHES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "path.simplify": False,
    "svg.hashsalt": "rgsp_jax",
}


def load_matplotlib() -> None:
    """Import what draws, which takes half a second: while a merge waits for the disk it costs nothing."""
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401


def _figure(width: float, height: float):
    """Empty figure of `width` x `height` CSS pixels without pyplot's global state."""
    from matplotlib.figure import Figure  # paid only where a report is drawn

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def _as_svg(figure, name: str, label: str) -> Markup:
    """Bare `<svg>` element: themed colours, ids unique to `name`, nothing that varies from run to run."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(tag[0].split())), svg)
    svg = re.sub(r'\b(id="|url\(#|xlink:href="#)', lambda found: f"{found[1]}{name}-", svg).replace(
        "xlink:href", "href"
    )
    for color, variable in _THEME.items():
        svg = svg.replace(color, f"var({variable})")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    head = f'<svg class="plot" role="img" aria-label="{Markup.escape(label)}" {view_box[0]}>'
    return Markup(head + re.sub(r"\s*\n\s*", "\n", svg[svg.index(">") + 1 :]).strip())


@contextmanager
def _plain_style() -> Iterator[None]:
    """Matplotlib's own defaults plus ours, whatever the user's matplotlibrc says."""
    import matplotlib

    settings: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    with matplotlib.rc_context(rc=settings | _RC):
        yield


@_plain_style()
def draw_lines(
    name: str,
    lines: Sequence[Line],
    axis: LayerAxis,
    *,
    label: str,
    percent: bool = False,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Median over the tensors at each layer, one line per series, with the range shaded where there are several.

    `limits` of the y axis are found from the values where not given. On a logarithmic axis zeros lie on its lower end.
    """
    figure = _figure(340, 200)
    axes = figure.add_axes((0.145, 0.17, 0.835, 0.785))
    low, high = limits or find_limits([v for line in lines for vs in line.values.values() for v in vs], log=log)
    log = log and low > 0
    if log:
        axes.set_yscale("log")
    axes.set_ylim(*((low / 1.3, high * 1.3) if log else (low, high)))  # marks on the first and last decade stay whole
    axes.set_xlim(-0.5, max(len(axis.locations) - 0.5, 0.5))
    for order, line in enumerate(lines):
        _draw_line(axes, line, axis, order=order, count=len(lines), floor=low if log else -math.inf)
    for position in axis.breaks:
        axes.axvline(position - 0.5, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    _dress_axes(axes, axis, percent=percent, log=log)
    return _as_svg(figure, name, label)


def _draw_line(axes, line: Line, axis: LayerAxis, *, order: int, count: int, floor: float) -> None:
    """One series: broken between stacks and where a layer has no such tensor.

    A few series go from thick to thin and differ in their dashes, so that those that coincide stay visible.
    """
    color, marker = _SERIES[line.style % len(_SERIES)], MARKERS[line.style % len(MARKERS)]
    x = range(len(axis.locations))
    spread = [[max(v, floor) for v in line.values.get(i, ())] for i in x]
    middle = np.array([float(np.median(values)) if values else math.nan for values in spread])
    lowest = np.array([min(values, default=math.nan) for values in spread])
    highest = np.array([max(values, default=math.nan) for values in spread])
    few = count <= len(_DASHES)
    depth = order / max(count - 1, 1) if few else 0.5
    dashes = _DASHES[order if few else line.style // len(_SERIES) % len(_DASHES)]
    size = (6.0 if len(x) <= 16 else 4.5 if len(x) <= 40 else 0.0) * (1 - depth / 3)
    width = (3.2 - 1.8 * depth if few else 1.9) * (1.0 if len(x) <= 40 else 0.7)
    for start, stop in zip((0, *axis.breaks), (*axis.breaks, len(x)), strict=True):
        part = slice(start, stop)
        lone = np.isfinite(middle[part]).sum() == 1
        marks = {"marker": marker, "markersize": max(size, 4.0) if lone else size, "markeredgewidth": 0}
        axes.plot(x[part], middle[part], color=color, linewidth=width, linestyle=dashes, **marks)
        if np.nanmax(highest[part] - lowest[part], initial=0.0) > 0:
            axes.fill_between(
                x[part], lowest[part], highest[part], color=color, alpha=max(0.05, 0.32 / max(count, 2)), linewidth=0
            )


def _dress_axes(axes, axis: LayerAxis, *, percent: bool, log: bool) -> None:
    """Quiet axes: horizontal grid, few ticks, layer numbers below."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(numticks=5) if log else MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{format_tick(100 * value)}%" if percent else format_tick(value))
    )
    positions = tick_positions(axis)
    axes.set_xticks(positions, [str(axis.locations[i].layer) for i in positions])
    axes.set_xlabel("layer", color=_MUTED, fontsize=9, labelpad=1)
    axes.tick_params(length=0, colors=_MUTED, pad=4)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)


def find_limits(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Limits of a y axis: whole decades where logarithmic and something is positive, else from zero with some air."""
    positive = [value for value in values if value > 0]
    if log and positive:
        first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        return 10.0**first, 10.0 ** max(last, first + 1)
    low, high = min([0.0, *values]), max([0.0, *values])
    air = 0.06 * (high - low) or 1e-3
    return low - (air if low < 0 else 0.0), high + (air if high > 0 or low == high else 0.0)


def format_tick(value: float) -> str:
    """Short tick label without mathematical markup."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"


def tick_positions(axis: LayerAxis, most: int = 9) -> list[int]:
    """Positions to label: round layer numbers, at most about `most`, and none right before the start of a stack."""
    count = len(axis.locations)
    step = next(step for e in range(9) for step in (10**e, 2 * 10**e, 5 * 10**e) if count / step <= most)
    chosen: list[int] = []
    for i, place in enumerate(axis.locations):
        if place.layer % step == 0 or i in (0, *axis.breaks):
            if chosen and i - chosen[-1] < max(1, step / 2):
                chosen.pop()
            chosen.append(i)
    return chosen


@_plain_style()
def draw_heat_map(
    name: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    highest: float,
    breaks: Sequence[int] = (),
    slanted: bool = False,
) -> Markup:
    """Cells shaded from 0 to the full colour at `highest`, with numbers where there is room; a dot where no value is.

    `rows` may leave labels empty; `breaks` are the rows before which a line is drawn.
    """
    side = 40 if len(rows) <= 8 and not slanted else min(22.0, max(9.0, 560 / len(rows)))
    left, right, top, width = 34, 40 if slanted else 4, 58 if slanted else 24, 340
    height = top + side * len(rows) + 4
    cell = min((width - left - right) / len(columns), 74)
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    numbered = cell >= 26 and side >= 13
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            _draw_cell(axes, value, (left + j * cell, top + i * side, cell, side), highest, numbered=numbered)
    for i, text in enumerate(rows):
        axes.text(
            left - 6, top + (i + 0.5) * side, text, color=_MUTED, ha="right", va="center", fontsize=min(9, 0.8 * side)
        )
    for j, text in enumerate(columns):
        turn = {"rotation": 35, "ha": "left", "va": "bottom"} if slanted else {"ha": "center", "va": "bottom"}
        axes.text(left + (j + (0.3 if slanted else 0.5)) * cell, top - 5, text, color=_MUTED, fontsize=9, **turn)
    for i in breaks:
        axes.plot([left, left + cell * len(columns)], [top + i * side] * 2, color=_INK, linewidth=1.2)
    return _as_svg(figure, name, label)


def _draw_cell(
    axes, value: float | None, box: tuple[float, float, float, float], highest: float, *, numbered: bool
) -> None:
    """One cell of a heat map with a hair of space around it."""
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    middle = {"x": x + width / 2, "y": y + height / 2, "ha": "center", "va": "center_baseline"}
    if value is None or not math.isfinite(value):
        axes.text(s="·", color=_MUTED, fontsize=9, **middle)
        return
    share = min(max(value / highest, 0.0), 1.0)
    axes.add_patch(Rectangle((x, y), width, height, facecolor=_GRID, alpha=0.35, edgecolor=_SURFACE, linewidth=1))
    if share > 0:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=_HEAT, alpha=share, edgecolor=_SURFACE, linewidth=1))
    if numbered:
        text = f"{value:.2f}".replace("0.", ".", 1)
        ink = _INK if share <= 0.5 else _HEAT_MIDDLE_INK if share <= 0.72 else _HEAT_INK
        axes.text(s=text, color=ink, fontsize=min(10, 0.62 * height), **middle)
