"""The safetensors header: parsed with every claim checked against the file, and written padded and aligned.

A file is 8 bytes little-endian header length, the header (JSON object), then the tensors back to back.
Source: the format section of the safetensors README.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgsp_jax.checkpoint.specs import DTYPE_CODES, DTYPES, TensorSpec, unsupported_dtype
from rgsp_jax.errors import RefusedError

if TYPE_CHECKING:
    from rgsp_jax.checkpoint.store import ObjectIdentity, RemotePath

MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 64
MAX_DIMS = 64
MAX_NAMED = 20
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


@dataclass(frozen=True)
class FileIdentity:
    """What must stay the same in a file between reading its header and reading its elements."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> "FileIdentity":
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """Checked header of one file; `offsets` are absolute positions in the file, in file order."""

    path: "Path | RemotePath"
    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    identity: "FileIdentity | ObjectIdentity"


class _DuplicateKeyError(ValueError):
    pass


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({repr(key) for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(f"names {', '.join(twice[:MAX_NAMED])} twice")
    return result


def load_json(text: bytes, *, unique: bool = True) -> Any:
    """Parse JSON from an untrusted file; ValueError whatever is wrong with it, with `unique` also duplicate keys."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object_without_duplicates if unique else None)
    except RecursionError:
        raise ValueError("nests too deeply") from None


def describe_failure(error: Exception) -> str:
    """One line for an exception of another library, without its stack or newlines."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def read_header(path: Path) -> Header:
    """Read and check one safetensors file's header.

    Raises:
        RefusedError: naming everything in the header that cannot be true.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RefusedError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RefusedError(f"{path} is not a regular file")
        return parse_header(path, lambda count, at: os.pread(descriptor, count, at), FileIdentity.of(descriptor))
    finally:
        os.close(descriptor)


Read = Callable[[int, int], bytes]
"""`read(count, position)`: that many bytes of a file from there, fewer at its end."""


def parse_header(path: "Path | RemotePath", read: Read, identity: "FileIdentity | ObjectIdentity") -> Header:
    """Check the header of a file that `read` delivers; RefusedError as `read_header`."""
    text = _read_header_text(read, path, identity.size)
    try:
        parsed = load_json(text)
    except ValueError as error:
        raise RefusedError(f"{path} has a header that is not valid JSON ({describe_failure(error)})") from None
    return _check_header(path, parsed, 8 + len(text), identity)


def _read_header_text(read: Read, path: "Path | RemotePath", size: int) -> bytes:
    start = read(min(len(LFS_POINTER), size), 0)
    if start == LFS_POINTER:
        raise RefusedError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if len(start) < 8:
        raise RefusedError(f"{path} is not a safetensors file: it has only {size} bytes")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise RefusedError(
            f"{path} is not a safetensors file: it announces a header of {length} bytes, past {MAX_HEADER_BYTES}"
        )
    if 8 + length > size:
        raise RefusedError(f"{path} is cut short: its header needs {8 + length} bytes, the file has {size}")
    pieces = bytearray()
    while len(pieces) < length:
        piece = read(length - len(pieces), 8 + len(pieces))
        if not piece:
            raise RefusedError(f"{path} was cut short while its header was read")
        pieces += piece
    if not pieces.startswith(b"{"):
        raise RefusedError(f"{path} is not a safetensors file: its header does not start with '{{'")
    return bytes(pieces)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_entry(name: str, entry: object) -> tuple[TensorSpec, int, int] | str:
    """The spec and its claimed byte range, or what is wrong with the entry."""
    if not isinstance(entry, dict):
        return "has no description in the header"
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str):
        return "has no dtype in the header"
    if code not in DTYPES:
        return unsupported_dtype(code)
    if not (isinstance(shape, list) and len(shape) <= MAX_DIMS and all(_is_count(n) for n in shape)):
        return f"has the impossible shape {str(shape)[:80]}"
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(n) for n in offsets)):
        return f"has the impossible data_offsets {str(offsets)[:80]}"
    begin, end = offsets
    spec = TensorSpec(name, tuple(shape), DTYPES[code])
    if math.prod(n for n in shape if n) >= 2**63:
        return f"has the impossible shape {str(shape)[:80]}"
    if end - begin != spec.nbytes:
        return f"claims {end - begin} bytes for {code} {list(shape)}, which takes {spec.nbytes}"
    return spec, begin, end


def _check_header(
    path: "Path | RemotePath", parsed: object, data_start: int, identity: "FileIdentity | ObjectIdentity"
) -> Header:
    assert isinstance(parsed, dict)  # the text starts with '{'
    metadata = parsed.pop("__metadata__", {})
    problems: list[str] = []
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        problems.append(f"{path}: __metadata__ is not a map of strings")
    entries: list[tuple[int, int, TensorSpec]] = []
    for name, entry in parsed.items():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            problems.append(f"{path}: the tensor name {name!r} is not valid Unicode")
            continue
        outcome = _parse_entry(name, entry)
        if isinstance(outcome, str):
            problems.append(f"{path}: tensor {name!r} {outcome}")
        else:
            spec, begin, end = outcome
            entries.append((begin, end, spec))
    if not problems:
        entries.sort(key=lambda item: item[:2])
        problems = _check_tiling(path, entries, data_start, identity.size)
    if problems:
        raise RefusedError(cap(problems))
    specs = {spec.name: spec for _, _, spec in entries}
    offsets = {spec.name: data_start + begin for begin, _, spec in entries}
    return Header(path, specs, offsets, metadata, identity)


def _check_tiling(
    path: "Path | RemotePath", entries: list[tuple[int, int, TensorSpec]], data_start: int, size: int
) -> list[str]:
    """The tensors must cover the rest of the file exactly: no overlap, no hole, nothing missing, nothing left."""
    problems = []
    position = 0
    for begin, end, spec in entries:
        if begin < position:
            problems.append(f"{path}: tensor {spec.name!r} overlaps the tensor before it")
        elif begin > position:
            problems.append(f"{path}: {begin - position} bytes before tensor {spec.name!r} belong to no tensor")
        position = max(position, end)
    if data_start + position > size:
        problems.append(
            f"{path} is cut short: its header describes {data_start + position} bytes, the file has {size}; "
            "fetch it again"
        )
    elif data_start + position < size:
        problems.append(f"{path}: {size - data_start - position} bytes at its end belong to no tensor")
    return problems


def cap(problems: list[str], limit: int = MAX_NAMED) -> list[str]:
    """The first `limit` problems and a count of the rest."""
    if len(problems) <= limit:
        return problems
    return [*problems[:limit], f"... and {len(problems) - limit} more of this kind"]


def build_header(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Header bytes (length prefix included) for tensors laid out back to back, and their absolute offsets.

    The length is padded with spaces to a multiple of 64; wider dtypes go first, so every offset is a multiple of its
    itemsize without a hole, which the format forbids. Otherwise the given order is kept.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    position = 0
    for spec in ordered:
        if spec.name == "__metadata__" or spec.name in begins:
            raise RefusedError(f"a safetensors file cannot hold the tensor name {spec.name!r} (twice, or reserved)")
        if spec.dtype not in DTYPE_CODES:
            raise RefusedError(f"tensor {spec.name!r} {unsupported_dtype(str(spec.dtype))}")
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        begins[spec.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise RefusedError(f"{len(ordered)} tensors need a header of {len(text)} bytes, past the format's limit")
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}
