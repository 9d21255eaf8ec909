"""Fusion weights learned from a few unlabelled inputs of every task, beside merges that need none and RegMean.

    python experiments/learned_fusion.py --bench BENCH --tasks trec subj mr --pair trec subj

Hardware: 2 CPU cores, 6 GB. Runtime: one to two minutes for every draw, group and loss. `pip install .[experiments]`
brings the tokenisers.

`BENCH/<task>/` is as `text_encoders.py` describes it, with `train.jsonl` beside. A draw takes `--inputs` rows of every
task's train.jsonl at random: RegMean has the covariances of these inputs, `rgsp learn` learns the coefficients of
`relative` by `--losses`, and the models' weights in every layer of RegMean by `--regmean`; only the loss cross-entropy
sees labels. `--shares` refits layer by layer on what the refitted layers before feed it (`rgsp graft` with everybody's
inputs, the first task's model the recipient): distillation in closed form. Every merge is scored on the first `--rows`
test rows with each task's own head. Differences are paired by draw; merges without data do not depend on it; learning
starts at `relative`. A run that was broken off goes on with `--resume`.

Expected from TREC, SUBJ and MR, distillation, five draws: average .8400, RegMean .8399, relative .8743, learned
.8782 (over relative +.004, standard error .004). Other losses, two draws (`learned_fusion_losses` in
experiments/results): cross-entropy .876, features .844, entropy .743.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tables import RESULTS, compare, describe_command, estimate, table, write_results
from text_encoders import Scorer, Task, encode_with_flax, read_task, working_directory

from rgsp_jax.activations import CovarianceSettings, collect_covariances
from rgsp_jax.activations.sequential import collect_sequentially
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints
from rgsp_jax.training import OBJECTIVES, LearnSettings, run_learning

MAXIMUM_LENGTH = 48
LOSSES = ("distillation", "features", "distillation+features", "entropy", "weighted-entropy", "cross-entropy")


@dataclass(frozen=True)
class Row:
    """One merge, scored."""

    group: tuple[str, ...]
    method: str
    draw: int | None
    """None where the merge needs no data."""
    accuracies: dict[str, float]
    seconds: float
    """Of the merge with everything it needs, covariances and learning included."""

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.accuracies.values())))


Key = tuple[tuple[str, ...], str, int | None]
"""Group, method and draw of a row."""
Entry = tuple[str, int | None, Callable[[], Path]]
"""Method, draw, and what makes the merge."""


def draw_inputs(bench: Path, task: str, count: int, draw: int, out: Path) -> Path:
    """Write `count` random training rows of a task."""
    lines = (bench / task / "train.jsonl").read_text().splitlines()
    chosen = np.random.default_rng([draw, sum(map(ord, task))]).choice(len(lines), count, replace=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{task}.jsonl"
    path.write_text("".join(f"{lines[i]}\n" for i in chosen))
    return path


def collect(models: Sequence[str], data: Sequence[Path], work: Path) -> tuple[str, ...]:
    """Covariances of these inputs, collected where they are not there yet."""
    paths = [work / f"{path.stem}.covariances.safetensors" for path in data]
    settings = CovarianceSettings(held_back=0, backend="flax")
    for model, path, file in zip(models, data, paths, strict=True):
        if not file.exists():
            collect_covariances(model, path, file, settings)
    return tuple(map(str, paths))


def merge(models: Sequence[str], method: str, out: Path, covariances: tuple[str, ...] = ()) -> Path:
    """Merge with a method as it is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    merge_checkpoints(MergeConfig(models=tuple(models), method=method, covariances=covariances), out)
    return out


def refit(models: Sequence[str], data: Sequence[Path], share: float, out: Path) -> Path:
    """`rgsp graft` of all the others onto the first, with the inputs of each."""
    files = [out.with_name(f"{out.name}.{path.stem}.covariances.safetensors") for path in data]
    settings = CovarianceSettings(max_length=MAXIMUM_LENGTH, held_back=0)
    own, *others = map(str, data)
    collect_sequentially(models[0], models[1:], own, files, settings, share=share, others=others)
    config = MergeConfig(
        models=tuple(models),
        method="sequential_graft",
        hyperparameters={"share": share},
        covariances=tuple(map(str, files)),
    )
    merge_checkpoints(config, out)
    return out


def learn(
    config: MergeConfig, tasks: Sequence[Task], data: Sequence[Path], loss: str, out: Path, settings: Any
) -> Path:
    """`rgsp learn` with one loss."""
    run_learning(
        config,
        LearnSettings(
            data=tuple(map(str, data)),
            heads=tuple(str(task.model.parent / "head.safetensors") for task in tasks),
            loss=loss,
            label_field="label" if loss == "cross-entropy" else None,
            max_length=MAXIMUM_LENGTH,
            per=settings.per if config.method is None else "layer",
            learn=tuple(settings.learn) if config.method is None else ("coefficients", "tensors"),
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            pull=settings.pull,
        ),
        out,
    )
    return out


def merge_regmean(models: Sequence[str], data: Sequence[Path], place: Path) -> Path:
    """RegMean with the covariances of these inputs."""
    return merge(models, "regmean", place / "regmean", collect(models, data, place))


def learn_regmean(
    models: Sequence[str], tasks: Sequence[Task], data: Sequence[Path], loss: str, place: Path, settings: Any
) -> Path:
    """RegMean with the models' weights learned from these inputs."""
    config = MergeConfig(models=tuple(models), method="regmean", covariances=collect(models, data, place))
    return learn(config, tasks, data, loss, place / f"regmean-{loss}", settings)


def list_merges(tasks: Sequence[Task], options: argparse.Namespace, work: Path) -> Iterator[Entry]:
    """Yield every merge of one group of tasks: its name, its draw, and what makes it."""
    models = [str(task.model) for task in tasks]
    config = MergeConfig(models=tuple(models))
    for method in ("average", "relative"):
        yield method, None, partial(merge, models, method, work / method)
    for draw in range(options.draws):
        place = work / f"draw-{draw}"
        data = [draw_inputs(options.bench, task.name, options.inputs, draw, place) for task in tasks]
        yield "RegMean", draw, partial(merge_regmean, models, data, place)
        for share in options.shares:
            yield f"refitted, share {share:g}", draw, partial(refit, models, data, share, place / f"refitted-{share}")
        for loss in options.losses:
            yield f"learned, {loss}", draw, partial(learn, config, tasks, data, loss, place / loss, options)
        for loss in options.regmean:
            made = partial(learn_regmean, models, tasks, data, loss, place, options)
            yield f"RegMean learned, {loss}", draw, made


def run_group(
    group: Sequence[str], options: argparse.Namespace, scorer: Scorer, work: Path, known: Mapping[Key, Row]
) -> Iterator[Row]:
    """Yield every expert and every merge of one group of tasks, scored; those that are `known` are not made again."""
    names = tuple(group)
    tasks = [scorer.tasks[name] for name in names]
    for task in tasks:
        key = names, f"expert of {task.name}", None
        yield known.get(key) or Row(*key, scorer.score(task.model, names), 0.0)
    for method, draw, make in list_merges(tasks, options, work / "+".join(names)):
        if (row := known.get((names, method, draw))) is None:
            started = time.monotonic()
            out = make()
            row = Row(names, method, draw, scorer.score(out, names), time.monotonic() - started)
        yield row


def read_known(out: Path, settings: Mapping[str, Any]) -> dict[Key, Row]:
    """Return the rows of a run with these settings that was broken off."""
    path = out.with_suffix(".json")
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("settings") != settings:
        return {}
    fields = ("method", "draw", "accuracies", "seconds")
    rows = [Row(tuple(row["group"]), *(row[name] for name in fields)) for row in record["rows"]]
    return {(row.group, row.method, row.draw): row for row in rows}


def tabulate(rows: Sequence[Row]) -> list[str]:
    """Return a table for every group: accuracies over the draws, paired differences, seconds."""
    text = []
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        by_method: dict[str, list[Row]] = {}
        for row in own:
            by_method.setdefault(row.method, []).append(row)
        draws = sorted({row.draw for row in own if row.draw is not None})

        def means(method: str, by_method: Mapping[str, list[Row]] = by_method, draws: Sequence[int] = draws) -> dict:
            found = by_method[method]
            return dict.fromkeys(draws, found[0].mean) if found[0].draw is None else {r.draw: r.mean for r in found}

        lines = []
        for method, found in by_method.items():
            cells = [str(estimate([row.accuracies[name] for row in found])) for name in group]
            differences = []
            for peer in ("relative", "RegMean"):
                gain = compare(means(method), means(peer)) if method != peer and draws else None
                shown = gain is not None and not method.startswith("expert")
                differences += [f"{gain.signed}" if shown else "", f"{gain.least:+.3f}" if shown else ""]
            seconds = f"{np.median([row.seconds for row in found]):.0f}" if found[0].seconds else ""
            lines.append([method, *cells, f"{np.mean([row.mean for row in found]):.4f}", *differences, seconds])
        head = ["merge", *group, "mean", "-relative", "worst", "-RegMean", "worst", "seconds"]
        text += ["", f"## {', '.join(group)}", "", table(head, lines)]
    return text


def find_headline(rows: Sequence[Row]) -> str:
    """Return one sentence: mean accuracies of every group."""
    parts = []
    for group in dict.fromkeys(row.group for row in rows):
        means: dict[str, list[float]] = {}
        for row in rows:
            if row.group == group and not row.method.startswith("expert"):
                means.setdefault(row.method, []).append(row.mean)
        parts.append(f"{'+'.join(group)}: " + ", ".join(f"{name} {np.mean(x):.4f}" for name, x in means.items()))
    return f"Mean test accuracy: {'; '.join(parts)}."


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="directory of task directories")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--pair", nargs=2, help="two of the tasks, merged by themselves as well")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--inputs", type=int, default=64, help="of every task (default: 64)")
    parser.add_argument("--losses", nargs="*", choices=list(OBJECTIVES), default=list(LOSSES))
    parser.add_argument("--regmean", nargs="*", choices=list(OBJECTIVES), default=["distillation"])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.25, 0.5], help="of grafts (default: 0.25 0.5)")
    parser.add_argument("--rows", type=int, default=600, help="test rows of each task (default: 600)")
    parser.add_argument("--per", default="direction")
    parser.add_argument("--learn", nargs="+", default=["directions"], help="of `relative` (default: directions)")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--pull", type=float, default=0.0)
    parser.add_argument("--work", type=Path, help="keep all merges there")
    parser.add_argument("--out", type=Path, default=RESULTS / "learned_fusion")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds of a run with these settings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and return its rows."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: spinning threads slow the sums
    options = parse_arguments(arguments)
    tasks = [read_task(options.bench / name, options.rows) for name in options.tasks]
    scorer = Scorer(tasks, encode_with_flax)
    groups = [tuple(options.tasks), *([tuple(options.pair)] if options.pair else [])]
    settings = {"tasks": options.tasks} | ({"pair": options.pair} if options.pair else {})
    settings |= {
        name: getattr(options, name)
        for name in ("draws", "inputs", "losses", "regmean", "shares", "rows", "per", "learn", "steps")
    }
    settings |= {"learning_rate": options.learning_rate, "pull": options.pull}
    command = describe_command("learned_fusion", {"bench": "BENCH", **settings})
    known = read_known(options.out, settings) if options.resume else {}
    rows: list[Row] = []
    with working_directory(options.work) as work:
        # Every draw compiles the same steps, which takes as long as to run them.
        if jax.config.values["jax_compilation_cache_dir"] is None:
            jax.config.update("jax_compilation_cache_dir", str(work.absolute() / "compiled"))
        for group in groups:
            for row in run_group(group, options, scorer, work, known):
                rows.append(row)
                shown = "  ".join(f"{name} {x:.4f}" for name, x in row.accuracies.items())
                where = "" if row.draw is None else f"draw {row.draw}: "
                print(
                    f"{'+'.join(group)}  {where}{row.method}  {shown}  mean {row.mean:.4f}  {row.seconds:.0f} s",
                    flush=True,
                )
                record = {"settings": settings, "rows": [row.__dict__ | {"mean": row.mean} for row in rows]}
                note = (
                    f"Mean (standard error) over {options.draws} draws of {options.inputs} inputs per task; accuracy "
                    f"on {options.rows} test rows at most. Differences are paired by draw, `worst` the smallest. "
                    "Seconds: median, everything included, on the machine it ran on."
                )
                write_results(options.out, command, find_headline(rows), record, [note, *tabulate(rows)])
    return rows


if __name__ == "__main__":
    print(json.dumps(find_headline(main())))
