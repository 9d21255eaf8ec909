"""`rgsp learn`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rgsp_jax.cli.display import show
from rgsp_jax.cli.merge import parse_assignment
from rgsp_jax.errors import RefusedError
from rgsp_jax.learning import Granularity
from rgsp_jax.pipeline import parse_config
from rgsp_jax.training import OBJECTIVES, LearnResult, LearnSettings, Record, run_learning
from rgsp_jax.training.learn import METHOD
from rgsp_jax.training.settings import OPTIMISERS, POOLINGS, SCHEDULES

SMOOTHING = 0.9


@contextmanager
def step_bar() -> Iterator[Any]:
    """A bar of steps with the loss and the agreement, smoothed, on stderr; None where nobody watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("learning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("learning", total=None, said="compiling")
        smooth: dict[str, float] = {}

        def advance(record: Record, total: int) -> None:
            seen = {"loss": record.loss, "agreement": record.agreement}
            for name, value in seen.items():
                if value is not None:
                    smooth[name] = SMOOTHING * smooth.get(name, value) + (1 - SMOOTHING) * value
            said = "  ".join(f"{name} {value:.4f}" for name, value in smooth.items())
            bars.update(task, completed=record.step, total=total, said=said)

        yield advance


def show_learned(result: LearnResult) -> None:
    """Loss and agreement of every model's inputs, before and after, and where things are."""
    console = Console()
    table = Table("inputs of", "loss before", "after", "agreement before", "after")

    def tell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    for one in result.by_model:
        cells = [tell(one[when][what]) for what in ("loss", "agreement") for when in ("before", "after")]
        table.add_row(show(one["model"]), *cells)
    console.print(table)
    console.print(f"{result.steps} steps; model {show(result.merge.out)}", highlight=False, soft_wrap=True)
    console.print(
        f"the learned setting, for `rgsp merge --config`: {show(result.config)}", highlight=False, soft_wrap=True
    )
    for warning in result.merge.warnings:
        console.print(f"[yellow]warning:[/] {show(warning)}", soft_wrap=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", multiple=True, required=True, help="Inputs of each model, in order: .jsonl, .txt or .npz.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Directory to create.")
@click.option("--method", "-m", help="Whose hyperparameters are learned. Default: relative.")
@click.option("--learn", "names", multiple=True, metavar="NAME", help="Which of them. Default: all numbers it takes.")
@click.option("--per", type=click.Choice(get_args(Granularity)), help="One value per this. Default: direction.")
@click.option("--loss", type=click.Choice(list(OBJECTIVES)), help="Default: distillation, of features without heads.")
@click.option("--head", "heads", multiple=True, help="Of each model without one: weight and bias, .safetensors.")
@click.option("--pooling", type=click.Choice(POOLINGS), help="Of hidden states, for heads and features. Default: mean.")
@click.option("--label-field", help="Of the data's lines: the number of the class.")
@click.option("--field", help="Of a .jsonl file's lines that holds the text. Default: text.")
@click.option("--pair-field", help="That holds a second text.")
@click.option("--max-rows", type=int, help="Inputs drawn from each model's data at most.")
@click.option("--max-length", type=int, help="Tokens of a text at most. Default: 128.")
@click.option("--steps", type=int, help="Default: 200.")
@click.option("--learning-rate", type=float, help="Default: 0.05.")
@click.option("--optimiser", type=click.Choice(list(OPTIMISERS)), help="Of optax. Default: adam.")
@click.option("--schedule", type=click.Choice(list(SCHEDULES)), help="Of the learning rate. Default: cosine.")
@click.option("--batch-size", type=int, help="Default: 16.")
@click.option("--temperature", type=float, help="Of a distillation. Default: 1.")
@click.option("--pull", type=float, help="Weight of the squared distance from the start. Default: 0.")
@click.option("--recompute", is_flag=True, help="Layers are computed again in the backward pass: less memory.")
@click.option("--rank", help="Singular directions: an integer, or a fraction of min(m, n).")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A hyperparameter, or its start.")
@click.option("--base", help="The models' common ancestor, for methods that need it.")
@click.option("--covariances", multiple=True, help="Of `rgsp covariances`, for methods that need them.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Merge these tensors only (glob, or re:REGEX).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these as in the first model.")
@click.option("--dtype", help="float32, float16, bfloat16 or float64. Default: as in the first model.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Of the inputs drawn and their order. Default: 0.")
@click.option("--save-every", type=int, help="Steps after which the state is saved. Default: 25.")
@click.option("--devices", type=int, help="Of this machine's. Default: all its accelerators, or one CPU device.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def learn(
    models: tuple[str, ...],
    out: Path,
    names: tuple[str, ...],
    rank: str | None,
    assignments: tuple[str, ...],
    devices: int | None,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Learn how to merge MODELs from a few inputs of each, and merge them so.

    The data are unlabelled inputs of the kind that each model is good at, one --data per model: the merge is to answer
    as its parent does. What is learned is how much of every parent goes into every layer. The result in DIR needs no
    data any more: DIR.learning/merge.yaml makes it again.
    """
    given = dict(parse_assignment(text, "--set") for text in assignments)
    if rank is not None:
        given |= [parse_assignment(f"rank={rank}", "--rank")]
    fields: dict[str, Any] = {"models": models, "hyperparameters": given}
    for name in ("method", "base", "covariances", "include", "exclude", "dtype"):
        if (value := flags.pop(name)) not in (None, ()):
            fields[name] = value
    fields.setdefault("method", METHOD)
    problems: list[str] = []
    try:
        config = parse_config(fields, "command line")
    except RefusedError as error:
        problems += error.problems
    chosen = {name: value for name, value in flags.items() if value not in (None, (), False)}
    try:
        settings = LearnSettings(**chosen, learn=names or None)
    except RefusedError as error:
        problems += error.problems
    if problems:
        raise RefusedError(problems)
    with step_bar() as on_step:
        result = run_learning(config, settings, out, resume=resume, on_step=on_step, devices=devices)
    click.echo(json.dumps(asdict(result), indent=2, default=str)) if as_json else show_learned(result)
