"""The parts of a merge that one process works on: where they lie, what is done of them, and doing the rest."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rgsp_jax.checkpoint import Checkpoint, ShardPlan, ShardWriter, plan_shards
from rgsp_jax.checkpoint.shard_plan import keep_shards
from rgsp_jax.checkpoint.store import hash_place
from rgsp_jax.pipeline.agreement import hash_json
from rgsp_jax.pipeline.audit import read_piece
from rgsp_jax.pipeline.execute import Compute, execute
from rgsp_jax.pipeline.journal import NAME as JOURNAL
from rgsp_jax.pipeline.journal import Journal, read_lines
from rgsp_jax.pipeline.parts import Cut, deal
from rgsp_jax.pipeline.placement import Devices, place_merge
from rgsp_jax.pipeline.plan import MergePlan, WorkItem
from rgsp_jax.pipeline.preparation import Preparation
from rgsp_jax.pipeline.workshop import MODEL, name_journal

Progress = Callable[[str, int, int, tuple[str, ...]], None]
"""`progress(stage, bytes just done, bytes of the stage, tensors just done)`; stages are "merge" and "audit"."""


@dataclass(frozen=True)
class Part:
    """Tensors that are planned, written and noted apart from all others."""

    number: int
    plan: MergePlan
    journal: str
    """File name."""
    fingerprint: str
    files: tuple[int, ...] | None
    """Numbers of its weight files; None is all."""


@dataclass(frozen=True)
class OpenPart:
    """A part with its files in the workshop."""

    part: Part
    journal: Journal
    writer: ShardWriter

    @property
    def plan(self) -> MergePlan:
        return self.part.plan


def lay_out(preparation: Preparation, cut: Cut | None) -> ShardPlan:
    """The files of the output: one for each part, or as many as the size takes where it is one part."""
    specs = preparation.plan.specs
    if cut is None:
        return plan_shards(specs, preparation.config.max_shard_size)
    numbers = cut.numbers
    return keep_shards(specs.values(), [numbers[name] for name in specs])


def plan_parts(preparation: Preparation, cut: Cut | None, fingerprint: str, numbers: Sequence[int]) -> list[Part]:
    """Some parts of the merge with their plans."""
    if cut is None:
        return [Part(0, preparation.plan, JOURNAL, fingerprint, None)] if numbers else []
    return [
        Part(
            number,
            preparation.plan_part(cut.parts[number]),
            name_journal(number),
            hash_json([fingerprint, cut.parts, number]),
            (number,),
        )
        for number in numbers
    ]


def open_part(part: Part, workshop: Path, shards: ShardPlan) -> OpenPart:
    """Make the part's files, or go on with those that are there; the journal is the caller's to close."""
    journal = Journal(workshop, part.fingerprint, part.journal)
    try:
        return OpenPart(part, journal, ShardWriter(workshop / MODEL, shards, resume=True, numbers=part.files))
    except BaseException:
        journal.close()
        raise


def count_done(workshop: Path, preparation: Preparation, cut: Cut | None) -> list[float]:
    """For every part the share of its bytes that its journal says are written."""
    tasks = preparation.plan.tasks
    shares = []
    for number, names in enumerate(cut.parts if cut else [tuple(tasks)]):
        path = workshop / (name_journal(number) if cut else JOURNAL)
        lines = read_lines(path)[0] if path.exists() else []
        pieces = [piece for line in lines[1:] for piece in line["records"] if piece["name"] in tasks]
        done = sum(piece["size"] * tasks[piece["name"]].out_dtype.itemsize for piece in pieces)
        total = sum(tasks[name].size * tasks[name].out_dtype.itemsize for name in names)
        shares.append(min(1.0, done / total) if total else 0.0)
    return shares


def forget_damaged(plan: MergePlan, journal: Journal, writer: ShardWriter) -> int:
    """Drop journal entries whose data are not on the disk as noted; number of items that stay done."""
    for index, entry in list(journal.entries.items()):
        dtype = plan.items[index].group.out_dtype
        if any(read_piece(writer, dtype, piece) is None for piece in entry["records"]):
            journal.forget(index)
    return len(journal.entries)


def merge_part(
    preparation: Preparation,
    part: OpenPart,
    on_done: Callable[[WorkItem], None],
    *,
    compute: Compute | None = None,
    devices: int | Devices | None = None,
) -> None:
    """Do what the journal does not have; `on_done` is called for what it has, too."""
    for index in part.journal.entries:
        on_done(part.plan.items[index])
    execute(
        part.plan,
        preparation.checkpoints,
        part.writer,
        part.journal,
        covariances=preparation.covariances,
        seed=preparation.config.seed,
        with_base=preparation.with_base,
        on_done=on_done,
        compute=compute,
        placement=place_merge(part.plan, devices=devices),
    )


class FileHash(NamedTuple):
    """SHA-256 of a model's file, to be; of an object what its store calls it."""

    model: int
    file: int
    size: int
    """Bytes that are read for it."""
    value: Future[str]


@contextmanager
def hash_files(checkpoints: Sequence[Checkpoint], index: int, count: int) -> Iterator[list[FileHash]]:
    """Hash the models' files beside the merge, those that fall to process `index` of `count`."""
    files = [(k, i, path) for k, checkpoint in enumerate(checkpoints) for i, path in enumerate(checkpoint.weight_files)]
    sizes = [path.stat().st_size if isinstance(path, Path) else 0 for _, _, path in files]  # objects are not read
    own = [(files[j], sizes[j]) for j in deal([float(size) for size in sizes], count)[index]]
    with ThreadPoolExecutor(1, "rgsp-hash") as pool:
        try:
            yield [FileHash(model, file, size, pool.submit(hash_place, path)) for (model, file, path), size in own]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_bytes(checkpoints: Sequence[Checkpoint]) -> int:
    """Bytes of weights read from the models so far."""
    return sum(checkpoint.bytes_read for checkpoint in checkpoints)
