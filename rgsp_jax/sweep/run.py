"""`run_sweep`: every point merged, scored and forgotten, or kept."""

import json
import math
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from rgsp_jax.errors import NotFiniteError, RefusedError
from rgsp_jax.pipeline import merge_checkpoints, prepare
from rgsp_jax.pipeline.merge import MergeResult, lock, name_workshop
from rgsp_jax.pipeline.placement import choose_devices
from rgsp_jax.registry import methods
from rgsp_jax.sweep.checkpoints import SharedStages
from rgsp_jax.sweep.grid import Point, SweepConfig
from rgsp_jax.sweep.merging import gather, sweep_merge
from rgsp_jax.sweep.page import write_page
from rgsp_jax.sweep.results import (
    Direction,
    Metrics,
    Result,
    append_result,
    check_stamp,
    read_results,
    rewrite_results,
    write_tables,
)
from rgsp_jax.sweep.staging import Ranks, largest_ranks

PyTree = Any
Evaluate = Callable[[Any], "float | Metrics"]
"""`evaluate(model)`, a directory or a tree, to one score or several by name."""
OnResult = Callable[[Result, int], None]
"""`on_result(point just scored, points in all)`."""
MODELS, SCORE = "models", "score"
"""Folder of the merges; name of a score that has none."""


def run_sweep(
    config: SweepConfig,
    out: Path | str,
    evaluate: Evaluate,
    *,
    trees: Sequence[PyTree] | None = None,
    beside: Mapping[str, Any] | None = None,
    directions: Mapping[str, Direction] | None = None,
    keep: bool = False,
    stamp: Mapping[str, Any] | None = None,
    on_result: OnResult | None = None,
    devices: int | None = None,
) -> list[Result]:
    """Merge and score every point of a config; decompositions are computed once for all of them.

    Results go into `out/results.jsonl` as they come, and a run that finds some there goes on behind them; at the end
    `results.csv`, `results.parquet` (with pyarrow) and `sweep.html` are made of them.

    Args:
        config: what is merged, and where.
        out: directory for results; made if it is not there.
        evaluate: called with the directory of every merge, which is removed again; or with the merged tree.
        trees: models in place of the config's checkpoints, which are then names only; no checkpoint is written.
        beside: with trees, other arguments of `sweep_merge`: `base`, `inputs`, `key`, `layout`, `model_type`,
            `mesh`.
        directions: metric -> "maximise" (as all that are not named) or "minimise".
        keep: leave the merges in `out/models`, each with its report.
        stamp: what else tells this sweep from others, as the command that scores.
        on_result: called after each.
        devices: of this process that share the work on checkpoints; None is all its accelerators, or one CPU device.
            Matrices that are read together are dealt out among them, and what is left of them solves the points that
            come next: as many over each as leaves the busiest the least (`sweep.mesh.split_devices`).

    Returns:
        The results in the config's order.

    A point whose merge holds an infinity or a NaN is a result with a `problem` and no score.

    Raises:
        RefusedError: what the user can mend, all of it at once, before anything is merged; another sweep's results in
            `out`; a full disk. What `evaluate` raises passes through; what was scored before is kept.
    """
    out, directions, chosen = Path(out), directions or {}, choose_devices(devices)
    points = config.plan_points() if not (problems := config.problems()) else []
    problems += [] if trees is not None or problems else find_problems(config, points)
    if problems:
        raise RefusedError(problems)
    check_stamp(out, {"config": config.to_yaml(), "kind": "grid", **(stamp or {})})
    with lock(out):
        done = {r.point: r for r in read_results(out) if r.point < len(points)}
        rewrite_results(out, done.values())
        pending = order_points([p for p in points if p.index not in done])
        if trees is not None:
            scored = score_trees(trees, config, pending, evaluate, beside or {})
        else:
            scored = score_checkpoints(config, pending, largest_ranks(points), evaluate, out, chosen, keep=keep)
        for result in scored:
            append_result(out, result)
            done[result.point] = result
            if on_result:
                on_result(result, len(points))
        if not keep:
            shutil.rmtree(out / MODELS, ignore_errors=True)  # what a run that was killed left
        results = [done[p.index] for p in points]
        write_tables(results, out)
        write_page(results, out, config, directions)
    return results


def find_problems(config: SweepConfig, points: Sequence[Point]) -> list[str]:
    """What stands against the merges of some points, from the models' headers."""
    problems: list[str] = []
    alike = gather(range(len(points)), lambda i: (points[i].method, points[i].hyperparameters.get("rank")))
    for members in alike:
        point = points[members[0]]
        try:
            with prepare(config.merge_config(point.method, point.hyperparameters)):
                pass
        except RefusedError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))


def order_points(points: Sequence[Point]) -> list[Point]:
    """The points so that those that share decompositions, and then solutions, follow each other."""

    def shared(point: Point, *stages: str) -> str:
        found = methods[point.method].stages
        taken = set().union(*(found.arguments(s) for s in stages)) if found else set()  # type: ignore[arg-type]
        return json.dumps([point.method, {n: v for n, v in sorted(point.hyperparameters.items()) if n in taken}])

    ordered: list[int] = []
    for members in gather(range(len(points)), lambda i: points[i].method):
        for group in gather(members, lambda i: shared(points[i], "prepare", "solve")):
            ordered += group
    return [points[i] for i in ordered]


def score_trees(
    trees: Sequence[PyTree], config: SweepConfig, points: Sequence[Point], evaluate: Evaluate, beside: Mapping[str, Any]
) -> Iterator[Result]:
    """Merge trees in memory and score each."""
    if not points:
        return
    started = time.monotonic()
    for point, tree in sweep_merge(trees, points, memory=config.memory, **beside):
        merged = time.monotonic()
        metrics = name_metrics(evaluate(tree))
        scored = time.monotonic()
        yield Result(point.index, point.method, point.hyperparameters, metrics, merged - started, scored - merged)
        started = time.monotonic()


def score_checkpoints(
    config: SweepConfig,
    points: Sequence[Point],
    ranks: Ranks,
    evaluate: Evaluate,
    out: Path,
    devices: Sequence[jax.Device],
    *,
    keep: bool,
) -> Iterator[Result]:
    """Merge checkpoints one by one and score each."""
    with sharing(ranks, out, config.memory, devices) as stages:
        for number, point in enumerate(points):
            stages.expect(points[number:])
            yield score_point(config, point, evaluate, out, stages, keep=keep)


@contextmanager
def sharing(ranks: Ranks, out: Path, memory: int, devices: Sequence[jax.Device]) -> Iterator[SharedStages]:
    """Stages to compute merges by, given back at the end."""
    stages = SharedStages(ranks, out, memory, devices)
    try:
        yield stages
    finally:
        stages.close()


def score_point(
    config: SweepConfig, point: Point, evaluate: Evaluate, out: Path, stages: SharedStages, *, keep: bool
) -> Result:
    """Merge one point into a checkpoint, score it, and remove it again."""
    model = out / MODELS / f"point-{point.index:05d}"
    model.parent.mkdir(parents=True, exist_ok=True)
    for left in (model, name_workshop(model)):
        shutil.rmtree(left, ignore_errors=True)
    started = time.monotonic()
    try:
        merged = merge_one(config, point, model, stages, keep=keep)
    except NotFiniteError as error:  # at this point alone; everything else is the user's to mend
        return Result(point.index, point.method, point.hyperparameters, problem="; ".join(error.problems))
    done = time.monotonic()
    try:
        metrics = name_metrics(evaluate(model))
    finally:
        if not keep:
            shutil.rmtree(model, ignore_errors=True)
    scored = time.monotonic()
    return Result(
        point.index, point.method, point.hyperparameters, metrics, done - started, scored - done, merged.flag_counts
    )


def merge_one(config: SweepConfig, point: Point, model: Path, stages: SharedStages, *, keep: bool) -> MergeResult:
    """The merge of one point; only one that is kept is described."""
    merge_config = config.merge_config(point.method, point.hyperparameters)
    return merge_checkpoints(merge_config, model, compute=stages.compute, overview=keep)


def name_metrics(found: "float | Metrics") -> dict[str, float | None]:
    """Scores by name; those that are not finite are None."""
    named = found if isinstance(found, Mapping) else {SCORE: found}
    return {str(name): float(x) if math.isfinite(float(x)) else None for name, x in named.items()}


def score_by_command(command: str, metrics: Sequence[str] = ()) -> Evaluate:
    """Scores that a shell command prints for a directory, which takes the place of `{model}` in it.

    Args:
        command: the last line it prints is a number, several numbers, or a JSON object of named numbers.
        metrics: names of the numbers, or of what is taken of the object.
    """
    if "{model}" not in command:
        raise RefusedError(f"--score {command!r} has no {{model}}, the place of the directory to score")

    def evaluate(model: Any) -> Metrics:
        done = subprocess.run(
            command.replace("{model}", shlex.quote(str(model))), shell=True, capture_output=True, text=True
        )
        if done.returncode:
            tail = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise RefusedError(f"--score failed with exit code {done.returncode} on {model}: {tail}")
        line = (done.stdout.strip().splitlines() or [""])[-1]
        found = read_scores(line, metrics)
        if found is None:
            wanted = (
                f"{len(metrics)} number{'s'[: len(metrics) > 1]} ({', '.join(metrics)})" if metrics else "one number"
            )
            raise RefusedError(
                f"--score printed {line!r} for {model}; the last line must be {wanted}, or a JSON object of named"
                " numbers; --metrics names several"
            )
        return found

    return evaluate


def read_scores(line: str, metrics: Sequence[str]) -> dict[str, float] | None:
    """Scores by name from a line of output, None where it holds none."""
    try:
        if not line.startswith("{"):
            numbers = [float(part) for part in line.replace(",", " ").split()]
            return dict(zip(metrics or (SCORE,), numbers, strict=True))
        found = json.loads(line)
        named = {name: found[name] for name in metrics} if metrics else found
        wrong = any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in named.values())
        return None if wrong or not named else {name: float(x) for name, x in named.items()}
    except (ValueError, KeyError, TypeError):
        return None
