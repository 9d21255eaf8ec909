"""The command line: arguments in, tables out; the work is the pipeline's."""

import logging
import os
import sys
from importlib import import_module
from pathlib import Path

import click

from rgsp_jax.errors import RefusedError
from rgsp_jax.version import __version__

REFUSED, INTERRUPTED = 2, 130
SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_compilations() -> None:
    """Let JAX keep what it compiles between runs, in the user's cache unless JAX_COMPILATION_CACHE_DIR says where."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "rgsp_jax"))
    if SHORTEST not in os.environ:
        jax.config.update(SHORTEST.lower(), 0.0)  # so that a second run compiles nothing


def keep_to_one_thread() -> None:
    """One BLAS thread for each LAPACK call, unless the environment says how many; before numpy is imported.

    Decompositions of single matrices gain little by more, whose threads spin on cores that other work wants:
    `python -m experiments.benchmarks.whole_merge` has both. Products are XLA's, on all cores.
    """
    if not {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():
        os.environ["OPENBLAS_NUM_THREADS"] = "1"


COMMANDS = {
    "align": "Put a model's units and heads into the order of another's.",
    "compare": "Say whether models share an ancestor and can be merged.",
    "convert": "Convert a model to another format, and back, bit for bit.",
    "covariances": "Run a model over data and keep the covariances of its inputs.",
    "demo": "Train small experts on digits, merge them, score every method.",
    "frontier": "Score every strength of a graft, beside plain averages.",
    "graft": "Add what donors know to a model that keeps what it does.",
    "learn": "Learn how to merge from a few inputs of each model.",
    "merge": "Merge models into one.",
    "methods": "List the merge methods and their hyperparameters.",
    "search": "Merge two models at the coefficient that AdaMMS chooses.",
    "sweep": "Merge with every setting of a list, and score each merge.",
}
"""By name, what `rgsp --help` says of each without importing it."""


class LazyCommands(click.Group):
    """Commands imported when they are asked for, so that `--help` does not wait for JAX."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        keep_to_one_thread()
        keep_compilations()
        return getattr(import_module(f"rgsp_jax.cli.{cmd_name}"), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rgsp")
def cli() -> None:
    """Merge fine-tuned models from their weights alone."""


def main() -> None:
    """Entry point: a refusal is one sentence per problem and exit code 2, Ctrl-C is exit code 130."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its remark on its first run on a machine
    try:
        cli(standalone_mode=False)
    except RefusedError as error:
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)
        sys.exit(REFUSED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:  # what the disk or the system denies is no fault of the program
        where = f": {error.filename}" if error.filename else ""
        click.echo(f"error: {error.strerror or error}{where}", err=True)
        sys.exit(REFUSED)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
