"""Execute notebooks and keep what they print and draw: `python notebooks/execute.py [NOTEBOOK ...]`, by default all.

Every notebook runs in a process of its own, with the interpreter that runs this, on the CPU.
"""

import os
import sys
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SECONDS_PER_CELL = 300


class RunningInterpreter(AsyncKernelManager):
    """Starts kernels with this very interpreter, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def find_notebooks() -> list[Path]:
    """All of them, in the order they are read."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh run; CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=RunningInterpreter,
        timeout=SECONDS_PER_CELL,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment | {"JAX_PLATFORMS": "cpu"})
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from machine to machine and says nothing."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", nbformat.from_dict({})
    return notebook


def main() -> None:
    """Execute the notebooks that are named, or all, in place."""
    for path in [Path(name) for name in sys.argv[1:]] or find_notebooks():
        nbformat.write(execute(path), path)
        print(path.name)


if __name__ == "__main__":
    main()
