"""Run the items of a plan: reading the next, computing this one and writing the last overlap."""

import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from rgsp_jax.checkpoint import Checkpoint, CovarianceFile, ShardWriter, digest
from rgsp_jax.pipeline.journal import Journal
from rgsp_jax.pipeline.kernels import NOTHING, ItemOutput, run_item
from rgsp_jax.pipeline.plan import BLOCK, InputShape, MergePlan, Piece, TensorTask, WorkItem
from rgsp_jax.types import InputStatistics

ALIGNMENT = 64
"""jax takes a host buffer on the CPU without a copy where it is aligned so."""

OnDone = Callable[[WorkItem], None]


class ItemSources(NamedTuple):
    """What is read for one item."""

    weights: tuple[np.ndarray, ...]
    """One buffer per model: [capacity, m, n], or [capacity, block]."""
    inputs: InputStatistics = NOTHING
    """[capacity, c, ...], for methods that need covariances."""


class Compute(Protocol):
    """How an item's output comes from its sources, as `compute_item` does it."""

    def __call__(
        self, plan: MergePlan, item: WorkItem, sources: ItemSources, seed: int, with_base: bool, /
    ) -> ItemOutput | None: ...


MergedPiece = tuple[Piece, np.ndarray, dict[str, Any]]
"""Where, the data, and their part of the report."""


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` on a boundary that lets the device alias it."""
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + count].view(dtype).reshape(shape)


def execute(
    plan: MergePlan,
    checkpoints: Sequence[Checkpoint],
    writer: ShardWriter,
    journal: Journal,
    *,
    covariances: Sequence[CovarianceFile] = (),
    seed: int,
    with_base: bool,
    on_done: OnDone,
    compute: Compute | None = None,
) -> None:
    """Do every item the journal does not have yet.

    One thread reads ahead, the caller's thread computes, one thread writes; at most `IN_FLIGHT` items are in memory.
    On any exception the journal holds exactly the items whose data are written. `compute` takes the place of
    `compute_item`.
    """
    compute = compute or compute_item
    pending = [item for item in plan.items if item.index not in journal.entries]
    reader, scribe = ThreadPoolExecutor(1, "rgsp-read"), ThreadPoolExecutor(1, "rgsp-write")
    reads: deque[tuple[WorkItem, Future[ItemSources]]] = deque()
    write: Future[None] | None = None
    try:
        ahead = iter(pending)
        for item in itertools.islice(ahead, 1):
            reads.append((item, reader.submit(read_item, plan, item, checkpoints, covariances)))
        while reads:
            item, read = reads.popleft()
            sources = read.result()
            for following in itertools.islice(ahead, 1):
                reads.append((following, reader.submit(read_item, plan, following, checkpoints, covariances)))
            output = compute(plan, item, sources, seed, with_base)
            if write is not None:
                write.result()
            pieces = copied_pieces(item, sources.weights[0]) if output is None else merged_pieces(plan, item, output)
            write = scribe.submit(write_item, item, pieces, writer, journal, on_done)
            del sources, output, pieces, read
        if write is not None:
            write.result()
    finally:
        for _, read in reads:
            read.cancel()
        reader.shutdown(wait=True, cancel_futures=True)
        scribe.shutdown(wait=True)


def read_item(
    plan: MergePlan, item: WorkItem, checkpoints: Sequence[Checkpoint], covariances: Sequence[CovarianceFile] = ()
) -> ItemSources:
    """Everything the item's kernel takes, straight from the files."""
    group = item.group
    if group.action == "copy":
        return ItemSources((read_copies(item, checkpoints[0], group.in_dtypes[0]),))
    shape = (item.capacity, *(group.matrix if group.action == "matrices" else (BLOCK,)))
    buffers = tuple(empty_aligned(shape, dtype) for dtype in group.in_dtypes)
    for checkpoint, buffer in zip(checkpoints, buffers, strict=True):
        fill = read_matrix if group.action == "matrices" else read_blocks
        for piece in item.pieces:
            fill(plan.tasks[piece.name], piece, checkpoint, buffer)
        used = item.pieces[-1].slot + (1 if group.action == "matrices" else -(-item.pieces[-1].size // BLOCK))
        buffer[used:] = buffer[:1] if group.action == "matrices" else 0
    if group.inputs is None:
        return ItemSources(buffers)
    return ItemSources(buffers, read_inputs(plan, item, group.inputs, covariances))


def read_inputs(
    plan: MergePlan, item: WorkItem, shape: InputShape, covariances: Sequence[CovarianceFile]
) -> InputStatistics:
    """What the files hold of the inputs of every slot of an item."""
    b, c = item.capacity, shape.models
    float32 = np.dtype(np.float32)
    buffers = {name: empty_aligned((b, c, *axes), float32) for name, axes in shape.parts.items()}
    for name, buffer in buffers.items():
        if name == "held_back":
            buffer[...] = 0
        for piece in item.pieces:
            for k, site in enumerate(plan.tasks[piece.name].sites):
                found = covariances[k].read(site, name)
                where: tuple[int | slice, ...] = (piece.slot, k, *map(slice, found.shape))
                buffer[where] = found
        buffer[item.pieces[-1].slot + 1 :] = buffer[:1]
    return InputStatistics(*(buffers.get(name) for name in InputStatistics._fields))  # type: ignore[arg-type]


def read_copies(item: WorkItem, checkpoint: Checkpoint, dtype: np.dtype) -> np.ndarray:
    """The item's tensors one behind the other."""
    buffer = np.empty(sum(p.size for p in item.pieces), dtype)
    start = 0
    for piece in item.pieces:
        checkpoint.read_into(piece.name, buffer[start : start + piece.size], piece.start)
        start += piece.size
    return buffer


def read_matrix(task: TensorTask, piece: Piece, checkpoint: Checkpoint, buffer: np.ndarray) -> None:
    """Fill one matrix slot; axes are only moved where the layout on disk needs it."""
    slot = buffer[piece.slot]
    if task.view is None or task.view.contiguous:
        checkpoint.read_into(task.name, slot.reshape(-1), piece.start)
        return
    on_disk = np.empty(task.view.slice_shape, buffer.dtype)
    checkpoint.read_into(task.name, on_disk.reshape(-1), piece.start)
    slot[...] = task.view.slice_view.to_matrices(on_disk)[0]


def read_blocks(task: TensorTask, piece: Piece, checkpoint: Checkpoint, buffer: np.ndarray) -> None:
    """Fill the blocks of one piece, zeros behind its end."""
    flat = buffer.reshape(-1)
    start = piece.slot * BLOCK
    checkpoint.read_into(task.name, flat[start : start + piece.size], piece.start)
    flat[start + piece.size : start + -(-piece.size // BLOCK) * BLOCK] = 0


def compute_item(
    plan: MergePlan, item: WorkItem, sources: ItemSources, seed: int, with_base: bool
) -> ItemOutput | None:
    """Run the kernel and wait for it; None where there is nothing to compute."""
    if item.group.action == "copy":
        return None
    salts = np.zeros((item.capacity, 2), np.uint32)
    for piece in item.pieces:
        count = 1 if item.group.action == "matrices" else -(-piece.size // BLOCK)
        first = piece.start // (piece.size or 1) if item.group.action == "matrices" else piece.start // BLOCK
        salts[piece.slot : piece.slot + count, 0] = zlib.crc32(piece.name.encode())
        salts[piece.slot : piece.slot + count, 1] = np.arange(first, first + count)
    double = np.float64 in (*item.group.in_dtypes, item.group.out_dtype)
    with jax.enable_x64(double):
        weights, inputs = jax.device_put(sources)
        return jax.device_get(run_item(item.group, weights, salts, seed, with_base, inputs))


def write_item(
    item: WorkItem, pieces: Iterable[MergedPiece], writer: ShardWriter, journal: Journal, on_done: OnDone
) -> None:
    """Write the merged pieces, then note them in the journal."""
    records = []
    for piece, data, record in pieces:
        writer.write(piece.name, data, piece.start)
        records.append({"name": piece.name, "start": piece.start, "size": piece.size, "digest": digest(data), **record})
    journal.record(item.index, records)
    on_done(item)


def copied_pieces(item: WorkItem, buffer: np.ndarray) -> Iterable[MergedPiece]:
    """Tensors passed through, in the output's dtype."""
    start = 0
    for piece in item.pieces:
        data = buffer[start : start + piece.size]
        with np.errstate(over="ignore"):
            cast = data.astype(item.group.out_dtype, copy=False)
        # What is not finite in the model is passed through as it is; what the cast makes so is lost.
        lost = cast is not data and bool((np.isfinite(data) & ~np.isfinite(cast)).any())
        yield piece, cast, {"bad_output": True} if lost else {}
        start += piece.size


def merged_pieces(plan: MergePlan, item: WorkItem, output: ItemOutput) -> Iterable[MergedPiece]:
    """Merged data of every piece in disk order, with its part of the report."""
    for piece in item.pieces:
        task = plan.tasks[piece.name]
        count = 1 if item.group.action == "matrices" else -(-piece.size // BLOCK)
        rows = slice(piece.slot, piece.slot + count)
        data = np.asarray(output.merged[rows])
        if item.group.action == "matrices" and task.view is not None:
            data = task.view.slice_view.from_matrices(data)
        data = np.ascontiguousarray(data).reshape(-1)[: piece.size]
        record: dict[str, Any] = {
            "change": output.change[rows].sum(0, dtype=np.float64).tolist(),
            "parents": output.size[rows].sum(0, dtype=np.float64).tolist(),
            "bad_inputs": np.flatnonzero(~output.finite_in[rows].all(0)).tolist(),
            "bad_output": not bool(output.finite_out[rows].all()),
        }
        if output.stats:
            record["stats"] = {name: plain(x[piece.slot]) for name, x in sorted(output.stats.items())}
        yield piece, data, clean(record)


def plain(x: Any) -> Any:
    """A scalar or small array as JSON numbers, in float32's own precision."""
    x = np.asarray(x)
    if x.dtype.kind in "biu":
        return x.tolist()
    return np.vectorize(lambda v: float(f"{v:.7g}"), otypes=[float])(x).tolist()


def clean(value: Any) -> Any:
    """JSON has no infinities: null takes their place."""
    if isinstance(value, Mapping):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
