"""Test the source's bound `|W* - W_opt| <= O(exp(-alpha r)) + O(1 / sqrt(r)) + O(delta)` where the optimum is known.

    python experiments/theorem.py

Hardware: 2 CPU cores, 1 GB. Runtime: about 3 minutes. Needs nothing but the package and matplotlib, which it brings.

A layer has an ancestor C [96, 96] with singular values exp(-alpha i) and two experts A = C + tau_A, B = C + tau_B; the
optimum is W_opt = C + tau_A + tau_B (SPEC section 5). Task vectors are of two kinds: `spectra` change C's leading eight
singular values and nothing else, which is all that the theorem assumes; `directions` are of rank four in directions of
their own, as fine-tuning makes them. delta is |M - I| / sqrt(r) of the dynamic map M of `rgsp_seed`. Errors are
|W* - W_opt| / |tau_A + tau_B|: 0 is the optimum, 1 is C itself, and the average has 1/2, because
A + B - 2 W_opt = -(tau_A + tau_B). The last column fits log error against log r: the theorem says -1/2 or less.

Results go to experiments/results/theorem.md, .json and .png. Expected: no method's error falls with r. `average`,
`rgsp` and `relative` (two models' mean) have .50 throughout, `rgsp_seed` 1.03 to 1.11, further from the optimum than C
itself; delta, which the theorem takes to be small, is .47 to .66 at r = 2 and .99 at r = 96.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgsp_jax import methods
from rgsp_jax.version import __version__

WIDTH, DECAY = 96, 0.1
RANKS = (2, 4, 8, 16, 32, 64, 96)
SIZES = (0.01, 0.1)
"""|tau| / |C| of each task vector."""
KINDS = ("spectra", "directions")
CHANGED, TASK_RANK = 8, 4
METHODS = ("average", "rgsp_seed", "rgsp", "relative")


@dataclass(frozen=True)
class Layer:
    """A layer with its optimum."""

    models: np.ndarray
    """A and B [2, m, n]."""
    optimum: np.ndarray
    change: float
    """|tau_A + tau_B|."""


@dataclass(frozen=True)
class Row:
    """Errors of one method over seeds."""

    kind: str
    size: float
    method: str
    rank: int
    error: float
    standard_error: float
    delta: float | None
    """Of rgsp_seed's dynamic map, mean over seeds."""


def make_layer(kind: str, size: float, seed: int) -> Layer:
    """Return one random layer."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(2))
    ancestor = u * np.exp(-DECAY * np.arange(WIDTH)) @ v.T
    changes = []
    for _ in range(2):
        if kind == "spectra":
            change = u[:, :CHANGED] * rng.normal(size=CHANGED) @ v[:, :CHANGED].T
        else:
            change = rng.normal(size=(WIDTH, TASK_RANK)) @ rng.normal(size=(TASK_RANK, WIDTH))
        changes.append(change * size * np.linalg.norm(ancestor) / np.linalg.norm(change))
    both = sum(changes)
    return Layer(np.stack([ancestor + change for change in changes]), ancestor + both, float(np.linalg.norm(both)))


@cache
def compile_method(method: str, rank: int) -> Any:
    """Return the jitted method at a rank."""
    settings = {} if method == "average" else {"rank": rank}
    return jax.jit(lambda stack: methods[method](stack, **settings).merged)


def measure_error(layer: Layer, method: str, rank: int) -> float:
    """Return |W* - W_opt| / |tau_A + tau_B|."""
    merged = np.asarray(compile_method(method, rank)(jnp.asarray(layer.models)))
    return float(np.linalg.norm(merged - layer.optimum) / layer.change)


def measure_delta(layer: Layer, rank: int) -> float:
    """Return |M - I| / sqrt(r) for the source's dynamic map, `M = softmax(U_A^T U_B / sqrt(r))`."""
    ours, theirs = (np.linalg.svd(model)[0][:, :rank] for model in layer.models)
    ours, theirs = (u * np.sign(u[np.abs(u).argmax(0), np.arange(rank)]) for u in (ours, theirs))
    logits = ours.T @ theirs / np.sqrt(rank)
    soft = np.exp(logits - logits.max(1, keepdims=True))
    return float(np.linalg.norm(soft / soft.sum(1, keepdims=True) - np.eye(rank)) / np.sqrt(rank))


def run(ranks: Sequence[int], seeds: int) -> list[Row]:
    """Return a row for every kind, size, method and rank."""
    rows = []
    for kind in KINDS:
        for size in SIZES:
            layers = [make_layer(kind, size, seed) for seed in range(seeds)]
            for rank in ranks:
                delta = float(np.mean([measure_delta(layer, rank) for layer in layers]))
                for method in METHODS:
                    errors = [measure_error(layer, method, rank) for layer in layers]
                    spread = float(np.std(errors, ddof=1) / np.sqrt(seeds)) if seeds > 1 else 0.0
                    seen = delta if method == "rgsp_seed" else None
                    rows.append(Row(kind, size, method, rank, float(np.mean(errors)), spread, seen))
    return rows


def fit_slope(ranks: Sequence[int], errors: Sequence[float]) -> float:
    """Return the slope of log error against log rank."""
    return float(np.polyfit(np.log(ranks), np.log(errors), 1)[0])


def write_results(rows: Sequence[Row], command: str, out: Path) -> None:
    """Write the table, the numbers and the picture."""
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"rgsp_jax": __version__, "jax": jax.__version__, "python": platform.python_version()}
    record = {"command": command, "versions": versions, "rows": [asdict(row) for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    ranks = list(dict.fromkeys(row.rank for row in rows))
    text = [
        f"# {out.name}",
        "",
        f"    {command}",
        "",
        "Errors |W* - W_opt| / |tau_A + tau_B|, mean (standard error).",
        "",
    ]
    head = ["tasks", "size", "method", *(f"r = {rank}" for rank in ranks), "slope"]
    text += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for kind, size, method in dict.fromkeys((row.kind, row.size, row.method) for row in rows):
        found = [row for row in rows if (row.kind, row.size, row.method) == (kind, size, method)]
        cells = [f"{row.error:.3f} ({row.standard_error:.3f})" for row in found]
        slope = fit_slope(ranks, [row.error for row in found])
        text.append(f"| {' | '.join([kind, f'{size:g}', method, *cells, f'{slope:+z.2f}'])} |")
        if method == "rgsp_seed":
            deltas = [f"{row.delta:.2f}" for row in found]
            text.append(f"| {' | '.join([kind, f'{size:g}', 'delta of rgsp_seed', *deltas, ''])} |")
    out.with_suffix(".md").write_text("\n".join(text) + "\n")
    draw(rows, out.with_suffix(".png"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw error against rank, with the bound's 1 / sqrt(r) beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row.kind, row.size) for row in rows))
    figure = Figure(figsize=(4 * len(cases), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, size) in zip(np.ravel(figure.subplots(1, len(cases), sharey=True)), cases, strict=True):
        for method, marker in zip(METHODS, "o^sD", strict=True):
            found = [row for row in rows if (row.kind, row.size, row.method) == (kind, size, method)]
            ranks, errors = [row.rank for row in found], [row.error for row in found]
            axes.errorbar(ranks, errors, [row.standard_error for row in found], marker=marker, label=method)
        axes.plot(ranks, np.sqrt(ranks[0] / np.array(ranks)), "k:", label="1 / sqrt(r)")
        axes.set(title=f"{kind}, size {size:g}", xlabel="rank", xscale="log", yscale="log")
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("error / |tau_A + tau_B|")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="random layers of each kind (default: 5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "theorem")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    rows = run(options.ranks, options.seeds)
    ranks = "" if tuple(options.ranks) == RANKS else f" --ranks {' '.join(map(str, options.ranks))}"
    write_results(rows, f"python experiments/theorem.py --seeds {options.seeds}{ranks}", options.out)
    return rows


if __name__ == "__main__":
    main()
