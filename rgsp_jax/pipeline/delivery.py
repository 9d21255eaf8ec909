"""A merge whose output lies in a store: every part is made on the local disk, audited, uploaded, noted and removed."""

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint import ShardPlan, TensorSpec
from rgsp_jax.checkpoint.remote_source import read_remote_header
from rgsp_jax.checkpoint.shard_writer import INDEX_NAME, write_index
from rgsp_jax.checkpoint.store import RemotePath, upload
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.audit import audit, compare_specs, find_uneven
from rgsp_jax.pipeline.decision import Decision
from rgsp_jax.pipeline.parts import NAME as CUT
from rgsp_jax.pipeline.parts import to_json
from rgsp_jax.pipeline.plan import WorkItem
from rgsp_jax.pipeline.preparation import Preparation
from rgsp_jax.pipeline.records import collect_pieces
from rgsp_jax.pipeline.run import Merged, Run, Spoilt, complete, is_finite, nothing, refuse_non_finite
from rgsp_jax.pipeline.site import SINGLE, StoreSite
from rgsp_jax.pipeline.work import FileHash, Part, hash_files, lay_out, merge_part, open_part, plan_parts, read_bytes
from rgsp_jax.pipeline.workshop import TOKEN, explain_os_error

CONFIG = "config.json"


def deliver(
    run: Run, site: StoreSite, preparation: Preparation, decision: Decision, flags: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Do the merge and put it into the store; facts of the result."""
    shards, spoilt = lay_out(preparation, decision.cut), Spoilt()
    try:
        with explained(site.workshop), scratch(site) as directory:
            token = run.team.meet("made", nothing, lambda _: begin(site, decision, spoilt))
            facts = Delivery(run, site, preparation, decision, shards, directory).deliver(flags, token, spoilt)
        with explained(site.workshop):
            run.team.meet("left", nothing, lambda _: site.workshop.remove_all())
        return facts
    except BaseException as error:
        run.team.fail(error)  # the others have ended their work when this returns
        if isinstance(error, RefusedError) and spoilt.all and run.leads:
            with suppress(OSError):  # a store that takes nothing more away: what went wrong first is said
                site.remove(shards)
        raise


@contextmanager
def explained(workshop: RemotePath) -> Iterator[None]:
    """Failures of the store and of the disk as refusals."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, workshop) from error


@contextmanager
def scratch(site: StoreSite) -> Iterator[Path]:
    """A local directory of this process alone."""
    with tempfile.TemporaryDirectory(prefix=f"{site.out.name}-", dir=site.room) as directory:
        yield Path(directory)


def begin(site: StoreSite, decision: Decision, spoilt: Spoilt) -> str:
    """Note the cut, so that no other merge is begun here; the token of this run."""
    assert decision.cut is not None
    token = secrets.token_hex(16)
    try:
        if site.read_cut() is None:
            (site.workshop / CUT).write_bytes(to_json(decision.cut, decision.fingerprint).encode(), create=True)
            spoilt.all = True
        (site.workshop / TOKEN).write_bytes(token.encode())
    except FileExistsError:
        raise RefusedError(f"{site.workshop} was begun by another process just now: choose another --out") from None
    except OSError as error:
        raise RefusedError(f"{error.filename or site.workshop} cannot be written: {error.strerror or error}") from None
    return token


class Delivery:
    """One process's share of a merge into a store."""

    def __init__(
        self,
        run: Run,
        site: StoreSite,
        preparation: Preparation,
        decision: Decision,
        shards: ShardPlan,
        directory: Path,
    ):
        self.run, self.site, self.preparation, self.decision = run, site, preparation, decision
        self.shards, self.directory = shards, directory
        self.digests: list[dict[str, str]] = []
        self.files: dict[str, str] = {}

    def deliver(self, flags: Mapping[str, list[str]], token: str, spoilt: Spoilt) -> dict[str, Any]:
        """Merge the parts of this process; process 0 puts together what all have done."""
        team, merged = self.run.team, Merged()
        team.kept = f"what is done is kept in {self.site.workshop}: finish it with the same command and --resume"

        def open_own() -> None:
            self.site.check_token(token)
            if problems := self.site.find_scratch_problems(self.shards):
                raise RefusedError(problems)

        def put_together(found: Sequence[dict[str, Any]]) -> None:
            merged.pieces.update(collect_pieces(entry for one in found for entry in one.pop("entries")))
            merged.work.extend(found)
            spoilt.all = True
            refuse_non_finite(self.preparation, merged.pieces)
            spoilt.all = False

        with hash_files(self.preparation.checkpoints if self.run.overview else (), team.index, team.count) as hashes:
            team.meet("begun", open_own)
            spoilt.all = False
            team.meet("merged", self.merge_own, put_together, long=True)
            return team.meet(
                "finished",
                lambda: self.report_own(hashes),
                lambda audited: self.complete(merged, flags, audited),
                long=True,
            )

    def merge_own(self) -> dict[str, Any]:
        """Merge and upload the parts of this process, or take them as they are; what there is to say of them."""
        run, decision = self.run, self.decision
        started, before = time.monotonic(), read_bytes(self.preparation.checkpoints)
        parts = plan_parts(self.preparation, decision.cut, decision.fingerprint, decision.dealt[run.team.index])
        total = sum(part.plan.bytes_in + part.plan.bytes_out for part in parts)
        audited = sum(part.plan.bytes_out for part in parts)
        entries: list[Mapping[str, Any]] = []
        resumed = 0
        for part in parts:
            run.team.check()
            record = self.site.read_record(part.number, part.fingerprint)
            if record is not None:
                resumed += len(record["entries"])
                if run.progress:
                    run.progress("merge", part.plan.bytes_in + part.plan.bytes_out, total, tuple(part.plan.tasks))
            else:
                record = self.merge_one(part, total, audited)
            entries += record["entries"]
            self.digests.append(record["digests"])
            self.files |= record["files"]
        return {
            "entries": entries,
            "resumed": resumed,
            "bytes_read": read_bytes(self.preparation.checkpoints) - before,
            "seconds": round(time.monotonic() - started, 3),
        }

    def merge_one(self, part: Part, total: int, audited: int) -> dict[str, Any]:
        """Merge one part on the disk, audit and upload it; its record. One that is not finite stays here."""
        run = self.run

        def on_done(item: WorkItem) -> None:
            run.team.check()
            if run.progress:
                run.progress("merge", item.bytes_in + item.bytes_out, total, tuple(p.name for p in item.pieces))

        def on_tensor(name: str, done: int) -> None:
            run.team.check()
            if run.progress:
                run.progress("audit", done, audited, (name,))

        opened = open_part(part, self.directory, self.shards)
        writer = opened.writer
        with closing(opened.journal):
            merge_part(self.preparation, opened, on_done, compute=run.compute, devices=run.devices)
            entries = list(opened.journal.entries.values())
        pieces = collect_pieces(entries)
        record: dict[str, Any] = {"fingerprint": part.fingerprint, "entries": entries, "digests": {}, "files": {}}
        if is_finite(self.preparation, pieces):
            writer.finish()
            record["digests"], record["files"] = audit(writer.directory, part.plan, pieces, writer, on_tensor)
            record["objects"] = {
                shard.file_name: self.send(writer.directory, shard.file_name) for shard in writer.shards
            }
            self.site.write_record(part.number, record)
        shutil.rmtree(writer.directory)
        opened.journal.path.unlink()
        return record

    def send(self, directory: Path, file_name: str) -> dict[str, Any]:
        """Upload a weight file; what a later run knows it by."""
        target = self.site.place_of(file_name)
        upload(directory / file_name, target)
        identity = target.identify()
        if identity is None:
            raise RefusedError(f"{target} vanished right after it was uploaded: is something else writing there?")
        return {"size": identity.size, "marks": identity.marks}

    def report_own(self, hashes: Sequence[FileHash]) -> dict[str, Any]:
        """What the audit of this process's files found, and the models' hashes that fell to it."""
        return {
            "digests": self.digests,
            "files": self.files,
            "hashes": [[of.model, of.file, of.value.result()] for of in hashes],
            "bytes_hashed": sum(of.size for of in hashes),
        }

    def complete(
        self, merged: Merged, flags: Mapping[str, list[str]], audited: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Everything beside the weights, and last of all what makes a model of them; facts of the result."""
        parts = [digests for found in audited for digests in found["digests"]]
        self.audit_objects(parts)
        digests = {name: value for part in parts for name, value in part.items()}
        files = dict(sorted(item for found in audited for item in found["files"].items()))
        directory = self.directory / "beside"
        directory.mkdir()
        arguments = (self.run, self.preparation, self.decision, self.shards, merged, flags, audited, digests, files)
        facts = complete(directory, *arguments)
        write_index(directory, self.shards)
        self.publish(directory)
        return facts

    def audit_objects(self, parts: Sequence[Mapping[str, str]]) -> None:
        """RefusedError where a tensor is in no part or in several, or its object's header does not name it."""
        problems = find_uneven(self.preparation.plan, parts)
        if not problems:
            found: dict[str, TensorSpec] = {}
            for shard in self.shards.shards:
                place = self.site.place_of(shard.file_name)
                header = read_remote_header(place)
                if header.specs.keys() != set(shard.names):
                    problems.append(f"audit: {place} does not hold the tensors that its index names")
                found |= header.specs
            problems += compare_specs(found, self.preparation.plan)
        if problems:
            raise RefusedError(problems)

    def publish(self, directory: Path) -> None:
        """Upload a directory, what readers look for last; nothing more is written after that."""
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda name: (name == INDEX_NAME, name == CONFIG, name)):
            self.run.team.check()
            upload(directory / name, self.site.out / name)
        if self.shards.shards[0].file_name == SINGLE:
            self.site.place_of(SINGLE).copy_to(self.site.out / SINGLE)
