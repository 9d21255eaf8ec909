"""Orbax checkpoints: one array at a time, as NumPy arrays, through the v1 interface."""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.manifest import find_manifest
from rgsp_jax.checkpoint.safetensors_header import cap, describe_failure
from rgsp_jax.checkpoint.specs import DTYPE_CODES, Checkpoint, TensorSpec, unsupported_dtype
from rgsp_jax.errors import RefusedError

TRAINING_STATE = frozenset({"opt_state", "optimizer", "optimizer_state", "optim", "opt", "rng", "rngs"})
BATCH_BYTES = 64 << 20
MARKERS = ("_CHECKPOINT_METADATA", "_METADATA", "orbax.checkpoint", "manifest.ocdbt")


TreePath = tuple[str, ...]


def is_orbax(directory: Path) -> bool:
    """Whether a directory carries one of Orbax's own files."""
    return any((directory / marker).exists() for marker in MARKERS)


def walk_tree(tree: Any, path: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    """Leaves of nested dicts and lists with their paths; list positions appear as decimal strings."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from walk_tree(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)) and tree:
        for position, value in enumerate(tree):
            yield from walk_tree(value, (*path, str(position)))
    else:
        yield path, tree


def map_tree(tree: Any, change: Any, path: TreePath = ()) -> Any:
    """The same nested dicts and lists with every leaf replaced by `change(path, leaf)`."""
    if isinstance(tree, Mapping) and tree:
        return {key: map_tree(value, change, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and tree:
        return [map_tree(value, change, (*path, str(position))) for position, value in enumerate(tree)]
    return change(path, tree)


def is_array(leaf: object) -> bool:
    """Whether a metadata leaf describes an array; scalars, strings, None and empty nodes do not."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def was_jax_array(leaf: object) -> bool:
    """Whether a metadata leaf describes an array that was saved as `jax.Array` rather than NumPy array."""
    return hasattr(leaf, "sharding_metadata")


def read_metadata(directory: Path) -> Any:
    """What Orbax records of a checkpoint: `metadata`, the tree without its arrays, and `custom_metadata`."""
    from orbax.checkpoint import v1 as ocp

    try:
        return ocp.metadata(directory)
    except Exception as error:
        raise RefusedError(f"{directory} cannot be read as an Orbax checkpoint ({describe_failure(error)})") from None


class OrbaxCheckpoint(Checkpoint):
    """The arrays of an Orbax checkpoint under their tree paths joined by `/`.

    Optimiser state and random keys at the top level are left out; scalars, strings and empty nodes are no tensors
    (`convert_to_orbax` carries them over). Arrays are loaded whole, small ones of equal shape together, and kept until
    their last element was read or about 128 MiB are kept. `manifest` is that of the conversion which the checkpoint
    came from, None where it came from elsewhere.
    """

    format = "orbax"

    def __init__(self, path: Path, candidates: Iterable[Path] = (), config: dict[str, Any] | None = None):
        from orbax.checkpoint import v1 as ocp

        self._orbax = ocp
        found = read_metadata(path)
        self.tree = found.metadata
        specs: dict[str, TensorSpec] = {}
        skipped: list[str] = []
        problems: list[str] = []
        self._paths: dict[str, TreePath] = {}
        for keys, leaf in walk_tree(self.tree):
            name = "/".join(keys)
            if is_training_state(keys):
                skipped.append(name)
            elif is_array(leaf):
                if name in specs:
                    problems.append(f"{path}: two arrays are named {name!r} once their keys are joined by '/'")
                dtype = np.dtype(leaf.dtype)
                if dtype not in DTYPE_CODES:
                    problems.append(f"{path}: array {name!r} {unsupported_dtype(str(dtype))}")
                specs[name] = TensorSpec(name, tuple(leaf.shape), dtype)
                self._paths[name] = keys
            else:
                skipped.append(name)
        if problems:
            raise RefusedError(cap(problems))
        self.manifest = find_manifest(found.custom_metadata, path)
        listed = frozenset(path / name for name in (self.manifest.companions if self.manifest else ()))
        companions = tuple(name for name in candidates if is_beside(path, path / name, listed))
        files = tuple(sorted(file for file in path.rglob("*") if file.is_file() and not is_beside(path, file, listed)))
        metadata = {"custom_metadata": found.custom_metadata, "not_tensors": skipped}
        super().__init__(path, specs, files, metadata=metadata, companions=companions, config=config)
        self._lock = threading.Lock()
        self._kept: dict[str, np.ndarray] = {}

    def _fill(self, spec: TensorSpec, out: np.ndarray, start: int) -> None:
        with self._lock:
            if spec.name not in self._kept:
                self._load_batch(spec)
            array = self._kept[spec.name]
            if start + out.size == spec.size:
                del self._kept[spec.name]
        out[:] = array.reshape(-1)[start : start + out.size]

    def _load_batch(self, spec: TensorSpec) -> None:
        """Load an array, and with it as many later ones of its shape and dtype as BATCH_BYTES hold.

        Every load walks the whole tree's metadata, so one load per array would cost the square of their number.
        """
        batch = {spec.name: spec}
        names = list(self.specs)
        for other in (self.specs[name] for name in names[names.index(spec.name) + 1 :]):
            if (len(batch) + 1) * spec.nbytes > BATCH_BYTES:
                break
            if (other.shape, other.dtype) == (spec.shape, spec.dtype) and other.name not in self._kept:
                batch[other.name] = other
        room = 2 * BATCH_BYTES - len(batch) * spec.nbytes
        while self._kept and sum(array.nbytes for array in self._kept.values()) > room:
            del self._kept[next(iter(self._kept))]
        self._kept |= self._load(batch)

    def _load(self, batch: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
        wanted = {self._paths[name] for name in batch}
        # np.ndarray as the abstract leaf loads arrays of any sharding on any number of devices; ... skips a leaf.
        abstract = map_tree(self.tree, lambda path, leaf: np.ndarray if path in wanted else _placeholder(leaf))
        try:
            loaded = self._orbax.load(self.path, abstract)
        except Exception as error:
            names = ", ".join(map(repr, batch))
            raise RefusedError(f"{self.path}: {names} cannot be read ({describe_failure(error)})") from None
        arrays = {}
        for path, array in walk_tree(loaded):
            if path in wanted:
                name = "/".join(path)
                spec = batch[name]
                if not isinstance(array, np.ndarray) or array.shape != spec.shape or array.dtype != spec.dtype:
                    raise RefusedError(f"{self.path}: array {name!r} is not what the checkpoint's metadata says")
                arrays[name] = np.asarray(array, order="C")
        return arrays

    def read_many(self, names: Collection[str]) -> dict[str, np.ndarray]:
        return self._load({name: self.specs[name] for name in names})

    def load_rest(self) -> dict[TreePath, Any]:
        """Values of the leaves that are no arrays (scalars, strings), training state excepted, by tree path."""
        abstract = map_tree(self.tree, lambda path, leaf: ... if is_array(leaf) or is_training_state(path) else leaf)
        leaves = walk_tree(self._orbax.load(self.path, abstract))
        return {path: leaf for path, leaf in leaves if leaf is not ...}

    def close(self) -> None:
        with self._lock:
            self._kept.clear()


def _placeholder(leaf: Any) -> Any:
    return leaf if leaf is None or leaf == {} or leaf == [] else ...


def is_training_state(keys: TreePath) -> bool:
    """Whether a tree path lies in optimiser state or random keys of a training checkpoint."""
    return bool(keys) and keys[0] in TRAINING_STATE


def is_beside(directory: Path, file: Path, listed: frozenset[Path] = frozenset()) -> bool:
    """Whether a file in an Orbax directory is a companion (config, tokenizer; or listed) and not Orbax's own."""
    own = {*MARKERS, "_sharding", "commit_success.txt", "_strings.json"}
    return file in listed or (file.parent == directory and file.name not in own)
