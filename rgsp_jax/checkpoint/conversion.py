"""PyTorch checkpoints as Flax trees and back, bit for bit: a manifest decides, arrays follow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from rgsp_jax.checkpoint.manifest import (
    CONSTANTS,
    PARAMS,
    STATISTICS,
    STYLES,
    Manifest,
    Style,
    TreePath,
    WeightRecord,
    build_tree,
    find_faults,
    get_leaf,
)
from rgsp_jax.checkpoint.module_types import Place, infer_places
from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.checkpoint.specs import FLOATING, Checkpoint, TensorSpec
from rgsp_jax.errors import RefusedError
from rgsp_jax.layouts import OPERATIONS, pack, to_flax_layout, to_torch_layout

if TYPE_CHECKING:
    import jax

Variables = dict[Any, Any]
"""Nested dicts of arrays under the collections "params", "constants" and, in linen's style, "batch_stats"."""
Shardings = Union["jax.sharding.Sharding", Callable[[str, "jax.ShapeDtypeStruct"], "jax.sharding.Sharding"]]
"""One sharding for every leaf, or a function of its slashed path and its shape and dtype."""
Select = Callable[[str], bool]
"""Which leaves, by slashed path."""
LEAVES = frozenset({"kernel", "bias", "scale", "embedding"})


def build_manifest(checkpoint: Checkpoint, *, style: Style = "nnx", allow_unmapped: bool = False) -> Manifest:
    """Decide for every key of a PyTorch checkpoint where it lies in a Flax tree, and in which layout.

    In the style "nnx", models of the families of `rgsp_jax.models` get the paths of their flax.nnx modules; others, and
    all in the style "linen", the names of their PyTorch modules. Layouts follow the type of the module, from the
    family's table or from the model that transformers builds of the config.

    Args:
        checkpoint: an opened safetensors or PyTorch checkpoint.
        style: "nnx" (positions in lists are integers, running statistics among the weights) or "linen" (strings, and
            running statistics in "batch_stats").
        allow_unmapped: pass keys that nothing knows through unchanged, under "constants".

    Raises:
        RefusedError: keys without a place (all are named), a family's weights that are missing, no known model.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; there are {', '.join(STYLES)}")
    if checkpoint.format == "orbax":
        raise RefusedError(f"{checkpoint.path} is an Orbax checkpoint, a tree already: give a PyTorch checkpoint")
    from rgsp_jax.rules import BUFFER_NAMES  # jax takes a second to import

    model_type = (checkpoint.config or {}).get("model_type")
    places = find_places(checkpoint, style)
    owners = choose_owners(checkpoint, places)
    unmapped = tuple(
        key for key in checkpoint.specs if not {key, owners[key]} & places.keys() and not BUFFER_NAMES.search(key)
    )
    if unmapped and not allow_unmapped:
        raise RefusedError(
            f"{checkpoint.path}: no {model_type or 'known'} module holds {key!r}; --allow-unmapped passes it through "
            "unchanged" + (", --style linen names it as PyTorch does" if style == "nnx" else "")
            for key in cap(list(unmapped))
        )
    records = []
    for key, spec in checkpoint.specs.items():
        path, operation, module = places.get(owners[key]) or ((CONSTANTS, owners[key]), "identity", "")
        tied_to = None if owners[key] == key else owners[key]
        shard = checkpoint.shard_of(key)
        records.append(WeightRecord(key, path, operation, spec.shape, spec.dtype, module, shard, tied_to))
    if problems := find_faults(records):
        raise RefusedError(f"{checkpoint.path}: {problem}" for problem in cap(problems))
    companions = tuple(path.as_posix() for path in checkpoint.companions)
    return Manifest(style, tuple(records), model_type, unmapped, companions)


Places = Mapping[str, tuple[TreePath, str, str] | None]
"""Key on disk -> (path, operation, module's type), None for buffers; unknown keys are not there."""


def find_places(checkpoint: Checkpoint, style: Style) -> Places:
    """Where the keys of a checkpoint go."""
    from rgsp_jax.models import FAMILIES  # flax takes a second to import

    family = FAMILIES.get((checkpoint.config or {}).get("model_type", ""))
    if family is None:
        return name_by_modules(infer_places(checkpoint), style)
    if style == "nnx":
        return place_in_family(checkpoint, family)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return name_by_modules(read_table(place_in_family(checkpoint, family)), style)
    return name_by_modules(infer_places(checkpoint), style)


def place_in_family(checkpoint: Checkpoint, family: Any) -> Places:
    """The places that a family's own weight table gives; RefusedError naming the weights it misses."""
    from rgsp_jax.models.weights import map_weights, normalise_key

    try:
        model = family.build(checkpoint.config or {}, {name: spec.shape for name, spec in checkpoint.specs.items()})
    except RefusedError as error:
        hint = "--style linen converts any model that transformers knows"
        raise RefusedError(f"{checkpoint.path}: {problem}; {hint}" for problem in error.problems) from None
    expected = map_weights(model)
    places: dict[str, tuple[TreePath, str, str] | None] = {}
    found: dict[str, str] = {}
    problems = []
    for name in checkpoint.specs:
        key = normalise_key(name, expected, type(model).weight_table)
        if key is None:
            places[name] = None
        elif key in expected:
            if key in found and checkpoint.aliases.get(name) != found[key]:
                problems.append(f"{checkpoint.path}: {found[key]!r} and {name!r} are the same weight; keep one")
            found.setdefault(key, name)
            path, operation = expected[key]
            places[name] = ((PARAMS, *path), operation, "")
    problems += [
        f"{checkpoint.path}: weight {key!r} is missing; the config describes a model that has it"
        for key in expected
        if key not in found
    ]
    if problems:
        raise RefusedError(cap(problems))
    return places


def read_table(places: Places) -> dict[str, Place | None]:
    """A family's places as those of PyTorch modules, for where transformers is not there to ask."""
    found: dict[str, Place | None] = {}
    for key, place in places.items():
        leaf = "" if place is None else str(place[0][-1])
        named = leaf if leaf in LEAVES else key.rpartition(".")[2]
        found[key] = None if place is None else Place(place[1], named)
    return found


def name_by_modules(places: Mapping[str, Place | None], style: Style) -> Places:
    """Paths as PyTorch names the modules, and leaves as Flax does."""
    named: dict[str, tuple[TreePath, str, str] | None] = {}
    for key, place in places.items():
        if place is None:
            named[key] = None
            continue
        parts: list[str | int] = list(key.split(".")[:-1])
        if style == "nnx":
            parts = [int(part) if isinstance(part, str) and part.isdecimal() else part for part in parts]
        collection = STATISTICS if place.statistic and style == "linen" else PARAMS
        named[key] = ((collection, *parts, place.leaf), place.operation, place.module)
    return named


def choose_owners(checkpoint: Checkpoint, places: Places) -> dict[str, str]:
    """Key -> the key of the same elements that has the leaf: one that is an embedding, or else any with a place."""
    groups: dict[str, list[str]] = {}
    for key in checkpoint.specs:
        groups.setdefault(checkpoint.aliases.get(key, key), []).append(key)
    owners = {}
    for members in groups.values():
        mapped = {key: place for key in members if (place := places.get(key)) is not None}
        embeddings = [key for key, place in mapped.items() if place[1] == "embedding"]
        owners.update(dict.fromkeys(members, (embeddings or list(mapped) or members)[0]))
    return owners


def to_flax(
    checkpoint: Checkpoint,
    manifest: Manifest,
    *,
    dtype: Any = None,
    select: Select | None = None,
    shardings: Shardings | None = None,
) -> Variables:
    """Read a PyTorch checkpoint into a Flax tree.

    Args:
        checkpoint: what `manifest` was built of.
        manifest: from `build_manifest`.
        dtype: of floating-point leaves; as on disk by default.
        select: takes a leaf's slashed path ("params/layers/0/mlp/up/kernel"); all leaves by default.
        shardings: leaves become `jax.Array`s so sharded, and only the bytes of this process's shards are read; NumPy
            arrays by default.

    Returns:
        {"params": tree, "constants": {key on disk: array}} and, in linen's style, "batch_stats"; a collection without
        leaves is left out. `params` is what `rgsp_jax.models.replace_parameters` and `nnx.replace_by_pure_dict` take,
        and the whole what a linen module's `apply` takes.

    Raises:
        RefusedError: the files were changed since the checkpoint was opened.
    """
    leaves: dict[TreePath, Any] = {}
    for record in manifest.owners:
        if select is None or select(join_path(record.path)):
            if shardings is None:
                leaves[record.path] = read_leaf(checkpoint, record, dtype)
            else:
                leaves[record.path] = read_sharded(checkpoint, record, dtype, shardings)
    return build_tree(leaves)


def join_path(path: TreePath) -> str:
    """The slashed path of a leaf."""
    return "/".join(map(str, path))


def leaf_dtype(record: WeightRecord, dtype: Any) -> np.dtype:
    """The dtype of a record's leaf under the one that was asked for."""
    return np.dtype(dtype) if dtype is not None and record.dtype in FLOATING else record.dtype


def read_leaf(checkpoint: Checkpoint, record: WeightRecord, dtype: Any = None) -> np.ndarray:
    """One leaf as a C-contiguous array."""
    array = pack(to_flax_layout(checkpoint.read(record.key), record.operation))
    return array.astype(leaf_dtype(record, dtype), copy=False)


def read_sharded(checkpoint: Checkpoint, record: WeightRecord, dtype: Any, shardings: Shardings) -> "jax.Array":
    """One leaf over devices; every shard is read by itself."""
    import jax

    target = leaf_dtype(record, dtype)
    wide = target.itemsize == 8 or jax.config.values["jax_enable_x64"]
    with jax.enable_x64(wide):  # otherwise 64-bit leaves would be narrowed
        described = jax.ShapeDtypeStruct(record.leaf_shape, target)
        sharding = shardings(join_path(record.path), described) if callable(shardings) else shardings
        axes = OPERATIONS[record.operation] or tuple(range(len(record.shape)))

        def read_shard(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
            on_disk = tuple(index[axes.index(axis)] for axis in range(len(axes)))
            block = checkpoint.read_block(record.key, on_disk)
            return pack(to_flax_layout(block, record.operation)).astype(target, copy=False)

        return jax.make_array_from_callback(record.leaf_shape, sharding, read_shard, dtype=target)


def from_flax(variables: Mapping[Any, Any], manifest: Manifest, *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Turn a Flax tree back into PyTorch weights: the inverse of `to_flax`.

    Args:
        variables: the tree, changed or not; positions in lists may have become strings, as Orbax makes them.
        manifest: of its conversion.
        dtype: of floating-point weights; as on the disk they came from by default, so that a cast to a wider dtype is
            undone exactly.

    Returns:
        Every key of the source, tied ones too, with a C-contiguous array in PyTorch's layout, in the source's order.

    Raises:
        RefusedError: leaves missing, added or of another shape; all are named.
    """
    check_tree(variables, manifest)
    return {record.key: restore(get_leaf(variables, record.path), record, dtype) for record in manifest.records}


def check_tree(variables: Mapping[Any, Any], manifest: Manifest) -> None:
    """Raise RefusedError where a tree has not exactly the leaves of its manifest."""
    problems = find_differences({join_path(path): np.shape(leaf) for path, leaf in walk(variables)}, manifest)
    if problems:
        raise RefusedError(cap(problems))


def find_differences(shapes: Mapping[str, tuple[int, ...]], manifest: Manifest) -> list[str]:
    """What leaves of these slashed paths and shapes lack, have too much or have otherwise than the manifest says."""
    problems = []
    expected = {join_path(record.path): record for record in manifest.owners}
    for name, record in expected.items():
        if name not in shapes:
            problems.append(f"leaf {name} ({record.key!r} on disk) is missing from the tree")
        elif tuple(shapes[name]) != record.leaf_shape:
            problems.append(f"leaf {name} has shape {list(shapes[name])}; its manifest says {list(record.leaf_shape)}")
    problems += [f"leaf {name} is not in the manifest: take it out" for name in shapes if name not in expected]
    return problems


def walk(tree: Any, path: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    """Leaves of nested dicts and lists with their paths."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from walk(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for position, value in enumerate(tree):
            yield from walk(value, (*path, position))
    else:
        yield path, tree


def restore(leaf: Any, record: WeightRecord, dtype: Any = None) -> np.ndarray:
    """The weight on disk of a leaf; without one, of no elements."""
    target = leaf_dtype(record, dtype)
    if not record.stored and leaf is None:
        return np.empty(record.shape, target)
    return pack(to_torch_layout(np.asarray(leaf), record.operation)).astype(target, copy=False)


def output_specs(records: Sequence[WeightRecord], dtype: Any = None) -> list[TensorSpec]:
    """What a return to PyTorch writes."""
    return [TensorSpec(record.key, record.shape, leaf_dtype(record, dtype)) for record in records]
