"""`rgsp merge`."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml

from rgsp_jax.cli.display import progress_bars, show_plan, show_result
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, describe_plan, merge_checkpoints, parse_config, prepare, read_config_file
from rgsp_jax.pipeline.config import parse_yaml, read_yaml
from rgsp_jax.pipeline.merge import check_place, name_workshop
from rgsp_jax.pipeline.placement import place_merge


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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory to create.")
@click.option("--method", "-m", help="See `rgsp methods`. Default: rgsp for two models, relative for more.")
@click.option("--base", help="The models' common ancestor, for methods that need it.")
@click.option("--key-map", help="YAML: rename (regex: template), keep, drop; for models with other tensor names.")
@click.option("--covariances", multiple=True, help="Of `rgsp covariances`, for methods that need them.")
@click.option("--rank", help="Singular directions kept: an integer, or a fraction of min(m, n).")
@click.option("--scale", help='Of the task vectors: a number, or "auto".')
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
@click.option("--plan", "plan_only", is_flag=True, help="Read headers only, say what would happen, write nothing.")
@click.option("--resume", is_flag=True, help="Finish an interrupted merge.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def merge(
    models: tuple[str, ...],
    out: Path | None,
    config: str | None,
    devices: int | None,
    plan_only: bool,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Merge MODELs (Hugging Face or Orbax directories, weight files, hf://owner/name) into a directory."""
    settings = build_config(models, config, flags)
    run_merge(settings, out, plan_only=plan_only, resume=resume, as_json=as_json, devices=devices)


def run_merge(
    settings: MergeConfig,
    out: Path | None,
    *,
    plan_only: bool,
    resume: bool,
    as_json: bool,
    devices: int | None = None,
) -> None:
    """Plan or merge, and show what came of it."""
    if plan_only:
        with prepare(settings, out) as preparation:
            if out is not None and (problems := check_place(preparation, out, resume=resume)):
                raise RefusedError(problems)
            description = describe_plan(preparation, place_merge(preparation.plan, devices=devices))
        click.echo(json.dumps(description, indent=2)) if as_json else show_plan(description)
        return
    if out is None:
        raise RefusedError("say where to write with --out DIR, or look first with --plan")
    try:
        with progress_bars() as progress:
            result = merge_checkpoints(settings, out, resume=resume, progress=progress, devices=devices)
    except KeyboardInterrupt:
        workshop = name_workshop(out)
        if workshop.exists():
            click.echo(f"stopped; finish with the same command and --resume ({workshop} keeps what is done)", err=True)
        raise
    click.echo(json.dumps(asdict(result), indent=2, default=str)) if as_json else show_result(result)
