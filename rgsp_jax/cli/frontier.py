"""`rgsp frontier`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from rgsp_jax.sweep import FrontierPoint, plan_points, run_frontier
from rgsp_jax.sweep.frontier_plot import draw_frontier


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.3,1,3", param, ctx)
        if not all(self.low < number < self.high for number in numbers):
            self.fail(f"{value!r} has numbers that are not between {self.low:g} and {self.high:g}", param, ctx)
        return numbers


SHARES, POSITIVE = Numbers(0, 1), Numbers(0, float("inf"))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipient")
@click.argument("donor")
@click.option("--covariances", required=True, help="File of `rgsp covariances RECIPIENT`.")
@click.option("--donor-covariances", help="File of `rgsp covariances DONOR`: adds RegMean, which needs both.")
@click.option("--score", required=True, metavar="COMMAND", help="Prints retention and acquisition of {model}.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Directory for results.")
@click.option("--ridges", type=POSITIVE, default="0.3,1,3,10,30", show_default=True)
@click.option("--energies", type=SHARES, default="0.5,0.9,0.99", show_default=True)
@click.option("--mixes", type=SHARES, default="0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", show_default=True)
@click.option("--keep", is_flag=True, help="Keep every merge, in OUT/models.")
@click.option("--json", "as_json", is_flag=True, help="Print the points as JSON.")
def frontier(
    recipient: str,
    donor: str,
    covariances: str,
    donor_covariances: str | None,
    score: str,
    out: Path,
    ridges: tuple[float, ...],
    energies: tuple[float, ...],
    mixes: tuple[float, ...],
    keep: bool,
    as_json: bool,
) -> None:
    """What every strength of a graft keeps of RECIPIENT and takes from DONOR, beside plain interpolation.

    COMMAND is run by the shell for every merge, with {model} replaced by its directory; the last line it prints is two
    numbers. Interrupted, the same command goes on where it stopped.
    """
    points = plan_points(ridges, energies, mixes, regmean=donor_covariances is not None)
    console = Console(stderr=True)

    def on_point(point: FrontierPoint, total: int) -> None:
        console.print(f"{point.name}: retention {point.retention:.4g}, acquisition {point.acquisition:.4g}")

    scored = run_frontier(
        recipient,
        donor,
        covariances,
        score,
        out,
        points,
        donor_covariances=donor_covariances,
        keep=keep,
        on_point=on_point if console.is_terminal else None,
    )
    (out / "frontier.md").write_text(tabulate(scored), encoding="utf-8")
    draw_frontier(scored, out / "frontier.svg")
    if as_json:
        click.echo(json.dumps([asdict(point) for point in scored], indent=2))
        return
    show(scored)
    click.echo(f"table and picture are {out / 'frontier.md'} and {out / 'frontier.svg'}")


def show(points: Sequence[FrontierPoint]) -> None:
    """The table on the terminal; Pareto points in bold."""
    table = Table("merge", "retention", "acquisition", "Pareto")
    for p in points:
        row = (p.name, f"{p.retention:.4g}", f"{p.acquisition:.4g}", "*" if p.pareto else "")
        table.add_row(*row, style="bold" if p.pareto else None)
    Console().print(table)


def tabulate(points: Sequence[FrontierPoint]) -> str:
    """The same in Markdown."""
    lines = ["| merge | retention | acquisition | Pareto |", "|---|---|---|---|"]
    lines += [f"| {p.name} | {p.retention:.4g} | {p.acquisition:.4g} | {'yes' if p.pareto else ''} |" for p in points]
    return "\n".join(lines) + "\n"
