"""How the time and memory of a merge grow with the model, with the number of models and with the rank.

    python -m experiments.benchmarks.growth --work PLACE             # writes results/growth.json, .md and .png
    python -m experiments.benchmarks.growth --work PLACE --axis rank # only this axis, repeatable

Random decoders of `decoders.py`, siblings in bfloat16, made in PLACE and removed. Along "parameters" the number of
layers grows, and the last point is a wider model of 1.7 billion; along "models" K, along "rank" r. Every point is `rgsp
merge` as a command of its own behind a first run that compiles; points of one size take turns, round by round. Times
are those of the merge without the command's start (`rgsp merge --plan` in the same round). Exponents are least squares
of logarithms; processor time is what is plotted, since others on the machine lengthen the wall time.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks.decoders import Decoder, make_decoders_apart
from experiments.benchmarks.peers import own_environment
from experiments.benchmarks.processes import Measured, measure
from experiments.benchmarks.svd import describe_machine
from experiments.benchmarks.whole_merge import OURS, ROOT, describe_place

RESULTS = Path(__file__).parent / "results" / "growth.json"
SMALL = Decoder(layers=1, vocabulary=4096)
SIZES = {
    "average": (Decoder(layers=4), Decoder(layers=8), Decoder(layers=16), Decoder(layers=32), Decoder(layers=64)),
    "slerp": (Decoder(layers=4), Decoder(layers=8), Decoder(layers=16), Decoder(layers=32)),
    "rgsp": (Decoder(layers=1), Decoder(layers=2), Decoder(layers=4), Decoder(layers=8)),
}
WIDEST = Decoder(layers=28, width=1792, hidden=9728, heads=28, key_heads=4)
"""1.73 billion parameters."""
MODELS = (2, 3, 4, 6, 8)
RANKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Point:
    """One merge."""

    axis: str
    """parameters, layers, models or rank."""
    method: str
    decoder: Decoder
    models: int = 2
    rank: int = 64

    @property
    def x(self) -> float:
        own = {"parameters": self.decoder.parameters, "models": self.models, "rank": self.rank}
        return float(own[self.axis])

    def command(self, models: Sequence[Path], out: Path) -> tuple[Any, ...]:
        rank = () if self.method in ("average", "slerp") else ("--rank", self.rank)
        return (*OURS, "merge", *models[: self.models], "--method", self.method, *rank, "--out", out)


def list_points(axes: Sequence[str], largest: float) -> list[Point]:
    """Every point up to so many parameters."""
    points = [Point("parameters", method, d) for method, decoders in SIZES.items() for d in (*decoders,)]
    points += [Point("parameters", "average", WIDEST)]
    points += [Point("models", "average", SMALL, models=k) for k in MODELS]
    # Two models have no ancestor to look for: what `relative` costs shows from three.
    points += [Point("models", "relative", SMALL, models=k) for k in MODELS[1:]]
    points += [Point("rank", m, SMALL, models=k, rank=r) for m, k in (("rgsp", 2), ("relative", 3)) for r in RANKS]
    return [p for p in points if p.axis in axes and p.decoder.parameters <= largest]


def keep_ends(points: Sequence[Point]) -> list[Point]:
    """The first and the last point of every curve."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.axis, point.method), []).append(point)
    return [point for own in curves.values() for point in dict.fromkeys((own[0], own[-1]))]


def run_point(
    point: Point, models: Sequence[Path], place: Path, environment: Mapping[str, str], start: Measured
) -> Measured:
    """The merge without its start."""
    out = place / "out"
    for left in (out, out.with_name("out.incomplete")):
        shutil.rmtree(left, ignore_errors=True)
    whole = measure(point.command(models, out), environment, place / "log")
    shutil.rmtree(out, ignore_errors=True)
    return Measured(max(whole.wall - start.wall, 1e-3), max(whole.cpu - start.cpu, 1e-3), whole.peak)


def run_points(points: Sequence[Point], place: Path, rounds: int) -> dict[Point, list[Measured]]:
    """Every point's runs behind a first one that compiles; models of one size are there at a time."""
    found: dict[Point, list[Measured]] = {point: [] for point in points}
    with tempfile.TemporaryDirectory() as cache:
        environment = own_environment() | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        for decoder in dict.fromkeys(point.decoder for point in points):
            own = [point for point in points if point.decoder == decoder]
            models = make_decoders_apart(place / "models", decoder, max(point.models for point in own))
            for number in range(rounds + 1):
                start = measure((*own[0].command(models, place / "out"), "--plan"), environment, place / "log")
                for point in own:
                    run = run_point(point, models, place, environment, start)
                    if number:
                        found[point].append(run)
                    print(
                        f"{point.axis:11}{point.method:10}{point.x:14g}  round {number}{run.wall:9.2f} s wall"
                        f"{run.cpu:9.2f} s cpu{run.peak / 1e6:8.0f} MB",
                        flush=True,
                    )
            shutil.rmtree(place / "models")
    return found


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x, by least squares."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread


def summarise(found: Mapping[Point, Sequence[Measured]]) -> list[dict[str, Any]]:
    """A curve for every axis and method."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point, runs in found.items():
        medians = {what: statistics.median(getattr(run, what) for run in runs) for what in ("wall", "cpu", "peak")}
        row = {"x": point.x, **{k: round(v, 3) for k, v in medians.items()}, "decoder": asdict(point.decoder)}
        curves.setdefault((point.axis, point.method), []).append(row | {"models": point.models, "rank": point.rank})
    report = []
    for (axis, method), rows in curves.items():
        rows.sort(key=lambda row: row["x"])
        xs = [row["x"] for row in rows]
        exponents = {w: round(fit_exponent(xs, [row[w] for row in rows]), 3) for w in ("wall", "cpu", "peak")}
        report.append({"axis": axis, "method": method, "exponents": exponents if rows[1:] else {}, "points": rows})
    return report


# Report


LABELS = {"parameters": "parameters", "models": "models K", "rank": "rank r"}


def draw(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Processor time above, peak memory below, a column for each axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes = [axis for axis in LABELS if any(curve["axis"] == axis for curve in curves)]
    figure = Figure(figsize=(4.2 * len(axes), 6.4), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    for column, axis in enumerate(axes):
        for row, (what, unit, title) in enumerate(
            (("cpu", 1.0, "processor time, s"), ("peak", 1e6, "peak memory, MB"))
        ):
            panel = grid[row][column]
            for number, curve in enumerate(c for c in curves if c["axis"] == axis):
                xs, ys = [p["x"] for p in curve["points"]], [p[what] / unit for p in curve["points"]]
                slope = curve["exponents"].get(what)
                label = curve["method"] + ("" if slope is None else f"  (exponent {slope:.2f})")
                panel.plot(xs, ys, marker="osv^"[number % 4], color=f"C{number}", label=label)
            panel.set(xscale="log", yscale="log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(True, which="major", alpha=0.3)
            panel.legend(fontsize=8, frameon=False)
            if column == 0:
                panel.set_ylabel(title)
            ticks = sorted({p["x"] for c in curves if c["axis"] == axis for p in c["points"]})
            if axis != "parameters":
                panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
                panel.minorticks_off()
        grid[1][column].set_xlabel(LABELS[axis])
    figure.savefig(path, dpi=110)


def render(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        "# Growth of a merge",
        "",
        f"    {report['command']}",
        "",
        f"{report['headline']} {machine['processor']}, {machine['cores_used']} cores, load {machine['load'][0]} at the"
        f" end, JAX {machine['jax']}; medians of {report['rounds']} round(s) behind one that compiles, without the"
        f" command's start. {report['cut']}",
        "",
        "![growth](growth.png)",
        "",
        "| axis | method | x | wall s | CPU s | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for curve in report["curves"]:
        for p in curve["points"]:
            cells = f"{p['x']:,.0f} | {p['wall']:.2f} | {p['cpu']:.2f} | {p['peak'] / 1e6:.0f}"
            lines.append(f"| {curve['axis']} | {curve['method']} | {cells} |")
    lines += ["", "| axis | method | exponent of wall | of CPU | of peak |", "|---|---|---|---|---|"]
    for curve in report["curves"]:
        if found := curve["exponents"]:
            cells = " | ".join(f"{found[w]:.2f}" for w in ("wall", "cpu", "peak"))
            lines.append(f"| {curve['axis']} | {curve['method']} | {cells} |")
    return "\n".join(lines) + "\n"


def write_headline(curves: Sequence[Mapping[str, Any]]) -> str:
    """The exponents in a sentence."""
    parts = [
        f"{c['method']} with {LABELS[c['axis']]} {c['exponents']['cpu']:.2f} (memory {c['exponents']['peak']:.2f})"
        for c in curves
        if c["exponents"]
    ]
    return f"Fitted exponents of processor time: {'; '.join(parts)}."


def main() -> int:
    parser = argparse.ArgumentParser(description="Growth of time and memory.")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs, 9 GB")
    parser.add_argument("--axis", choices=list(LABELS), action="append", help="only these, repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ends", action="store_true", help="the first and the last point of every curve only")
    parser.add_argument("--largest", type=float, default=2e9, help="parameters of a model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written, table and plot beside it")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    axes = arguments.axis or list(LABELS)
    points = list_points(axes, arguments.largest)
    if arguments.ends:
        points = keep_ends(points)
    curves = summarise(run_points(points, arguments.work, arguments.rounds))
    if arguments.out.exists() and arguments.axis:  # the other axes stay as they were measured
        curves += [c for c in json.loads(arguments.out.read_text())["curves"] if c["axis"] not in axes]
        curves.sort(key=lambda curve: list(LABELS).index(curve["axis"]))
    cut = f"Sizes above {arguments.largest:,.0f} parameters were left out. " if arguments.largest < 2e9 else ""
    cut += "Of every curve two points were measured, not all." if arguments.ends else ""
    report = {
        "command": "python -m experiments.benchmarks.growth --work PLACE",
        "headline": write_headline(curves),
        "machine": describe_machine(len(os.sched_getaffinity(0))) | describe_place(arguments.work),
        "rounds": arguments.rounds,
        "cut": cut.strip(),
        "curves": curves,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(curves, arguments.out.with_suffix(".png"))
    text = render(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
