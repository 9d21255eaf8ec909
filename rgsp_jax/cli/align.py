"""`rgsp align`."""

import json
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rgsp_jax.alignment import Alignment, align_checkpoints
from rgsp_jax.alignment.matching import METHODS, Method
from rgsp_jax.checkpoint import format_bytes
from rgsp_jax.cli.display import progress_bars, show

NAMED = 12


def show_alignment(alignment: Alignment) -> None:
    """How well units agree as they lie and aligned: the sets that moved most, and all together."""
    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("units", "number", "moved", "cosine before", "after"):
        table.add_column(heading, no_wrap=True)
    sets = sorted(alignment.units, key=lambda x: -x.moved / x.units)[:NAMED]
    for one in sets:
        table.add_row(show(one.label), str(one.units), str(one.moved), f"{one.before:.3f}", f"{one.after:.3f}")
    if len(alignment.units) > NAMED:
        table.add_row(f"... {len(alignment.units) - NAMED} more sets", "", "", "", "")
    count = sum(x.units for x in alignment.units)
    table.add_row("all", str(count), str(alignment.moved), f"{alignment.before:.3f}", f"{alignment.after:.3f}")
    console.print(table)
    size = format_bytes(alignment.bytes_out)
    text = f"{alignment.tensors} tensors, {size} -> {show(alignment.out)}"
    console.print(text, highlight=False, soft_wrap=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="MODEL")
@click.option("--to", "reference", required=True, metavar="REFERENCE", help="The model whose order is taken.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Directory to create.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="weights",
    show_default=True,
    help="Compare all weights of a unit (Git Re-Basin), or those into it (OTFusion).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def align(model: str, reference: str, out: Path, method: Method, as_json: bool) -> None:
    """Put MODEL's MLP units and attention heads into the order of REFERENCE's, so that the two can be merged.

    The function of MODEL stays: its weights are permuted, none is changed. Its residual stream keeps its order.
    """
    with progress_bars() as progress:
        alignment = align_checkpoints(model, reference, out, method=method, progress=progress)
    if as_json:
        click.echo(json.dumps({"out": str(out), **alignment.summary()}, indent=2))
    else:
        show_alignment(alignment)
