"""What every checkpoint format is reduced to: named tensors with a shape and a dtype, and flat reads of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import ml_dtypes
import numpy as np

from rgsp_jax.errors import RefusedError

if TYPE_CHECKING:
    from rgsp_jax.checkpoint.store import RemotePath

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F16": np.dtype(np.float16),
        "BF16": BFLOAT16,
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
    }
)
"""Supported dtypes under their safetensors names."""

DTYPE_CODES: Mapping[np.dtype, str] = MappingProxyType({dtype: code for code, dtype in DTYPES.items()})

FLOATING = frozenset({DTYPES["F16"], BFLOAT16, DTYPES["F32"], DTYPES["F64"]})


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor as it lies on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))  # so that jnp.bfloat16 and np.float32 may be given

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar of shape ()."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements on disk."""
        return self.size * self.dtype.itemsize

    @property
    def kind(self) -> str:
        """`float`, `integer` or `bool`: tensors of one kind may be merged across dtypes."""
        if self.dtype in FLOATING:
            return "float"
        return "bool" if self.dtype == np.bool_ else "integer"


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """View of a C-contiguous array as one row of bytes (ml_dtypes arrays have no usable buffer of their own)."""
    return array.reshape(-1).view(np.uint8)


def unsupported_dtype(label: str) -> str:
    """Half a sentence that says why a dtype cannot be merged and what to do."""
    low_bits = label.upper().replace("TORCH.", "").startswith(("F8", "F4", "F6", "FLOAT8", "FLOAT4", "FLOAT6", "INT4"))
    if low_bits:
        return f"is quantised ({label}): dequantise the model to bfloat16, float16 or float32 first"
    if label.lower().replace("torch.", "").startswith(("c", "complex")):
        return f"is complex ({label}), which no method here merges"
    return f"has the unsupported dtype {label}; supported are {', '.join(DTYPES)}"


class Checkpoint(ABC):
    """An opened model: specs read from headers, elements read on demand.

    Attributes:
        path: directory (resolved) or lone file (absolute), or the place of either in a store.
        root: the directory that holds config and companions: `path`, the base's of an adapter, or, of a model in a
            store, where these were fetched to.
        format: `safetensors`, `torch`, `orbax` or `lora`.
        specs: every key on disk, aliases included, in disk order (shards by name, by offset within a file).
        aliases: key -> the key whose elements it shares: one storage in PyTorch files, tied embeddings stored twice
            elsewhere. Merge `specs` without `aliases`; write an alias as a copy of its owner's result, or not at all.
        weight_files: the files that hold the elements, absolute.
        companions: relative paths of what belongs to the model besides weights; empty for a lone file.
        config: the parsed `config.json`, or None.
        metadata: what the file format itself records (string map of safetensors, custom metadata of Orbax).
        bytes_read: bytes of elements that `read_into` has delivered so far.

    Reads are thread-safe. The file must not change while open: a changed file is refused at the next read.
    """

    format: ClassVar[str]

    def __init__(
        self,
        path: "Path | RemotePath",
        specs: Mapping[str, TensorSpec],
        weight_files: "tuple[Path | RemotePath, ...]",
        *,
        aliases: Mapping[str, str] | None = None,
        companions: tuple[Path, ...] = (),
        config: dict[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        root: Path | None = None,
    ):
        self.path = path
        self.root: Path = root or path  # type: ignore[assignment]  # a remote model's is given
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(dict(specs))
        self.weight_files = weight_files
        self.aliases: Mapping[str, str] = MappingProxyType(dict(aliases or {}))
        self.companions = companions
        self.config = config
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata or {}))
        self.bytes_read = 0
        self._counting = Lock()

    def read_into(self, name: str, out: np.ndarray, start: int = 0) -> None:
        """Fill `out` with the flat elements `[start, start + out.size)` of tensor `name`.

        Args:
            name: a key of `specs` (KeyError otherwise).
            out: writable C-contiguous array of any shape and of the tensor's dtype on disk.
            start: first element, counted in the tensor's C order.

        Raises:
            ValueError: `out` has another dtype or layout, or the range leaves the tensor.
            RefusedError: the file was changed or cut short since it was opened.
        """
        spec = self.specs[name]
        if out.dtype != spec.dtype:
            raise ValueError(f"{name!r} is {spec.dtype} on disk, the buffer is {out.dtype}")
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(f"the buffer for {name!r} must be C-contiguous and writable")
        if start < 0 or start + out.size > spec.size:
            raise ValueError(f"elements [{start}, {start + out.size}) leave {name!r}, which has {spec.size}")
        if out.size:
            self._fill(spec, out.reshape(-1), start)
            with self._counting:
                self.bytes_read += out.nbytes

    def read(self, name: str) -> np.ndarray:
        """The whole tensor as a fresh C-contiguous array."""
        spec = self.specs[name]
        out = np.empty(spec.shape, spec.dtype)
        self.read_into(name, out)
        return out

    def read_many(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Whole tensors by name, read together where the format gains by it."""
        return {name: self.read(name) for name in names}

    def read_block(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The block `tensor[index]` as a fresh C-contiguous array; only its bytes are read, and whole runs at once.

        Args:
            name: a key of `specs` (KeyError otherwise).
            index: one slice of step 1 per axis.
        """
        spec = self.specs[name]
        ranges = [range(*part.indices(length)) for part, length in zip(index, spec.shape, strict=True)]
        out = np.empty([len(part) for part in ranges], spec.dtype)
        if not out.size:
            return out
        whole = len(ranges)  # axes from here on are taken whole, so that one run covers them and the axis before
        while whole and len(ranges[whole - 1]) == spec.shape[whole - 1]:
            whole -= 1
        outer = max(0, whole - 1)
        run = math.prod(out.shape[outer:])
        strides = [math.prod(spec.shape[axis + 1 :]) for axis in range(len(ranges))]
        first = sum(part.start * stride for part, stride in zip(ranges, strides, strict=True))
        starts = [
            first + sum(i * stride for i, stride in zip(position, strides, strict=False))
            for position in np.ndindex(*out.shape[:outer])
        ]
        self._fill_runs(spec, out.reshape(-1, run), starts)
        return out

    def _fill_runs(self, spec: TensorSpec, rows: np.ndarray, starts: list[int]) -> None:
        """Fill every row with the flat elements that begin at its start."""
        for row, start in zip(rows, starts, strict=True):
            self._fill(spec, row, start)

    def shard_of(self, name: str) -> int:
        """Number of the weight file that holds a tensor, from 0."""
        del name
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, aliases counted once."""
        return sum(spec.nbytes for name, spec in self.specs.items() if name not in self.aliases)

    def add_aliases(self, aliases: Mapping[str, str]) -> None:
        """Record further tied names, found after opening."""
        self.aliases = MappingProxyType({**self.aliases, **aliases})

    @abstractmethod
    def _fill(self, spec: TensorSpec, out: np.ndarray, start: int) -> None:
        """Fill the checked, non-empty 1-D `out`."""

    def close(self) -> None:  # noqa: B027
        """Let go of mappings; specs stay readable."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.format} checkpoint {self.path}: {len(self.specs)} tensors, {self.nbytes} bytes>"


def raise_if(problems: list[str]) -> None:
    """Raise RefusedError with all problems, if any."""
    if problems:
        raise RefusedError(problems)
