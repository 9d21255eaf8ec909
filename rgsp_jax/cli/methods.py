"""`rgsp methods`."""

import click
from rich.console import Console
from rich.table import Table

from rgsp_jax.registry import methods as table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[NAME...]")
def methods(names: tuple[str, ...]) -> None:
    """List the merge methods; with NAMEs, their hyperparameters too."""
    if unknown := [name for name in names if name not in table]:
        raise click.UsageError(f"no method {', '.join(unknown)}; there are {', '.join(table)}")
    console = Console()
    for name in names:
        method = table[name]
        grid = Table(
            "hyperparameter", "default", "allowed", "meaning", title=f"{name}: {method.summary}", title_justify="left"
        )
        for key, h in method.hyperparameters.items():
            grid.add_row(key, str(method.defaults[key]), h.expected(), h.help)
        console.print(grid)
    if not names:
        grid = Table("method", "models", "needs", "what it does")
        for name, method in table.items():
            low, high = method.models
            count = str(low) if low == high else f"{low}+" if high is None else f"{low}-{high}"
            grid.add_row(name, count, ", ".join(sorted(method.needs)) or "-", method.summary)
        console.print(grid)
