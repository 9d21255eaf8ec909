"""Is `relative` a default to trust? Text encoders, digit transformers and decoders, in two halves fixed beforehand.

    python experiments/relative_suite.py --half development --work WORK               # what is chosen by
    python experiments/relative_suite.py --half development --work WORK --candidates  # every candidate and ablation
    python experiments/relative_suite.py --half test --work WORK                      # the chosen one, once
    ... --families text --texts BENCH --base BASE                                     # encoders fine-tuned on text

Hardware: 2 CPU cores, 6 GB. Runtime on cores that others use too: development half and candidates half an hour each,
the test half an hour and a half, its text an hour more. A run that was stopped goes on where it was.

The halves (HALVES) share no seed. A digit seed deals the rows, trains its ancestor and experts anew and takes its tasks
in an order of its own (vision_digits.py), a character seed likewise (character_tasks.py), a text seed trains experts
anew (text_tasks.py): BENCH has a folder with train.jsonl and test.jsonl for mr, subj and trec, BASE is the Hugging Face
encoder that they start from. Nothing is tuned here: every row is a method at one setting.

A difference is paired by problem. Its standard error is over seeds: the problems of a seed share experts, so that their
mean is one observation. `worst` is the smallest difference of a single problem.
"""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import character_tasks
import jax
import numpy as np
from contenders import Contender, Problem, PyTree, make_contender, merge_settings
from digit_tasks import REGIMES
from digit_training import Store, Training
from relative_others import OUTWARD, merge_heads, merge_vectors
from relative_variants import ANCESTORS, COUPLINGS, OUT, RANDOM, RANKS, SCALES, TRUSTS, VARIANT, WEIGHTS
from tables import RESULTS, Estimate, describe_command, estimate, make_figure, table, write_results
from vision_digits import choose_tasks, hash_sources, make_score, open_work, train_ancestor, train_expert

EXPERTS = (2, 3, 4, 6, 8)
NEAR = 0.1
"""Experts are near their ancestor where rho, the mean of |theta_k - mean| / |mean| over matrices, is below this."""
MARGIN = 0.005
WHOLE = 1e9
"""A reach that leaves the correction of the mean whole, however far apart the models are."""
FAMILIES = ("digits", "characters", "text")


@dataclass(frozen=True)
class Half:
    """Seeds and trainings whose problems belong together: (width, learning rate), of text (learning rate, epochs)."""

    seeds: Sequence[int]
    digits: Sequence[tuple[int, float]]
    characters: Sequence[tuple[int, float]]
    text: Sequence[tuple[float, float]]
    text_seeds: Sequence[int]


HALVES: Mapping[str, Half] = {
    "development": Half((0, 1), ((64, 1e-4), (64, 3e-4), (64, 1e-3)), ((64, 3e-4),), ((5e-5, 2),), (0,)),
    "test": Half(
        (2, 3, 4),
        ((64, 1e-4), (64, 3e-4), (64, 1e-3), (32, 3e-4), (128, 3e-4)),
        ((64, 3e-4), (64, 1e-3)),
        ((1e-5, 4), (5e-5, 2), (2e-4, 1), (2e-4, 4)),
        (2, 3, 4),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One problem, not yet made."""

    family: str
    regime: str
    training: str
    experts: int
    seed: int
    make: Callable[[], Problem]

    @property
    def name(self) -> str:
        return f"{self.family} {self.regime} {self.training} K={self.experts} seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """Accuracy of one method on one problem, mean over its tasks."""

    family: str
    regime: str
    training: str
    experts: int
    seed: int
    rho: float
    method: str
    accuracy: float

    @property
    def problem(self) -> tuple[Any, ...]:
        return self.family, self.regime, self.training, self.experts, self.seed


# What the reach and the scale of `relative` were chosen among.
REACHES: Mapping[str, Mapping[str, float]] = {
    f"relative, reach {reach:g}, scale {scale:g}": {"reach": reach, "scale": scale}
    for scale in (1.0, 1.2, 1.35, 1.5)
    for reach in (0.0012, 0.0018, 0.0025, 0.0035, WHOLE)
}
# Settings of the variants: the winner first, then what else was tried, then the source's ingredients one by one.
CANDIDATES: Mapping[str, Mapping[str, float]] = (
    {"winner": {}}
    | {f"ancestor: {ANCESTORS[i]}": {"ancestor": i} for i in (1, 2, 3)}
    | {f"rank: {RANKS[i]}": {"ranks": i} for i in (1, 2, 3)}
    | {f"scale by {SCALES[i]}": {"scales": i} for i in (1, 2, 3)}
    | {
        f"trust by {TRUSTS[1]} alone, reach {reach:g}": {"trusts": 1, "reach": reach}
        for reach in (0.02, 0.03, 0.04, 0.055, 0.075)
    }
    | {"the default before: polar factors, rho": {"coupling": 1, "trusts": 1, "scale": 1.5, "reach": 0.03}}
)
COUPLED = {"scale": 1.0}
ABLATIONS: Mapping[str, Mapping[str, float]] = {
    **{f"weights: {WEIGHTS[i]}": {"weight": i} for i in (1, 2, 3, 4)},
    **{f"weights: {WEIGHTS[i]}, permuted": {"weight": i, "weight_random": RANDOM} for i in (1, 2, 3, 4)},
    **{f"directions: {COUPLINGS[i]}": {"coupling": i} for i in (1, 2, 3, 4)},
    f"directions: {COUPLINGS[1]}, scale 1.5": {"coupling": 1, "scale": 1.5},
    **{f"directions: {COUPLINGS[i]}, scale 1": {"coupling": i} | COUPLED for i in (2, 3, 4)},
    **{
        f"directions: {COUPLINGS[i]}, permuted, scale 1": {"coupling": i, "coupling_random": RANDOM} | COUPLED
        for i in (3, 4)
    },
    "chain: M, GW, psi, TOS, lambda": {"chain": 0},
    **{
        f"chain, {name} out": {"chain": 0, key: OUT}
        for name, key in (("M", "m"), ("GW", "gw"), ("TOS", "tos"), ("lambda", "lam"))
    },
    **{
        f"chain, {name} permuted": {"chain": 0, key: RANDOM}
        for name, key in (("M", "m"), ("GW", "gw"), ("TOS", "tos"), ("lambda", "lam"))
    },
}
# At the default epsilon plans are nearly uniform (coupling_information.py): the couplings once more where they are not.
SHARP: Mapping[str, Mapping[str, float]] = {
    f"{name}, epsilon {epsilon:g}": {**settings, "epsilon": epsilon}
    for epsilon in (0.005, 0.001)
    for name, settings in {
        f"directions: {COUPLINGS[3]}, scale 1": {"coupling": 3, **COUPLED},
        f"directions: {COUPLINGS[3]}, permuted, scale 1": {"coupling": 3, "coupling_random": RANDOM, **COUPLED},
        f"weights: {WEIGHTS[3]}": {"weight": 3},
        f"weights: {WEIGHTS[3]}, permuted": {"weight": 3, "weight_random": RANDOM},
        "chain: M, GW, psi, TOS, lambda": {"chain": 0},
        "chain, GW permuted": {"chain": 0, "gw": RANDOM},
    }.items()
}
FUSED: Mapping[str, Mapping[str, float]] = {
    f"directions: fused {COUPLINGS[3]}{', permuted' if random else ''}, scale 1, epsilon {epsilon:g}": {
        "coupling": 3,
        "coupling_random": random,
        "fused_penalty": 1.0,
        "epsilon": epsilon,
        **COUPLED,
    }
    for epsilon in (0.05, 0.001)
    for random in (0, RANDOM)
}
VECTORS: Mapping[str, Mapping[str, float]] = {
    "vectors: their median": {"ancestor": 1.0},
    "vectors: their median and .3 of what departs": {"ancestor": 1.0, "departures": 0.3},
    "vectors: their median and all that departs": {"ancestor": 1.0, "departures": 1.0},
}
OUTWARD_SETTINGS: Mapping[str, Mapping[str, float]] = {
    f"by the odds of who moved, strength {strength:g}, level {level:g}, scale {scale:g}": {
        "strength": strength,
        "level": level,
        "scale": scale,
    }
    for strength, level, scale in ((0.25, 0.0, 1.0), (1.0, 0.0, 1.0), (1.0, 0.0, 1.2), (1.0, 2.0, 1.2), (1.0, 2.0, 1.5))
}


def list_cells(half: str, families: Sequence[str], experts: Sequence[int], work: Path) -> Iterator[Cell]:
    """Yield the problems of a half that need no files."""
    chosen, store = HALVES[half], Store(work / "experts")
    if "digits" in families:
        for seed, (width, rate), name, count in itertools.product(chosen.seeds, chosen.digits, REGIMES, experts):
            yield Cell(
                "digits",
                name,
                f"width {width} rate {rate:g}",
                count,
                seed,
                lambda *a, w=width, r=rate, n=name, c=count, s=seed: make_digits(store, Training(w, r), n, s, c),
            )
    if "characters" in families:
        for seed, (width, rate), count in itertools.product(chosen.seeds, chosen.characters, experts):
            yield Cell(
                "characters",
                "rewriting",
                f"width {width} rate {rate:g}",
                count,
                seed,
                lambda w=width, r=rate, c=count, s=seed: character_tasks.make_problem(w, r, s, c),
            )


def list_text(half: str, texts: Path, base: Path, experts: Sequence[int], work: Path) -> Iterator[Cell]:
    """Yield the problems of a half whose experts are fine-tuned from `base` on the rows in `texts`."""
    import text_tasks

    chosen = HALVES[half]
    for seed, (rate, epochs), (name, (_, counts)) in itertools.product(
        chosen.text_seeds, chosen.text, text_tasks.REGIMES.items()
    ):
        for count in (n for n in counts if n in experts):
            yield Cell(
                "text",
                name,
                f"rate {rate:g}, {epochs:g} epochs",
                count,
                seed,
                lambda n=name, t=(rate, epochs), s=seed, c=count: text_tasks.make_text(
                    texts, base, work / "text", n, t, s, c
                ),
            )


def make_digits(store: Store, training: Training, regime: str, seed: int, count: int) -> Problem:
    """Return experts, ancestor and score of one seed, without what data-needing methods take."""
    tasks = choose_tasks(REGIMES[regime], seed, count)
    experts = [train_expert(store, training, REGIMES[regime], task, seed) for task in tasks]
    return Problem(
        [expert.encoder for expert in experts],
        [task.name for task in tasks],
        make_score(training.configure(), tasks, experts, seed),
        seed,
        base=train_ancestor(store, training, REGIMES[regime], seed).encoder,
    )


def measure_rho(trees: Sequence[PyTree]) -> float:
    """Return the mean of |theta_k - mean| / |mean| over the leaves that are matrices."""
    found = []
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        if leaves[0].ndim >= 2:
            stack = np.stack([np.asarray(x, np.float64) for x in leaves])
            mean = stack.mean(0)
            found.append(np.mean([np.linalg.norm(x - mean) for x in stack]) / np.linalg.norm(mean))
    return float(np.mean(found))


def make_rows(half: str, candidates: bool) -> list[tuple[Contender, Mapping[str, Mapping[str, float]]]]:
    """Return contenders with the settings that each is scored at, by name; the test half has the chosen one alone."""
    found = [
        (make_contender(name, grid={}), {name: {}})
        for name in ("average", "tsv_m", "relative_weighted", "rgsp", "relative")
    ]
    if half == "development":
        found.append((make_contender("relative", "reaches", grid={}), REACHES))
    if candidates:
        found += [(make_contender(VARIANT, grid={}), own) for own in ({**CANDIDATES, **ABLATIONS}, SHARP, FUSED)]
        found += [
            (Contender("heads", merge_heads, models=(3, None)), {"heads as matrices of their own": {}}),
            (Contender("vectors", merge_vectors, models=(3, None)), VECTORS),
            (make_contender(OUTWARD, grid={}), OUTWARD_SETTINGS),
        ]
    return found


def score(cell: Cell, rows: Sequence[tuple[Contender, Mapping[str, Any]]], work: Path) -> list[Row]:
    """Return the experts' own accuracy and that of every row; what `work` has is not done again."""
    problem, found, rho = None, [], float("nan")
    wanted = [("individual", None, {"individual": {}}), *((c.name, c, s) for c, s in rows)]
    for name, contender, settings in wanted:
        if contender is not None and not contender.models[0] <= cell.experts <= (contender.models[1] or cell.experts):
            continue
        what = repr(
            (hash_sources(), hash_here(), cell.name, name, sorted((k, sorted(v.items())) for k, v in settings.items()))
        )
        kept = work / "rows" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"
        if not kept.exists():
            problem = problem or cell.make()
            rho = measure_rho(problem.experts) if np.isnan(rho) else rho
            if contender is None:
                accuracies = {name: [float(problem.score(e, "test")[i]) for i, e in enumerate(problem.experts)]}
            else:
                trees = merge_settings(contender, problem, list(settings.values()))
                accuracies = {n: problem.score(tree, "test") for n, tree in zip(settings, trees, strict=True)}
            kept.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                asdict(Row(cell.family, cell.regime, cell.training, cell.experts, cell.seed, rho, n, float(np.mean(a))))
                for n, a in accuracies.items()
            ]
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(lines))
            partial.replace(kept)
        found += [Row(**fields) for fields in json.loads(kept.read_text())]
    return found


def hash_here() -> str:
    """Return a hash of this script's libraries that vision_digits does not know."""
    names = ("relative_variants", "relative_others", "character_tasks")
    return hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)).hexdigest()


def differ(rows: Sequence[Row], method: str, peer: str) -> dict[tuple[Any, ...], float]:
    """Return method minus peer on every problem that both have."""
    ours, theirs = ({r.problem: r.accuracy for r in rows if r.method == name} for name in (method, peer))
    return {problem: ours[problem] - theirs[problem] for problem in ours if problem in theirs}


def estimate_over_seeds(differences: Mapping[tuple[Any, ...], float]) -> Estimate | None:
    """Return the mean difference; its error is over the seeds' means, its least over the problems."""
    if not differences:
        return None
    seeds: dict[Any, list[float]] = {}
    for problem, value in differences.items():
        seeds.setdefault((problem[0], problem[-1]), []).append(value)
    means = estimate([float(np.mean(values)) for values in seeds.values()])
    values = list(differences.values())
    return Estimate(float(np.mean(values)), means.standard_error, len(values), min(values))


def say(found: Estimate | None) -> str:
    """Return a difference with its error, to four digits."""
    if found is None:
        return ""
    return f"{found.mean:+.4f}" + ("" if found.standard_error is None else f" ({found.standard_error:.4f})")


SELECTIONS: Mapping[str, Callable[[Row], bool]] = {
    "K >= 3": lambda r: r.experts >= 3,
    f"K >= 3, rho < {NEAR:g}": lambda r: r.experts >= 3 and r.rho < NEAR,
    f"K >= 3, rho >= {NEAR:g}": lambda r: r.experts >= 3 and r.rho >= NEAR,
    "K = 2": lambda r: r.experts == 2,
}


def tabulate(rows: Sequence[Row]) -> list[str]:
    """Return Markdown: totals over selections of the problems, then accuracies by family, regime, training and K."""
    methods = [m for m in dict.fromkeys(r.method for r in rows) if m != "individual"]
    text = []
    for title, chosen in SELECTIONS.items():
        part = [r for r in rows if chosen(r)]
        count = len({r.problem for r in part})
        if not count:
            continue
        lines = []
        for method in methods:
            over, tsv = (estimate_over_seeds(differ(part, method, peer)) for peer in ("average", "tsv_m"))
            if over is None:
                continue
            values = differ(part, method, "average")
            lost = sum(value < -MARGIN for value in values.values())
            mean = float(np.mean([r.accuracy for r in part if r.method == method]))
            lines.append([method, f"{mean:.4f}", say(over), f"{over.least:+.4f}", lost, say(tsv)])
        head = [
            "method",
            "accuracy",
            "- average",
            "worst",
            f"problems lost by over {MARGIN:g}",
            "- TSV-M with the base",
        ]
        text += ["", f"## {title}: {count} problems", "", table(head, lines)]
    shown = [
        m for m in ("individual", "average", "tsv_m", "relative_weighted", "relative") if m in {r.method for r in rows}
    ]
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.family, row.regime, row.training, row.experts), []).append(row)
    lines = []
    for group, part in groups.items():
        cells = [
            f"{np.mean([r.accuracy for r in part if r.method == m]):.3f}" if any(r.method == m for r in part) else ""
            for m in shown
        ]
        over, tsv = (estimate_over_seeds(differ(part, "relative", peer)) for peer in ("average", "tsv_m"))
        lines.append([*group, f"{part[0].rho:.3f}", *cells, say(over), say(tsv)])
    head = ["family", "tasks", "training", "K", "rho", *shown, "relative - average", "relative - TSV-M"]
    return [*text, "", "## By problem, mean over seeds", "", table(head, lines)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot the gain over the average of `relative` and of TSV-M with the base against rho, a point per problem."""
    figure = make_figure(9, 4.2)
    families = [f for f in FAMILIES if any(r.family == f for r in rows)]
    rho = {r.problem: r.rho for r in rows}
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, (method, title) in zip(axes, (("relative", "relative"), ("tsv_m", "TSV-M, given the base")), strict=True):
        for family, colour in zip(families, ("tab:blue", "tab:orange", "tab:green"), strict=False):
            found = {p: d for p, d in differ(rows, method, "average").items() if p[0] == family and p[3] >= 3}
            ax.scatter([rho[p] for p in found], list(found.values()), s=14, color=colour, label=family, alpha=0.7)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=title, xlabel="rho, how far the experts are apart")
        ax.locator_params(axis="x", nbins=6)
        ax.grid(linewidth=0.3)
    axes[0].set_ylabel("accuracy minus the average's, K >= 3")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def find_headline(rows: Sequence[Row]) -> str:
    """Return the result in a sentence."""
    part = [r for r in rows if r.experts >= 3]
    over, tsv = (estimate_over_seeds(differ(part, "relative", peer)) for peer in ("average", "tsv_m"))
    assert over is not None
    return (
        f"relative over the average, K >= 3, {over.repetitions} problems: {say(over)}, worst {over.least:+.4f}; "
        f"over TSV-M with the base: {say(tsv)}."
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=sorted(HALVES), required=True)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["digits", "characters"])
    parser.add_argument("--experts", nargs="+", type=int, default=list(EXPERTS), help="default: 2 3 4 6 8")
    parser.add_argument("--candidates", action="store_true", help="score every candidate and ablation too")
    parser.add_argument("--texts", type=Path, help="rows of the text tasks: a folder for each")
    parser.add_argument("--base", type=Path, help="the encoder that text experts are fine-tuned from")
    parser.add_argument("--work", type=Path, help="keep experts, rows and compiled code here, and use them")
    parser.add_argument("--out", type=Path, help="default: experiments/results/relative_HALF")
    options = parser.parse_args(arguments)
    if "text" in options.families and not (options.texts and options.base):
        parser.error("--families text needs --texts and --base")
    options.out = options.out or RESULTS / f"relative_{options.half}"
    return options


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and return its rows."""
    options = parse_arguments(arguments)
    contenders = make_rows(options.half, options.candidates)
    rows: list[Row] = []
    with open_work(options.work) as work:
        cells = list(list_cells(options.half, options.families, options.experts, work))
        if "text" in options.families:
            cells += list_text(options.half, options.texts, options.base, options.experts, work)
        for number, cell in enumerate(cells):
            started = time.monotonic()
            found = score(cell, contenders, work)
            rows += found
            shown = "  ".join(
                f"{r.method} {r.accuracy:.3f}" for r in found if r.method in ("average", "tsv_m", "relative")
            )
            print(f"{number + 1}/{len(cells)} {cell.name}: {shown}  ({time.monotonic() - started:.0f} s)", flush=True)
    settings = {"half": options.half, "families": options.families, "experts": options.experts}
    command = describe_command("relative_suite", settings) + (" --candidates" if options.candidates else "")
    if "text" in options.families:
        command += " --texts BENCH --base BASE"
    record = {
        "settings": settings,
        "candidates": CANDIDATES | ABLATIONS | SHARP | FUSED if options.candidates else {},
        "rows": [asdict(r) for r in rows],
    }
    write_results(options.out, command, find_headline(rows), record, tabulate(rows))
    draw(rows, options.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main()
