"""Experiments are scripts, not a package."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    """`script(name)` is the script as it is when it is run: its directory is on the path."""
    directory = str(Path(__file__).parents[2] / "experiments")
    sys.path.insert(0, directory)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(directory)
