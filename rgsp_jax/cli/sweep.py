"""`rgsp sweep`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from rgsp_jax.cli.display import show
from rgsp_jax.errors import RefusedError
from rgsp_jax.sweep.grid import read_sweep
from rgsp_jax.sweep.results import Direction, Result, as_cell, finite, list_metrics, mark_front
from rgsp_jax.sweep.run import run_sweep, score_by_command
from rgsp_jax.sweep.study import SAMPLERS, run_study

MOST_ROWS = 12


def split_names(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name for name in (part.strip() for part in (value or "").split(",")) if name)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--score", required=True, metavar="COMMAND", help="Prints the score of {model} on its last line.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Directory for results.")
@click.option("--metrics", callback=split_names, metavar="NAMES", help="Names of several numbers that are printed.")
@click.option("--maximise", callback=split_names, metavar="NAMES", help="Metrics of which more is better (default).")
@click.option("--minimise", callback=split_names, metavar="NAMES", help="Metrics of which less is better.")
@click.option("--keep", is_flag=True, help="Keep every merge, in OUT/models, with its report.")
@click.option("--study", type=click.IntRange(1), metavar="TRIALS", help="Let Optuna choose so many points.")
@click.option("--sampler", type=click.Choice(SAMPLERS), default="tpe", show_default=True, help="Of a study.")
@click.option("--storage", metavar="URL", help="Database of a study  [default: SQLite in OUT].")
@click.option("--study-name", default="sweep", show_default=True, help="Of the study in its storage.")
@click.option("--devices", type=int, help="Of this machine's. Default: all its accelerators, or one CPU device.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def sweep(
    config: Path,
    score: str,
    out: Path,
    metrics: tuple[str, ...],
    maximise: tuple[str, ...],
    minimise: tuple[str, ...],
    keep: bool,
    study: int | None,
    sampler: str,
    storage: str | None,
    study_name: str,
    devices: int | None,
    as_json: bool,
) -> None:
    """Merge with every setting that CONFIG lists, and score each merge; decompositions are computed once.

    COMMAND is run by the shell for every merge, with {model} replaced by its directory; the last line it prints is a
    number, the numbers that --metrics names, or a JSON object. OUT gets results.jsonl while it runs, then results.csv,
    results.parquet and sweep.html. Interrupted, the same command goes on where it stopped. With --study, ranges need
    no count, and the same command run several times at once shares the trials.
    """
    chosen = read_sweep(config, study=study is not None)
    evaluate = score_by_command(score, metrics)
    directions = choose_directions(metrics, maximise, minimise)
    console = Console(stderr=True)

    def on_result(result: Result, total: int) -> None:
        console.print(f"{describe(result)}: {describe_scores(result)}", highlight=False)

    shared: dict[str, Any] = {
        "keep": keep,
        "stamp": {"score": score, "metrics": list(metrics)},
        "on_result": on_result if console.is_terminal else None,
        "devices": devices,
    }
    if study is None:
        results = run_sweep(chosen, out, evaluate, directions=directions, **shared)
    else:
        objectives = {name: directions[name] for name in (*maximise, *minimise)} or directions
        results = run_study(
            chosen, out, evaluate, study, sampler=sampler, directions=objectives, storage=storage, name=study_name,
            **shared,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps([finite(asdict(result)) for result in results], indent=2))
        return
    show_results(results, directions)
    made = [out / name for name in ("results.csv", "results.parquet", "sweep.html") if (out / name).exists()]
    click.echo("results are " + ", ".join(map(show, made)))
    if not (out / "results.parquet").exists():
        click.echo("results.parquet needs pyarrow: pip install 'rgsp_jax[sweep]'", err=True)


def choose_directions(
    metrics: tuple[str, ...], maximise: tuple[str, ...], minimise: tuple[str, ...]
) -> dict[str, Direction]:
    """Metric -> direction; RefusedError where names contradict each other."""
    problems = [f"{name}: maximise it or minimise it, not both" for name in maximise if name in minimise]
    if metrics:
        unknown = [name for name in (*maximise, *minimise) if name not in metrics]
        problems += [f"--metrics names no {name!r}; there are {', '.join(metrics)}" for name in unknown]
    if problems:
        raise RefusedError(problems)
    found: dict[str, Direction] = dict.fromkeys((*maximise, *metrics), "maximise")
    return {**found, **dict.fromkeys(minimise, "minimise")}


def describe(result: Result) -> str:
    """A point in one line."""
    return " ".join([result.method, *(f"{name}={as_cell(value)}" for name, value in result.hyperparameters.items())])


def describe_scores(result: Result) -> str:
    """Its scores, or why there are none."""
    scores = [f"{name} {'-' if x is None else format(x, '.4g')}" for name, x in result.metrics.items()]
    return result.problem or ", ".join(scores)


def show_results(results: list[Result], directions: dict[str, Direction]) -> None:
    """The best points, those on the Pareto front in bold."""
    metrics = list_metrics(results)
    toward: dict[str, Direction] = {name: directions.get(name, "maximise") for name in metrics}
    front = dict(zip((r.point for r in results), mark_front(results, toward), strict=True))
    scored = [r for r in results if any(x is not None for x in r.metrics.values())]

    def order(result: Result) -> float:
        first = result.metrics.get(metrics[0])
        return float("inf") if first is None else first if toward[metrics[0]] == "minimise" else -first

    table = Table("point", "setting", *metrics)
    for result in sorted(scored, key=order)[:MOST_ROWS]:
        cells = [format(x, ".4g") if (x := result.metrics.get(name)) is not None else "-" for name in metrics]
        table.add_row(str(result.point), describe(result), *cells, style="bold" if front[result.point] else None)
    console = Console()
    console.print(table)
    if len(scored) > MOST_ROWS:
        console.print(f"the best {MOST_ROWS} of {len(scored)}", highlight=False)
    if unscored := [r for r in results if r.problem]:
        console.print(f"{len(unscored)} without a score; the first: {unscored[0].problem}", highlight=False)
