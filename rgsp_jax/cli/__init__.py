"""The command line: arguments in, tables out; the work is the pipeline's."""

import logging
import os
import sys
from importlib import import_module
from pathlib import Path

import click
import jax

from rgsp_jax.errors import RefusedError
from rgsp_jax.version import __version__

REFUSED, INTERRUPTED = 2, 130


def keep_compilations() -> None:
    """Let JAX keep what it compiles between runs, in the user's cache unless JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "rgsp_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


COMMANDS = (
    "align",
    "compare",
    "convert",
    "covariances",
    "demo",
    "frontier",
    "graft",
    "learn",
    "merge",
    "methods",
    "search",
    "sweep",
)


class LazyCommands(click.Group):
    """Commands imported when they are asked for, so that `--help` does not wait for JAX."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        keep_compilations()
        return getattr(import_module(f"rgsp_jax.cli.{cmd_name}"), cmd_name)


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
