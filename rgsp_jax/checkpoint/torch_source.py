"""PyTorch state dicts, single and sharded: mapped, unpickled by the safe loader only, copied slice by slice."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.guards import is_lfs_pointer, resolve_inside
from rgsp_jax.checkpoint.safetensors_header import FileIdentity, cap, describe_failure
from rgsp_jax.checkpoint.safetensors_source import (
    check_against_index,
    read_exactly,
    read_index,
    resolve_shards,
)
from rgsp_jax.checkpoint.specs import BFLOAT16, DTYPES, Checkpoint, TensorSpec, flat_bytes, unsupported_dtype
from rgsp_jax.errors import RefusedError

NESTING_KEYS = ("state_dict", "model_state_dict", "model", "module")
MAX_NESTING = 3
MINIMUM_TORCH = (2, 6)
SUPPORTED = {str(dtype): dtype for dtype in DTYPES.values()}


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise RefusedError(
            f"{path} is a PyTorch file and torch is not installed: install it (pip install 'rgsp_jax[torch]'), "
            "or convert the model to safetensors"
        ) from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        # Before 2.6 weights_only=True could be made to run code (CVE-2025-32434).
        raise RefusedError(
            f"{path} cannot be loaded safely by torch {torch.__version__}: install torch 2.6 or newer, "
            "or convert the model to safetensors"
        )
    return torch


def _check_archive(path: Path) -> bool:
    """True for the zip format (mappable), False for the legacy one; refuses archives a mapping would misread."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise RefusedError(f"{path} is a TorchScript archive: save its state_dict() instead")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise RefusedError(f"{path} is a compressed archive, not a file of torch.save")
            if entry.filename.endswith("/byteorder") and archive.read(entry).strip() == b"big":
                raise RefusedError(f"{path} was saved on a big-endian machine: save it again as safetensors")
    return True


def load_state_dict(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of one PyTorch file by name, and a record of what lay around them.

    Raises:
        RefusedError: the file is damaged, needs more than the safe loader allows, or holds no state dict.
    """
    torch = _import_torch(path)
    if is_lfs_pointer(path):
        raise RefusedError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    try:
        mapped = _check_archive(path)
        loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except RefusedError:
        raise
    except Exception as error:  # the unpickler raises whatever a damaged or hostile file provokes
        raise RefusedError(
            f"{path} was not loaded: torch's safe loader (weights_only=True) refuses it, because it is damaged, no "
            f"PyTorch file, or pickles objects other than tensors; convert it to safetensors where you trust it "
            f"({describe_failure(error)})"
        ) from None
    record: dict[str, Any] = {}
    return _find_state_dict(torch, path, loaded, record), record


def _find_state_dict(torch: Any, path: Path, loaded: object, record: dict[str, Any]) -> dict[str, Any]:
    nesting: list[str] = []
    while isinstance(loaded, Mapping) and len(nesting) < MAX_NESTING:
        inner = next((key for key in NESTING_KEYS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        record["ignored"] = [*record.get("ignored", []), *(str(key) for key in loaded if key != inner)]
        nesting.append(inner)
        loaded = loaded[inner]
    if nesting:
        record["nested_under"] = "/".join(nesting)
    if not isinstance(loaded, Mapping):
        raise RefusedError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    problems = [
        f"{path}: the entry {key!r} is a {type(value).__name__}, not a tensor; save only the state dict"
        for key, value in loaded.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if problems:
        raise RefusedError(cap(problems))
    return {key: value.detach() for key, value in loaded.items()}


def _view_as_numpy(torch: Any, path: Path, name: str, tensor: Any) -> np.ndarray:
    """A NumPy view of the tensor's storage, strides kept."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise RefusedError(f"{path}: tensor {name!r} is sparse, quantised or without data; save it densely first")
    label = str(tensor.dtype).removeprefix("torch.")
    if label not in SUPPORTED:
        raise RefusedError(f"{path}: tensor {name!r} {unsupported_dtype(label)}")
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def _describe(torch: Any, path: Path, tensors: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Views by name and aliases (same storage, offset, shape, strides and dtype) for one file."""
    arrays: dict[str, np.ndarray] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        try:
            arrays[name] = _view_as_numpy(torch, path, name, tensor)
        except RefusedError as error:
            problems += error.problems
            continue
        if tensor.numel():
            view = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            owner = owners.setdefault(view, name)
            if owner != name:
                aliases[name] = owner
    if problems:
        raise RefusedError(cap(problems))
    return arrays, aliases


def _find_positions(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """File positions of the C-contiguous arrays that lie in this process's mapping of the file.

    Reading them by position keeps the mapping's pages out of the process; where the mapping cannot be found (another
    operating system, a legacy file in memory), the arrays are copied from instead.
    """
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return {}
    ranges = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and int(fields[4]) == inode and fields[5] == str(path):
            low, high = (int(part, 16) for part in fields[0].split("-"))
            ranges.append((low, high, int(fields[2], 16)))
    positions = {}
    for name, array in arrays.items():
        pointer = array.ctypes.data
        for low, high, offset in ranges:
            if array.flags.c_contiguous and low <= pointer and pointer + array.nbytes <= high:
                positions[name] = offset + pointer - low
    return positions


class TorchCheckpoint(Checkpoint):
    """State dicts in `torch.save` files: zip files stay mapped and unread, legacy ones are held in memory."""

    format = "torch"

    def __init__(self, path: Path, files: tuple[Path, ...], **companions: Any):
        self._arrays: dict[str, np.ndarray] = {}
        self._positions: dict[str, int] = {}
        self._files: dict[str, Path] = {}
        self._identities: dict[Path, FileIdentity] = {}
        self.held: dict[Path, dict[str, TensorSpec]] = {}
        aliases: dict[str, str] = {}
        record: dict[str, Any] = {}
        problems: list[str] = []
        for file in files:
            try:
                with _opened(file) as descriptor:
                    self._identities[file] = FileIdentity.of(descriptor)
                tensors, beside = load_state_dict(file)
                arrays, shared = _describe(_import_torch(file), file, tensors)
            except RefusedError as error:
                problems += error.problems
                continue
            self.held[file] = {name: TensorSpec(name, array.shape, array.dtype) for name, array in arrays.items()}
            self._arrays.update(arrays)
            self._positions.update(_find_positions(file, arrays))
            self._files.update(dict.fromkeys(arrays, file))
            aliases.update(shared)
            record.update(beside)
        if problems:
            raise RefusedError(problems)
        specs = {name: spec for held in self.held.values() for name, spec in held.items()}
        super().__init__(path, specs, files, aliases=aliases, metadata=record, **companions)

    def _fill(self, spec: TensorSpec, out: np.ndarray, start: int) -> None:
        array = self._arrays.get(spec.name)
        if array is None:
            raise ValueError(f"{self.path} is closed")
        file = self._files[spec.name]
        with _opened(file) as descriptor:
            unchanged = FileIdentity.of(descriptor) == self._identities[file]
            if unchanged and spec.name in self._positions:
                position = self._positions[spec.name] + start * spec.dtype.itemsize
                unchanged = read_exactly(descriptor, flat_bytes(out), position)
            elif unchanged:
                flat = array.reshape(-1) if array.flags.c_contiguous else array.flat
                out[:] = flat[start : start + out.size]
            unchanged = unchanged and FileIdentity.of(descriptor) == self._identities[file]
        if not unchanged:
            raise RefusedError(f"{file} was changed while it was being read; leave it alone and start again")

    def shard_of(self, name: str) -> int:
        return self.weight_files.index(self._files[name])

    def close(self) -> None:
        self._arrays.clear()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RefusedError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_torch_shards(directory: Path, index_path: Path, **companions: Any) -> TorchCheckpoint:
    """A sharded PyTorch checkpoint, checked against its index."""
    weight_map, _ = read_index(resolve_inside(directory, index_path.name))
    shards = resolve_shards(directory, index_path, weight_map)
    checkpoint = TorchCheckpoint(directory, tuple(shards.values()), **companions)
    held = {shard: checkpoint.held[real] for shard, real in shards.items()}
    problems = check_against_index(index_path, weight_map, held)
    if problems:
        checkpoint.close()
        raise RefusedError(problems)
    return checkpoint
