"""`rgsp search`."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from rgsp_jax.cli.display import show
from rgsp_jax.cli.frontier import Numbers
from rgsp_jax.pipeline.config import parse_config, read_yaml
from rgsp_jax.sweep.alpha import AlphaSearch, run_alpha_search, summarise


def show_search(result: AlphaSearch) -> None:
    """Changes by candidate, the chosen one in bold."""
    table = Table("alpha", "answers that change")
    for alpha, change in zip(result.alphas, result.changes, strict=True):
        row = f"{alpha:g}", "-" if change is None else f"{change:g} of {result.inputs}"
        table.add_row(*row, style="bold" if alpha == result.alpha else None)
    console = Console()
    console.print(table)
    if result.tied[1:]:
        console.print(f"{len(result.tied)} candidates change as little; the smallest is taken", highlight=False)
    console.print(f"model {show(result.model)}", highlight=False, soft_wrap=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("first")
@click.argument("other")
@click.option("--answer", required=True, metavar="COMMAND", help="Prints {model}'s answers to unlabelled inputs.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Directory for results.")
@click.option(
    "--alphas",
    type=Numbers(float("-inf"), float("inf")),
    default="0.4,0.5,0.6,0.7,0.8,0.9,1",
    show_default=True,
    help="Shares of FIRST to try.",
)
@click.option("--smoothing", type=click.IntRange(0), default=0, show_default=True, help="Neighbours averaged over.")
@click.option("--key-map", help="YAML: rename, keep, drop; where OTHER has other tensor names.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these tensors as in FIRST.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def search(
    first: str,
    other: str,
    answer: str,
    out: Path,
    alphas: tuple[float, ...],
    smoothing: int,
    key_map: str | None,
    exclude: tuple[str, ...],
    as_json: bool,
) -> None:
    """Merge FIRST and OTHER with the coefficient that AdaMMS chooses, without labels.

    FIRST and OTHER are interpolated with every alpha; COMMAND is run by the shell for each merge, with {model} replaced
    by its directory, and prints one answer a line. The merge whose answers differ least from its neighbours' becomes
    OUT/model. Interrupted, the same command goes on where it stopped.
    """
    fields: dict[str, Any] = {"models": (first, other), "method": "average", "exclude": exclude}
    if key_map is not None:
        fields["key_map"] = read_yaml(Path(key_map))
    console = Console(stderr=True)

    def on_answers(alpha: float, total: int) -> None:
        console.print(f"alpha {alpha:g} has answered, {total} in all")

    result = run_alpha_search(
        parse_config(fields, "command line"),
        answer,
        out,
        alphas,
        smoothing=smoothing,
        on_answers=on_answers if console.is_terminal else None,
    )
    click.echo(json.dumps(summarise(result), indent=2)) if as_json else show_search(result)
