"""`rgsp demo`."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from rgsp_jax.cli.display import show
from rgsp_jax.demo import DemoResult, DemoSettings, run


def show_demo(result: DemoResult) -> None:
    """The tables of accuracies: all tasks, then every pair."""
    console = Console()
    groups: dict[tuple[str, ...], Table] = {}
    for row in result.rows:
        tasks = tuple(row.accuracies)
        if tasks not in groups:
            groups[tasks] = Table("method", *tasks, "mean", title=" + ".join(tasks), title_justify="left")
        groups[tasks].add_row(row.method, *(f"{x:.3f}" for x in row.accuracies.values()), f"{row.mean:.3f}")
    for table in groups.values():
        console.print(table)
    console.print(
        f"accuracy on {result.test_rows} test digits, seed {result.seed};"
        f" trained in {result.training_seconds:.0f} s, all in {result.seconds:.0f} s",
        highlight=False,
    )
    reports = [row.model / "report.html" for row in result.rows if row.model is not None]
    where, one = show(result.directory), show(reports[-1])
    console.print(f"models and reports are in {where}; for one, open {one}", highlight=False, soft_wrap=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("rgsp-demo"),
    show_default=True,
    help="Directory to create.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the models and their training.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Train small experts on scikit-learn's digits, merge them through the pipeline, print their accuracies."""
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = run(out, settings=DemoSettings(seed=seed), progress=status.update)
    click.echo(json.dumps(result.to_json(), indent=2)) if as_json else show_demo(result)
