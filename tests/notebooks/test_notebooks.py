"""The notebooks run as a reader would run them, assert what they claim, and show what a run gives."""

import ast
import importlib.util
import itertools
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 300_000
"""Bytes of a notebook with its pictures."""

spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)

WORD = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[^\W\d]+|[^\w\s]")
RELATIVE, OF_RATES, OF_SMALL = 0.02, 0.01, 0.001
"""Trained networks come out a little different on another processor: an accuracy by a few of some hundred answers."""


def read_outputs(notebook):
    """The text of every code cell's outputs: what was printed, and what a cell's last line evaluated to."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = (output.text for output in cell.outputs if output.output_type == "stream")
            shown = (output.data.get("text/plain", "") for output in cell.outputs if "data" in output)
            yield cell.source, "\n".join((*printed, *(text for text in shown if not text.startswith("<Figure"))))


def differs(word, other):
    """Whether two words of an output differ, as numbers beyond what a processor may change."""
    try:
        x, y = float(word), float(other)
    except ValueError:
        return word != other
    return abs(x - y) > RELATIVE * abs(y) + (OF_RATES if abs(y) >= 0.1 else OF_SMALL)


def find_differences(text, other):
    pairs = itertools.zip_longest(WORD.findall(text), WORD.findall(other), fillvalue="(nothing)")
    return [(word, known) for word, known in pairs if differs(word, known)]


def count_checks(notebook):
    """`assert` statements and calls of numpy.testing in a notebook's cells."""
    nodes = [node for cell, _ in read_outputs(notebook) for node in ast.walk(ast.parse(cell))]
    calls = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("assert_")]
    return sum(isinstance(node, ast.Assert) for node in nodes) + len(calls)


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path):
    saved = nbformat.read(path, as_version=4)
    nbformat.validate(saved)
    assert path.stat().st_size < LARGEST
    assert count_checks(saved) >= 5
    assert all(cell.outputs or cell.source for cell in saved.cells if cell.cell_type == "code")
    found = runner.execute(path)  # raises where a cell does
    for (source, text), (_, known) in zip(read_outputs(found), read_outputs(saved), strict=True):
        assert not find_differences(text, known), f"{source}\n--- gives\n{text}\n--- and shows\n{known}"


def test_differences_are_seen():
    assert find_differences("rank 4: 0.812 True", "rank  4:\n0.815 True") == []
    assert find_differences("rank 4: 0.812", "rank 4: 0.912") == [("0.812", "0.912")]
    assert find_differences("equal: True", "equal: False") == [("True", "False")]
    assert find_differences("loss 0.025", "loss 0.03") == [("0.025", "0.03")]
    assert find_differences("a 1 2", "a 1") == [("2", "(nothing)")]
