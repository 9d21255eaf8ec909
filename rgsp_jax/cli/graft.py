"""`rgsp graft`."""

from pathlib import Path
from typing import Any

import click

from rgsp_jax.activations import CovarianceSettings, collect_covariances
from rgsp_jax.cli.covariances import let_threads_sleep, progress_bar
from rgsp_jax.cli.merge import parse_override, run_merge
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import parse_config

RULES = ("ridge", "energy", "threshold")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipient")
@click.argument("donor")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory to create.")
@click.option("--covariances", help="File of `rgsp covariances RECIPIENT`.")
@click.option("--donor-covariances", help="Of the donor's inputs, or what they are thought to be; for a ridge.")
@click.option("--data", help="Or what to collect them from: .jsonl, .txt, .npz or a directory of images.")
@click.option("--field", help="Of a .jsonl file's lines that holds the text.")
@click.option("--ridge", type=float, help="Soft: protects less as it grows, in mean eigenvalues. Default 3.")
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
    donor: str,
    out: Path | None,
    covariances: str | None,
    data: str | None,
    field: str | None,
    plan_only: bool,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Add what DONOR knows to RECIPIENT, and keep what RECIPIENT does on data of its own.

    The data are a few hundred unlabelled inputs of the kind that RECIPIENT must not get worse on.
    """
    if (covariances is None) == (data is None):
        raise RefusedError("give --covariances FILE, or --data FILE to collect them from, and not both")
    given = {name: flags.pop(name) for name in RULES}
    donors = flags.pop("donor_covariances")
    fields: dict[str, Any] = {
        "models": (recipient, donor),
        "method": "graft",
        "hyperparameters": {name: value for name, value in given.items() if value is not None},
        "overrides": [parse_override(text) for text in flags.pop("per_layer")],
        "covariances": (covariances or str(name_covariances(out)), *filter(None, [donors])),
    }
    fields |= {name: value for name, value in flags.items() if value not in (None, ())}
    settings = parse_config(fields, "command line")
    if data is not None:
        collect_first(recipient, data, field, Path(settings.covariances[0]), resume=resume)
    run_merge(settings, out, plan_only=plan_only, resume=resume, as_json=as_json)


def name_covariances(out: Path | None) -> Path:
    """Where covariances that are collected on the way are kept: a graft is only reproducible with them."""
    if out is None:
        raise RefusedError("say where to write with --out DIR")
    return out.with_name(out.name + ".covariances.safetensors")


def collect_first(model: str, data: str, field: str | None, path: Path, *, resume: bool) -> None:
    """Collect the recipient's covariances, unless the run that is resumed did."""
    if resume and path.exists():
        return
    settings = CovarianceSettings(field=field) if field else CovarianceSettings()
    let_threads_sleep()
    with progress_bar() as progress:
        collect_covariances(model, data, path, settings, progress)
