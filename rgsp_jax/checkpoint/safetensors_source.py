"""Single and sharded safetensors: headers at opening, positional reads into the caller's buffer afterwards."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.guards import is_lfs_pointer, resolve_inside
from rgsp_jax.checkpoint.safetensors_header import FileIdentity, Header, cap, load_json, read_header
from rgsp_jax.checkpoint.specs import Checkpoint, TensorSpec, flat_bytes
from rgsp_jax.checkpoint.store import RemotePath
from rgsp_jax.errors import RefusedError

MAX_INDEX_BYTES = 100_000_000


def read_exactly(descriptor: int, out: np.ndarray, position: int) -> bool:
    """Fill a contiguous byte row from a file position; False where the file ends early. Releases the GIL."""
    view = memoryview(out)  # type: ignore[arg-type]
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            return False
        view = view[count:]
        position += count
    return True


class SafetensorsCheckpoint(Checkpoint):
    """One or more safetensors files. No file stays open between reads, so any number of shards is fine."""

    format = "safetensors"

    def __init__(self, path: Path | RemotePath, headers: list[Header], **companions: Any):
        specs: dict[str, TensorSpec] = {}
        self._sources: dict[str, Header] = {}
        for header in headers:
            specs.update(header.specs)
            self._sources.update(dict.fromkeys(header.specs, header))
        super().__init__(path, specs, tuple(header.path for header in headers), **companions)

    def _fill(self, spec: TensorSpec, out: np.ndarray, start: int) -> None:
        self._fill_runs(spec, out[None], [start])

    def _fill_runs(self, spec: TensorSpec, rows: np.ndarray, starts: list[int]) -> None:
        header = self._sources[spec.name]
        origin, width = header.offsets[spec.name], spec.dtype.itemsize
        assert isinstance(header.path, Path)
        descriptor = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            complete = FileIdentity.of(descriptor) == header.identity and all(
                read_exactly(descriptor, flat_bytes(row), origin + start * width)
                for row, start in zip(rows, starts, strict=True)
            )
            unchanged = complete and FileIdentity.of(descriptor) == header.identity
        finally:
            os.close(descriptor)
        if not unchanged:
            raise RefusedError(f"{header.path} was changed while it was being read; leave it alone and start again")
        refuse_booleans(header.path, spec, rows)

    def shard_of(self, name: str) -> int:
        return self.weight_files.index(self._sources[name].path)


def refuse_booleans(path: Path | RemotePath, spec: TensorSpec, rows: np.ndarray) -> None:
    """RefusedError where booleans are neither 0 nor 1."""
    if spec.dtype == np.bool_ and flat_bytes(rows).max() > 1:
        raise RefusedError(f"{path}: tensor {spec.name!r} holds bytes other than 0 and 1 as booleans")


def read_index(path: Path) -> tuple[dict[str, str], Mapping[str, Any]]:
    """The weight map (tensor name -> shard's file name) and metadata of an index file, checked for their types."""
    if is_lfs_pointer(path):
        raise RefusedError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository")
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise RefusedError(f"{path} is larger than {MAX_INDEX_BYTES} bytes, which no index is")
        index = load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(f"{path} cannot be read as an index: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise RefusedError(f"{path} has no weight_map from tensor names to file names")
    if not weight_map:
        raise RefusedError(f"{path} names no tensor")
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def resolve_shards(directory: Path, index_path: Path, weight_map: Mapping[str, str]) -> dict[str, Path]:
    """File name -> real path of every shard that the index names, in order of their numbered names.

    Raises:
        RefusedError: naming every shard that is absent, leaves the directory or is a Git LFS pointer.
    """
    shards: dict[str, Path] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):  # the map itself is sorted by tensor, which scatters layers
        try:
            real = resolve_inside(directory, shard)
        except RefusedError as error:
            problems += error.problems
            continue
        if not real.is_file():
            problems.append(f"{index_path} names the shard {shard!r}, which is not there")
        elif is_lfs_pointer(real):
            problems.append(f"{directory / shard} is a Git LFS pointer: run `git lfs pull` in its repository")
        shards[shard] = real
    if problems:
        raise RefusedError(cap(problems))
    return shards


def check_against_index(
    index_path: Path | RemotePath, weight_map: Mapping[str, str], held: Mapping[str, Mapping[str, TensorSpec]]
) -> list[str]:
    """Every disagreement between an index and what its shards hold, as sentences."""
    problems: list[str] = []
    places: dict[str, list[str]] = {}
    for shard, specs in held.items():
        for name in specs:
            places.setdefault(name, []).append(shard)
    for name, shards in places.items():
        if len(shards) > 1:
            problems.append(f"{index_path}: tensor {name!r} lies in several shards ({', '.join(shards)})")
        elif name not in weight_map:
            problems.append(f"{index_path} does not name tensor {name!r}, which {shards[0]} holds")
        elif weight_map[name] != shards[0]:
            problems.append(f"{index_path} says {weight_map[name]} holds tensor {name!r}, but {shards[0]} does")
    problems += [
        f"{index_path} says {shard} holds tensor {name!r}, but it does not"
        for name, shard in weight_map.items()
        if name not in places
    ]
    return cap(problems)


def open_sharded(directory: Path, index_path: Path) -> tuple[list[Header], Mapping[str, Any]]:
    """Headers of all shards in order of their names, and the index's metadata; RefusedError with every disagreement."""
    weight_map, metadata = read_index(resolve_inside(directory, index_path.name))
    headers: list[Header] = []
    problems: list[str] = []
    shards = resolve_shards(directory, index_path, weight_map)
    for real in shards.values():
        try:
            headers.append(read_header(real))
        except RefusedError as error:
            problems += error.problems
    if not problems:
        held = {shard: header.specs for shard, header in zip(shards, headers, strict=True)}
        problems = check_against_index(index_path, weight_map, held)
    if problems:
        raise RefusedError(problems)
    return headers, metadata
