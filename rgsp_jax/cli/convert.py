"""`rgsp convert`."""

import json
from pathlib import Path

import click
from rich.console import Console

from rgsp_jax.checkpoint import (
    STYLES,
    Conversion,
    convert_to_flax,
    convert_to_huggingface,
    format_bytes,
    open_checkpoint,
)
from rgsp_jax.cli.display import progress_bars, show
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.config import parse_size

NAMED = 10
DTYPES = ("float32", "bfloat16", "float16")


def show_conversion(conversion: Conversion) -> None:
    """What was written, and what passed through unchanged."""
    console = Console()
    style = f" in the style of {conversion.style}" if conversion.style else ""
    size = format_bytes(conversion.bytes_out)
    text = f"{conversion.tensors} tensors, {size}{style} -> {show(conversion.out)}"
    console.print(text, highlight=False, soft_wrap=True)
    for key in conversion.unmapped[:NAMED]:
        console.print(f"[yellow]unmapped:[/] {show(key)}", highlight=False, soft_wrap=True)
    if more := len(conversion.unmapped[NAMED:]):
        console.print(f"[yellow]unmapped:[/] and {more} more, all in --json", highlight=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["flax", "huggingface"]), required=True, help="What DST becomes.")
@click.option("--style", type=click.Choice(STYLES), help="Names of the Flax tree.  [default: nnx]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of floating-point weights.  [default: as they were]")
@click.option("--max-shard-size", help="Bytes per safetensors file, such as 5GB.  [default: as they were]")
@click.option("--memory", default="1GB", show_default=True, help="Memory to take above the process's own.")
@click.option("--allow-unmapped", is_flag=True, help="Pass keys through that no known module holds.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def convert(
    source: str,
    out: Path,
    target: str,
    style: str | None,
    dtype: str | None,
    max_shard_size: str | None,
    memory: str,
    allow_unmapped: bool,
    as_json: bool,
) -> None:
    """Convert the model SRC into the directory DST, and back, bit for bit.

    To flax: an Orbax checkpoint of the tree that a Flax model of this architecture has; nnx models of the families in
    rgsp_jax.models get their own names, all others those of their PyTorch modules. To huggingface: safetensors with the
    keys, dtypes and files that the Orbax checkpoint was made of, or those of a PyTorch checkpoint.
    """
    problems = []
    if target == "huggingface":
        problems += [
            f"{option} is for --to flax: leave it out"
            for option, given in (("--style", style), ("--allow-unmapped", allow_unmapped))
            if given
        ]
    elif max_shard_size is not None:
        problems.append("--max-shard-size is for --to huggingface: leave it out")
    sizes: dict[str, int] = {}
    for option, text in (("--max-shard-size", max_shard_size), ("--memory", memory)):
        try:
            sizes |= {} if text is None else {option: parse_size(text)}
        except ValueError as error:
            problems.append(f"{option} {error}")
    if problems:
        raise RefusedError(problems)
    with open_checkpoint(source) as checkpoint, progress_bars() as show_progress:

        def progress(done: int, total: int) -> None:
            if show_progress is not None:
                show_progress("convert", done, total, ())

        if target == "flax":
            conversion = convert_to_flax(
                checkpoint,
                out,
                style="linen" if style == "linen" else "nnx",
                dtype=dtype,
                allow_unmapped=allow_unmapped,
                memory=sizes["--memory"],
                progress=progress,
            )
        else:
            conversion = convert_to_huggingface(
                checkpoint,
                out,
                dtype=dtype,
                max_shard_size=sizes.get("--max-shard-size"),
                memory=sizes["--memory"],
                progress=progress,
            )
    if as_json:
        facts = {"out": str(out), "tensors": conversion.tensors, "bytes": conversion.bytes_out}
        click.echo(json.dumps({**facts, "style": conversion.style, "unmapped": list(conversion.unmapped)}, indent=2))
    else:
        show_conversion(conversion)
