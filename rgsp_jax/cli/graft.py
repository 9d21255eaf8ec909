"""`rgsp graft`."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rgsp_jax.activations import CannotStepError, CovarianceSettings, collect_covariances
from rgsp_jax.activations.collect import has_torch
from rgsp_jax.cli.covariances import let_threads_sleep, progress_bar
from rgsp_jax.cli.display import show
from rgsp_jax.cli.merge import parse_override, run_merge
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, parse_config

RULES = ("ridge", "energy", "threshold")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipient")
@click.argument("donors", nargs=-1, required=True)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory to create.")
@click.option("--data", help="Inputs of RECIPIENT: .jsonl, .txt, .npz or a directory of images.")
@click.option("--donor-data", multiple=True, help="Of DONOR too, if there are some; else guessed from its embeddings.")
@click.option("--field", help="Of a .jsonl file's lines that holds the text.")
@click.option("--share", type=float, help="Sequential, the default with --data: 0 keeps RECIPIENT most. Default .25.")
@click.option("--covariances", help="In place of --data: a file of `rgsp covariances RECIPIENT`.")
@click.option("--donor-covariances", help="Of the donor's inputs, or what they are thought to be; for a ridge.")
@click.option("--ridge", type=float, help="Soft: protects less as it grows, in mean eigenvalues.")
@click.option("--energy", type=float, help="Hard: protect the directions with this share of the inputs' energy.")
@click.option("--threshold", type=float, help="Hard: protect eigenvalues above this (AlphaEdit: 2e-2).")
@click.option("--per-layer", multiple=True, metavar="'PATTERN NAME=VALUE'", help="Another rule for some tensors.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Graft these tensors only (glob, or re:REGEX).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these as in the recipient.")
@click.option("--dtype", help="float32, float16, bfloat16 or float64. Default: as in the recipient.")
@click.option("--max-shard-size", help="Default 5GB.")
@click.option("--memory", help="Memory to take above the process's own. Default 1GB.")
@click.option("--plan", "plan_only", is_flag=True, help="Read headers only, say what would happen, write nothing.")
@click.option("--resume", is_flag=True, help="Finish an interrupted graft.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def graft(
    recipient: str,
    donors: tuple[str, ...],
    out: Path | None,
    covariances: str | None,
    data: str | None,
    donor_data: tuple[str, ...],
    field: str | None,
    share: float | None,
    plan_only: bool,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Add what DONORs know to RECIPIENT, and keep what RECIPIENT does on data of its own.

    The data are a few hundred unlabelled inputs of the kind that RECIPIENT must not get worse on. With them every layer
    is refitted on what the merged model feeds it (--share); a rule (--ridge, --energy, --threshold) makes a null-space
    graft instead, and so does a file of covariances (ridge 3).
    """
    if (covariances is None) == (data is None):
        raise RefusedError("give --covariances FILE, or --data FILE to collect them from, and not both")
    given = {name: value for name in RULES if (value := flags.pop(name)) is not None}
    other_covariances = flags.pop("donor_covariances")
    overrides = [parse_override(text) for text in flags.pop("per_layer")]
    null_space_rule = (
        given or other_covariances or any(rule in o["hyperparameters"] for o in overrides for rule in RULES)
    )
    in_step = data is not None and not null_space_rule
    asked = [name for name, value in (("--share", share), ("--donor-data", donor_data or None)) if value is not None]
    asked += ["several donors"] if donors[1:] else []
    if asked and not in_step:
        raise RefusedError(f"{' and '.join(asked)}: for sequential grafts, from --data and without another rule")
    if share is not None:
        given = {"share": share}
    fields: dict[str, Any] = {
        "models": (recipient, *donors),
        "overrides": overrides,
    }
    fields |= {name: value for name, value in flags.items() if value not in (None, ())}
    null_space = {
        "method": "graft",
        "hyperparameters": given,
        "covariances": (covariances or str(name_covariances(out)), *filter(None, [other_covariances])),
    }
    if in_step:
        names = ["", "donor-"] if not donors[1:] else ["", *(f"donor-{i}-" for i in range(1, len(donors) + 1))]
        files = [name_covariances(out, name) for name in names]
        refitted = {"method": "sequential_graft", "hyperparameters": given, "covariances": tuple(map(str, files))}
        settings = parse_config(fields | refitted, "command line")
        try:
            collect_in_step(settings, data, donor_data, field, files, resume=resume)
        except CannotStepError as error:
            if asked:
                raise
            said = "; ".join(error.problems)
            Console(stderr=True).print(f"[yellow]a soft null-space graft instead:[/] {show(said)}", soft_wrap=True)
            in_step = False
    if not in_step:
        settings = parse_config(fields | null_space, "command line")
        if data is not None:
            collect_first(recipient, data, field, Path(settings.covariances[0]), resume=resume)
    run_merge(settings, out, plan_only=plan_only, resume=resume, as_json=as_json)


def name_covariances(out: Path | None, prefix: str = "") -> Path:
    """Where covariances that are collected on the way are kept: a graft is only reproducible with them."""
    if out is None:
        raise RefusedError("say where to write with --out DIR")
    return out.with_name(f"{out.name}.{prefix}covariances.safetensors")


def collect_in_step(
    config: MergeConfig,
    data: str | None,
    others: Sequence[str],
    field: str | None,
    files: Sequence[Path],
    *,
    resume: bool,
) -> None:
    """Collect what a sequential graft takes, unless the run that is resumed did.

    Raises:
        CannotStepError: these models or data allow none.
    """
    if resume and all(file.exists() for file in files):
        return
    if resume and files[0].exists():
        raise CannotStepError(f"{files[0]} is of a null-space graft that was begun")
    if not has_torch():
        raise CannotStepError("torch and transformers, which run models in step, are not installed here")
    if resume:
        for file in files[1:]:  # the recipient's is written last: these are of a collection that was stopped
            file.unlink(missing_ok=True)
    let_threads_sleep()
    sequential = import_module("rgsp_jax.activations.sequential")
    settings = CovarianceSettings(field=field or CovarianceSettings.field, held_back=sequential.HELD_BACK)
    with progress_bar("sites") as progress:
        sequential.collect_sequentially(
            config.models[0],
            config.models[1:],
            data,
            files,
            settings,
            others=others,
            progress=progress,
            **config.hyperparameters,
        )


def collect_first(model: str, data: str, field: str | None, path: Path, *, resume: bool) -> None:
    """Collect the recipient's covariances, unless the run that is resumed did."""
    if resume and path.exists():
        return
    settings = CovarianceSettings(field=field or CovarianceSettings.field)
    let_threads_sleep()
    with progress_bar() as progress:
        collect_covariances(model, data, path, settings, progress)
