"""Progress and tables on a terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from rgsp_jax.checkpoint import format_bytes
from rgsp_jax.pipeline import MergeResult
from rgsp_jax.pipeline.merge import Progress as OnProgress
from rgsp_jax.pipeline.report import make_encodable

STAGES = {"merge": "merging", "audit": "checking", "convert": "converting", "match": "matching", "align": "writing"}


def show(text: object) -> str:
    """A name or path as it is: no markup of rich's in it, and nothing that a terminal cannot print."""
    return escape(make_encodable(str(text)))


@contextmanager
def progress_bars() -> Iterator[OnProgress | None]:
    """Bars for each stage on stderr: bytes, tensors, speed and time left; None where nobody watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[name]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}
        seen: dict[str, set[str]] = {}

        def advance(stage: str, done: int, total: int, names: tuple[str, ...]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(STAGES[stage], total=total, tensors=0, name="")
                seen[stage] = set()
            seen[stage].update(names)
            last = show(names[-1]) if names else ""
            bars.update(tasks[stage], advance=done, tensors=len(seen[stage]), name=last)

        yield advance


def show_plan(description: Mapping[str, Any]) -> None:
    """What a merge would do."""
    console = Console()
    console.print(f"[bold]{description['method']}[/] of", highlight=False)
    for model in description["models"]:
        console.print(f"  {show(model)}", highlight=False, soft_wrap=True)
    if description["base"] is not None:
        console.print(f"  on {show(description['base'])}", highlight=False, soft_wrap=True)
    table = Table("rule", "method", "tensors", "parameters", title="Tensors by rule", title_justify="left")
    for row in description["rules"]:
        table.add_row(row["rule"], row["method"], str(row["tensors"]), f"{row['parameters']:,}")
    console.print(table)
    spread = ("waves", "devices", "idle") if description["devices"] > 1 else ()
    columns = ("method", "shape", "dtypes", "tensors", "items", *spread)
    table = Table(*columns, title="Groups of equal work", title_justify="left")
    for row in description["groups"]:
        shape = "x".join(map(str, row["matrix"])) if row["matrix"] else "any"
        dealt = (str(row["waves"]), f"{row['devices']}{' together' * row['divided']}", f"{row['idle_share']:.0%}")
        counts = str(row["tensors"]), str(row["items"])
        table.add_row(row["method"], shape, row["dtypes"], *counts, *dealt[: len(spread)])
    console.print(table)
    if spread:
        held = format_bytes(description["peak_device_memory"])
        console.print(f"on {description['devices']} {description['platform']} devices, {held} each", highlight=False)
    console.print(
        f"reads {format_bytes(description['bytes_in'])}, writes {format_bytes(description['bytes_out'])}"
        f" in {description['shards']} file(s), {description['flops']:.2g} FLOPs, peak memory"
        f" {format_bytes(description['peak_memory'])} above the process, roughly {description['seconds']:.0f} s"
        f" on {name_devices(description['prediction'])}",
        highlight=False,
    )


def name_devices(prediction: Mapping[str, Any]) -> str:
    """`one cpu device`, `4 processes with 4 tpu-v5e devices each`."""
    processes, each, kind = prediction["processes"], prediction["devices_per_process"], prediction["kind"]["name"]
    own = f"one {kind} device" if each == 1 else f"{each} {kind} devices"
    return own if processes == 1 else f"{processes} processes with {own} each"


def show_prediction(prediction: Mapping[str, Any]) -> None:
    """Where the time of a merge on planned devices goes, and what that rests on."""
    console = Console()
    console.print(f"[italic]On {name_devices(prediction)}: a prediction[/]", highlight=False, soft_wrap=True)
    table = Table("stage", "seconds")
    for stage, seconds in prediction["stages"].items():
        table.add_row(stage + " (bottleneck)" * (stage == prediction["bottleneck"]), f"{seconds:.1f}")
    table.add_row("all, as they overlap", f"{prediction['seconds']:.1f}")
    console.print(table)
    divided = prediction["divided"]
    shown = ", ".join(map(show, divided[:3])) + (f" and {len(divided) - 3} others" if divided[3:] else "")
    for line in (
        prediction["overlapping"],
        f"memory: {format_bytes(prediction['memory_per_process'])} of each process's host,"
        f" {format_bytes(prediction['memory_per_device'])} of each device",
        f"devices idle {prediction['idle_share']:.0%} of the time, {prediction['padding_share']:.0%} of the computing"
        f" is padding; slowest process over mean {prediction['imbalance']:.2f}",
        f"rows divided over the devices of a process: {shown or 'no matrix'}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    table = Table("figure", "value", "origin", "source", title="What it rests on", title_justify="left")
    for name, figure in prediction["kind"]["figures"].items():
        table.add_row(name, f"{figure['value']:.3g} {figure['unit']}".strip(), figure["origin"], figure["source"])
    console.print(table)
    console.print(f"assumed: {', '.join(prediction['assumed'])}. Left out: {prediction['left_out']}", highlight=False)


def show_result(result: MergeResult) -> None:
    """Where the merge is and what to look at."""
    console = Console()
    counts = ", ".join(f"{count} {rule}" for rule, count in result.counts_by_rule.items())
    console.print(f"merged {result.tensors} tensors by [bold]{result.method}[/] ({counts})", highlight=False)
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/] {show(warning)}", highlight=False, soft_wrap=True)
    for flag, count in result.flag_counts.items():
        console.print(f"[yellow]warning:[/] {flag} on {count} tensor(s), see the report", highlight=False)
    rate = (result.bytes_in + result.bytes_out) / max(result.seconds, 1e-9)
    console.print(
        f"{format_bytes(result.bytes_in)} read, {format_bytes(result.bytes_out)} written"
        f" in {result.seconds:.1f} s ({format_bytes(rate)}/s)",
        highlight=False,
    )
    model, report = show(result.out), show(result.out / "report.html")
    console.print(f"model  {model}\nreport {report}", highlight=False, soft_wrap=True)
