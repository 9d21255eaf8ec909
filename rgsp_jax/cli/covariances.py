"""`rgsp covariances`."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from rgsp_jax.activations import CovarianceResult, CovarianceSettings, collect_covariances, combine_covariance_files
from rgsp_jax.activations.settings import BACKENDS, DTYPES
from rgsp_jax.activations.settings import Progress as OnProgress
from rgsp_jax.checkpoint import format_bytes
from rgsp_jax.cli.display import show
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.config import parse_size

NAMED = 5


@contextmanager
def progress_bar(unit: str = "examples") -> Iterator[OnProgress | None]:
    """A bar of examples, or of what `unit` says, on stderr; None where nobody watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("loading", total=None)

        def advance(done: int, total: int) -> None:
            bars.update(task, advance=done, total=total, description="running")

        yield advance


def let_threads_sleep() -> None:
    """Before torch is loaded, which is when OpenMP reads it: threads that spin while they wait slow the sums."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def read_size(text: str) -> int:
    """Bytes of a size; RefusedError for anything else."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise RefusedError(f"--memory {error}") from None


def read_part(text: str) -> tuple[int, int]:
    """(i, k) of "i/k"; RefusedError for anything else."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise RefusedError(f"--part must be I/K, such as 1/2, not {text!r}")
    return int(part), int(parts)


def show_result(result: CovarianceResult) -> None:
    """What was seen and where it is."""
    console = Console()
    kinds = ", ".join(f"{count} {kind}" for kind, count in result.sites.items())
    console.print(
        f"covariances of {sum(result.sites.values())} sites ({kinds}) from {result.examples} examples,"
        f" {result.held_back} more held back, by {result.backend}",
        highlight=False,
        soft_wrap=True,
    )
    if result.movement_worst is not None:
        early = ", stopped early" if result.stopped_early else ""
        console.print(
            f"leading subspaces moved by {result.movement_mean:.3f} on average over the last half of the examples, at"
            f" most {result.movement_worst:.3f} ({show(result.worst_site)}){early}",
            highlight=False,
            soft_wrap=True,
        )
    if result.sketches:
        console.print(
            f"sketches, for want of memory: {show(name_some(result.sketches))}", highlight=False, soft_wrap=True
        )
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/] {show(warning)}", highlight=False, soft_wrap=True)
    if result.not_covered:
        reasons: dict[str, list[str]] = {}
        for name, reason in result.not_covered.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            console.print(
                f"[yellow]not covered:[/] {show(name_some(names))}: {show(reason)}", highlight=False, soft_wrap=True
            )
    console.print(
        f"file {show(result.out)}, {format_bytes(result.nbytes)}, {result.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def name_some(names: Any) -> str:
    """The first few names and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--data", "-d", help="Inputs: .jsonl, .txt (a text a line), .npz (images), image directory.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="File to write (.safetensors).")
@click.option("--field", default="text", show_default=True, help="Of a .jsonl: the text.")
@click.option("--pair-field", help="Of a .jsonl: a second text, or the answer to text and image.")
@click.option("--image-field", default="image", show_default=True, help="Of a .jsonl: an image file beside it.")
@click.option("--max-rows", type=int, help="Examples to draw from the data at most.")
@click.option("--batch-size", type=int, default=32, show_default=True, help="Examples in a forward pass.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of a text; the rest is cut off.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order in which examples are drawn.")
@click.option("--part", default="1/1", show_default=True, help="I/K: the I-th of K parts of the data, to --combine.")
@click.option("--held-back", type=int, default=256, show_default=True, help="Rows per site kept out, to prove grafts.")
@click.option("--until", type=float, help="Stop when no leading subspace moves more than this as the data double.")
@click.option("--memory", default="4GB", show_default=True, help="For the sums; wider sites keep sketches past it.")
@click.option("--sketch-size", type=int, default=512, show_default=True, help="Rows of a sketch.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the model.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the forward pass.")
@click.option("--combine", nargs=2, metavar="A B", help="Add up two covariance files of one model instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def covariances(
    model: str | None,
    data: str | None,
    out: Path | None,
    combine: tuple[str, str] | None,
    memory: str,
    part: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Run MODEL (a Hugging Face directory, hf://owner/name) over data; keep the covariances of its layers' inputs.

    `rgsp graft` uses them to protect what the model does on such data.
    """
    if out is None:
        raise RefusedError("say where to write with --out FILE.safetensors")
    if combine is not None:
        if model is not None or data is not None:
            raise RefusedError("--combine adds up two files: give no MODEL and no --data with it")
        sites = combine_covariance_files(*combine, out)
        click.echo(json.dumps({"out": str(out), "sites": len(sites)})) if as_json else click.echo(
            f"covariances of {len(sites)} sites of both files are in {out}"
        )
        return
    missing = [
        problem
        for problem, given in (("name the MODEL to run", model), ("give its inputs with --data", data))
        if not given
    ]
    if missing or model is None or data is None:
        raise RefusedError(missing)
    let_threads_sleep()
    settings = CovarianceSettings(memory=read_size(memory), part=read_part(part), **options)
    with progress_bar() as progress:
        result = collect_covariances(model, data, out, settings, progress)
    click.echo(json.dumps(asdict(result), indent=2, default=str)) if as_json else show_result(result)
