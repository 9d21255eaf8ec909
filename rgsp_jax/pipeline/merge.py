"""`merge_checkpoints`: from paths to a complete output directory, or to a clear refusal and nothing at all."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rgsp_jax.checkpoint import (
    Checkpoint,
    ShardWriter,
    check_disk,
    check_output,
    copy_companions,
    find_problems,
    hash_file,
    open_checkpoint,
    plan_shards,
    publish,
)
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.audit import audit, verify_piece
from rgsp_jax.pipeline.config import DTYPES, MergeConfig
from rgsp_jax.pipeline.execute import execute
from rgsp_jax.pipeline.journal import Journal
from rgsp_jax.pipeline.model_card import model_card
from rgsp_jax.pipeline.plan import MergePlan, WorkItem, is_merged, plan_merge
from rgsp_jax.pipeline.records import build_records, collect_pieces, find_bad_inputs, find_bad_outputs
from rgsp_jax.pipeline.report import Parent, RunSummary, count_flags, render_report
from rgsp_jax.rules import BUFFER_NAMES

Progress = Callable[[str, int, int, tuple[str, ...]], None]
"""`progress(stage, bytes just done, bytes of the stage, tensors just done)`; stages are "merge" and "audit"."""
Pieces = Mapping[str, Sequence[Mapping[str, Any]]]
MODEL = "model"
"""Folder of the workshop that becomes the output."""
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"}
)
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


@dataclass(frozen=True)
class Preparation:
    """Opened models and the plan of their merge."""

    config: MergeConfig
    checkpoints: tuple[Checkpoint, ...]
    """The base last, where the config has one."""
    plan: MergePlan
    labels: tuple[str, ...]

    @property
    def with_base(self) -> bool:
        return self.config.base is not None


@contextmanager
def prepare(config: MergeConfig, out: Path | None = None) -> Iterator[Preparation]:
    """Open the models and plan their merge from headers.

    Raises:
        RefusedError: everything that stands against the merge, over all models, at once.
    """
    problems: list[str] = config.problems()
    checkpoints: list[Checkpoint] = []
    labels = [*config.models, *([config.base] if config.base else [])]
    with ExitStack() as stack:
        for label in labels:
            try:
                checkpoints.append(stack.enter_context(open_checkpoint(label)))
            except RefusedError as error:
                problems += error.problems
        if out is not None:
            problems += check_output(out, checkpoints)
        if len(checkpoints) == len(labels) and checkpoints:
            problems += find_problems(checkpoints, skip=lambda name: not is_merged(config, name))
        if problems:
            raise RefusedError(problems)
        first = checkpoints[0]
        # A model with a config ties its weights itself; elsewhere every name must be in the file.
        names = [name for name in first.specs if first.config is None or name not in first.aliases]
        model_type = (first.config or {}).get("model_type")
        plan = plan_merge(config, [c.specs for c in checkpoints], names=names, model_type=model_type)
        if plan.problems:
            raise RefusedError(plan.problems)
        yield Preparation(config, tuple(checkpoints), plan, tuple(labels))


def merge_checkpoints(
    config: MergeConfig, out: Path | str, *, resume: bool = False, progress: Progress | None = None
) -> MergeResult:
    """Merge models into the directory `out`, which appears complete or not at all.

    Work goes on in `OUT.incomplete` (the future output and the journal beside it); a killed merge is finished by the same call with `resume=True`, and ends
    byte-identical to one that was not interrupted.

    Args:
        config: what to merge and how.
        out: directory to create.
        resume: go on with an `OUT.incomplete` left by the same merge.
        progress: called as bytes are done.

    Raises:
        RefusedError: what the user can mend, all of it at once; nothing is left behind.
    """
    started = time.monotonic()
    out = Path(out)
    workshop = out.with_name(out.name + ".incomplete")
    with prepare(config, out) as preparation:
        plan = preparation.plan
        shards = plan_shards(plan.specs, config.max_shard_size)
        fresh = not workshop.exists()
        if not fresh and not resume:
            raise RefusedError(f"{workshop} is left from an earlier merge: finish it with --resume, or delete it")
        if fresh and (problems := check_disk(out, shards.file_bytes + REPORT_ROOM)):
            raise RefusedError(problems)
        buffer_flags = check_buffers(preparation)
        workshop.mkdir(exist_ok=True)
        with lock(workshop), ThreadPoolExecutor(1, "rgsp-hash") as pool:
            parent_hashes = [[pool.submit(hash_file, p) for p in c.weight_files] for c in preparation.checkpoints]
            try:
                with discarded_on_refusal(workshop, fresh):
                    journal = Journal(workshop, fingerprint(preparation))
                    writer = ShardWriter(workshop / MODEL, shards, resume=True)
                resumed = forget_damaged(plan, journal, writer)
                run(preparation, writer, journal, progress)
                pieces = collect_pieces(journal.entries.values())
                with discarded_on_refusal(workshop, True):
                    refuse_non_finite(preparation, pieces)
                hashes = [[future.result() for future in futures] for futures in parent_hashes]
                facts = finish(preparation, out.name, writer, pieces, hashes, buffer_flags, progress)
            except OSError as error:
                raise explain_os_error(error, workshop) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            publish(workshop / MODEL, out)
            shutil.rmtree(workshop)
    return MergeResult(
        out=out,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        resumed_items=resumed,
        seconds=time.monotonic() - started,
        **facts,
    )


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
        for checkpoint in preparation.checkpoints
        for path in checkpoint.weight_files
    ]
    items = [
        [item.group.key, item.capacity, [[p.name, p.start, p.size] for p in item.pieces]]
        for item in preparation.plan.items
    ]
    facts = [preparation.config.to_yaml(), files, items, versions(), jax.default_backend()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of what computes."""
    return {name: version(name) for name in ("rgsp_jax", "jax", "jaxlib", "ott-jax", "numpy")}


def check_buffers(preparation: Preparation) -> dict[str, list[str]]:
    """Flags of buffers that differ between models; RefusedError for integers that are no known buffer and differ."""
    first, *others = preparation.checkpoints[: len(preparation.config.models)]
    flags: dict[str, list[str]] = {}
    problems = []
    for task in preparation.plan.tasks.values():
        if task.kind != "buffer":
            continue
        ours = first.read(task.name)
        for other in others:
            if np.array_equal(other.read(task.name).view(np.uint8), ours.view(np.uint8)):
                continue
            if BUFFER_NAMES.search(task.name):
                flags[task.name] = ["buffer_differs"]
            else:
                problems.append(
                    f"tensor {task.name!r} holds {task.out_dtype} values that differ between {first.path} and {other.path}:"
                    " such values cannot be merged; --exclude it to keep the first model's"
                )
    if problems:
        raise RefusedError(problems)
    return flags


def forget_damaged(plan: MergePlan, journal: Journal, writer: ShardWriter) -> int:
    """Drop journal entries whose data are not on the disk as noted; number of items that stay done."""
    for index, entry in list(journal.entries.items()):
        dtype = plan.items[index].group.out_dtype
        if not all(verify_piece(writer, dtype, piece) for piece in entry["records"]):
            journal.forget(index)
    return len(journal.entries)


def run(preparation: Preparation, writer: ShardWriter, journal: Journal, progress: Progress | None) -> None:
    """Do what the journal does not have, reporting bytes read and written."""
    plan = preparation.plan
    total = plan.bytes_in + plan.bytes_out

    def on_done(item: WorkItem) -> None:
        if progress:
            progress("merge", item.bytes_in + item.bytes_out, total, tuple(p.name for p in item.pieces))

    for index in journal.entries:
        on_done(plan.items[index])
    seed = preparation.config.seed
    execute(plan, preparation.checkpoints, writer, journal, seed=seed, with_base=preparation.with_base, on_done=on_done)
    journal.close()


def refuse_non_finite(preparation: Preparation, pieces: Pieces) -> None:
    """Refuse inputs, and merges, that hold an infinity or a NaN; all of them at once."""
    bad = find_bad_inputs(preparation.plan, pieces, preparation.labels)
    if problems := bad or find_bad_outputs(preparation.plan, pieces):
        raise RefusedError(problems)


def finish(
    preparation: Preparation,
    name: str,
    writer: ShardWriter,
    pieces: Pieces,
    hashes: Sequence[Sequence[str]],
    buffer_flags: dict[str, list[str]],
    progress: Progress | None,
) -> dict[str, Any]:
    """Everything beside the weights, and the audit; the facts of the result."""
    plan, config, first = preparation.plan, preparation.config, preparation.checkpoints[0]
    directory = writer.directory
    writer.finish()
    dtype = dominant_dtype(plan)
    copy_companions(first, directory, dtype=dtype if needs_dtype(first.config, dtype) else None)

    def on_tensor(name: str, done: int) -> None:
        if progress:
            progress("audit", done, plan.bytes_out, (name,))

    digests, files = audit(directory, plan, pieces, writer, on_tensor)
    records = build_records(plan, pieces, digests, buffer_flags)
    counts = dict(Counter(f"{t.kind}: {t.method}" for t in plan.tasks.values()))
    flag_counts = count_flags(records)
    method = config.resolved_method()
    parents = [describe_parent(*args) for args in zip(preparation.labels, preparation.checkpoints, hashes, strict=True)]
    warnings = find_warnings(preparation)
    summary = RunSummary(
        method=method.name,
        hyperparameters={**method.defaults, **config.hyperparameters},
        output_name=name,
        parents=parents[: len(config.models)],
        base=parents[-1] if preparation.with_base else None,
        versions=versions(),
        config_yaml=config.to_yaml(),
        parameters=sum(t.size for t in plan.tasks.values()),
        dtype=dtype,
        shards=len(files),
        bytes=writer.plan.file_bytes,
        counts_by_rule=counts,
        architecture=next(iter((first.config or {}).get("architectures") or []), None),
        has_tokenizer=any(path.name in TOKENIZER_FILES for path in first.companions),
        flag_counts=flag_counts,
        warnings=warnings,
    )
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    (directory / "report.jsonl").write_text(lines)
    (directory / "report.html").write_text(render_report(summary, records))
    (directory / "README.md").write_text(model_card(summary))
    (directory / "merge_config.yaml").write_text(config.to_yaml())
    overview = asdict(summary) | {"files": files}
    (directory / "merge_summary.json").write_text(json.dumps(overview, indent=2, default=list) + "\n")
    return {
        "method": method.name,
        "tensors": len(plan.tasks),
        "counts_by_rule": counts,
        "flag_counts": flag_counts,
        "warnings": tuple(warnings),
        "files": files,
    }


def dominant_dtype(plan: MergePlan) -> str:
    """The floating dtype that most of the output's bytes have."""
    sizes: Counter[str] = Counter()
    for task in plan.tasks.values():
        if task.out_dtype.name in DTYPES:
            sizes[task.out_dtype.name] += task.size
    return sizes.most_common(1)[0][0] if sizes else next(iter(plan.tasks.values())).out_dtype.name


def needs_dtype(config: dict[str, Any] | None, dtype: str) -> bool:
    """True where config.json says another dtype than the output has."""
    return config is not None and (config.get("dtype") or config.get("torch_dtype")) != dtype


def describe_parent(label: str, checkpoint: Checkpoint, hashes: Sequence[str]) -> Parent:
    """What the report says of a model."""
    config = checkpoint.config or {}
    floats = [spec for spec in checkpoint.specs.values() if spec.kind == "float"]
    return Parent(
        label=label,
        files=[(path.name, digest) for path, digest in zip(checkpoint.weight_files, hashes, strict=True)],
        architecture=next(iter(config.get("architectures") or []), None),
        model_type=config.get("model_type"),
        parameters=sum(spec.size for name, spec in checkpoint.specs.items() if name not in checkpoint.aliases),
        dtype=max(floats, key=lambda spec: spec.size).dtype.name if floats else None,
    )


def find_warnings(preparation: Preparation) -> list[str]:
    """Sentences on what does not stand against a merge but deserves a look."""
    first, *others = preparation.checkpoints[: len(preparation.config.models)]
    warnings = []
    for label, other in zip(preparation.labels[1:], others, strict=False):
        for path in first.companions:
            if path.name not in TOKENIZER_FILES or path not in other.companions:
                continue
            if hash_file(first.path / path) != hash_file(other.path / path):
                warnings.append(f"{path} of {label} differs from the first model's, which was copied")
    return warnings
