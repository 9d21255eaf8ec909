"""The record of finished work beside an unfinished output, so that a killed merge goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgsp_jax.errors import RefusedError

NAME = "journal.jsonl"


class Journal:
    """Append-only JSON lines: a fingerprint of the merge first, then one entry per finished item.

    An entry is one `write` call, so that a killed process leaves whole lines and at most one torn last line; a machine
    that lost its power may leave worse. What stands behind the first line that cannot be read is dropped. Nothing is
    fsynced here: entries carry digests, and a resumed merge believes only data that match them.
    """

    def __init__(self, directory: Path, fingerprint: str, name: str = NAME):
        self.path = directory / name
        self.entries: dict[int, Mapping[str, Any]] = {}
        kept = self._read(fingerprint) if self.path.exists() else 0
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, kept)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if not kept:
            self._append({"fingerprint": fingerprint})

    def _read(self, fingerprint: str) -> int:
        """Load the whole lines; how many bytes they are."""
        lines, kept = read_lines(self.path)
        if lines and lines[0].get("fingerprint") != fingerprint:
            raise explain_other(self.path.parent)
        self.entries = {line["item"]: line for line in lines[1:]}
        return kept

    def _append(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]

    def record(self, item: int, records: list[dict[str, Any]]) -> None:
        """Note that an item's data are written; `records` holds one entry per piece."""
        entry = {"item": item, "records": records}
        self._append(entry)
        self.entries[item] = entry

    def forget(self, item: int) -> None:
        """Take an item as not done: its data are not what the journal says."""
        self.entries.pop(item, None)

    def close(self) -> None:
        os.close(self._descriptor)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """What stands in a journal before the first line that cannot be read, and how many bytes that is."""
    kept = 0
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        entry = read_entry(line, "item" if lines else "fingerprint")
        if entry is None:
            break
        kept += len(line)
        lines.append(entry)
    return lines, kept


def explain_other(workshop: object) -> RefusedError:
    """The refusal to go on with another merge's work."""
    return RefusedError(
        f"{workshop} was begun with other settings or other model files, so it cannot be resumed:"
        " delete it, or repeat the command that began it"
    )


def read_entry(line: bytes, key: str) -> dict[str, Any] | None:
    """One line of the journal; None where it is torn, or not what was once written."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if line.endswith(b"\n") and isinstance(entry, dict) and key in entry else None
