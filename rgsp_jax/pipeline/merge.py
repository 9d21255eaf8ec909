"""`merge_checkpoints`: from paths to a complete output directory, or to a clear refusal and nothing at all."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rgsp_jax.checkpoint import (
    Checkpoint,
    ShardWriter,
    check_disk,
    convert_to_orbax,
    copy_companions,
    digest,
    hash_file,
    open_checkpoint,
    plan_shards,
    publish,
)
from rgsp_jax.errors import NotFiniteError, RefusedError
from rgsp_jax.pipeline.audit import audit, read_piece
from rgsp_jax.pipeline.config import MergeConfig
from rgsp_jax.pipeline.execute import Compute, execute
from rgsp_jax.pipeline.journal import NAME as JOURNAL
from rgsp_jax.pipeline.journal import Journal
from rgsp_jax.pipeline.overview import dominant_dtype, needs_dtype, summarise, versions, write_overview
from rgsp_jax.pipeline.placement import Placement, place_merge
from rgsp_jax.pipeline.plan import MergePlan, WorkItem
from rgsp_jax.pipeline.preparation import Preparation, check_buffers, check_covariances, prepare
from rgsp_jax.pipeline.records import build_records, collect_pieces, find_bad_inputs, find_bad_outputs

Progress = Callable[[str, int, int, tuple[str, ...]], None]
"""`progress(stage, bytes just done, bytes of the stage, tensors just done)`; stages are "merge" and "audit"."""
Pieces = Mapping[str, Sequence[Mapping[str, Any]]]
MODEL = "model"
"""Folder of the workshop that becomes the output."""
REPORT_ROOM = 64_000_000
"""Bytes set aside on the disk for reports and companion files."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge did."""

    out: Path
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


def merge_checkpoints(
    config: MergeConfig,
    out: Path | str,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    compute: Compute | None = None,
    overview: bool = True,
    devices: int | None = None,
) -> MergeResult:
    """Merge models into the directory `out`, which appears complete or not at all.

    Work goes on in `OUT.incomplete` (the future output and the journal beside it); a killed merge is finished by the
    same call with `resume=True`, and ends byte-identical to one that was not interrupted.

    Args:
        config: what to merge and how.
        out: directory to create.
        resume: go on with an `OUT.incomplete` left by the same merge.
        progress: called as bytes are done.
        compute: how items are computed, where decompositions are at hand (`rgsp_jax.sweep`).
        overview: False leaves out report, model card and the models' hashes, for a merge that is used once.
        devices: how many of this process's devices compute; None is all its accelerators, or one CPU device. The
            result does not depend on it.

    Raises:
        RefusedError: what the user can mend, all of it at once; nothing is left behind.
    """
    started = time.monotonic()
    out = Path(out)
    if out.name in ("", ".."):
        raise RefusedError(f"the output {out} has no name of its own: give the directory to create")
    workshop = name_workshop(out)
    if resume:
        clear_finished(out, workshop)
    with prepare(config, out) as preparation:
        plan = preparation.plan
        placement = place_merge(plan, devices=devices)
        shards = plan_shards(plan.specs, config.max_shard_size)
        fresh = not workshop.exists()
        if problems := check_place(preparation, out, resume=resume):
            raise RefusedError(problems)
        check_covariances(preparation)
        buffer_flags = check_buffers(preparation)
        try:
            workshop.mkdir(exist_ok=True)
        except OSError as error:
            raise RefusedError(f"{workshop} cannot be made: {error.strerror}") from None
        with lock(workshop), ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(1, "rgsp-hash"))
            read = preparation.checkpoints if overview else ()
            parent_hashes = [[pool.submit(hash_file, p) for p in c.weight_files] for c in read]
            try:
                with discarded_on_refusal(workshop, fresh):
                    journal = stack.enter_context(closing(Journal(workshop, fingerprint(preparation))))
                    writer = ShardWriter(workshop / MODEL, shards, resume=True)
                resumed = forget_damaged(plan, journal, writer)
                run(preparation, writer, journal, progress, compute, placement)
                pieces = collect_pieces(journal.entries.values())
                with discarded_on_refusal(workshop, True):
                    refuse_non_finite(preparation, pieces)
                hashes = [[future.result() for future in futures] for futures in parent_hashes] if overview else None
                finished, facts = finish(preparation, out.name, writer, pieces, hashes, buffer_flags, progress)
                publish(finished, out)
            except OSError as error:
                raise explain_os_error(error, workshop) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            shutil.rmtree(workshop)
    return MergeResult(
        out=out,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        resumed_items=resumed,
        seconds=time.monotonic() - started,
        **facts,
    )


def name_workshop(out: Path) -> Path:
    """The directory that holds the unfinished output."""
    return out.with_name(out.name + ".incomplete")


def clear_finished(out: Path, workshop: Path) -> None:
    """Remove what a process killed right after it published leaves behind, and say that there is nothing to resume."""
    if (workshop / JOURNAL).exists() and not (workshop / MODEL).exists() and out.is_dir() and any(out.iterdir()):
        with lock(workshop):
            shutil.rmtree(workshop)
        raise RefusedError(f"{out} is complete, there is nothing to resume: its merge had finished when it was stopped")


def check_place(preparation: Preparation, out: Path, *, resume: bool = False) -> list[str]:
    """Why the merge cannot begin at `out` as things lie: an unfinished one is there, or too little room."""
    workshop = name_workshop(out)
    if workshop.exists():
        hint = f"{workshop} is left from an earlier merge: finish it with --resume, or delete it"
        return [] if resume else [hint]
    shards = plan_shards(preparation.plan.specs, preparation.config.max_shard_size)
    copies = 2 if preparation.checkpoints[0].format == "orbax" else 1
    return check_disk(out, copies * shards.file_bytes + REPORT_ROOM)


@contextmanager
def discarded_on_refusal(workshop: Path, discard: bool) -> Iterator[None]:
    """Leave nothing behind where resuming could not help."""
    try:
        yield
    except RefusedError:
        if discard:
            shutil.rmtree(workshop, ignore_errors=True)
        raise


@contextmanager
def lock(workshop: Path) -> Iterator[None]:
    """Keep other processes out of an unfinished output; the lock goes with the process."""
    descriptor = os.open(workshop, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"{workshop} is being written by another process: wait for it, or choose another --out"
            ) from None
        yield
    finally:
        os.close(descriptor)


def explain_os_error(error: OSError, workshop: Path) -> RefusedError:
    """A full disk or a lost mount, in one sentence; what is done so far stays for --resume."""
    where = f" ({error.filename})" if error.filename else ""
    return RefusedError(
        f"{error.strerror or error}{where}; what is done so far is in {workshop}: mend it and use --resume"
    )


def fingerprint(preparation: Preparation) -> str:
    """Hash of everything that decides the output's bytes: settings, files as they lie on disk, versions, platform."""
    files = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for path in [
            *(path for checkpoint in preparation.checkpoints for path in checkpoint.weight_files),
            *(file.path for file in preparation.covariances),
        ]
    ]
    items = [
        [item.group.key, item.capacity, [[p.name, p.start, p.size] for p in item.pieces]]
        for item in preparation.plan.items
    ]
    facts = [preparation.config.to_yaml(), files, items, versions(), jax.default_backend()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def forget_damaged(plan: MergePlan, journal: Journal, writer: ShardWriter) -> int:
    """Drop journal entries whose data are not on the disk as noted; number of items that stay done."""
    for index, entry in list(journal.entries.items()):
        dtype = plan.items[index].group.out_dtype
        if any(read_piece(writer, dtype, piece) is None for piece in entry["records"]):
            journal.forget(index)
    return len(journal.entries)


def run(
    preparation: Preparation,
    writer: ShardWriter,
    journal: Journal,
    progress: Progress | None,
    compute: Compute | None = None,
    placement: Placement | None = None,
) -> None:
    """Do what the journal does not have, reporting bytes read and written."""
    plan = preparation.plan
    total = plan.bytes_in + plan.bytes_out

    def on_done(item: WorkItem) -> None:
        if progress:
            progress("merge", item.bytes_in + item.bytes_out, total, tuple(p.name for p in item.pieces))

    for index in journal.entries:
        on_done(plan.items[index])
    seed = preparation.config.seed
    execute(
        plan,
        preparation.checkpoints,
        writer,
        journal,
        covariances=preparation.covariances,
        seed=seed,
        with_base=preparation.with_base,
        on_done=on_done,
        compute=compute,
        placement=placement,
    )


def refuse_non_finite(preparation: Preparation, pieces: Pieces) -> None:
    """Refuse inputs, and merges, that hold an infinity or a NaN; all of them at once."""
    if problems := find_bad_inputs(preparation.plan, pieces, preparation.labels):
        raise RefusedError(problems)
    if problems := find_bad_outputs(preparation.plan, pieces):
        raise NotFiniteError(problems)


def as_orbax(directory: Path, parent: Checkpoint, digests: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """The audited weights as an Orbax checkpoint with the parent's tree, read back; its path, its files' SHA-256."""
    converted = directory.with_name("orbax")
    shutil.rmtree(converted, ignore_errors=True)
    convert_to_orbax(directory, parent, converted)
    with open_checkpoint(converted) as copy:
        if wrong := [name for name, expected in digests.items() if digest(copy.read(name)) != expected]:
            raise RefusedError(f"audit: {name!r} in the Orbax checkpoint is not what was merged" for name in wrong)
        return converted, {path.relative_to(converted).as_posix(): hash_file(path) for path in copy.weight_files}


def finish(
    preparation: Preparation,
    name: str,
    writer: ShardWriter,
    pieces: Pieces,
    hashes: Sequence[Sequence[str]] | None,
    buffer_flags: Mapping[str, list[str]],
    progress: Progress | None,
) -> tuple[Path, dict[str, Any]]:
    """The audit and everything beside the weights; the finished directory and the facts of the result.

    Without the models' hashes there is no overview.
    """
    plan, first = preparation.plan, preparation.checkpoints[0]
    directory = writer.directory
    writer.finish()

    def on_tensor(name: str, done: int) -> None:
        if progress:
            progress("audit", done, plan.bytes_out, (name,))

    digests, files = audit(directory, plan, pieces, writer, on_tensor)
    if first.format == "orbax":
        directory, files = as_orbax(directory, first, digests)
    dtype = dominant_dtype(plan)
    copy_companions(first, directory, dtype=dtype if needs_dtype(first.config, dtype) else None)
    records = build_records(plan, pieces, digests, buffer_flags)
    known = hashes or [[""] * len(checkpoint.weight_files) for checkpoint in preparation.checkpoints]
    summary = summarise(preparation, name, records, known, writer.plan)
    if hashes is not None:
        write_overview(directory, summary, records, files)
    return directory, {
        "method": summary.method,
        "tensors": len(plan.tasks),
        "counts_by_rule": dict(summary.counts_by_rule),
        "flag_counts": dict(summary.flag_counts),
        "warnings": tuple(summary.warnings),
        "files": files,
    }
