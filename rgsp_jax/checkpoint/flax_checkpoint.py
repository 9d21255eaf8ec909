"""Flax trees as Orbax checkpoints that carry their manifest and the model's other files."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rgsp_jax.checkpoint.conversion import Select, Shardings, Variables, check_tree
from rgsp_jax.checkpoint.guards import resolve_inside
from rgsp_jax.checkpoint.manifest import METADATA_KEY, Manifest, TreePath, build_tree, find_manifest
from rgsp_jax.checkpoint.orbax_source import is_array, is_orbax, map_tree, read_metadata, walk_tree
from rgsp_jax.checkpoint.output import publish, sync_directory
from rgsp_jax.checkpoint.safetensors_header import cap, describe_failure
from rgsp_jax.errors import RefusedError

T = TypeVar("T")
CHUNK_BYTES = 16 << 20
"""Largest piece in which an array is stored, and so the least that is read of it for a shard."""
OLD = "old"
"""Where a checkpoint waits, in the scratch directory, while its successor takes its place."""


@contextmanager
def saving_options() -> Iterator[Any]:
    """Orbax without compression, which weights hardly yield to, and in chunks that shards can be read from."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with context:
        yield ocp


def save_pieces(destination: Path, pieces: Iterable[Any], custom_metadata: Any) -> None:
    """Write trees that together are one, a piece at a time while the next one is being made.

    Raises:
        RefusedError: Orbax will not have it.
    """
    with saving_options() as ocp:
        try:
            for piece in read_ahead(pieces):
                ocp.partial.save(destination, piece, custom_metadata=custom_metadata)
            ocp.partial.finalize(destination)
        except (ValueError, TypeError) as error:
            raise RefusedError(f"Orbax cannot save the result as {destination} ({describe_failure(error)})") from error


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next one being made in a thread while this one is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "rgsp-read") as reader:
        following: Future[Any] = reader.submit(next, iterator, end)
        while (item := following.result()) is not end:
            following = reader.submit(next, iterator, end)
            yield item


def save_orbax(
    directory: Path | str,
    variables: Mapping[Any, Any],
    manifest: Manifest | None = None,
    *,
    companions: Path | str | None = None,
    overwrite: bool = False,
) -> None:
    """Save a Flax tree as an Orbax checkpoint, complete or not at all.

    What stood there before is replaced only once the new checkpoint is whole.

    Args:
        directory: to create.
        variables: nested dicts of NumPy or JAX arrays, of any sharding, as `to_flax` gives them.
        manifest: of the conversion; with it `convert_to_huggingface` and `from_flax` need nothing else.
        companions: directory of the model whose other files (config, tokenizer) are to lie beside: those that the
            manifest lists.
        overwrite: replace a checkpoint that is there.

    Raises:
        RefusedError: something is there, the tree is not the manifest's, a companion is missing, or Orbax refuses.
    """
    start_saving(directory, variables, manifest, companions=companions, overwrite=overwrite).result()


def start_saving(
    directory: Path | str,
    variables: Mapping[Any, Any],
    manifest: Manifest | None = None,
    *,
    companions: Path | str | None = None,
    overwrite: bool = False,
) -> "Future[None]":
    """`save_orbax` in the background: the arrays may be changed or donated once this returns.

    `result()` of what it returns waits for the end and raises what went wrong; only then is the checkpoint there.
    """
    directory = Path(directory).absolute()
    check_target(directory, overwrite)
    if manifest is not None:
        check_tree(variables, manifest)
    scratch = make_scratch(directory)
    try:
        with saving_options() as ocp:
            metadata = None if manifest is None else {METADATA_KEY: manifest.to_json()}
            response = ocp.save_async(scratch / directory.name, as_saved(variables), custom_metadata=metadata)
    except (ValueError, TypeError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise RefusedError(f"Orbax cannot save the tree as {directory} ({describe_failure(error)})") from error
    pool = ThreadPoolExecutor(1, "rgsp-save")

    def finish() -> None:
        try:
            response.result()
            if manifest is not None and companions is not None:
                copy_listed(Path(companions), scratch / directory.name, manifest.companions)
            swap(scratch / directory.name, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    future = pool.submit(finish)
    pool.shutdown(wait=False)
    return future


def as_saved(variables: Any) -> Any:
    """The tree with keys and leaves as Orbax takes them."""
    import jax

    if isinstance(variables, Mapping):
        return {str(key): as_saved(value) for key, value in variables.items()}
    return variables if isinstance(variables, jax.Array) else np.asarray(variables)


def check_target(directory: Path, overwrite: bool) -> None:
    """Raise RefusedError where nothing may be saved at a path."""
    if not directory.parent.is_dir():
        raise RefusedError(f"the output's parent {directory.parent} does not exist: create it first")
    if not os.path.lexists(directory):
        return
    if not overwrite:
        raise RefusedError(f"{directory} is already there: choose another name, or overwrite it")
    if directory.is_symlink() or not is_orbax(directory):
        raise RefusedError(f"{directory} is no Orbax checkpoint, so it is not overwritten: choose another name")


def make_scratch(directory: Path) -> Path:
    """An empty hidden directory beside the target; what a killed run left there goes, but for a checkpoint it moved."""
    scratch = directory.with_name(f".{directory.name}.saving")
    if (scratch / OLD).exists() and not os.path.lexists(directory):
        os.rename(scratch / OLD, directory)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return scratch


def swap(fresh: Path, directory: Path) -> None:
    """Put a finished checkpoint in the place of the one before, which is whole until then."""
    if os.path.lexists(directory):
        old = fresh.with_name(OLD)
        os.rename(directory, old)
        os.rename(fresh, directory)
        sync_directory(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        publish(fresh, directory)


def copy_listed(source: Path, target: Path, companions: Iterable[str]) -> None:
    """Copy the listed files; RefusedError naming those that are missing or lead out of the directory."""
    problems: list[str] = []
    for name in companions:
        try:
            file = resolve_inside(source, name)
        except RefusedError as error:
            problems += error.problems
            continue
        if file.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
        else:
            problems.append(f"{source} lacks {name!r}, which its manifest lists")
    if problems:
        raise RefusedError(cap(problems))


def load_orbax(directory: Path | str, *, select: Select | None = None, shardings: Shardings | None = None) -> Variables:
    """Load the arrays of an Orbax checkpoint as nested dicts.

    Args:
        directory: any Orbax checkpoint of arrays in nested dicts and lists.
        select: takes a leaf's slashed path; only those leaves are read. All by default.
        shardings: leaves become `jax.Array`s so sharded, read chunk by chunk as the shards need them; NumPy arrays by
            default.

    Returns:
        The tree without the leaves that were not selected; positions in lists of modules are integers again where the
        checkpoint carries a manifest.

    Raises:
        RefusedError: no Orbax checkpoint, or one that cannot be read as its metadata say.
    """
    import jax
    from orbax.checkpoint import v1 as ocp

    directory = Path(directory).absolute()
    if not directory.is_dir() or not is_orbax(directory):
        raise RefusedError(f"{directory} is no Orbax checkpoint")
    found = read_metadata(directory)
    manifest = find_manifest(found.custom_metadata, directory)
    wanted = {
        path: leaf
        for path, leaf in walk_tree(found.metadata)
        if is_array(leaf) and (select is None or select("/".join(path)))
    }

    def describe(path: tuple[str, ...], leaf: Any) -> Any:
        if path not in wanted:
            return leaf if leaf is None or leaf == {} or leaf == [] else ...
        if shardings is None:
            return np.ndarray
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        sharding = shardings("/".join(path), shape) if callable(shardings) else shardings
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    wide = any(np.dtype(leaf.dtype).itemsize == 8 for leaf in wanted.values())
    with jax.enable_x64(wide or jax.config.values["jax_enable_x64"]):  # otherwise 64-bit leaves would be narrowed
        abstract = map_tree(found.metadata, describe)
        try:
            loaded = ocp.load(directory, abstract)
        except Exception as error:
            raise RefusedError(f"{directory} cannot be read ({describe_failure(error)})") from None
    paths = {} if manifest is None else {tuple(map(str, r.path)): r.path for r in manifest.owners}
    leaves: dict[TreePath, Any] = {}
    for path, leaf in walk_tree(loaded):
        if path in wanted:
            expected = wanted[path]
            if not hasattr(leaf, "shape") or leaf.shape != expected.shape or leaf.dtype != expected.dtype:
                raise RefusedError(f"{directory}: array {'/'.join(path)!r} is not what the checkpoint's metadata says")
            leaves[paths.get(path, path)] = leaf
    return build_tree(leaves)


def load_manifest(directory: Path | str) -> Manifest:
    """The manifest that an Orbax checkpoint carries; RefusedError where it has none."""
    directory = Path(directory).absolute()
    manifest = find_manifest(read_metadata(directory).custom_metadata, directory)
    if manifest is None:
        raise RefusedError(
            f"{directory} has no manifest of a conversion in its metadata, so nothing says which PyTorch weights its "
            "leaves are: convert the PyTorch checkpoint with `rgsp convert --to flax`"
        )
    return manifest
