"""Writing tensors in any order and from any thread into preallocated safetensors files."""

import errno
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from rgsp_jax.checkpoint.output import format_bytes, sync_directory
from rgsp_jax.checkpoint.safetensors_header import build_header
from rgsp_jax.checkpoint.safetensors_source import read_exactly
from rgsp_jax.checkpoint.shard_plan import METADATA, Shard, ShardPlan
from rgsp_jax.checkpoint.specs import TensorSpec, flat_bytes
from rgsp_jax.errors import RefusedError

INDEX_NAME = "model.safetensors.index.json"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class ShardWriter:
    """Writes a ShardPlan's tensors by position.

    At construction every file is made at its full size with its header, so that a disk too full is found before
    anything is computed. A file appears under its name only once that is done; `resume=True` continues in such files.

    Args:
        directory: existing or new directory for the files.
        plan: where everything goes.
        resume: accept files that are there, provided that their header and size are the plan's.
        numbers: of the shards that are this writer's; None is all. Other writers, in other processes as well, make
            the others meanwhile.

    Attributes:
        shards: this writer's.

    Raises:
        RefusedError: not enough room, a file in the way, or files of another plan.
    """

    def __init__(
        self, directory: Path | str, plan: ShardPlan, resume: bool = False, numbers: Collection[int] | None = None
    ):
        self.directory = Path(directory)
        self.plan = plan
        self.shards = tuple(shard for i, shard in enumerate(plan.shards) if numbers is None or i in numbers)
        self.directory.mkdir(parents=True, exist_ok=True)
        made: list[Path] = []
        planned = {shard.file_name for shard in plan.shards}
        foreign = sorted(path for path in self.directory.glob("model*.safetensors") if path.name not in planned)
        problems = [f"{path} belongs to no shard of this output: remove it first" for path in foreign]
        for shard in self.shards:
            path = self.directory / shard.file_name
            if os.path.lexists(path):
                problems += _find_mismatch(path, shard) if resume else [f"{path} is already there"]
        if problems:
            raise RefusedError(problems)
        try:
            for shard in self.shards:
                path = self.directory / shard.file_name
                if not path.exists():
                    _make_file(path, shard)
                    made.append(path)
        except OSError as error:
            for path in made:
                path.unlink(missing_ok=True)
            if error.errno not in FULL:
                raise RefusedError(f"{self.directory} cannot be written: {error.strerror}") from None
            raise RefusedError(
                f"{self.directory} has no room for the {format_bytes(sum(s.size for s in self.shards))} of the output "
                f"({error.strerror}): free some space or choose another place"
            ) from None

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Write `array` as the flat elements `[start, start + array.size)` of tensor `name`.

        Args:
            name: a tensor of the plan (KeyError otherwise).
            array: of the plan's dtype, any shape and strides; its elements are taken in C order.
            start: first element, counted in the tensor's C order.

        Raises:
            ValueError: another dtype, or the range leaves the tensor.
            OSError: the disk is full or fails; what was written before stays for `resume`.
        """
        path, position = self._locate(name, array, start)
        row = flat_bytes(np.asarray(array, order="C"))
        if not row.size:
            return
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                write_exactly(descriptor, row, position)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                error.errno, f"no room left while writing tensor {name!r}: free some space, then resume", str(path)
            ) from None

    def read_back(self, name: str, out: np.ndarray, start: int = 0) -> None:
        """Fill the C-contiguous `out` with elements as they now are in the file; the reverse of `write`."""
        path, position = self._locate(name, out, start)
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(f"the buffer for {name!r} must be C-contiguous and writable")
        if not out.size:
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not read_exactly(descriptor, flat_bytes(out), position):
                raise OSError(errno.EIO, f"the file ends inside tensor {name!r}", str(path))
        finally:
            os.close(descriptor)

    def _locate(self, name: str, array: np.ndarray, start: int) -> tuple[Path, int]:
        placement = self.plan.placements[name]
        spec = placement.spec
        if array.dtype != spec.dtype:
            raise ValueError(f"{name!r} is planned as {spec.dtype}, the array is {array.dtype}")
        if start < 0 or start + array.size > spec.size:
            raise ValueError(f"elements [{start}, {start + array.size}) leave {name!r}, which has {spec.size}")
        path = self.directory / self.plan.shards[placement.shard].file_name
        return path, placement.offset + start * spec.dtype.itemsize

    def finish(self) -> tuple[Path, ...]:
        """See everything onto the disk; a writer of all shards also writes the index, where there are several files.

        Returns:
            Paths of all files written, index included.
        """
        paths = [self.directory / shard.file_name for shard in self.shards]
        for path in paths:
            sync_file(path)
        if len(self.shards) == len(self.plan.shards):
            paths += write_index(self.directory, self.plan)
        sync_directory(self.directory)
        return tuple(paths)


def write_index(directory: Path, plan: ShardPlan) -> list[Path]:
    """Write the index of a model of several files; the path written, none for a model of one file."""
    if len(plan.shards) == 1:
        return []
    index = {"metadata": {"total_size": plan.total_size}, "weight_map": plan.weight_map}
    path = directory / INDEX_NAME
    replace_file(path, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    return [path]


def write_exactly(descriptor: int, row: np.ndarray, position: int) -> None:
    """Write all of a contiguous byte row at a file position, however many calls that takes. Releases the GIL."""
    view = memoryview(row)  # type: ignore[arg-type]
    while view:
        count = os.pwrite(descriptor, view, position)
        view = view[count:]
        position += count


def sync_file(path: Path) -> None:
    """Flush one file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all: temporary name, flush, rename."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and its blocks where the system and the file system can reserve them."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def _make_file(path: Path, shard: Shard) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            _reserve(descriptor, shard.size)
            write_exactly(descriptor, np.frombuffer(shard.header, np.uint8), 0)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _find_mismatch(path: Path, shard: Shard) -> list[str]:
    if path.is_symlink() or not path.is_file():
        return [f"{path} is not a regular file"]
    with path.open("rb") as file:
        same = file.read(len(shard.header)) == shard.header
    if same and path.stat().st_size == shard.size:
        return []
    return [f"{path} was begun for other tensors, shapes or dtypes: remove its directory or merge without resuming"]


def write_safetensors(
    path: Path | str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays (any strides; 0-d and empty ones too) as one safetensors file, whole or not at all.

    Args:
        path: file to write; replaced if it is there.
        tensors: arrays of supported dtypes by name.
        metadata: strings for the header; `{"format": "pt"}` by default.

    Raises:
        RefusedError: an unsupported dtype or an impossible name.
        OSError: the disk is full or fails; nothing is left of the attempt.
    """
    path = Path(path)
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()]
    header, offsets = build_header(specs, METADATA if metadata is None else metadata)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            _reserve(file.fileno(), len(header) + sum(spec.nbytes for spec in specs))
            write_exactly(file.fileno(), np.frombuffer(header, np.uint8), 0)
            for name, array in tensors.items():
                write_exactly(file.fileno(), flat_bytes(np.asarray(array, order="C")), offsets[name])
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
