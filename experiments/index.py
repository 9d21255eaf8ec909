"""Collect what every experiment recorded: its headline, the command that repeats it, and where its tables are.

    python -m experiments.index

Writes experiments/results/index.md from the JSON records beside it and in experiments/benchmarks/results. Seconds.
"""

import argparse
import ast
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
DIRECTORIES = (ROOT / "results", ROOT / "benchmarks" / "results")
LONGEST = 600
"""Characters of a headline that is taken from prose."""


def find_command(record: Mapping[str, Any]) -> str | None:
    """Return the command that a record says made it."""
    return record.get("command") or record.get("settings", {}).get("command")


def find_headline(record: Mapping[str, Any], path: Path) -> str:
    """Return the record's own headline, else what its script expects, else the first prose of its Markdown."""
    if "headline" in record:
        return str(record["headline"])
    script, markdown = path.parent.parent / f"{path.stem}.py", path.with_suffix(".md")
    text = (ast.get_docstring(ast.parse(script.read_text())) or "") if script.exists() else ""
    if (at := text.find("Expected")) < 0:
        text, at = markdown.read_text() if markdown.exists() else "", 0
    paragraphs = [" ".join(p.split()) for p in text[at:].split("\n\n") if p.strip() and p[0] not in "# |\n"]
    return next((p if len(p) <= LONGEST else p[:LONGEST].rsplit(" ", 1)[0] + " ..." for p in paragraphs), "")


def list_records(directories: Sequence[Path], base: Path) -> list[str]:
    """Return the lines of the index: one section per record, by name; paths are relative to `base`'s directory."""
    lines = []
    for path in sorted((p for d in directories for p in d.glob("*.json")), key=lambda p: (p.parent != base, p.name)):
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise SystemExit(f"{path} is no record: its JSON is a {type(record).__name__}")
        others = [path.with_suffix(suffix) for suffix in (".md", ".json", ".png")]
        links = [f"[{p.suffix[1:]}]({Path(os.path.relpath(p, base)).as_posix()})" for p in others if p.exists()]
        lines += [f"## {path.stem}", ""]
        if headline := find_headline(record, path):
            lines += [headline, ""]
        if command := find_command(record):
            lines += [f"    {command}", ""]
        lines += [" ".join(links), ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> str:
    """Write the index and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directories", nargs="+", type=Path, default=list(DIRECTORIES), help="where records are")
    parser.add_argument("--out", type=Path, default=DIRECTORIES[0] / "index.md")
    options = parser.parse_args(arguments)
    lines = ["# Results", "", "Made by `python -m experiments.index` from the records beside it.", ""]
    text = "\n".join([*lines, *list_records(options.directories, options.out.parent)]).rstrip() + "\n"
    options.out.write_text(text)
    return text


if __name__ == "__main__":
    main()
