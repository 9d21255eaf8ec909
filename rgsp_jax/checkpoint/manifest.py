"""The record of a conversion: which key on disk became which leaf of a tree, and how to turn it back."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.checkpoint.specs import DTYPE_CODES, DTYPES, TensorSpec
from rgsp_jax.errors import RefusedError
from rgsp_jax.layouts import OPERATIONS, to_flax_shape

Style = Literal["nnx", "linen"]
STYLES: tuple[Style, ...] = ("nnx", "linen")
VERSION = 1
METADATA_KEY = "rgsp_jax_manifest"
"""Where the custom metadata of an Orbax checkpoint hold the manifest."""

PARAMS, STATISTICS, CONSTANTS = "params", "batch_stats", "constants"
"""Collections of a converted tree: weights; running statistics (linen only, in nnx they are among the weights);
buffers and passed-through tensors, flat under their keys on disk."""

TreePath = tuple[str | int, ...]


class WeightRecord(NamedTuple):
    """One key on disk and its leaf."""

    key: str
    path: TreePath
    """Where the leaf lies in the tree; integers are positions in lists of modules. A tied key has its owner's path."""
    operation: str
    """Name in `rgsp_jax.layouts.OPERATIONS`."""
    shape: tuple[int, ...]
    """On disk."""
    dtype: np.dtype
    """On disk."""
    module: str
    """Type of the module that holds it, as PyTorch names it; "" where it is not known."""
    shard: int
    """Number of the weight file that holds it, from 0."""
    tied_to: str | None = None
    """The key whose elements it repeats; None for an owner."""

    @property
    def spec(self) -> TensorSpec:
        """Name, shape and dtype on disk."""
        return TensorSpec(self.key, self.shape, self.dtype)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape in the tree."""
        return to_flax_shape(self.shape, self.operation)

    @property
    def stored(self) -> bool:
        """Whether the tree has a leaf of its own for it: ties share one, and Orbax has no arrays without elements."""
        return self.tied_to is None and 0 not in self.shape


@dataclass(frozen=True)
class Manifest:
    """Everything that the way back needs besides the leaves and the companion files."""

    style: Style
    records: tuple[WeightRecord, ...]
    """In the order of the source's files."""
    model_type: str | None = None
    unmapped: tuple[str, ...] = ()
    """Keys that no rule knew and `allow_unmapped` passed through unchanged."""
    companions: tuple[str, ...] = ()
    """Relative paths of the files that belong to the model besides weights."""

    @property
    def owners(self) -> tuple[WeightRecord, ...]:
        """The records that have a leaf of their own."""
        return tuple(record for record in self.records if record.stored)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; the inverse of `read_manifest`."""
        facts = {key: value for key, value in asdict(self).items() if key != "records"}
        rows = [
            [r.key, r.path, r.operation, r.shape, DTYPE_CODES[r.dtype], r.module, r.shard, r.tied_to]
            for r in self.records
        ]
        return json.loads(json.dumps({"version": VERSION, **facts, "records": rows}))


def read_manifest(value: Any, where: str) -> Manifest:
    """The manifest of its JSON form.

    Args:
        value: what `Manifest.to_json` gave, from a file that may have been tampered with.
        where: names the file in refusals.

    Raises:
        RefusedError: it is none, of a later version, or its parts contradict one another.
    """
    try:
        if value["version"] > VERSION:
            raise RefusedError(
                f"{where} was converted by a later rgsp_jax (manifest version {value['version']}, this one reads up "
                f"to {VERSION}): upgrade rgsp_jax"
            )
        records = tuple(_read_record(*row) for row in value["records"])
        texts = [*value["unmapped"], *value["companions"], value["style"]]
        if value["style"] not in STYLES or not all(isinstance(text, str) for text in texts):
            raise ValueError("style or lists of names")
        manifest = Manifest(
            value["style"], records, value["model_type"], tuple(value["unmapped"]), tuple(value["companions"])
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(f"{where} has a damaged manifest ({type(error).__name__}: {error})") from None
    if problems := find_faults(records):
        raise RefusedError(f"{where}: {problem}" for problem in cap(problems))
    return manifest


def find_manifest(custom_metadata: Any, where: object) -> Manifest | None:
    """The manifest among custom metadata, if there is one."""
    if not isinstance(custom_metadata, Mapping) or METADATA_KEY not in custom_metadata:
        return None
    return read_manifest(custom_metadata[METADATA_KEY], str(where))


def _read_record(
    key: str, path: list[Any], operation: str, shape: list[int], dtype: str, module: str, shard: int, tied: str | None
) -> WeightRecord:
    if not (isinstance(key, str) and isinstance(module, str) and isinstance(tied, str | None)):
        raise TypeError(f"record {key!r}")
    if not all(isinstance(part, str | int) for part in path) or not path:
        raise TypeError(f"path of {key!r}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, shard)):
        raise ValueError(f"sizes of {key!r}")
    axes = OPERATIONS[operation]
    if axes is not None and len(axes) != len(shape):
        raise ValueError(f"operation {operation!r} of {key!r}")
    return WeightRecord(key, tuple(path), operation, tuple(shape), DTYPES[dtype], module, shard, tied)


def find_faults(records: Sequence[WeightRecord]) -> list[str]:
    """Why keys and leaves are no bijection, as sentences: keys twice, leaves twice or inside another, loose ties."""
    problems = [f"key {key!r} is recorded twice" for key, n in Counter(r.key for r in records).items() if n > 1]
    by_path: dict[tuple[str, ...], str] = {}
    owners: dict[str, WeightRecord] = {}
    for record in records:
        if record.tied_to is None:
            owners[record.key] = record
            path = tuple(map(str, record.path))  # as Orbax stores it
            if path in by_path:
                problems.append(f"{record.key!r} and {by_path[path]!r} would both lie at {'/'.join(path)}")
            by_path[path] = record.key
    for path, key in by_path.items():
        for length in range(1, len(path)):
            if path[:length] in by_path:
                problems.append(f"{by_path[path[:length]]!r} would be both a leaf and the branch that holds {key!r}")
    for record in records:
        owner = owners.get(record.tied_to or record.key)
        if owner is None:
            problems.append(f"{record.key!r} is tied to {record.tied_to!r}, which is not there")
        elif (owner.shape, owner.dtype) != (record.shape, record.dtype):
            problems.append(f"{record.key!r} is tied to {record.tied_to!r}, which has another shape or dtype")
    return problems


def get_leaf(tree: Mapping[Any, Any], path: TreePath) -> Any:
    """The leaf at a path, None where there is none; positions are found as strings too, as a saved tree has them."""
    node: Any = tree
    for part in path:
        if isinstance(node, Mapping):
            node = node.get(part, node.get(str(part)))
        elif isinstance(node, list | tuple) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            return None
    return node


def build_tree(leaves: Mapping[TreePath, Any]) -> dict[Any, Any]:
    """Nested dicts of leaves by path."""
    root: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return root
