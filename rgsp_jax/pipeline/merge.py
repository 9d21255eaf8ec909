"""`merge_checkpoints`: from paths to a complete output directory, or to a clear refusal and nothing at all."""

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint import Checkpoint, ShardPlan, convert_to_orbax, digest, hash_file, open_checkpoint, publish
from rgsp_jax.checkpoint.shard_writer import replace_file, write_index
from rgsp_jax.checkpoint.store import RemotePath, is_remote, locate
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.agreement import ask_platform, gather_facts, require_agreement, require_one_platform
from rgsp_jax.pipeline.audit import audit, audit_whole
from rgsp_jax.pipeline.config import MergeConfig
from rgsp_jax.pipeline.decision import Decision, check_place, decide
from rgsp_jax.pipeline.delivery import deliver
from rgsp_jax.pipeline.execute import Compute
from rgsp_jax.pipeline.journal import Journal
from rgsp_jax.pipeline.parts import NAME as CUT
from rgsp_jax.pipeline.parts import to_json
from rgsp_jax.pipeline.placement import Devices, place_merge
from rgsp_jax.pipeline.plan import WorkItem
from rgsp_jax.pipeline.plots import load_matplotlib
from rgsp_jax.pipeline.preparation import Preparation, check_buffers, check_covariances, prepare
from rgsp_jax.pipeline.processes import Alone, Team
from rgsp_jax.pipeline.records import collect_pieces
from rgsp_jax.pipeline.run import Merged, Run, Spoilt, complete, nothing, refuse_non_finite
from rgsp_jax.pipeline.site import DiskSite, StoreSite
from rgsp_jax.pipeline.work import (
    FileHash,
    OpenPart,
    Progress,
    forget_damaged,
    hash_files,
    lay_out,
    merge_part,
    open_part,
    plan_parts,
    read_bytes,
)
from rgsp_jax.pipeline.workshop import (
    MODEL,
    check_token,
    explain_os_error,
    lock,
    make_workshop,
    name_workshop,
    write_token,
)

__all__ = ["Journal", "MergeResult", "Progress", "check_place", "lock", "merge_checkpoints", "name_workshop"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge did."""

    out: Path | RemotePath
    method: str
    tensors: int
    counts_by_rule: dict[str, int]
    flag_counts: dict[str, int]
    warnings: tuple[str, ...]
    bytes_in: int
    bytes_out: int
    resumed_items: int
    seconds: float
    files: dict[str, str]
    """Weight files of the output and their SHA-256."""
    processes: dict[str, Any] | None = None
    """Where several processes worked: what each had to do, read and took; see `describe_work`."""


def merge_checkpoints(
    config: MergeConfig,
    out: Path | RemotePath | str,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    compute: Compute | None = None,
    overview: bool = True,
    devices: int | Devices | None = None,
    processes: Team | None = None,
    scratch: Path | str | None = None,
) -> MergeResult:
    """Merge models into the directory `out`, which appears complete or not at all.

    Work goes on in `OUT.incomplete` (the future output and the journal beside it); a killed merge is finished by the
    same call with `resume=True`, and ends byte-identical to one that was not interrupted.

    Where several processes make the same call, each with its place among `processes`, the merge is cut into parts of
    whole tensors, a weight file each, and each process reads, merges and writes those dealt to it. The cut is noted, so
    that any number of processes, or one by itself, can resume it. Every call returns when the output is complete.

    Args:
        config: what to merge and how.
        out: directory to create; for several processes, on a file system that they share. Or a place in a store
            (`gs://bucket/merged`, `s3://...`): parts are made on the local disk, and each is uploaded when it is done.
        resume: go on with an `OUT.incomplete` left by the same merge.
        progress: called as bytes are done, of this process's own share.
        compute: how items are computed, where decompositions are at hand (`rgsp_jax.sweep`).
        overview: False leaves out report, model card and the models' hashes, for a merge that is used once.
        devices: how many of this process's devices compute; None is all its accelerators, or one CPU device;
            `Devices` says how much of their memory, too. The result does not depend on it.
        processes: those that make this call, from `connect_processes`; None is this one by itself.
        scratch: local directory for the parts of an output in a store; None is the system's for temporary files.

    Raises:
        RefusedError: what the user can mend, all of it at once; nothing is left behind. In every process where another
            one is lost or fails; what is done is left for `resume` then.
    """
    started = time.monotonic()
    out = locate(str(out)) if is_remote(out) and not isinstance(out, RemotePath) else out
    out = Path(out) if isinstance(out, str) else out
    if scratch is not None and not isinstance(out, RemotePath):
        raise RefusedError(f"scratch {scratch}: it goes with an output in a store, and {out} is none")
    if out.name in ("", ".."):
        raise RefusedError(f"the output {out} has no name of its own: give the directory to create")
    team = processes or Alone()
    room = None if scratch is None else Path(scratch)
    run = Run(config, out, team, processes is not None, resume, progress, compute, overview, devices, room)
    try:
        facts = begin(run)
    except BaseException as error:
        team.fail(error)
        raise
    return MergeResult(out=out, seconds=time.monotonic() - started, **facts)


def begin(run: Run) -> dict[str, Any]:
    """Everything before the workshop, so that a refusal leaves nothing behind; then the rest."""
    team = run.team
    if team.count > 1:  # first of all, since no process gets its devices before all ask for them
        team.meet("started", ask_platform, require_one_platform)
    team.meet("cleared", nothing, lambda _: run.site.clear_finished() if run.resume else None)
    with ExitStack() as stack:
        opened: list[Preparation] = []

        def open_models() -> dict[str, str]:
            opened.append(stack.enter_context(prepare(run.config, run.out)))
            return gather_facts(opened[0]) if team.count > 1 else {}

        def settle(_: object) -> dict[str, Any]:
            decision = decide(opened[0], run.site, processes=team.count, distributed=run.distributed, resume=run.resume)
            return asdict(decision)

        def check_own() -> dict[str, list[str]]:
            place_merge(preparation.plan, devices=run.devices)
            check_covariances(preparation, names)
            return check_buffers(preparation, names)

        team.meet("opened", open_models, require_agreement)
        preparation = opened[0]
        decision = Decision.of(team.meet("settled", nothing, settle))
        own = decision.dealt[team.index]
        names = {name for number in own for name in decision.cut.parts[number]} if decision.cut else None
        if idle := sum(not numbers for numbers in decision.dealt):
            verb, count = "has" if idle == 1 else "have", len(decision.left)
            parts = f"{count} part{'s'[: count > 1]}"
            team.say(f"{idle} of {team.count} processes {verb} nothing to do: the merge is {parts}")
        flags = team.meet("checked", check_own, lambda found: {n: f for part in found for n, f in part.items()})
        if isinstance(run.site, StoreSite):
            return deliver(run, run.site, preparation, decision, flags)
        assert isinstance(run.site, DiskSite)
        return work_in(run, run.site.workshop, preparation, decision, flags)


def work_in(
    run: Run, workshop: Path, preparation: Preparation, decision: Decision, flags: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Do the merge in the workshop; facts of the result."""
    spoilt = Spoilt()
    with ExitStack() as held:

        def make(_: object) -> str:
            fresh = not workshop.exists()
            make_workshop(workshop)
            held.enter_context(lock(workshop))
            spoilt.all = fresh
            if decision.cut and not (workshop / CUT).exists():
                replace_file(workshop / CUT, to_json(decision.cut, decision.fingerprint).encode())
            return write_token(workshop) if run.team.count > 1 else ""

        try:
            with explained(workshop):
                token = run.team.meet("made", nothing, make)
                facts = merge_in(run, workshop, preparation, decision, flags, token, spoilt)
            run.team.meet("left", nothing, lambda _: shutil.rmtree(workshop))
            return facts
        except BaseException as error:
            run.team.fail(error)  # the others have left the workshop when this returns
            if isinstance(error, RefusedError) and spoilt.all and run.leads:
                shutil.rmtree(workshop, ignore_errors=True)
            raise


@contextmanager
def explained(workshop: Path) -> Iterator[None]:
    """Errors of the system as refusals."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, workshop) from error


def merge_in(
    run: Run,
    workshop: Path,
    preparation: Preparation,
    decision: Decision,
    flags: Mapping[str, list[str]],
    token: str,
    spoilt: Spoilt,
) -> dict[str, Any]:
    """Merge, audit and finish; process 0 puts together what all have done."""
    team, shards = run.team, lay_out(preparation, decision.cut)
    team.kept = f"what is done is kept in {workshop}: finish it with the same command and --resume"
    parts: list[OpenPart] = []
    merged = Merged()

    def open_own(stack: ExitStack) -> None:
        if token:
            check_token(workshop, token)
        for part in plan_parts(preparation, decision.cut, decision.fingerprint, decision.dealt[team.index]):
            parts.append(open_part(part, workshop, shards))
            stack.enter_context(closing(parts[-1].journal))

    def put_together(found: Sequence[dict[str, Any]]) -> None:
        merged.pieces.update(collect_pieces(entry for one in found for entry in one.pop("entries")))
        merged.work.extend(found)
        spoilt.all = True
        refuse_non_finite(preparation, merged.pieces)
        spoilt.all = False

    def conclude(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return finish(run, workshop / MODEL, preparation, decision, shards, merged, flags, found)

    if run.overview and run.leads:
        threading.Thread(target=load_matplotlib, name="rgsp-plots", daemon=True).start()
    with hash_files(preparation.checkpoints if run.overview else (), team.index, team.count) as hashes:
        with ExitStack() as stack:
            team.meet("begun", lambda: open_own(stack))
            spoilt.all = False
            team.meet("merged", lambda: merge_own(run, preparation, parts), put_together, long=True)
        return team.meet("finished", lambda: audit_own(run, parts, hashes), conclude, long=True)


def merge_own(run: Run, preparation: Preparation, parts: Sequence[OpenPart]) -> dict[str, Any]:
    """Merge the parts of this process; what there is to say of them."""
    started, before = time.monotonic(), read_bytes(preparation.checkpoints)
    total = sum(part.plan.bytes_in + part.plan.bytes_out for part in parts)

    def on_done(item: WorkItem) -> None:
        run.team.check()
        if run.progress:
            run.progress("merge", item.bytes_in + item.bytes_out, total, tuple(p.name for p in item.pieces))

    resumed = sum(forget_damaged(part.plan, part.journal, part.writer) for part in parts)
    for part in parts:
        merge_part(preparation, part, on_done, compute=run.compute, devices=run.devices)
    return {
        "entries": [entry for part in parts for entry in part.journal.entries.values()],
        "resumed": resumed,
        "bytes_read": read_bytes(preparation.checkpoints) - before,
        "seconds": round(time.monotonic() - started, 3),
    }


def audit_own(run: Run, parts: Sequence[OpenPart], hashes: Sequence[FileHash]) -> dict[str, Any]:
    """Audit the files of this process, and wait for the models' hashes that fell to it."""
    total = sum(part.plan.bytes_out for part in parts)
    found: list[tuple[dict[str, str], dict[str, str]]] = []

    def on_tensor(name: str, done: int) -> None:
        run.team.check()
        if run.progress:
            run.progress("audit", done, total, (name,))

    with ThreadPoolExecutor(1, "rgsp-sync") as pool:  # the disk takes what is written while it is read back
        synced = [pool.submit(part.writer.finish) for part in parts]
        for part in parts:
            pieces = collect_pieces(part.journal.entries.values())
            found.append(audit(part.writer.directory, part.plan, pieces, part.writer, on_tensor))
        for one in synced:
            one.result()
    return {
        "digests": [digests for digests, _ in found],
        "files": {name: value for _, files in found for name, value in files.items()},
        "hashes": [[of.model, of.file, of.value.result()] for of in hashes],
        "bytes_hashed": sum(of.size for of in hashes),
    }


def as_orbax(directory: Path, parent: Checkpoint, digests: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """The audited weights as an Orbax checkpoint with the parent's tree, read back; its path, its files' SHA-256."""
    converted = directory.with_name("orbax")
    shutil.rmtree(converted, ignore_errors=True)
    convert_to_orbax(directory, parent, converted)
    with open_checkpoint(converted) as copy:
        if wrong := [name for name, expected in digests.items() if digest(copy.read(name)) != expected]:
            raise RefusedError(f"audit: {name!r} in the Orbax checkpoint is not what was merged" for name in wrong)
        return converted, {
            path.relative_to(converted).as_posix(): hash_file(path)
            for path in copy.weight_files
            if isinstance(path, Path)
        }


def finish(
    run: Run,
    directory: Path,
    preparation: Preparation,
    decision: Decision,
    shards: ShardPlan,
    merged: Merged,
    flags: Mapping[str, list[str]],
    audited: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything beside the audited weights in `directory`, and the output's name; facts of the result."""
    assert isinstance(run.out, Path)
    plan, first = preparation.plan, preparation.checkpoints[0]
    parts = [digests for found in audited for digests in found["digests"]]
    if decision.cut:
        write_index(directory, shards)
        audit_whole(directory, plan, parts)
    digests = {name: value for part in parts for name, value in part.items()}
    files = dict(sorted(item for found in audited for item in found["files"].items()))
    if first.format == "orbax":
        directory, files = as_orbax(directory, first, digests)
    facts = complete(directory, run, preparation, decision, shards, merged, flags, audited, digests, files)
    publish(directory, run.out)
    return facts
