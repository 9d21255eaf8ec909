"""Where an unfinished output lies: in `OUT.incomplete` on a disk, or in objects under that name in a store.

OUT.incomplete/parts.json          how the merge is cut; made only where there is none
OUT.incomplete/token               drawn by process 0, found by the others where they see the same store
OUT.incomplete/part-*.json         of a finished part: what its journal has, and which object holds it
OUT.incomplete/model.safetensors   the weights of a merge of one part, until all else is there
OUT/model-*-of-*.safetensors       the weights of one of several

A store renames nothing, and a copy of every object would take as long as the merge did. So the files of several parts
lie at once where they will stay, and what makes them a model comes last: the index, without which no reader takes
numbered files for a model, or, of one part, the copy of the one file. `config.json` is the last but one.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rgsp_jax.checkpoint import ShardPlan, check_disk, plan_shards
from rgsp_jax.checkpoint.shard_writer import INDEX_NAME
from rgsp_jax.checkpoint.store import RemotePath
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.journal import NAME as JOURNAL
from rgsp_jax.pipeline.journal import explain_other
from rgsp_jax.pipeline.parts import NAME as CUT
from rgsp_jax.pipeline.parts import Cut, parse_cut, read_cut
from rgsp_jax.pipeline.preparation import Preparation
from rgsp_jax.pipeline.work import count_done
from rgsp_jax.pipeline.workshop import REPORT_ROOM, TOKEN, clear_finished, find_place_problems, name_workshop

SINGLE = "model.safetensors"


class Site(Protocol):
    """The place of an unfinished output."""

    @property
    def workshop(self) -> Path | RemotePath: ...

    def clear_finished(self) -> None:
        """Remove what a process killed right after it published leaves behind; RefusedError says so."""
        ...

    def find_problems(self, preparation: Preparation, *, resume: bool) -> list[str]:
        """Why the merge cannot begin as things lie: an unfinished one is there, or too little room."""
        ...

    def read_cut(self) -> tuple[str, Cut] | None:
        """Fingerprint and cut of what was begun in parts."""
        ...

    def takes_parts(self, distributed: bool) -> bool:
        """Whether a merge that is not cut yet should be."""
        ...

    def count_done(self, preparation: Preparation, cut: Cut | None) -> list[float]:
        """For every part the share of it that is done."""
        ...


@dataclass(frozen=True)
class DiskSite:
    """A file system, shared by all processes where there are several."""

    out: Path

    @property
    def workshop(self) -> Path:
        return name_workshop(self.out)

    def clear_finished(self) -> None:
        clear_finished(self.out, self.workshop)

    def find_problems(self, preparation: Preparation, *, resume: bool) -> list[str]:
        copies = 2 if preparation.checkpoints[0].format == "orbax" else 1
        return find_place_problems(self.out, copies * lay_out_whole(preparation).file_bytes, resume=resume)

    def read_cut(self) -> tuple[str, Cut] | None:
        return read_cut(self.workshop / CUT) if (self.workshop / CUT).exists() else None

    def takes_parts(self, distributed: bool) -> bool:
        return distributed and not (self.workshop / JOURNAL).exists()

    def count_done(self, preparation: Preparation, cut: Cut | None) -> list[float]:
        return count_done(self.workshop, preparation, cut)


@dataclass(frozen=True)
class StoreSite:
    """A store, and a local directory where files are made."""

    out: RemotePath
    scratch: Path | None = None

    @property
    def workshop(self) -> RemotePath:
        return self.out.beside(f"{self.out.name}.incomplete")

    @property
    def room(self) -> Path:
        """The local directory for scratch."""
        return self.scratch or Path(tempfile.gettempdir())

    def clear_finished(self) -> None:
        if not self.workshop.list_entries():
            return
        if any((self.out / seal).inform() is not None for seal in (INDEX_NAME, SINGLE)):
            self.workshop.remove_all()
            raise RefusedError(
                f"{self.out} is complete, there is nothing to resume: its merge had finished when it was stopped"
            )

    def find_problems(self, preparation: Preparation, *, resume: bool) -> list[str]:
        problems = []
        if preparation.checkpoints[0].format == "orbax":
            problems.append(f"an Orbax output cannot be written to {self.out}: give a local --out and copy it there")
        if self.scratch is not None and not self.scratch.is_dir():
            problems.append(f"--scratch {self.scratch} is no directory: create it first")
        if not resume and self.workshop.list_entries():
            problems.append(
                f"{self.workshop} is left from an earlier merge: finish it with --resume, or delete it and {self.out}"
            )
        return problems + self.find_scratch_problems(lay_out_whole(preparation))

    def find_scratch_problems(self, shards: ShardPlan) -> list[str]:
        """One sentence where the largest file has no room on the local disk."""
        return check_disk(self.room, max(shard.size for shard in shards.shards) + REPORT_ROOM)

    def read_cut(self) -> tuple[str, Cut] | None:
        place = self.workshop / CUT
        try:
            return parse_cut(place.read_bytes(), place, self.workshop)
        except FileNotFoundError:
            return None

    def takes_parts(self, distributed: bool) -> bool:
        return True  # a part is what is uploaded, and what resuming takes or does again

    def count_done(self, preparation: Preparation, cut: Cut | None) -> list[float]:
        assert cut is not None
        there = {entry["name"] for entry in self.workshop.list_entries()}
        return [float(name_record(number) in there) for number in range(len(cut.parts))]

    def check_token(self, token: str) -> None:
        """RefusedError where this process does not see the store that process 0 writes to."""
        try:
            found = (self.workshop / TOKEN).read_bytes()
        except FileNotFoundError:
            found = b""
        if found != token.encode():
            raise RefusedError(
                f"{self.workshop} is not the place that process 0 works in: all processes must write to one store"
            )

    def place_of(self, file_name: str) -> RemotePath:
        """Where a weight file lies until the output is complete."""
        return (self.workshop if file_name == SINGLE else self.out) / file_name

    def read_record(self, number: int, fingerprint: str) -> dict[str, Any] | None:
        """The record of a finished part whose object is there as noted; None where it has to be done."""
        place = self.workshop / name_record(number)
        try:
            record = json.loads(place.read_bytes())
            if record["fingerprint"] != fingerprint:
                raise explain_other(self.workshop)
            noted = {name: (facts["size"], facts["marks"]) for name, facts in record["objects"].items()}
            record["entries"], record["digests"], record["files"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, RefusedError):
                raise
            return None
        for name, (size, marks) in noted.items():
            identity = self.place_of(name).identify()
            if identity is None or identity.size != size or [list(mark) for mark in identity.marks] != marks:
                return None
        return record

    def write_record(self, number: int, record: Mapping[str, Any]) -> None:
        """Note a finished part."""
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
        (self.workshop / name_record(number)).write_bytes(text.encode())

    def remove(self, shards: ShardPlan) -> None:
        """Delete all that a merge of these files has put here."""
        for shard in shards.shards:
            self.place_of(shard.file_name).remove()
        self.workshop.remove_all()


def name_record(number: int) -> str:
    """The record of one finished part."""
    return f"part-{number + 1:05d}.json"


def lay_out_whole(preparation: Preparation) -> ShardPlan:
    """The files of an output that is not cut."""
    return plan_shards(preparation.plan.specs, preparation.config.max_shard_size)


def choose_site(out: Path | RemotePath, scratch: Path | None = None) -> Site:
    """The place of an output."""
    return StoreSite(out, scratch) if isinstance(out, RemotePath) else DiskSite(out)
