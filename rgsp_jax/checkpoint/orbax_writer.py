"""The merged result of Orbax parents as an Orbax checkpoint, written piece by piece."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.flax_checkpoint import save_pieces
from rgsp_jax.checkpoint.orbax_source import (
    OrbaxCheckpoint,
    TreePath,
    is_array,
    is_training_state,
    map_tree,
    walk_tree,
    was_jax_array,
)
from rgsp_jax.checkpoint.output import sync_directory
from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.checkpoint.source import open_checkpoint
from rgsp_jax.checkpoint.specs import Checkpoint, TensorSpec
from rgsp_jax.errors import RefusedError

PIECE_BYTES = 128 << 20


def convert_to_orbax(
    safetensors_dir: Path | str, like: Checkpoint, destination: Path | str, *, piece_bytes: int = PIECE_BYTES
) -> None:
    """Write a finished merge as an Orbax checkpoint with the tree of its Orbax parent.

    Arrays come from the safetensors directory, in its dtypes; scalars, strings, empty nodes and custom metadata from
    the parent; optimiser state and random keys are left out. Arrays that the parent held as `jax.Array` are written as
    such (on one device), the others as NumPy arrays. Twice `piece_bytes` are in memory at once, or the largest list or
    array of the tree where that is more. A directory `.NAME.converting` beside the destination is used and removed.

    Args:
        safetensors_dir: directory written by ShardWriter.
        like: an opened Orbax checkpoint.
        destination: directory to create; must be absent.
        piece_bytes: bytes to read and save at a time.

    Raises:
        RefusedError: `like` is no Orbax checkpoint, something is at the destination, or tensors and tree disagree.
    """
    destination = Path(destination).absolute()
    if not isinstance(like, OrbaxCheckpoint):
        raise RefusedError(f"{like.path} is no Orbax checkpoint, so it has no tree to write the result in")
    if os.path.lexists(destination):
        raise RefusedError(f"{destination} is already there: choose another name or remove it")
    with open_checkpoint(safetensors_dir) as merged:
        _check_same_arrays(merged, like)
        scratch = destination.with_name(f".{destination.name}.converting")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            _save_pieces(merged, like, scratch / destination.name, piece_bytes)
            os.rename(scratch / destination.name, destination)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    sync_directory(destination.parent)


def _check_same_arrays(merged: Checkpoint, like: OrbaxCheckpoint) -> None:
    problems = [
        f"{merged.path} lacks {name!r}, an array of {like.path}" for name in like.specs if name not in merged.specs
    ]
    problems += [f"{like.path} has no array {name!r}" for name in merged.specs if name not in like.specs]
    problems += [
        f"{name!r} has shape {list(spec.shape)} in {merged.path} and {list(like.specs[name].shape)} in {like.path}"
        for name, spec in merged.specs.items()
        if name in like.specs and like.specs[name].shape != spec.shape
    ]
    if problems:
        raise RefusedError(cap(problems))


def _save_pieces(merged: Checkpoint, like: OrbaxCheckpoint, destination: Path, piece_bytes: int) -> None:
    rest = like.load_rest()

    def fill(path: TreePath, leaf: Any) -> Any:
        return _as_saved(merged.read("/".join(path)), leaf) if is_array(leaf) else rest.get(path, leaf)

    pieces = (map_tree(piece, fill) for piece in divide_tree(like.tree, merged.specs, piece_bytes))
    save_pieces(destination, pieces, like.metadata["custom_metadata"] or None)


def _as_saved(array: np.ndarray, leaf: Any) -> Any:
    """The array as the kind of leaf the parent held, so that the same abstract state loads parent and result."""
    if not was_jax_array(leaf):
        return array
    import jax

    with jax.enable_x64(True):  # otherwise 64-bit arrays would be narrowed here
        return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def divide_tree(tree: Any, specs: Mapping[str, TensorSpec], piece_bytes: int) -> Iterator[Any]:
    """Nested dicts that together are `tree` without training state, each of about `piece_bytes` bytes at most.

    Orbax adds keys of dicts to what it saved before, but no items of lists: a list is never divided.
    """
    units = [unit for unit in _walk_units(tree) if not is_training_state(unit[0])]
    piece: list[tuple[TreePath, Any]] = []
    filled = 0
    for path, subtree in units:
        names = ("/".join((*path, *inner)) for inner, leaf in walk_tree(subtree) if is_array(leaf))
        nbytes = sum(specs[name].nbytes for name in names)
        if piece and filled + nbytes > piece_bytes:
            yield _nest(piece)
            piece, filled = [], 0
        piece.append((path, subtree))
        filled += nbytes
    if piece:
        yield _nest(piece)


def _walk_units(tree: Any, path: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _walk_units(value, (*path, str(key)))
    else:
        yield path, tree


def _nest(units: list[tuple[TreePath, Any]]) -> Any:
    if units[0][0] == ():
        return units[0][1]
    root: dict[str, Any] = {}
    for path, subtree in units:
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = subtree
    return root
