"""`rgsp merge`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from rgsp_jax.checkpoint import format_bytes
from rgsp_jax.checkpoint.store import RemotePath, is_remote, locate
from rgsp_jax.cli.display import progress_bars, show_plan, show_prediction, show_result
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, describe_plan, merge_checkpoints, parse_config, prepare, read_config_file
from rgsp_jax.pipeline.config import parse_size, parse_yaml, read_yaml
from rgsp_jax.pipeline.decision import check_place
from rgsp_jax.pipeline.hardware import DeviceKind, find_kind
from rgsp_jax.pipeline.launch import connect_processes
from rgsp_jax.pipeline.parts import describe_parts
from rgsp_jax.pipeline.placement import Devices, place_merge, place_planned
from rgsp_jax.pipeline.prediction import Layout, lay_out_devices
from rgsp_jax.pipeline.processes import Team
from rgsp_jax.pipeline.site import choose_site


def parse_assignment(text: str, where: str) -> tuple[str, Any]:
    """`name=value`, the value as YAML reads it."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RefusedError(f"{where}: {text!r} must be NAME=VALUE")
    try:
        return name, parse_yaml(value)
    except yaml.YAMLError:
        raise RefusedError(f"{where}: the value in {text!r} is not valid YAML") from None


def parse_override(text: str) -> dict[str, Any]:
    """`PATTERN [method=NAME] [NAME=VALUE ...]` as fields of an Override."""
    try:
        pattern, *settings = shlex.split(text)
    except ValueError:
        raise RefusedError(f"--override {text!r}: give PATTERN and NAME=VALUE settings, separated by spaces") from None
    values = dict(parse_assignment(setting, "--override") for setting in settings)
    if not values:
        raise RefusedError(f"--override {text!r} changes nothing: add method=NAME or NAME=VALUE")
    method = values.pop("method", None)
    return {"pattern": pattern, "method": method, "hyperparameters": values}


def merge_settings(before: Any, given: Mapping[str, Any], config: str | None) -> dict[str, Any]:
    """The command line's hyperparameters over those of the file."""
    if before is not None and not isinstance(before, Mapping):
        raise RefusedError(f"{config}: hyperparameters: must be a mapping, not {before!r}")
    return {**(before or {}), **given}


def build_config(models: tuple[str, ...], config: str | None, flags: Mapping[str, Any]) -> MergeConfig:
    """The config file's settings, if there is one, with the command line's in their place."""
    fields: dict[str, Any] = read_config_file(Path(config)) if config else {}
    if models:
        fields["models"] = models
    named = ("rank", "scale", "beta", "epsilon")
    given = dict(parse_assignment(f"{n}={flags[n]}", f"--{n}") for n in named if flags[n] is not None)
    given |= dict(parse_assignment(text, "--set") for text in flags["set"])
    if given:
        fields["hyperparameters"] = merge_settings(fields.get("hyperparameters"), given, config)
    for name in ("method", "base", "covariances", "dtype", "max_shard_size", "memory", "seed", "include", "exclude"):
        if flags[name] not in (None, ()):
            fields[name] = flags[name]
    if flags["key_map"]:
        fields["key_map"] = read_yaml(Path(flags["key_map"]))
    if flags["override"]:
        before = fields.get("overrides") or ()
        if not isinstance(before, (list, tuple)):
            raise RefusedError(f"{config}: overrides: must be a list, not {before!r}")
        fields["overrides"] = [*before, *map(parse_override, flags["override"])]
    if "models" not in fields:
        raise RefusedError("name the models to merge, or a --config that does")
    return parse_config(fields, config or "command line")


def read_devices(count: int | None, memory: str | None) -> Devices:
    """What --devices and --device-memory say."""
    try:
        return Devices(count, None if memory is None else parse_size(memory))
    except ValueError as error:
        raise RefusedError(f"--device-memory {error}") from None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--out", "-o", help="Directory to create, or a place in a store: gs://BUCKET/MERGED.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Local directory for an --out in a store.")
@click.option("--method", "-m", help="See `rgsp methods`. Default: rgsp for two models, relative for more.")
@click.option("--base", help="The models' common ancestor, for methods that need it.")
@click.option("--key-map", help="YAML: rename (regex: template), keep, drop; for models with other tensor names.")
@click.option("--covariances", multiple=True, help="Of `rgsp covariances`, for methods that need them.")
@click.option("--rank", help="Singular directions kept: an integer, or a fraction of min(m, n).")
@click.option("--scale", help="Of the task vectors: a number.")
@click.option("--beta", help="Decay of TOS with the transport cost.")
@click.option("--epsilon", help="Entropy of the Gromov-Wasserstein plan.")
@click.option("--set", multiple=True, metavar="NAME=VALUE", help="Any other hyperparameter of the method.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Merge these tensors only (glob, or re:REGEX).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these as in the first model.")
@click.option(
    "--override",
    multiple=True,
    metavar="'PATTERN NAME=VALUE...'",
    help="Other settings (method=... too) for some tensors.",
)
@click.option("--config", "-c", help="The same as a YAML file; a mergekit YAML is read where both have the method.")
@click.option("--dtype", help="float32, float16, bfloat16 or float64. Default: as in the first model.")
@click.option("--max-shard-size", help="Default 5GB.")
@click.option("--memory", help="Memory to take above the process's own. Default 1GB.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="For methods that draw random numbers.")
@click.option("--devices", type=int, help="Of this machine's. Default: all its accelerators, or one CPU device.")
@click.option("--distributed", is_flag=True, help="One of several processes that make this call, on any machines.")
@click.option("--coordinator", metavar="HOST:PORT", help="Process 0's. Default: as the cluster's environment says.")
@click.option("--processes", type=int, help="How many there are. Default: as the cluster's environment says.")
@click.option("--process", type=int, help="Which one this is, from 0. Default: as the cluster's environment says.")
@click.option("--heartbeat-timeout", type=click.IntRange(min=2), help="Seconds until a silent process is lost: 20.")
@click.option("--start-timeout", type=click.IntRange(min=1), help="Seconds for all processes to arrive: 300.")
@click.option("--device-memory", help="To take of each device's. Default: nine tenths of what it says it has.")
@click.option("--device-kind", help="With --plan: for N --devices like cpu, h100, h200, tpu-v5e or tpu-v5p.")
@click.option("--plan", "plan_only", is_flag=True, help="Read headers only, say what would happen, write nothing.")
@click.option("--resume", is_flag=True, help="Finish an interrupted merge.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def merge(
    models: tuple[str, ...],
    out: str | None,
    scratch: Path | None,
    config: str | None,
    devices: int | None,
    device_kind: str | None,
    distributed: bool,
    plan_only: bool,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Merge MODELs (Hugging Face or Orbax directories, weight files, hf://owner/name, gs://bucket/path) into one."""
    given = {name: flags.pop(name) for name in MEETING}
    if not distributed and (lost := [name for name, value in given.items() if value is not None]):
        raise RefusedError(f"--{name.replace('_', '-')} goes with --distributed" for name in lost)
    chosen_devices = read_devices(devices, flags.pop("device_memory"))
    place = read_place(out)
    if scratch is not None and not isinstance(place, RemotePath):
        raise RefusedError("--scratch goes with an --out in a store")
    options: dict[str, Any] = {"resume": resume, "as_json": as_json, "devices": chosen_devices, "scratch": scratch}
    if device_kind is not None and not plan_only:
        raise RefusedError("--device-kind goes with --plan: a merge takes the devices that are there")
    if plan_only and distributed and given["processes"] is None:
        raise RefusedError("--plan --distributed: say for how many with --processes N")
    if plan_only:
        kind = None if device_kind is None else find_kind(device_kind)
        settings = build_config(models, config, flags)
        show_merge(settings, place, processes=given["processes"], kind=kind, **options)
    elif distributed:
        chosen = {name: value for name, value in given.items() if value is not None}
        with connect_processes(**chosen, say=partial(click.echo, err=True)) as team:
            run_merge(build_config(models, config, flags), place, processes=team, **options)
    else:
        run_merge(build_config(models, config, flags), place, plan_only=plan_only, **options)


def read_place(out: str | None) -> Path | RemotePath | None:
    """What --out names."""
    if out is None:
        return None
    return locate(out) if is_remote(out) else Path(out)


MEETING = ("coordinator", "processes", "process", "heartbeat_timeout", "start_timeout")
"""Flags on where and when processes meet."""


def show_merge(
    settings: MergeConfig,
    out: Path | RemotePath | None,
    *,
    resume: bool = False,
    as_json: bool = False,
    devices: Devices | None = None,
    processes: int | None = None,
    scratch: Path | None = None,
    kind: DeviceKind | None = None,
) -> None:
    """What a merge would do, by how many processes, and on devices of what kind."""
    with prepare(settings, out, shared_memory=None if kind is None else kind.shared) as preparation:
        if out is not None and (problems := check_place(preparation, out, resume=resume, scratch=scratch)):
            raise RefusedError(problems)
        plan, wanted = preparation.plan, devices or Devices()
        if kind is None:
            placement = place_merge(plan, devices=wanted)
            layout = Layout(processes or 1, len(placement.devices), processes or 1)
        else:
            layout = lay_out_devices(kind, wanted.count, processes)
            placement = place_planned(plan, Devices(layout.devices, wanted.memory), kind)
            processes = layout.processes if layout.processes > 1 else processes
        description = describe_plan(preparation, placement, kind=kind, layout=layout)
        if processes is not None:
            description["processes"] = describe_parts(preparation.plan, settings.max_shard_size, processes)
            description["shards"] = sum(len(row["parts"]) for row in description["processes"])
    if as_json:
        click.echo(json.dumps(description, indent=2))
        return
    show_plan(description)
    if processes is not None:
        show_parts(description["processes"])
    if kind is not None:
        show_prediction(description["prediction"])


def show_parts(rows: Sequence[Mapping[str, Any]]) -> None:
    """What would fall to each process."""
    table = Table("process", "files", "tensors", "reads", "writes", "load", title="Processes", title_justify="left")
    for row in rows:
        numbers = ", ".join(map(str, row["parts"])) or "none: it would be idle"
        sizes = map(format_bytes, (row["bytes_in"], row["bytes_out"]))
        table.add_row(str(row["process"]), numbers, str(row["tensors"]), *sizes, f"{row['load']:.3f}")
    console = Console()
    console.print(table)
    console.print("load: predicted work over the mean of all processes", highlight=False)


def run_merge(
    settings: MergeConfig,
    out: Path | RemotePath | None,
    *,
    plan_only: bool = False,
    resume: bool = False,
    as_json: bool = False,
    devices: Devices | None = None,
    processes: Team | None = None,
    scratch: Path | None = None,
) -> None:
    """Plan or merge, and show what came of it; of several processes the first does."""
    if plan_only:
        show_merge(settings, out, resume=resume, as_json=as_json, devices=devices, scratch=scratch)
        return
    if out is None:
        raise RefusedError("say where to write with --out DIR, or look first with --plan")
    try:
        with progress_bars() as progress:
            result = merge_checkpoints(
                settings,
                out,
                resume=resume,
                progress=progress,
                devices=devices,
                processes=processes,
                scratch=scratch,
            )
    except KeyboardInterrupt:
        workshop = choose_site(out).workshop
        if isinstance(workshop, RemotePath) or workshop.exists():
            click.echo(f"stopped; finish with the same command and --resume ({workshop} keeps what is done)", err=True)
        raise
    if processes is not None and processes.index:
        return
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2, default=str))
        return
    show_result(result)
    if result.processes is not None:
        show_work(result.processes)


def show_work(work: Mapping[str, Any]) -> None:
    """How even the work was."""
    read = ", ".join(map(format_bytes, work["bytes_read"]))
    click.echo(
        f"{work['processes']} processes, {work['parts']} parts; read {read}; "
        f"busiest over mean {work['predicted_imbalance']:.2f} predicted, {work['measured_imbalance']:.2f} measured"
    )
