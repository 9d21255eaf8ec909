"""`rgsp compare`."""

import json
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rgsp_jax.cli.covariances import progress_bar, read_size
from rgsp_jax.cli.display import show
from rgsp_jax.comparison import Comparison, compare_checkpoints, write_comparison

NAMED = 10
COLOURS = {"good": "green", "check": "yellow", "serious": "red"}


def format_number(value: float | None, digits: str) -> str:
    """The number, or a dash."""
    return "-" if value is None else f"{value:{digits}}"


def show_comparison(comparison: Comparison) -> None:
    """The verdict, the pairs, what to do."""
    console = Console()
    for code, model in zip(comparison.codes, comparison.models, strict=True):
        console.print(f"  {code}  {show(model.label)}", highlight=False, soft_wrap=True)
    verdict = comparison.verdict
    console.print(f"[bold {COLOURS[verdict.level]}]{show(verdict.headline)}[/]", highlight=False, soft_wrap=True)
    for sentence in verdict.sentences:
        console.print(show(sentence), highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("pair", "relation", "rho", "cosine", "signs", "overlap", "GW", "shared", "permuted"):
        table.add_column(heading, no_wrap=True)
    for pair in verdict.pairs:
        shares = (pair.sign_agreement, pair.overlap, pair.gw_cost, pair.shared, pair.permuted)
        numbers = [format_number(pair.rho, ".3g"), *(format_number(x, ".3f") for x in (pair.cosine, *shares))]
        table.add_row("-".join(comparison.codes[i] for i in pair.models), pair.relation, *numbers)
    console.print(table)
    for _, _, problem in comparison.differences[:NAMED]:
        console.print(f"[yellow]differs:[/] {show(problem)}", highlight=False, soft_wrap=True)
    if more := len(comparison.differences[NAMED:]):
        console.print(f"[yellow]differs:[/] and {more} more, all in --json and --out", highlight=False)
    for sentence in verdict.advice:
        console.print(f"[bold]do:[/] {show(sentence)}", highlight=False, soft_wrap=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, metavar="MODEL MODEL...")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory for compare.html and compare.jsonl.")
@click.option("--memory", default="1GB", show_default=True, help="Memory to take above the process's own.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def compare(models: tuple[str, ...], out: Path | None, memory: str, as_json: bool) -> None:
    """Say whether MODELs (two to eight, in any format that merges) share an ancestor and can be merged.

    Needs no base and no data. rho is their distance as `relative` measures it: 0 the same, 1 independent. The exit code
    is 0 whatever the verdict.
    """
    with progress_bar("tensors") as progress:
        comparison = compare_checkpoints(models, out=out, memory=read_size(memory), progress=progress)
    if out is not None:
        write_comparison(comparison, out)
    click.echo(json.dumps(comparison.summary(), indent=2)) if as_json else show_comparison(comparison)
    if out is not None and not as_json:
        Console().print(f"page {show(out / 'compare.html')}", highlight=False, soft_wrap=True)
