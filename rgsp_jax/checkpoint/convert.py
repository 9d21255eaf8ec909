"""Whole conversions, streamed: PyTorch directory to Orbax checkpoint, and either of them to a PyTorch directory."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.companions import copy_companions
from rgsp_jax.checkpoint.conversion import (
    build_manifest,
    check_tree,
    find_differences,
    join_path,
    leaf_dtype,
    output_specs,
    read_leaf,
    restore,
)
from rgsp_jax.checkpoint.flax_checkpoint import copy_listed, make_scratch, read_ahead, save_pieces
from rgsp_jax.checkpoint.manifest import METADATA_KEY, Manifest, Style, WeightRecord, build_tree, get_leaf
from rgsp_jax.checkpoint.orbax_source import OrbaxCheckpoint
from rgsp_jax.checkpoint.output import check_disk, check_output, publish
from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.checkpoint.shard_plan import ShardPlan, keep_shards, plan_shards
from rgsp_jax.checkpoint.shard_writer import ShardWriter
from rgsp_jax.checkpoint.specs import Checkpoint
from rgsp_jax.errors import RefusedError

MEMORY = 1 << 30
"""Bytes that a conversion takes above the process's own, unless the caller says otherwise."""
COPIES = 4
"""Pieces in memory at once: one being read, one being turned, one being written and Orbax's own copy of it."""
ROOM = 64_000_000
"""Bytes set aside on the disk for metadata and companion files."""
Progress = Callable[[int, int], None]
"""`progress(bytes just done, bytes of all)`."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    out: Path
    tensors: int
    bytes_out: int
    style: Style | None
    unmapped: tuple[str, ...]


def convert_to_flax(
    checkpoint: Checkpoint,
    out: Path | str,
    *,
    style: Style = "nnx",
    dtype: Any = None,
    allow_unmapped: bool = False,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a PyTorch checkpoint to an Orbax checkpoint of its Flax tree, a piece of it in memory at a time.

    The manifest travels in the Orbax metadata and the model's other files lie beside, so that `convert_to_huggingface`
    needs nothing else.

    Args:
        checkpoint: opened; safetensors or PyTorch.
        out: directory to create, complete or not at all.
        style, allow_unmapped: see `build_manifest`.
        dtype: of floating-point leaves; as on disk by default. The manifest keeps the one on disk.
        memory: bytes to take above the process's own; more where the largest tensor needs it.
        progress: called as bytes are written.

    Raises:
        RefusedError: the checkpoint has no such tree, or `out` cannot be made; nothing is left behind.
    """
    out = Path(out)
    problems = check_output(out, [checkpoint])
    try:
        manifest = build_manifest(checkpoint, style=style, allow_unmapped=allow_unmapped)
    except RefusedError as error:
        raise RefusedError([*problems, *error.problems]) from None
    total = sum(record.spec.size * leaf_dtype(record, dtype).itemsize for record in manifest.owners)
    if problems := problems + check_disk(out, total + ROOM):
        raise RefusedError(problems)
    out = out.absolute()
    scratch = make_scratch(out)
    try:
        fresh = scratch / out.name
        pieces = read_pieces(checkpoint, manifest, dtype, memory // COPIES)
        save_pieces(fresh, report(pieces, total, progress), {METADATA_KEY: manifest.to_json()})
        copy_listed(checkpoint.root, fresh, manifest.companions)
        publish(fresh, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Conversion(out, len(manifest.records), total, style, manifest.unmapped)


def divide(records: Iterable[WeightRecord], piece_bytes: int) -> Iterator[list[WeightRecord]]:
    """Runs of records of at most `piece_bytes` each, or one larger record."""
    piece: list[WeightRecord] = []
    filled = 0
    for record in records:
        if piece and filled + record.spec.nbytes > piece_bytes:
            yield piece
            piece, filled = [], 0
        piece.append(record)
        filled += record.spec.nbytes
    if piece:
        yield piece


def read_pieces(checkpoint: Checkpoint, manifest: Manifest, dtype: Any, piece_bytes: int) -> Iterator[Any]:
    """Trees that together are the checkpoint's."""
    for piece in divide(manifest.owners, piece_bytes):
        yield build_tree({tuple(map(str, record.path)): read_leaf(checkpoint, record, dtype) for record in piece})


def report(pieces: Iterator[Any], total: int, progress: Progress | None) -> Iterator[Any]:
    """The pieces, each reported once the next one is asked for."""
    for piece in pieces:
        yield piece
        if progress is not None:
            progress(count_bytes(piece), total)


def count_bytes(tree: Any) -> int:
    """Bytes of all arrays of nested dicts."""
    return sum(map(count_bytes, tree.values())) if isinstance(tree, Mapping) else tree.nbytes


def convert_to_huggingface(
    checkpoint: Checkpoint,
    out: Path | str,
    *,
    dtype: Any = None,
    max_shard_size: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint as a Hugging Face directory of safetensors, tensor by tensor.

    An Orbax checkpoint is turned back by the manifest it carries: the keys, dtypes and division into files of the
    PyTorch checkpoint it came from, bit for bit where nothing was changed. A PyTorch checkpoint keeps its keys.

    Args:
        checkpoint: opened; Orbax with a manifest, safetensors or PyTorch.
        out: directory to create, complete or not at all.
        dtype: of floating-point weights; by default as in the PyTorch checkpoint.
        max_shard_size: bytes per file; by default as in the PyTorch checkpoint.
        memory: bytes to take above the process's own; more where the largest tensor needs it.
        progress: called as bytes are written.

    Raises:
        RefusedError: an Orbax checkpoint without a manifest or with other leaves than it says, or `out` cannot be
            made; nothing is left behind.
    """
    out = Path(out)
    problems = check_output(out, [checkpoint])
    try:
        records = find_records(checkpoint)
    except RefusedError as error:
        raise RefusedError([*problems, *error.problems]) from None

    def copy_rest(directory: Path) -> None:
        copy_companions(checkpoint, directory, dtype=None if dtype is None else np.dtype(dtype).name)

    plan = plan_return(records, dtype, max_shard_size)
    arrays = restore_all(records, read_leaves(checkpoint, records, memory // COPIES), dtype, progress)
    write_directory(out, plan, arrays, copy_rest, problems)
    return Conversion(out.absolute(), len(records), plan.total_size, None, ())


def save_huggingface(
    directory: Path | str,
    variables: Mapping[Any, Any],
    manifest: Manifest,
    *,
    companions: Path | str | None = None,
    dtype: Any = None,
    max_shard_size: int | None = None,
) -> None:
    """Write a Flax tree in memory as a Hugging Face directory; see `convert_to_huggingface`.

    Args:
        directory: to create, complete or not at all.
        variables: the tree of a conversion, changed or not.
        manifest: of that conversion.
        companions: directory whose other files (config, tokenizer) are copied: those that the manifest lists.
        dtype, max_shard_size: as there.

    Raises:
        RefusedError: the tree is not the manifest's, a companion is missing, or the directory cannot be made.
    """
    check_tree(variables, manifest)
    plan = plan_return(manifest.records, dtype, max_shard_size)
    leaves = (get_leaf(variables, record.path) for record in manifest.records)
    arrays = restore_all(manifest.records, leaves, dtype, None)

    def copy_rest(target: Path) -> None:
        if companions is not None:
            copy_listed(Path(companions), target, manifest.companions)

    directory = Path(directory)
    write_directory(directory, plan, arrays, copy_rest, check_output(directory, []))


def read_leaves(checkpoint: Checkpoint, records: Sequence[WeightRecord], piece_bytes: int) -> Iterator[Any]:
    """The leaf of every record in turn, the next piece being read while this one is used; None for those without."""

    def read(piece: list[WeightRecord]) -> list[Any]:
        names = [None if 0 in record.shape else name_on_disk(checkpoint, record) for record in piece]
        arrays = checkpoint.read_many({name for name in names if name is not None})
        return [None if name is None else arrays[name] for name in names]

    for leaves in read_ahead(map(read, divide(records, piece_bytes))):
        yield from leaves


def restore_all(
    records: Sequence[WeightRecord], leaves: Iterable[Any], dtype: Any, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Keys and their arrays as they lie on disk, one at a time."""
    total = sum(spec.nbytes for spec in output_specs(records, dtype))
    for record, leaf in zip(records, leaves, strict=True):
        array = restore(leaf, record, dtype)
        yield record.key, array
        if progress is not None:
            progress(array.nbytes, total)


def write_directory(
    out: Path,
    plan: ShardPlan,
    arrays: Iterable[tuple[str, np.ndarray]],
    copy_rest: Callable[[Path], object],
    problems: list[str],
) -> None:
    """Write tensors and what lies beside them into a directory that appears once it is complete."""
    if problems := problems + check_disk(out, plan.file_bytes + ROOM):
        raise RefusedError(problems)
    out = out.absolute()
    scratch = make_scratch(out)
    try:
        writer = ShardWriter(scratch / out.name, plan)
        for name, array in arrays:
            writer.write(name, array)
        writer.finish()
        copy_rest(scratch / out.name)
        publish(scratch / out.name, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_records(checkpoint: Checkpoint) -> tuple[WeightRecord, ...]:
    """What a return to PyTorch writes and where it lies in the checkpoint."""
    if not isinstance(checkpoint, OrbaxCheckpoint):
        aliases, number = checkpoint.aliases, checkpoint.shard_of
        return tuple(
            WeightRecord(key, (key,), "identity", spec.shape, spec.dtype, "", number(key), aliases.get(key))
            for key, spec in checkpoint.specs.items()
        )
    manifest = checkpoint.manifest
    if manifest is None:
        raise RefusedError(
            f"{checkpoint.path} has no manifest of a conversion in its metadata, so nothing says which PyTorch weights "
            "its leaves are: only what `rgsp convert --to flax` made can be turned back"
        )
    problems = find_differences({name: spec.shape for name, spec in checkpoint.specs.items()}, manifest)
    if problems:
        raise RefusedError(f"{checkpoint.path}: {problem}" for problem in cap(problems))
    return manifest.records


def name_on_disk(checkpoint: Checkpoint, record: WeightRecord) -> str:
    """The checkpoint's name of a record's elements."""
    return join_path(record.path) if checkpoint.format == "orbax" else record.key


def plan_return(records: Sequence[WeightRecord], dtype: Any, max_shard_size: int | None) -> ShardPlan:
    """The files of a return: of at most so many bytes, or divided as the source was."""
    specs = output_specs(records, dtype)
    if max_shard_size is not None:
        return plan_shards(specs, max_shard_size)
    return keep_shards(specs, [record.shard for record in records])
