"""The picture of a frontier."""

from collections.abc import Sequence
from pathlib import Path

from rgsp_jax.sweep.frontier import FrontierPoint

STYLES = {
    "interpolation": ("#666666", "o"),
    "soft ridge": ("#0072b2", "s"),
    "hard energy": ("#d55e00", "^"),
    "RegMean": ("#009e73", "D"),
    "recipient": ("#000000", "P"),
    "donor": ("#000000", "X"),
}
"""Colour and marker of every series: told apart without colour too."""


def draw_frontier(points: Sequence[FrontierPoint], out: Path) -> None:
    """Retention against acquisition; filled points are on the Pareto front, each with its knob beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="retention (recipient's score)", ylabel="acquisition (donor's score)")
    for series, (colour, marker) in STYLES.items():
        found = sorted((p for p in points if p.series == series), key=lambda p: p.knob or 0)
        if not found:
            continue
        x, y = [p.retention for p in found], [p.acquisition for p in found]
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        for filled in (True, False):
            some = [p for p in found if p.pareto is filled]
            axes.scatter(
                [p.retention for p in some],
                [p.acquisition for p in some],
                marker=marker,
                s=42,
                color=colour,
                facecolor=colour if filled else "white",
                zorder=3,
                label=series if filled == any(p.pareto for p in found) else None,
            )
        for p in found:
            if p.knob is not None:
                axes.annotate(f"{p.knob:g}", (p.retention, p.acquisition), xytext=(5, 4), textcoords="offset points",
                              fontsize=7, color=colour)  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
