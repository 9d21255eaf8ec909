"""Models in object stores: headers and elements by byte ranges, everything beside the weights fetched at opening."""

import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.companions import find_module_folders, walk_companions
from rgsp_jax.checkpoint.guards import check_relative, find_quantisation, read_config
from rgsp_jax.checkpoint.output import check_disk
from rgsp_jax.checkpoint.safetensors_header import Header, cap, parse_header
from rgsp_jax.checkpoint.safetensors_source import (
    SafetensorsCheckpoint,
    check_against_index,
    read_index,
    refuse_booleans,
)
from rgsp_jax.checkpoint.specs import TensorSpec, flat_bytes
from rgsp_jax.checkpoint.store import GAP_BYTES, REQUEST_BYTES, REQUESTS, ObjectIdentity, RemotePath, locate
from rgsp_jax.errors import RefusedError

FIRST_BYTES = 256 << 10
"""Asked for to begin with: most headers are shorter."""
Pick = Callable[[RemotePath, list[str]], str]


@dataclass
class Span:
    """One request: the bytes [start, end), and which of them go where."""

    start: int
    end: int
    targets: list[tuple[int, memoryview]] = field(default_factory=list)


def plan_requests(runs: Iterator[tuple[int, memoryview]]) -> list[Span]:
    """Requests for runs of bytes, each with its position: long ones divided, near ones together."""
    spans: list[Span] = []
    for position, view in runs:
        for i in range(0, len(view), REQUEST_BYTES):
            piece = view[i : i + REQUEST_BYTES]
            begin, end = position + i, position + i + len(piece)
            last = spans[-1] if spans else None
            if last is None or not 0 <= begin - last.end <= GAP_BYTES or end - last.start > REQUEST_BYTES:
                last = Span(begin, end)
                spans.append(last)
            last.targets.append((begin - last.start, piece))
            last.end = end
    return spans


class RemoteCheckpoint(SafetensorsCheckpoint):
    """Safetensors in a store. `root` is a temporary directory that holds what was fetched; it goes with `close`."""

    def __init__(self, path: RemotePath, headers: list[Header], fetched: tempfile.TemporaryDirectory, **beside: Any):
        self._fetched = fetched
        super().__init__(path, headers, root=Path(fetched.name), **beside)

    def _fill_runs(self, spec: TensorSpec, rows: np.ndarray, starts: list[int]) -> None:
        header = self._sources[spec.name]
        assert isinstance(header.path, RemotePath) and isinstance(header.identity, ObjectIdentity)
        origin, width = header.offsets[spec.name], spec.dtype.itemsize
        views = (memoryview(flat_bytes(row)) for row in rows)  # type: ignore[arg-type]
        spans = plan_requests((origin + start * width, view) for start, view in zip(starts, views, strict=True))
        for first in range(0, len(spans), REQUESTS):
            fill_spans(header.path, header.identity, spans[first : first + REQUESTS])
        refuse_changed(header.path, header.identity)
        refuse_booleans(header.path, spec, rows)

    def close(self) -> None:
        self._fetched.cleanup()


def fill_spans(path: RemotePath, identity: ObjectIdentity, spans: list[Span]) -> None:
    """Ask for some spans at once and deal out what comes."""
    for span, data in zip(spans, path.read_ranges([(span.start, span.end) for span in spans]), strict=True):
        if len(data) != span.end - span.start:
            refuse_changed(path, identity)
            raise OSError(errno.EIO, f"the store gave {len(data)} of {span.end - span.start} bytes asked for", path.url)
        for offset, view in span.targets:
            view[:] = data[offset : offset + len(view)]


def refuse_changed(path: RemotePath, identity: ObjectIdentity) -> None:
    """RefusedError where an object is not the one whose header was read."""
    if path.identify() != identity:
        raise RefusedError(f"{path} was changed while it was being read; leave it alone and start again")


def read_remote_header(path: RemotePath) -> Header:
    """Read and check one safetensors object's header, in one request or two; RefusedError as of a local file's."""
    identity = path.identify()
    if identity is None:
        raise RefusedError(f"{path} is no object in the store")
    start = path.read_ranges([(0, min(FIRST_BYTES, identity.size))])[0] if identity.size else b""

    def read(count: int, position: int) -> bytes:
        if position + count <= len(start):
            return start[position : position + count]
        ranges = [
            (begin, min(begin + REQUEST_BYTES, position + count))
            for begin in range(position, position + count, REQUEST_BYTES)
        ]
        return b"".join(path.read_ranges(ranges))

    return parse_header(path, read, identity)


def open_remote(location: str | RemotePath, pick: Pick) -> RemoteCheckpoint:
    """Open a model in a store.

    Args:
        location: of a directory of safetensors, or of one such object.
        pick: chooses the weights or their index among a directory's names, as for local ones.

    Raises:
        RefusedError: no such model, a format that is read from local disks only, or the store fails.
    """
    path = locate(location)
    try:
        found = path.inform()
        if found is not None and found.get("type") != "directory":
            return _open_object(path)
        return _open_prefix(path, pick)
    except OSError as error:
        raise RefusedError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def _open_object(path: RemotePath) -> RemoteCheckpoint:
    if not path.name.endswith(".safetensors"):
        raise RefusedError(
            f"{path} is no .safetensors file, and nothing else is read from stores: fetch it to a local disk first"
        )
    header = read_remote_header(path)
    return RemoteCheckpoint(path, [header], tempfile.TemporaryDirectory(prefix="rgsp-"), metadata=header.metadata)


def _open_prefix(path: RemotePath, pick: Pick) -> RemoteCheckpoint:
    entries = path.list_entries()
    if not entries:
        raise RefusedError(f"{path} does not exist, or nothing lies below it")
    files = {entry["name"]: entry["size"] for entry in entries if entry["type"] != "directory"}
    chosen = pick(path, list(files))
    fetched = tempfile.TemporaryDirectory(prefix="rgsp-")
    try:
        with named(fetched.name, path):
            return _open_fetched(path, files, chosen, fetched)
    except BaseException:
        fetched.cleanup()
        raise


def _open_fetched(
    path: RemotePath, files: dict[str, int], chosen: str, fetched: tempfile.TemporaryDirectory
) -> RemoteCheckpoint:
    """The model of a directory whose weights or index are `chosen`; every refusal at once."""
    root = Path(fetched.name)
    early = [name for name in ("config.json", "modules.json", chosen) if name in files]
    _fetch(path, root, {Path(name): files[name] for name in early if not name.endswith(".safetensors")})
    problems: list[str] = []
    config: dict[str, Any] | None = None
    headers: list[Header] = []
    metadata: Any = {}
    companions: tuple[Path, ...] = ()
    try:
        config = read_config(root)
    except RefusedError as error:
        problems += error.problems
    try:
        sizes = _find_companions(path, find_module_folders(root))
        companions = tuple(sorted(sizes))
        _fetch(path, root, {name: size for name, size in sizes.items() if not (root / name).exists()})
    except RefusedError as error:
        problems += error.problems
    try:
        headers, metadata = _read_headers(path, root, files, chosen)
    except RefusedError as error:
        problems += [*error.problems, *find_quantisation(root, {}, config)]
    if problems:
        raise RefusedError(problems)
    return RemoteCheckpoint(path, headers, fetched, metadata=metadata, config=config, companions=companions)


def _read_headers(path: RemotePath, root: Path, files: dict[str, int], chosen: str) -> tuple[list[Header], Any]:
    """Headers of one file, or of all shards in order of their names, and the file's or the index's metadata."""
    if chosen.endswith(".safetensors"):
        header = read_remote_header(path / chosen)
        return [header], header.metadata
    weight_map, metadata = read_index(root / chosen)
    headers: dict[str, Header] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        try:
            check_relative(path, shard)
            if "/" not in shard and shard not in files:
                raise RefusedError(f"{path / chosen} names the shard {shard!r}, which is not there")
            headers[shard] = read_remote_header(path / shard)
        except RefusedError as error:
            problems += error.problems
    problems = cap(problems) or check_against_index(
        path / chosen, weight_map, {shard: header.specs for shard, header in headers.items()}
    )
    if problems:
        raise RefusedError(problems)
    return list(headers.values()), metadata


def _find_companions(path: RemotePath, module_folders: frozenset[str]) -> dict[Path, int]:
    """Relative path -> size of what belongs to the model besides its weights, as for local directories."""
    sizes: dict[Path, int] = {}

    def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
        place = path if folder == Path() else path / folder.as_posix()
        entries = place.list_entries()
        subfolders = [entry["name"] for entry in entries if entry["type"] == "directory"]
        names = [entry["name"] for entry in entries if entry["type"] != "directory"]
        sizes.update({folder / entry["name"]: entry["size"] for entry in entries})
        yield folder, subfolders, names
        for subfolder in subfolders:  # those that whoever iterates has left
            yield from walk(folder / subfolder)

    return {name: sizes[name] for name in walk_companions(walk(Path()), module_folders)}


def _fetch(path: RemotePath, root: Path, sizes: dict[Path, int]) -> None:
    """Copy objects below `root`; RefusedError where there is no room or one came cut short."""
    if problems := check_disk(root, sum(sizes.values())):
        raise RefusedError(f"to fetch what lies beside the weights of {path}: {problem}" for problem in problems)
    for name, size in sizes.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (path / name.as_posix()).fetch(target)
        if target.stat().st_size != size:
            raise RefusedError(f"{path / name.as_posix()} came with {target.stat().st_size} of {size} bytes: try again")


@contextmanager
def named(directory: str, path: RemotePath) -> Iterator[None]:
    """Refusals of what was fetched, under the name of where it came from."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(problem.replace(directory, str(path)) for problem in error.problems) from None
