"""Run the items of a plan: reading the next, computing this one and writing the last overlap."""

import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rgsp_jax.checkpoint import Checkpoint, CovarianceFile, ShardWriter, digest
from rgsp_jax.linalg import ROWS
from rgsp_jax.pipeline.journal import Journal
from rgsp_jax.pipeline.kernels import LAYERS, NOTHING, ItemOutput, run_divided, run_item
from rgsp_jax.pipeline.placement import Placement, Segment, Share, Wave, place_merge
from rgsp_jax.pipeline.plan import BLOCK, Group, InputShape, MergePlan, Piece, TensorTask, WorkItem, count_rows
from rgsp_jax.types import InputStatistics

ALIGNMENT = 64
"""jax takes a host buffer on the CPU without a copy where it is aligned so."""

OnDone = Callable[[WorkItem], None]


class ItemSources(NamedTuple):
    """What is read for one item, or for one device's share of a wave."""

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
    placement: Placement | None = None,
) -> None:
    """Do every item the journal does not have yet.

    One thread reads ahead, the caller's thread computes, one thread writes; at most `IN_FLIGHT` waves are in memory.
    On any exception the journal holds exactly the items whose data are written. `compute` takes the place of
    `compute_item`, on one device; `placement` says which devices there are otherwise.
    """
    placement = placement or place_merge(plan, devices=1)
    if compute is not None:
        placement = replace(placement, devices=placement.devices[:1])
    compute = compute or compute_item
    pending = [item for item in plan.items if item.index not in journal.entries]
    reader, scribe = ThreadPoolExecutor(1, "rgsp-read"), ThreadPoolExecutor(1, "rgsp-write")
    reads: deque[tuple[Wave, Future[list[ItemSources]]]] = deque()
    write: Future[None] | None = None
    try:
        ahead = iter(placement.waves(pending))
        for wave in itertools.islice(ahead, 1):
            reads.append((wave, reader.submit(read_wave, plan, wave, checkpoints, covariances)))
        while reads:
            wave, read = reads.popleft()
            sources = read.result()
            for following in itertools.islice(ahead, 1):
                reads.append((following, reader.submit(read_wave, plan, following, checkpoints, covariances)))
            outputs: Sequence[ItemOutput | None]
            if wave.divided > 1:
                outputs = [compute_divided(wave, sources[0], seed, with_base, placement.devices)]
            elif wave.shares[1:]:
                outputs = compute_wave(wave, sources, seed, with_base, placement.devices)
            else:
                outputs = [compute(plan, wave.items[0], sources[0], seed, with_base)]
            if write is not None:
                write.result()
            merged = merged_items(plan, wave, outputs, sources)
            write = scribe.submit(write_items, merged, writer, journal, on_done)
            del sources, outputs, merged, read
        if write is not None:
            write.result()
    finally:
        for _, read in reads:
            read.cancel()
        reader.shutdown(wait=True, cancel_futures=True)
        scribe.shutdown(wait=True)


def read_wave(
    plan: MergePlan, wave: Wave, checkpoints: Sequence[Checkpoint], covariances: Sequence[CovarianceFile] = ()
) -> list[ItemSources]:
    """What every device takes; one that nothing is left for repeats the first one's."""
    found: list[ItemSources] = []
    for share in wave.shares:
        found.append(read_item(plan, share, checkpoints, covariances) if share.pieces else found[0])
    return found


def read_item(
    plan: MergePlan,
    item: WorkItem | Share,
    checkpoints: Sequence[Checkpoint],
    covariances: Sequence[CovarianceFile] = (),
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
        used = item.pieces[-1].slot + count_rows(group, item.pieces[-1])
        buffer[used:] = buffer[:1] if group.action == "matrices" else 0
    if group.inputs is None:
        return ItemSources(buffers)
    return ItemSources(buffers, read_inputs(plan, item, group.inputs, covariances))


def read_inputs(
    plan: MergePlan, item: WorkItem | Share, shape: InputShape, covariances: Sequence[CovarianceFile]
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


def read_copies(item: WorkItem | Share, checkpoint: Checkpoint, dtype: np.dtype) -> np.ndarray:
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
    salts = name_slots(item)
    with jax.enable_x64(in_double(item.group)):
        weights, inputs = jax.device_put(sources)
        return jax.device_get(run_item(item.group, weights, salts, seed, with_base, inputs))


def compute_wave(
    wave: Wave,
    sources: Sequence[ItemSources],
    seed: int,
    with_base: bool,
    devices: Sequence[jax.Device],
) -> list[ItemOutput]:
    """Run the kernel on all devices at once and wait for it: every share's output."""
    mesh = Mesh(np.array(devices[: len(wave.shares)]), (LAYERS,))
    placed = NamedSharding(mesh, PartitionSpec(LAYERS))

    def join(*shards: jax.Array) -> jax.Array:
        shape = (len(shards) * shards[0].shape[0], *shards[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, placed, shards)

    def split(x: jax.Array) -> list[jax.Array]:
        return [shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)]

    shares = [(of, name_slots(share)) for of, share in zip(sources, wave.shares, strict=True)]
    with jax.enable_x64(in_double(wave.group)):
        own = [jax.device_put(share, device) for share, device in zip(shares, mesh.devices, strict=True)]
        (weights, inputs), salts = jax.tree.map(join, *own)
        output = run_item(wave.group, weights, salts, seed, with_base, inputs, mesh)
        leaves, structure = jax.tree.flatten(output)
        shards = jax.device_get([split(x) for x in leaves])
        return [jax.tree.unflatten(structure, of_share) for of_share in zip(*shards, strict=True)]


def compute_divided(
    wave: Wave, sources: ItemSources, seed: int, with_base: bool, devices: Sequence[jax.Device]
) -> ItemOutput:
    """Merge the matrices of an item one after the other, each on all devices together."""
    group, used = wave.group, wave.used
    mesh = Mesh(np.array(devices[: wave.divided]), (ROWS,))
    salts = name_slots(wave.shares[0])
    outputs: list[ItemOutput] = []
    with jax.enable_x64(in_double(group)):
        for slot in range(used):
            weights = tuple(divide_matrix(buffer[slot], mesh) for buffer in sources.weights)
            inputs = jax.tree.map(lambda x, i=slot: x[i], sources.inputs)
            output = run_divided(group, weights, salts[slot], seed, with_base, inputs, mesh)
            merged = join_matrix(output.merged, group.matrix)
            outputs.append(ItemOutput(merged, *jax.device_get(output[1:])))  # type: ignore[arg-type]
    return jax.tree.map(lambda *slots: slots[0][None] if len(slots) == 1 else np.stack(slots), *outputs)


def divide_matrix(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """A matrix with its longer side filled up with zeros and divided over a mesh."""
    axis = 0 if x.shape[0] >= x.shape[1] else 1
    length = -(-x.shape[axis] // mesh.size)
    shards = []
    for i, device in enumerate(mesh.devices):
        part = x[i * length : (i + 1) * length] if axis == 0 else x[:, i * length : (i + 1) * length]
        missing = length - part.shape[axis]
        filled = np.pad(part, [(0, missing if d == axis else 0) for d in range(2)]) if missing else part
        shards.append(jax.device_put(filled, device))
    shape = tuple(mesh.size * length if d == axis else size for d, size in enumerate(x.shape))
    placed = NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))
    return jax.make_array_from_single_device_arrays(shape, placed, shards)


def join_matrix(x: jax.Array, matrix: tuple[int, int]) -> np.ndarray:
    """The [m, n] of a divided matrix on the host."""
    joined = np.empty(matrix, x.dtype)
    for shard in x.addressable_shards:
        own = joined[shard.index]
        own[...] = np.asarray(shard.data)[: own.shape[0], : own.shape[1]]
    return joined


def name_slots(item: WorkItem | Share) -> np.ndarray:
    """[capacity, 2] numbers that tell every matrix or block of the models from every other one."""
    salts = np.zeros((item.capacity, 2), np.uint32)
    for piece in item.pieces:
        count = count_rows(item.group, piece)
        first = piece.start // (piece.size or 1) if item.group.action == "matrices" else piece.start // BLOCK
        salts[piece.slot : piece.slot + count, 0] = zlib.crc32(piece.name.encode())
        salts[piece.slot : piece.slot + count, 1] = np.arange(first, first + count)
    return salts


def in_double(group: Group) -> bool:
    """True where float64 comes in or goes out."""
    return np.float64 in (*group.in_dtypes, group.out_dtype)


def merged_items(
    plan: MergePlan, wave: Wave, outputs: Sequence[ItemOutput | None], sources: Sequence[ItemSources]
) -> list[tuple[WorkItem, Iterable[MergedPiece]]]:
    """What is to be written for every item of a wave."""
    found: list[tuple[WorkItem, Iterable[MergedPiece]]] = []
    for item, segments in zip(wave.items, wave.segments, strict=True):
        known = [output for output in outputs if output is not None]
        if known:
            found.append((item, merged_pieces(plan, item, known, segments)))
        else:
            found.append((item, copied_pieces(item, sources[0].weights[0])))
    return found


def write_items(
    merged: list[tuple[WorkItem, Iterable[MergedPiece]]], writer: ShardWriter, journal: Journal, on_done: OnDone
) -> None:
    """Write the items of a wave one after the other."""
    for item, pieces in merged:
        write_item(item, pieces, writer, journal, on_done)


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


def merged_pieces(
    plan: MergePlan, item: WorkItem, outputs: Sequence[ItemOutput], segments: Sequence[Segment]
) -> Iterable[MergedPiece]:
    """Merged data of every piece in disk order, with its part of the report."""
    output = join_segments(outputs, segments)
    for piece in item.pieces:
        task = plan.tasks[piece.name]
        rows = slice(piece.slot, piece.slot + count_rows(item.group, piece))
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


def join_segments(outputs: Sequence[ItemOutput], segments: Sequence[Segment]) -> ItemOutput:
    """An item's own rows; a copy only where they were merged on several devices."""
    if len(segments) == 1:
        ((share, start, stop),) = segments
        return jax.tree.map(lambda x: x[start:stop], outputs[share])
    parts = [jax.tree.map(lambda x, s=segment: x[s.start : s.stop], outputs[segment.share]) for segment in segments]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


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
