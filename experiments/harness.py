"""Score any merge method by name: untuned and tuned on validation rows, per task, beside the experts' own accuracy.

A library of the other scripts here. `run(problem, contenders)` gives a `Outcome` for every method that takes the
problem's models; `tabulate` and `draw` make the table and the picture of many of them (many seeds, several groups).

- Untuned is the method at its defaults (its paper's). Tuned is the best mean accuracy on the validation rows among its
  defaults and the product of its row in GRIDS; at equal accuracy the earlier one wins, the defaults first. Test rows
  are scored for those two settings and no others.
- Normalised accuracy is merged / individual on the test rows, task by task, then averaged over the tasks.
- Differences are paired by seed: against the average, and against TSV-M with the base in the same column.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from compilations import drop_compilations
from contenders import GRIDS, Contender, Problem, make_contender, make_contenders, merge_settings
from tables import Estimate, compare, estimate, make_figure, table

__all__ = ["Contender", "Outcome", "Problem", "make_contender", "make_contenders", "run", "summarise", "tabulate"]

Column = Literal["untuned", "tuned"]
COLUMNS: tuple[Column, Column] = ("untuned", "tuned")
INDIVIDUAL, ZERO_SHOT = "individual", "zero-shot base"
COLOURS = {"": "tab:blue", "base": "tab:orange", "data": "tab:green", "labelled data": "tab:red"}
LEGEND = (
    "Mean (standard error over seeds). Untuned: the method's defaults. Tuned: the best of its grid on validation rows, "
    "reported on test rows. `needs` is what a method asks for beside the models. `-average` and `-TSV-M` are paired "
    "differences by seed in the same column, `worst` the smallest of the former; normalised accuracy is merged / "
    "individual, averaged over tasks; `tuned by` is what was chosen for most seeds."
)
HEAD = ("method", "needs", *(f"{c}{x}" for c in ("", "tuned ") for x in ("accuracy", "-average", "worst", "-TSV-M")))
HEAD += ("tuned by",)


@dataclass(frozen=True)
class Outcome:
    """One method on one problem, in one column."""

    group: Mapping[str, Any]
    seed: int
    method: str
    kind: str
    column: Column
    setting: dict[str, Any]
    """Hyperparameters that differ from the method's defaults."""
    validation: dict[str, float] | None
    """By task; None where it was not asked for."""
    test: dict[str, float]
    normalised: float
    """Mean over the tasks of test accuracy / the expert's own."""

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.test.values())))


def pick(validation: Sequence[Sequence[float]]) -> int:
    """Return which setting has the best mean validation accuracy, the first of equals; what is not finite is worst."""
    means = np.mean(np.asarray(validation, np.float64), axis=1)
    return int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))


def run(problem: Problem, contenders: Sequence[Contender]) -> list[Outcome]:
    """Return both columns of every contender that fits, after the experts themselves and, if there is one, the base."""
    own = [float(problem.score(expert, "test")[i]) for i, expert in enumerate(problem.experts)]

    def report(name: str, kind: str, column: Column, setting: Mapping[str, Any], test: Any, seen: Any) -> Outcome:
        accuracies, validation = (None if x is None else name_tasks(problem, x) for x in (test, seen))
        assert accuracies is not None
        ratios = [a / o if o > 0 else float("nan") for a, o in zip(accuracies.values(), own, strict=True)]
        normalised = float(np.mean(ratios))
        return Outcome(
            problem.group, problem.seed, name, kind, column, dict(setting), validation, accuracies, normalised
        )

    outcomes = [report(INDIVIDUAL, "", "untuned", {}, own, None)]
    if problem.base is not None:
        outcomes.append(report(ZERO_SHOT, "base", "untuned", {}, problem.score(problem.base, "test"), None))
    for contender in contenders:
        if not contender.fits(problem):
            continue
        settings = contender.settings
        trees = list(merge_settings(contender, problem, settings))
        validation = [problem.score(tree, "validation") for tree in trees]
        best = pick(validation)
        tests = {i: problem.score(trees[i], "test") for i in sorted({0, best})}
        for column, i in ((COLUMNS[0], 0), (COLUMNS[1], best)):
            outcomes.append(report(contender.name, contender.kind, column, settings[i], tests[i], validation[i]))
        drop_compilations()
    return outcomes


def name_tasks(problem: Problem, accuracies: Sequence[float]) -> dict[str, float]:
    """Return accuracies by task."""
    return {task: float(accuracy) for task, accuracy in zip(problem.tasks, accuracies, strict=True)}


@dataclass(frozen=True)
class Summary:
    """One method in one column, over the seeds of one group."""

    group: Mapping[str, Any]
    method: str
    kind: str
    column: Column
    normalised: Estimate
    accuracy: Estimate
    """Mean over the tasks."""
    over_average: Estimate | None
    """Accuracy minus that of the average, paired by seed; its `least` is the worst case."""
    over_tsv_m: Estimate | None
    """The same against TSV-M with the base, in the same column."""
    settings: tuple[str, ...]
    """What was set, most frequent first."""


def summarise(outcomes: Sequence[Outcome]) -> list[Summary]:
    """Return a summary of every group, method and column, in the order in which they first come."""
    cells: dict[Any, dict[int, Outcome]] = {}
    for outcome in outcomes:
        cell = cells.setdefault((name_group(outcome.group), outcome.method, outcome.column), {})
        if outcome.seed in cell:
            raise ValueError(f"{outcome.method} comes twice in {name_group(outcome.group)}, seed {outcome.seed}")
        cell[outcome.seed] = outcome
    summaries = []
    for (group, method, column), cell in cells.items():
        first = next(iter(cell.values()))
        accuracies = {seed: outcome.mean for seed, outcome in cell.items()}
        peers = [
            {seed: outcome.mean for seed, outcome in cells.get((group, peer, column), {}).items()}
            for peer in ("average", "tsv_m")
        ]
        texts = [describe_setting(outcome.setting) for outcome in cell.values()]
        summaries.append(
            Summary(
                group=first.group,
                method=method,
                kind=first.kind,
                column=column,
                normalised=estimate([outcome.normalised for outcome in cell.values()]),
                accuracy=estimate(list(accuracies.values())),
                over_average=compare(accuracies, peers[0]),
                over_tsv_m=compare(accuracies, peers[1]),
                settings=tuple(text for text, _ in Counter(texts).most_common()),
            )
        )
    return summaries


def name_group(group: Mapping[str, Any]) -> str:
    """Return a group as a heading."""
    return ", ".join(f"{name} {value}" for name, value in group.items())


def describe_setting(setting: Mapping[str, Any]) -> str:
    """Return hyperparameters as text; nothing set is the defaults."""
    return " ".join(f"{name}={value}" for name, value in setting.items()) or "defaults"


def tabulate(outcomes: Sequence[Outcome]) -> list[str]:
    """Return Markdown: one table of normalised accuracies, then one per group with differences and settings."""
    summaries = summarise(outcomes)
    found = {(name_group(s.group), s.method, s.column): s for s in summaries}
    groups = list(dict.fromkeys(name_group(s.group) for s in summaries))
    kinds = {s.method: s.kind for s in summaries}
    text = [LEGEND, "", "Normalised accuracy, untuned / tuned:", ""]
    lines = []
    for method, kind in kinds.items():
        cells = [
            " / ".join(str(s.normalised) for column in COLUMNS if (s := found.get((group, method, column))) is not None)
            for group in groups
        ]
        lines.append([method, kind, *cells])
    text.append(table(["method", "needs", *groups], lines))
    for group in groups:
        text += ["", f"## {group}", "", table(HEAD, list(list_details(found, group, kinds)))]
    return text


def list_details(
    found: Mapping[tuple[str, str, Column], Summary], group: str, kinds: Mapping[str, str]
) -> Iterator[list[str]]:
    """Yield the lines of one group's table."""
    for method, kind in kinds.items():
        cells = [method, kind]
        for column in COLUMNS:
            summary = found.get((group, method, column))
            if summary is None:
                cells += [""] * 4
                continue
            over, tsv = summary.over_average, summary.over_tsv_m
            cells += [str(summary.accuracy), "" if over is None else over.signed]
            cells += ["" if over is None else f"{over.least:+.3f}", "" if tsv is None else tsv.signed]
        tuned = found.get((group, method, "tuned"))
        if (group, method, "untuned") in found:
            yield [*cells, tuned.settings[0] if tuned else ""]


def find_headline(outcomes: Sequence[Outcome]) -> str:
    """Return one sentence: mean accuracies, untuned, over all groups and seeds, of the methods that fit every one."""
    untuned = [o for o in outcomes if o.column == "untuned"]
    problems = {(name_group(o.group), o.seed) for o in untuned}
    scores: dict[str, list[float]] = {}
    for outcome in untuned:
        scores.setdefault(outcome.method, []).append(outcome.mean)
    means = {name: float(np.mean(values)) for name, values in scores.items() if len(values) == len(problems)}
    kinds = {o.method: o.kind for o in untuned}
    parts = [f"{name} {means[name]:.3f}" for name in (INDIVIDUAL, "average", "relative", "tsv_m") if name in means]
    merged = {name: mean for name, mean in means.items() if name not in (INDIVIDUAL, ZERO_SHOT)}
    for kind in dict.fromkeys(kinds[name] for name in merged):
        best = max((name for name in merged if kinds[name] == kind), key=lambda name: merged[name])
        parts.append(f"best {f'with {kind}' if kind else 'of the models alone'}: {best} {merged[best]:.3f}")
    return f"Mean accuracy of {len(problems)} merges, untuned: {', '.join(parts)}."


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the accuracies of every group: untuned hollow, tuned filled, bars of one standard error."""
    summaries = summarise(outcomes)
    groups = list(dict.fromkeys(name_group(s.group) for s in summaries))
    names = list(dict.fromkeys(s.method for s in summaries))[::-1]
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = make_figure(4.2 * columns + 1, (0.22 * len(names) + 1) * rows)
    panels = np.ravel(figure.subplots(rows, columns, sharey=True, squeeze=False))
    for axes, group in itertools.zip_longest(panels, groups):
        if group is None:
            axes.set_visible(False)
            continue
        here = [s for s in summaries if name_group(s.group) == group]
        for s in here:
            offset, fill = (0.15, "none") if s.column == "untuned" else (-0.15, COLOURS[s.kind])
            axes.errorbar(
                s.accuracy.mean,
                names.index(s.method) + offset,
                xerr=s.accuracy.standard_error,
                fmt="o",
                color=COLOURS[s.kind],
                markerfacecolor=fill,
                markersize=4,
            )
        for s in here:
            if s.method == "average" and s.column == "untuned":
                axes.axvline(s.accuracy.mean, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=group, xlabel="test accuracy, mean over tasks")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(axis="y", linewidth=0.3)
    for kind, colour in COLOURS.items():
        figure.axes[0].plot([], [], "o", color=colour, label=kind or "nothing but the models", markersize=4)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(COLOURS),
        fontsize=8,
        title="needs; hollow untuned, filled tuned; dotted line: the average",
        title_fontsize=8,
    )
    figure.savefig(path, dpi=100)


def to_record(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything as plain data: the grids, every outcome, and the summaries."""
    rows = [asdict(outcome) | {"mean": outcome.mean} for outcome in outcomes]
    return {"grids": GRIDS, "outcomes": rows, "summaries": [as_data(s) for s in summarise(outcomes)]}


def as_data(summary: Summary) -> dict[str, Any]:
    """Return a summary with its estimates as mappings."""
    fields = {name: getattr(summary, name) for name in summary.__dataclass_fields__}
    return {name: x._asdict() if isinstance(x, Estimate) else x for name, x in fields.items()}
