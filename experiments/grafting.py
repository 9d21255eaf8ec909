"""Graft every task's BERT encoder onto every other's and measure both ends of the trade: retention and acquisition.

    python experiments/grafting.py --bench BENCH --tasks trec subj mr --work WORK

Hardware: 2 CPU cores, 6 GB. Runtime: hours on 2 cores with all series; with `--work`, a run that was stopped goes on
where it was, and `--series sequential` runs interpolation and the sequential grafts only. `pip install .[experiments]`
brings the tokenisers and transformers.

The bench and the scores are those of text_encoders.py; `BENCH/<task>/train.jsonl` gives `--inputs` unlabelled inputs of
the recipient, drawn anew for every seed. Retention is the recipient's accuracy on its own test rows, acquisition the
donor's. Series: plain interpolation; hard and soft null-space grafts; soft grafts whose ridge in every layer leaves the
same share of the donor's disturbance; soft grafts in the metric of pseudo-inputs (random sequences of the tokens whose
embeddings the two models disagree on, seen by the donor); sequential grafts, which need the recipient's inputs only;
and, for reference, RegMean with both tasks' inputs and sequential grafts with the donor's inputs in place of
pseudo-inputs. `--chains` also grafts all tasks together, in turn in every order and at once.

Results go to experiments/results/grafting.md, .json and .png; hard grafts and the pseudo-input metric are not in those
recorded. Expected (retention / acquisition), recipient trec, donor subj, 600 rows, seed 0: sequential .25 -> .962 /
.928; interpolation .3 -> .960 / .873, .4 -> .954 / .903, .5 -> .940 / .927. Where both tasks read the same kind of text
(subj, mr) nothing tried so far beats interpolation.
"""

import argparse
import itertools
import json
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from text_encoders import (
    BACKENDS,
    MAXIMUM_LENGTH,
    Scorer,
    Task,
    read_task,
    read_weights,
    working_directory,
)
from tokenizers import Tokenizer

from rgsp_jax.activations import CovarianceSettings, Dataset, Example, collect_covariances
from rgsp_jax.activations.pseudo_inputs import draw_pseudo_inputs, find_moved
from rgsp_jax.activations.sequential import collect_sequentially
from rgsp_jax.checkpoint import open_covariances
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints
from rgsp_jax.pipeline.config import Override
from rgsp_jax.version import __version__

WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
INTERPOLATION = "interpolation"
SEQUENTIAL = "sequential"
NEAR = 0.05
"""Points are compared with interpolation where retention is at most this far below the recipient's own accuracy."""


@dataclass(frozen=True)
class Series:
    """Merges along one knob."""

    name: str
    knobs: tuple[float, ...]
    make: Callable[["Bench", str, str, float, int, Path], None]
    """`make(bench, recipient, donor, knob, seed, out)` writes one merge."""
    repeated: tuple[float, ...] = ()
    """Knobs that further draws of the inputs run, too."""


@dataclass(frozen=True)
class Point:
    """One merge, scored."""

    series: str
    knob: float
    recipient: str
    donor: str
    seed: int
    retention: float
    acquisition: float
    seconds: float | None = None
    """Of the merge, covariances not counted; None where it was found ready made."""


class Bench:
    """Tasks, their unlabelled inputs, and files made of them on the way."""

    def __init__(self, root: Path, tasks: Sequence[Task], inputs: int, work: Path):
        self.root, self.inputs, self.work = root, inputs, work
        self.tasks = {task.name: task for task in tasks}

    def model(self, task: str) -> Path:
        return self.tasks[task].model

    def texts(self, task: str, seed: int) -> list[str]:
        """Return the training inputs drawn with a seed."""
        lines = (self.root / task / "train.jsonl").read_text().splitlines()
        drawn = np.random.default_rng(seed).permutation(len(lines))[: self.inputs]
        return [json.loads(lines[i])["text"] for i in drawn]

    def ids(self, task: str, seed: int) -> list[list[int]]:
        """Return the same, tokenised."""
        return [encoding.ids for encoding in tokenizer_of(self.model(task)).encode_batch(self.texts(task, seed))]

    def pseudo_ids(self, recipient: str, donor: str, seed: int) -> list[list[int]]:
        """Return pseudo-inputs of the donor (`draw_pseudo_inputs`)."""
        ours, theirs = read_weights(self.model(recipient)), read_weights(self.model(donor))
        moves = [find_moved(*(np.float32(w[name]) for w in (ours, theirs))) for name in (WORDS, POSITIONS)]
        return draw_pseudo_inputs(*moves, self.ids(recipient, seed), self.inputs, MAXIMUM_LENGTH, seed)

    def pseudo_texts(self, recipient: str, donor: str, seed: int) -> list[str]:
        """Return the same as texts."""
        decode = tokenizer_of(self.model(donor)).decode
        return [decode(ids) for ids in self.pseudo_ids(recipient, donor, seed)]

    def covariances(self, model: str, texts: Sequence[str], name: str) -> str:
        """Return the file of covariances of a model's inputs on these texts, made the first time."""
        path = self.work / f"covariances-{name}.safetensors"
        if not path.exists():
            data = path.with_suffix(".jsonl")
            data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            settings = CovarianceSettings(max_length=MAXIMUM_LENGTH, held_back=64)
            collect_covariances(self.model(model), data, path, settings)
        return str(path)

    def own_covariances(self, task: str, seed: int) -> str:
        return self.covariances(task, self.texts(task, seed), f"{task}-{seed}")

    def pseudo_covariances(self, recipient: str, donor: str, seed: int) -> str:
        """Of the donor's inputs, on pseudo-inputs."""
        return self.covariances(donor, self.pseudo_texts(recipient, donor, seed), f"{donor}-pseudo-{recipient}-{seed}")


@cache
def tokenizer_of(model: Path) -> Tokenizer:
    """Return a model's tokeniser, cutting where the scores do."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAXIMUM_LENGTH)
    return tokenizer


def make_interpolation(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write `(1 - t) A + t B`."""
    settings = {"coefficients": [1 - knob, knob]}
    merge(bench, "average", (recipient, donor), settings, (), out)


def make_soft(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write the soft graft of ridge rho."""
    files = (bench.own_covariances(recipient, seed),)
    merge(bench, "graft", (recipient, donor), {"ridge": knob}, files, out)


def make_hard(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write the hard graft of an energy."""
    files = (bench.own_covariances(recipient, seed),)
    merge(bench, "graft", (recipient, donor), {"energy": knob}, files, out)


def make_discrepancy(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write soft grafts whose ridge in every layer leaves the same share of the donor's disturbance."""
    path = bench.own_covariances(recipient, seed)
    ours, theirs = (read_weights(bench.model(task)) for task in (recipient, donor))
    overrides = []
    with open_covariances(path) as file:
        for site in file.sites.values():
            if site.kind == "full":
                values, basis = np.linalg.eigh(file.read(site.name, "covariance").astype(np.float64))
                for name in site.weights:
                    along = np.sum(((np.float64(theirs[name]) - ours[name]) @ basis) ** 2, axis=0)
                    if not along.any():  # a pooler that no task trained
                        continue
                    ridge = find_ridge(np.maximum(values, 0), along, knob)
                    overrides.append(Override(pattern=name, hyperparameters={"ridge": ridge}))
    merge(bench, "graft", (recipient, donor), {}, (path,), out, tuple(overrides))


def find_ridge(values: np.ndarray, along: np.ndarray, share: float) -> float:
    """Return the ridge at which `|(W* - A) C^(1/2)| = share |(B - A) C^(1/2)|`, by bisection.

    `along` are the squared lengths of B - A along the eigenvectors of C, whose eigenvalues are `values`.
    """
    low, high = -6.0, 6.0
    for _ in range(50):
        middle = (low + high) / 2
        shift = 10**middle * values.mean()
        left = np.sqrt(np.sum(values * (shift / (values + shift)) ** 2 * along) / np.sum(values * along))
        low, high = (middle, high) if left < share else (low, middle)
    return 10**low


def make_soft_pseudo(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write the soft graft in the metric of the donor's pseudo-inputs."""
    files = (bench.own_covariances(recipient, seed), bench.pseudo_covariances(recipient, donor, seed))
    merge(bench, "graft", (recipient, donor), {"ridge": knob}, files, out)


def make_regmean(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write RegMean, with inputs of both tasks; the knob is its factor on off-diagonal entries."""
    files = tuple(bench.own_covariances(task, seed) for task in (recipient, donor))
    merge(bench, "regmean", (recipient, donor), {"off_diagonal": knob}, files, out)


def merge(
    bench: Bench,
    method: str,
    tasks: Sequence[str],
    settings: dict[str, Any],
    covariances: tuple[str, ...],
    out: Path,
    overrides: tuple[Override, ...] = (),
) -> None:
    """Run the product's pipeline."""
    models = tuple(str(bench.model(task)) for task in tasks)
    config = MergeConfig(
        models=models, method=method, hyperparameters=settings, covariances=covariances, overrides=overrides
    )
    merge_checkpoints(config, out, resume=True)


def make_sequential(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write the sequential graft, with pseudo-inputs of the donor."""
    run_sequential(bench.model(recipient), [bench.model(donor)], bench.texts(recipient, seed), [], knob, seed, out)


def make_sequential_both(bench: Bench, recipient: str, donor: str, knob: float, seed: int, out: Path) -> None:
    """Write the sequential graft, with inputs of both tasks."""
    own, others = bench.texts(recipient, seed), bench.texts(donor, seed)
    run_sequential(bench.model(recipient), [bench.model(donor)], own, [others], knob, seed, out)


def run_sequential(
    recipient: Path,
    donors: Sequence[Path],
    own: Sequence[str],
    others: Sequence[Sequence[str]],
    knob: float,
    seed: int,
    out: Path,
) -> None:
    """Graft directories onto another, as `rgsp graft` does."""
    with TemporaryDirectory() as directory:
        files = [Path(directory) / f"{number}.safetensors" for number in range(1 + len(donors))]
        settings = CovarianceSettings(max_length=MAXIMUM_LENGTH, held_back=0, seed=seed)
        given = list(map(as_dataset, others))
        collect_sequentially(recipient, donors, as_dataset(own), files, settings, share=knob, others=given)
        config = MergeConfig(
            models=tuple(map(str, (recipient, *donors))),
            method="sequential_graft",
            hyperparameters={"share": knob},
            covariances=tuple(map(str, files)),
        )
        merge_checkpoints(config, out, resume=True)


def as_dataset(texts: Sequence[str]) -> Dataset:
    """Return texts as the library takes them."""
    return Dataset("texts", "0" * 32, [Example(text) for text in texts])


SERIES = (
    Series(INTERPOLATION, tuple(round(0.1 * i, 1) for i in range(11)), make_interpolation),
    Series(SEQUENTIAL, (0.0, 0.1, 0.25, 0.6, 1.5), make_sequential, repeated=(0.25,)),
    Series("soft ridge", (1, 3, 10), make_soft),
    Series("soft ridge, discrepancy rule", (0.2, 0.35, 0.5), make_discrepancy),
    Series("soft ridge, pseudo-input metric", (0.5, 1.5, 5), make_soft_pseudo),
    Series("hard energy", (0.9,), make_hard),
    Series("RegMean, both inputs", (0.9,), make_regmean),
    Series("sequential, both inputs", (0.1,), make_sequential_both),
)


class Ledger:
    """Scored points by what they are, kept in a file from run to run."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.points = {self.key(point): point for point in (Point(**json.loads(line)) for line in lines)}

    @staticmethod
    def key(point: Point) -> tuple[Any, ...]:
        return point.series, point.knob, point.recipient, point.donor, point.seed

    def add(self, point: Point) -> None:
        self.points[self.key(point)] = point
        with self.path.open("a") as lines:
            lines.write(json.dumps(asdict(point)) + "\n")


def run_series(
    bench: Bench,
    scorer: Scorer,
    ledger: Ledger,
    series: Series,
    pairs: Sequence[tuple[str, str]],
    seed: int,
    knobs: Sequence[float],
) -> Iterator[Point]:
    """Yield the points of one series on all pairs."""
    for recipient, donor in pairs:
        for knob in knobs:
            wanted = Point(series.name, float(knob), recipient, donor, seed, 0, 0)
            if Ledger.key(wanted) not in ledger.points:
                out = bench.work / "merge"
                shutil.rmtree(out, ignore_errors=True)
                started = time.monotonic()
                series.make(bench, recipient, donor, knob, seed, out)
                seconds = time.monotonic() - started
                scores = scorer.score(out, [recipient, donor])
                shutil.rmtree(out)
                fields = asdict(wanted) | {"retention": scores[recipient], "acquisition": scores[donor]}
                ledger.add(Point(**fields | {"seconds": seconds}))
            yield ledger.points[Ledger.key(wanted)]


def run_chains(
    bench: Bench, scorer: Scorer, knob: float, seed: int, ledger: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the accuracies of grafting all tasks together: in turn, in every order, and all donors at once.

    In turn, each donor is grafted onto what came before; protected are the first task's inputs and the pseudo-inputs
    of every donor grafted so far. `ledger` keeps what is done.
    """
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    done = {(line["name"], line["knob"], line["seed"]): line["accuracies"] for line in lines}
    orders = list(itertools.permutations(bench.tasks))
    in_turn = {" <- ".join(order): [[donor] for donor in order[1:]] for order in orders}
    rest = {first: [task for task in bench.tasks if task != first] for first in bench.tasks}
    at_once = {f"{first} <- {', '.join(others)}": [others] for first, others in rest.items() if len(others) > 1}
    for name, steps in (in_turn | at_once).items():
        if (name, knob, seed) not in done:
            first = name.split(" <- ")[0]
            current, own = bench.model(first), bench.texts(first, seed)
            for number, donors in enumerate(steps):
                out = bench.work / f"chain-{number}"
                shutil.rmtree(out, ignore_errors=True)
                run_sequential(current, list(map(bench.model, donors)), own, [], knob, seed, out)
                current, own = out, own + [text for d in donors for text in bench.pseudo_texts(first, d, seed)]
            accuracies = done[name, knob, seed] = scorer.score(current, list(bench.tasks))
            with ledger.open("a") as lines_out:
                record = {"name": name, "knob": knob, "seed": seed, "accuracies": accuracies}
                lines_out.write(json.dumps(record) + "\n")
        yield name, done[name, knob, seed]


def envelope(interpolated: Sequence[Point], retention: float) -> float:
    """Return the most that interpolation acquires at a retention or above, on straight lines between its points."""
    points = sorted((p.retention, p.acquisition) for p in interpolated)
    at = np.array([r for r, _ in points])
    best = np.maximum.accumulate(np.array([a for _, a in points])[::-1])[::-1]
    return float(np.interp(retention, at, best))


def compare(points: Sequence[Point], interpolated: Sequence[Point]) -> float | None:
    """Return the mean acquisition beyond interpolation's at equal retention, over the points that keep the recipient.

    A point keeps it where its retention is at most NEAR below the recipient's own; None where no point does. Where a
    point retains more than any interpolation, it is compared with the one that retains most.
    """
    own = next(p.retention for p in interpolated if p.knob == 0)
    kept = [p for p in points if p.retention >= own - NEAR]
    gains = [p.acquisition - envelope(interpolated, p.retention) for p in kept]
    return float(np.mean(gains)) if gains else None


def summarise(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return, by series, the gains over interpolation: of every pair over seeds, their mean and standard error.

    The standard error is over pairs: draws of one pair share its models and test rows.
    """
    rows = []
    for name in dict.fromkeys(p.series for p in points if p.series != INTERPOLATION):
        gains: dict[str, list[float]] = {}
        for (recipient, donor, _), group in by(points, lambda p: (p.recipient, p.donor, p.seed), name).items():
            lines = by(points, lambda p: (p.recipient, p.donor), INTERPOLATION)[recipient, donor]
            gain = compare(group, lines)
            gains.setdefault(f"{recipient} <- {donor}", [])
            if gain is not None:
                gains[f"{recipient} <- {donor}"].append(gain)
        means = [float(np.mean(g)) for g in gains.values() if g]
        spread = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
        mean = float(np.mean(means)) if means else None
        rows.append({"series": name, "gains": gains, "mean": mean, "standard_error": spread})
    return rows


def by(points: Sequence[Point], key: Callable[[Point], Any], series: str) -> dict[Any, list[Point]]:
    """Return the points of one series, grouped."""
    groups: dict[Any, list[Point]] = {}
    for point in points:
        if point.series == series:
            groups.setdefault(key(point), []).append(point)
    return groups


def find_pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one is at least as good as in both scores and better in one."""
    return [
        p
        for p in points
        if not any(
            q.retention >= p.retention
            and q.acquisition >= p.acquisition
            and (q.retention, q.acquisition) != (p.retention, p.acquisition)
            for q in points
        )
    ]


def draw(points: Sequence[Point], pairs: Sequence[tuple[str, str]], path: Path) -> None:
    """Draw acquisition against retention for every pair; Pareto points are ringed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.5 * columns, 4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (recipient, donor) in zip(np.ravel(figure.subplots(lines, columns, squeeze=False)), pairs, strict=False):
        here = [p for p in points if (p.recipient, p.donor) == (recipient, donor)]
        for name in dict.fromkeys(p.series for p in here):
            x, y = zip(*sorted((p.retention, p.acquisition) for p in here if p.series == name), strict=True)
            axes.plot(x, y, "o-", markersize=4, label=name)
        best = find_pareto(here)
        axes.plot([p.retention for p in best], [p.acquisition for p in best], "ko", fillstyle="none", markersize=9)
        axes.set(title=f"{recipient} <- {donor}", xlabel=f"retention ({recipient})", ylabel=f"acquisition ({donor})")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def list_draws(
    points: Sequence[Point], pairs: Sequence[tuple[str, str]], seeds: Sequence[int]
) -> Iterator[tuple[str, float, list[str]]]:
    """Yield (series, knob, cells) of what was run with every draw of the inputs: means and standard deviations."""
    for series, knob in dict.fromkeys((p.series, p.knob) for p in points):
        cells = []
        for pair in pairs:
            here = [p for p in points if (p.series, p.knob, p.recipient, p.donor) == (series, knob, *pair)]
            if {p.seed for p in here} == set(seeds):
                scores = np.array([(p.retention, p.acquisition) for p in here])
                mean, spread = scores.mean(0), scores.std(0, ddof=1)
                cells.append(f"{mean[0]:.3f} ({spread[0]:.3f}) / {mean[1]:.3f} ({spread[1]:.3f})")
        if len(cells) == len(pairs):
            yield series, knob, cells


def write_results(
    points: Sequence[Point],
    chains: Sequence[tuple[str, dict[str, float]]],
    settings: Mapping[str, Any],
    out: Path,
) -> None:
    """Write everything as JSON, tables as Markdown, the frontiers as PNG."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pairs = list(dict.fromkeys((p.recipient, p.donor) for p in points))
    first = [p for p in points if p.seed == settings["seeds"][0]]
    summary = summarise(first)
    record = {
        "settings": settings,
        "versions": {"rgsp_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "summary": summary,
        "points": [asdict(p) for p in points],
        "chains": [{"name": name, "accuracies": scores} for name, scores in chains],
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    text = [f"# {out.name}", "", f"    {settings['command']}", ""]
    text += [
        f"Acquisition beyond interpolation's at equal retention, where retention is at most {NEAR} below the",
        "recipient's own: mean over the points of a series, first draw of the inputs; standard error over pairs.",
        "Empty: no point retains that much.",
        "",
        table_head(["series", *(f"{a} <- {b}" for a, b in pairs), "mean", "SE"]),
    ]
    for row in summary:
        cells = [signed(np.mean(g)) if (g := row["gains"].get(f"{a} <- {b}")) else "" for a, b in pairs]
        text.append(table_line([row["series"], *cells, signed(row["mean"]), plain(row["standard_error"])]))
    text += ["", "Retention / acquisition (first draw of the inputs; Pareto points of a pair in bold):", ""]
    best = {pair: find_pareto([p for p in first if (p.recipient, p.donor) == pair]) for pair in pairs}
    text.append(table_head(["series", "knob", *(f"{a} <- {b}" for a, b in pairs)]))
    for series, knob in dict.fromkeys((p.series, p.knob) for p in first):
        cells = []
        for pair in pairs:
            found = [p for p in first if (p.series, p.knob, p.recipient, p.donor) == (series, knob, *pair)]
            cell = f"{found[0].retention:.3f} / {found[0].acquisition:.3f}" if found else ""
            cells.append(f"**{cell}**" if found and found[0] in best[pair] else cell)
        text.append(table_line([series, f"{knob:g}", *cells]))
    if len(settings["seeds"]) > 1:
        text += ["", f"The same over {len(settings['seeds'])} draws of the inputs, mean (standard deviation):", ""]
        text.append(table_head(["series", "knob", *(f"{a} <- {b}" for a, b in pairs)]))
        for series, knob, cells in list_draws(points, pairs, settings["seeds"]):
            text.append(table_line([series, f"{knob:g}", *cells]))
    if chains:
        names = sorted(chains[0][1])
        text += ["", "All tasks by sequential grafts, in turn (<-) and at once (,):", ""]
        text.append(table_head(["grafts", *names, "mean"]))
        for name, scores in chains:
            mean = np.mean(list(scores.values()))
            text.append(table_line([name, *(f"{scores[n]:.3f}" for n in names), f"{mean:.4f}"]))
    out.with_suffix(".md").write_text("\n".join(text) + "\n")
    draw(first, pairs, out.with_suffix(".png"))


def table_head(cells: Sequence[str]) -> str:
    return f"{table_line(cells)}\n|{'---|' * len(cells)}"


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def signed(number: float | None) -> str:
    return "" if number is None else f"{number:+.3f}"


def plain(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def describe_command(options: argparse.Namespace, tasks: Sequence[str]) -> str:
    """Return the command that repeats the run, without the paths of the machine it was run on."""
    parts = ["python", "experiments/grafting.py", "--bench", "BENCH", "--tasks", *tasks, "--rows", str(options.rows)]
    parts += ["--inputs", str(options.inputs), "--seeds", *map(str, options.seeds)]
    if tuple(options.series) != tuple(series.name for series in SERIES):
        parts += ["--series", *options.series]
    return shlex.join(parts + (["--chains"] if options.chains else []))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [series.name for series in SERIES]
    parser.add_argument("--bench", type=Path, required=True, help="directory of task directories")
    parser.add_argument("--tasks", nargs="+", help="default: all, by name")
    parser.add_argument("--rows", type=int, default=600, help="test rows of each task (default: 600)")
    parser.add_argument("--inputs", type=int, default=200, help="unlabelled inputs of each task (default: 200)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="draws of the inputs (default: 0); the first runs all knobs"
    )
    parser.add_argument("--series", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument(
        "--chains", action="store_true", help="also graft all tasks together: in turn, in every order, and at once"
    )
    parser.add_argument("--chain-knob", type=float, default=0.25, help="knob of these grafts (default: 0.25)")
    parser.add_argument("--work", type=Path, help="keep scores and covariances here, and use those found")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grafting")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Point]:
    """Run the experiment and return its points."""
    options = parse_arguments(arguments)
    names = options.tasks or sorted(path.parent.name for path in options.bench.glob("*/head.safetensors"))
    tasks = [read_task(options.bench / name, options.rows) for name in names]
    pairs = list(itertools.permutations(names, 2))
    chosen = [s for s in SERIES if s.name in {INTERPOLATION, *options.series}]
    points: list[Point] = []
    with working_directory(options.work) as work:
        scorer = Scorer(tasks, BACKENDS["flax"], work / "scores.json")
        bench, ledger = Bench(options.bench, tasks, options.inputs, work), Ledger(work / "points.jsonl")
        for seed, series in itertools.product(options.seeds, chosen):
            knobs = series.knobs if seed == options.seeds[0] else series.repeated
            for p in run_series(bench, scorer, ledger, series, pairs, seed, knobs):
                points.append(p)
                where = f"{p.recipient} <- {p.donor}"
                print(f"{where:14s} {p.series} {p.knob:g}: {p.retention:.3f} / {p.acquisition:.3f}", flush=True)
        kept = work / "chains.jsonl"
        chains = list(run_chains(bench, scorer, options.chain_knob, options.seeds[0], kept)) if options.chains else []
        settings = {"command": describe_command(options, names), "rows": options.rows, "inputs": options.inputs}
        write_results(points, chains, settings | {"seeds": options.seeds}, options.out)
    return points


if __name__ == "__main__":
    main()
