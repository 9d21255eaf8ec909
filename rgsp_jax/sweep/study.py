"""Studies: a sampler chooses what is merged next, over spaces too large for a grid, in one process or many."""

import fcntl
import json
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.placement import choose_devices
from rgsp_jax.registry import methods
from rgsp_jax.sweep.grid import Point, Range, SweepConfig, is_whole, list_corners, list_values
from rgsp_jax.sweep.merging import TreeMerger
from rgsp_jax.sweep.page import write_page
from rgsp_jax.sweep.results import (
    Direction,
    Result,
    append_result,
    check_stamp,
    finite,
    write_tables,
)
from rgsp_jax.sweep.run import MODELS, SCORE, Evaluate, OnResult, find_problems, name_metrics, score_point, sharing
from rgsp_jax.sweep.staging import ranks_of_space

SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")
HEARTBEAT = 60
"""Seconds between two signs of life of a worker; two missed, and its trial is another's."""
MISSING = "a study needs Optuna: pip install 'rgsp_jax[sweep]'"


class Surplus(Exception):
    """Another worker has begun the last trial."""


class Unscored(Exception):
    """A point that cannot be merged or has no finite score; why is in its result."""


def run_study(
    config: SweepConfig,
    out: Path | str,
    evaluate: Evaluate,
    trials: int,
    *,
    trees: Sequence[Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    sampler: str = "tpe",
    directions: Mapping[str, Direction] | None = None,
    storage: str | None = None,
    name: str = "sweep",
    keep: bool = False,
    stamp: Mapping[str, Any] | None = None,
    heartbeat: int = HEARTBEAT,
    on_result: OnResult | None = None,
    devices: int | None = None,
) -> list[Result]:
    """Merge and score `trials` points of a space that an Optuna sampler chooses; one study, one worker or many.

    Run it in several processes, or on several machines with one storage, and they share the trials between them: there
    are as many as asked for in all. The trial of a worker that died is failed and done again by another; an
    interrupted study goes on. The first worker draws with the config's seed. A setting that was scored before is not
    scored again.

    Args:
        config: `axes` are the space: ranges, and lists of choices.
        out: directory for results; made if it is not there.
        evaluate: called with the directory of every merge, which is removed again; or with the merged tree.
        trials: of all workers together.
        trees, beside: models in place of the config's checkpoints, see `run_sweep`.
        sampler: "tpe", "cmaes", "nsga2", "random", or "grid" (ranges with a count).
        directions: objective -> "maximise" or "minimise"; several make a study of their trade-off. Empty: the one
            score, maximised.
        storage: URL of a database that Optuna knows; `out/study.db` (SQLite) if None.
        name: of the study in the storage.
        keep: leave the merges in `out/models`.
        stamp: what else tells this study from others, as the command that scores.
        heartbeat: seconds between signs of life.
        on_result: called after each trial of this worker.
        devices: of this worker, as in `run_sweep`; since no point is known ahead, matrices alone are dealt out.

    Returns:
        The results of all workers by trial.

    Raises:
        RefusedError: what the user can mend, all of it at once, before anything is merged; another study's results.
    """
    out, directions, chosen = Path(out), dict(directions or {SCORE: "maximise"}), choose_devices(devices)
    problems = find_study_problems(config, trials, sampler, directions)
    if not problems and trees is None:
        problems = find_problems(config, list_extremes(config))
    if problems:
        raise RefusedError(problems)
    facts = {"config": config.to_yaml(), "kind": "study", "objectives": directions, **(stamp or {})}
    check_stamp(out, facts)
    with without_remarks():
        study = open_study(config, out, sampler, directions, storage, name, heartbeat, facts)
        if sampler == "grid":
            trials = min(trials, math.prod(len(values) for values in list_choices(config).values()))
        with open_scorer(config, out, evaluate, trees, beside or {}, chosen, keep=keep) as scorer:
            run_worker(study, config, out, scorer, trials, directions, heartbeat, on_result)
    if not keep:
        shutil.rmtree(out / MODELS, ignore_errors=True)  # what a worker that was killed left
    results = collect_results(study)
    write_tables(results, out)
    write_page(results, out, config, directions, kind="Study")
    return results


@contextmanager
def open_scorer(
    config: SweepConfig,
    out: Path,
    evaluate: Evaluate,
    trees: Sequence[Any] | None,
    beside: Mapping[str, Any],
    devices: Sequence[jax.Device],
    *,
    keep: bool,
) -> Iterator[Callable[[Point], Result]]:
    """What merges and scores one point."""
    ranks = ranks_of_space(config)
    if trees is None:
        with sharing(ranks, out, config.memory, devices) as stages:
            yield lambda point: score_point(config, point, evaluate, out, stages, keep=keep)
        return
    merger = TreeMerger(trees, ranks, **beside)

    def score_tree(point: Point) -> Result:
        started = time.monotonic()
        tree = merger.merge(point)
        merged = time.monotonic()
        metrics = name_metrics(evaluate(tree))
        times = merged - started, time.monotonic() - merged
        return Result(point.index, point.method, point.hyperparameters, metrics, *times)

    yield score_tree


def run_worker(
    study: Any,
    config: SweepConfig,
    out: Path,
    scorer: Callable[[Point], Result],
    trials: int,
    directions: Mapping[str, Direction],
    heartbeat: int,
    on_result: OnResult | None,
) -> None:
    """Do trials until all workers together have done them all."""

    def objective(trial: Any) -> list[float]:
        if rank_trial(study, trial.number) >= trials:
            raise Surplus
        point = choose_point(config, trial)
        result = judge(find_scored(study, point) or scorer(point), directions)
        trial.set_user_attr("result", finite(vars(result)))
        append_result(out, result)
        if on_result:
            on_result(result, trials)
        if result.problem:
            raise Unscored
        return [float(value) for name in directions if (value := result.metrics[name]) is not None]

    while wait_for_turn(study, trials, heartbeat):
        study.optimize(objective, n_trials=1, catch=(Surplus, Unscored))


@contextmanager
def without_remarks() -> Iterator[None]:
    """Keep Optuna's remarks on its experimental parts, and on every trial, from the terminal."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def find_study_problems(
    config: SweepConfig, trials: int, sampler: str, directions: Mapping[str, Direction]
) -> list[str]:
    """What is wrong before anything is opened."""
    problems = config.problems(study=True)
    try:
        import optuna  # noqa: F401
    except ImportError:
        problems.append(MISSING)
    if sampler == "cmaes":
        try:
            import cmaes  # noqa: F401
        except ImportError:
            problems.append("the sampler cmaes needs its package: pip install 'rgsp_jax[sweep]'")
        if len(directions) > 1:
            problems.append("the sampler cmaes takes one objective: use nsga2 or tpe for several")
    if sampler not in SAMPLERS:
        problems.append(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    if sampler == "grid":
        open_ranges = [n for n, axis in config.axes.items() if isinstance(axis, Range) and axis.count is None]
        problems += [f"axes.{n}: the sampler grid needs count, how many values of the range" for n in open_ranges]
    if trials < 1:
        problems.append(f"a study takes at least one trial, not {trials}")
    return problems


def list_extremes(config: SweepConfig) -> list[Point]:
    """Settings with both ends of every range: what can be merged with these can be with all between."""
    found: list[Point] = []
    for name in config.method_names:
        method = methods[name]
        for corner in list_corners(config.axes_of(method), method):
            found.append(Point(len(found), name, config.fixed_for(method) | corner))
    return found


def open_study(
    config: SweepConfig,
    out: Path,
    sampler: str,
    directions: Mapping[str, Direction],
    storage: str | None,
    name: str,
    heartbeat: int,
    facts: Mapping[str, Any],
) -> Any:
    """The study in its storage, made if it is not there; RefusedError where one of that name is another."""
    import optuna
    import sqlalchemy

    url = storage or f"sqlite:///{(out / 'study.db').resolve()}"
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    try:
        with alone(out):  # two workers that begin at once would both make the tables
            backend = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
                heartbeat_interval=heartbeat,
                grace_period=2 * heartbeat,
                heartbeat_stale_trial_callback=retry,
            )
            study = optuna.create_study(
                storage=backend,
                study_name=name,
                directions=["maximize" if d == "maximise" else "minimize" for d in directions.values()],
                load_if_exists=True,
            )
            known = study.user_attrs.get("facts")
            if known is None and not study.get_trials(deepcopy=False):
                study.set_user_attr("facts", dict(facts))
            elif known != dict(facts):
                raise RefusedError(
                    f"{url} holds another study named {name!r}: choose another --study-name, or --storage"
                )
            worker = uuid.uuid4()
            study.set_user_attr(f"worker {worker}", os.getpid())
            first = sum(key.startswith("worker ") for key in study.user_attrs) == 1
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise RefusedError(f"the storage {url} cannot be opened: {reason}") from None
    study.sampler = make_sampler(config, sampler, config.seed if first else worker.int % 2**31)
    return study


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Wait until no other process on this machine is in this block for the same directory."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_sampler(config: SweepConfig, sampler: str, seed: int) -> Any:
    """Optuna's sampler of a name."""
    import optuna

    made: Mapping[str, Callable[[], Any]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda: optuna.samplers.GridSampler(list_choices(config), seed=seed),
    }
    return made[sampler]()


def list_choices(config: SweepConfig) -> dict[str, list[Any]]:
    """Every value of every axis, as Optuna takes them."""
    found: dict[str, list[Any]] = {"method": list(config.method_names)} if len(config.method_names) > 1 else {}
    for name, axis in config.axes.items():
        method = next(m for m in map(methods.__getitem__, config.method_names) if name in m.hyperparameters)
        found[name] = [as_choice(value) for value in list_values(method, name, axis)]
    return found


def as_choice(value: Any) -> Any:
    """A value as Optuna takes it: lists as JSON text."""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def choose_point(config: SweepConfig, trial: Any) -> Point:
    """The setting that the study's sampler suggests."""
    names = config.method_names
    chosen = trial.suggest_categorical("method", list(names)) if len(names) > 1 else names[0]
    method = methods[chosen]
    swept: dict[str, Any] = {}
    for name, axis in config.axes_of(method).items():
        if not isinstance(axis, Range):
            by_choice = {as_choice(value): value for value in axis}
            swept[name] = by_choice[trial.suggest_categorical(name, list(by_choice))]
        elif is_whole(method, name, axis):
            swept[name] = trial.suggest_int(name, int(axis.low), int(axis.high), log=axis.log)
        else:
            swept[name] = trial.suggest_float(name, float(axis.low), float(axis.high), log=axis.log)
    return Point(trial.number, chosen, config.fixed_for(method) | swept)


def judge(result: Result, directions: Mapping[str, Direction]) -> Result:
    """The result, with a problem where an objective is not finite; RefusedError where one is not among its scores."""
    if result.problem:
        return result
    if missing := [name for name in directions if name not in result.metrics]:
        raise RefusedError(
            f"the score has no {', '.join(missing)}; it has {', '.join(result.metrics)}: name the objectives with"
            " --maximise and --minimise"
        )
    if lost := [name for name in directions if result.metrics[name] is None]:
        return replace(result, problem=f"{', '.join(lost)} is not finite")
    return result


def find_scored(study: Any, point: Point) -> Result | None:
    """The result of an earlier trial of the same setting, under this trial's number."""
    for result in collect_results(study):
        if Point(0, result.method, result.hyperparameters).key == point.key and not result.problem:
            return replace(result, point=point.index, merge_seconds=0.0, score_seconds=0.0)
    return None


def collect_results(study: Any) -> list[Result]:
    """What all workers have found so far, by trial."""
    trials = study.get_trials(deepcopy=False)
    found = [trial.user_attrs["result"] | {"point": trial.number} for trial in trials if is_over(trial)]
    return [Result(**result) for result in found]


def is_over(trial: Any) -> bool:
    """True for trials that have a result: a score, or the reason why there is none."""
    return trial.state.is_finished() and "result" in trial.user_attrs


def count_live(trials: Sequence[Any]) -> tuple[int, int]:
    """(trials that are over, trials that are begun or wait to be)."""
    over = sum(map(is_over, trials))
    return over, sum(not trial.state.is_finished() for trial in trials)


def rank_trial(study: Any, number: int) -> int:
    """How many trials before this one are over or still run: the workers' common count, whoever asks."""
    before = [trial for trial in study.get_trials(deepcopy=False) if trial.number < number]
    return sum(is_over(trial) or not trial.state.is_finished() for trial in before)


def wait_for_turn(study: Any, trials: int, heartbeat: int) -> bool:
    """True when there is a trial to begin, False when all are over; waits for other workers' last ones in between."""
    import optuna

    while True:
        optuna.storages.fail_stale_trials(study)
        found = study.get_trials(deepcopy=False)
        over, live = count_live(found)
        if over >= trials:
            return False
        waiting = any(trial.state == optuna.trial.TrialState.WAITING for trial in found)
        if over + live < trials or waiting:
            return True
        time.sleep(min(1.0, heartbeat / 4))
