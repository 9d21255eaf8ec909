"""Weights as data: one table per family maps PyTorch keys to nnx paths, read in both directions.

A rule pairs a key template with a path template, `encoder.layer.{layer}.output.dense.weight` with
`layers.{layer}.mlp.down.kernel`, and names the operation between the two layouts. Placeholders stand for
integers, so that a template is a regular expression in either direction and the table is its own inverse.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rgsp_jax.errors import RefusedError
from rgsp_jax.layouts import pack, to_flax_layout, to_torch_layout, to_torch_shape


class WeightRule(NamedTuple):
    """`key` (PyTorch) and `path` (nnx, dotted) name one weight per value of their shared placeholders."""

    key: str
    path: str
    operation: str = "identity"


class WeightTable(NamedTuple):
    """Everything needed to read and write one family's checkpoints."""

    rules: tuple[WeightRule, ...]
    prefixes: tuple[str, ...] = ()
    """Prefixes a checkpoint may carry before every key of this table (`bert.`); dropped on loading."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of whole keys that are no weights (`embeddings.position_ids`); dropped on loading."""
    renames: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement) pairs applied to every key: the names older versions saved."""


class WeightPlace(NamedTuple):
    """Where a PyTorch key lives in the model, and the operation from its layout to flax's."""

    path: tuple[Any, ...]
    operation: str


ModelT = TypeVar("ModelT", bound=nnx.Module)


def linear(key: str, path: str) -> tuple[WeightRule, WeightRule]:
    """Return the rules of a PyTorch Linear at `key`, held as an nnx.Linear at `path`."""
    return WeightRule(f"{key}.weight", f"{path}.kernel", "linear"), WeightRule(f"{key}.bias", f"{path}.bias")


def norm(key: str, path: str) -> tuple[WeightRule, WeightRule]:
    """Return the rules of a LayerNorm: its `weight` is flax's `scale`."""
    return WeightRule(f"{key}.weight", f"{path}.scale", "norm"), WeightRule(f"{key}.bias", f"{path}.bias")


def embedding(key: str, path: str) -> tuple[WeightRule]:
    """Return the rule of an Embedding, stored the same way by both."""
    return (WeightRule(f"{key}.weight", f"{path}.embedding", "embedding"),)


def conv2d(key: str, path: str) -> tuple[WeightRule, WeightRule]:
    """Return the rules of a Conv2d: (out, in, height, width) there, (height, width, in, out) in flax."""
    return WeightRule(f"{key}.weight", f"{path}.kernel", "conv2d"), WeightRule(f"{key}.bias", f"{path}.bias")


def conv3d(key: str, path: str) -> tuple[WeightRule, WeightRule]:
    """Return the rules of a Conv3d: (out, in, time, height, width) there, (time, height, width, in, out) in flax."""
    return WeightRule(f"{key}.weight", f"{path}.kernel", "conv3d"), WeightRule(f"{key}.bias", f"{path}.bias")


def nest(table: WeightTable, key_prefix: str, path_prefix: str, rules: Sequence[WeightRule] = ()) -> WeightTable:
    """Return the table of a model that holds `table`'s model as a part and adds `rules` of its own."""
    inner = tuple(WeightRule(key_prefix + r.key, path_prefix + r.path, r.operation) for r in table.rules)
    ignored = tuple(re.escape(key_prefix) + pattern for pattern in table.ignored)
    return WeightTable(inner + tuple(rules), ignored=ignored, renames=table.renames)


def join(*tables: WeightTable) -> WeightTable:
    """Return the table of a model that holds the models of `tables`, each nested already, side by side."""
    return WeightTable(
        tuple(rule for table in tables for rule in table.rules),
        ignored=tuple(pattern for table in tables for pattern in table.ignored),
        renames=tuple(rename for table in tables for rename in table.renames),
    )


def map_weights(model: nnx.Module) -> dict[str, WeightPlace]:
    """Return PyTorch key -> place in the model, for every array that the model holds.

    Raises RefusedError naming every array that no rule, or more than one rule, gives a key, and every key given twice.
    """
    table = _table_of(model)
    places: list[tuple[str, WeightPlace]] = []
    problems = []
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        dotted = ".".join(map(str, path))
        found = _translate(dotted, tuple((rule.path, rule.key, rule.operation) for rule in table.rules))
        if len(found) == 1:
            ((key, operation),) = found
            places.append((key, WeightPlace(path, operation)))
        else:
            problems.append(
                f"{type(model).__name__} holds {dotted!r}, which {len(found) or 'no'} rules of its weight table name; "
                "each array needs exactly one"
            )
    doubled = [key for key, count in Counter(key for key, _ in places).items() if count > 1]
    problems += [f"weight table of {type(model).__name__} gives {key!r} to several arrays" for key in doubled]
    if problems:
        raise RefusedError(problems)
    return dict(places)


def match_names(model: nnx.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightPlace]:
    """Return where each name of a checkpoint lives in the model; names that are no weights are left out.

    Raises RefusedError with every key that is missing, unexpected or doubled and every shape that differs.
    """
    places = map_weights(model)
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    given, problems = _normalise_keys(shapes, places, _table_of(model))
    problems += [f"weight {key!r} is missing; the checkpoint has to hold it" for key in places if key not in given]
    for key, name in given.items():
        if key not in places:
            problems.append(f"weight {name!r} has no place in {type(model).__name__}; remove it or change the config")
            continue
        expected = to_torch_shape(leaves[places[key].path].shape, places[key].operation)
        if tuple(shapes[name]) != expected:
            problems.append(f"weight {name!r} has shape {tuple(shapes[name])}; the config asks for {expected}")
    if problems:
        raise RefusedError(problems)
    return {given[key]: place for key, place in places.items()}


def load_weights(model: ModelT, weights: Mapping[str, np.ndarray]) -> ModelT:
    """Return `model` (real or from `nnx.eval_shape`) holding `weights`, given by PyTorch key in PyTorch layout.

    Values are cast to the dtypes of the model's own arrays; `model` itself is left as it is.
    Raises RefusedError with every key that is missing, unexpected or doubled and every shape that differs: keys and
    arrays must be in bijection, apart from the prefixes, renames and ignored keys of the family's table.
    """
    places = match_names(model, {name: np.shape(array) for name, array in weights.items()})
    graphdef, state = nnx.split(model)
    leaves = dict(nnx.to_flat_state(state))
    for name, (path, operation) in places.items():
        array = to_flax_layout(np.asarray(weights[name]), operation)
        # order="C" copies transposed views: the device buffer must not depend on the file that was mapped.
        leaves[path] = leaves[path].replace(jnp.asarray(np.array(array, dtype=leaves[path].dtype, order="C")))
    return nnx.merge(graphdef, nnx.from_flat_state(list(leaves.items())))


def export_weights(model: nnx.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """Return `prefix` + PyTorch key -> C-contiguous NumPy array in PyTorch layout: the inverse of `load_weights`."""
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    return {
        prefix + key: pack(to_torch_layout(np.asarray(leaves[path][...]), operation))
        for key, (path, operation) in map_weights(model).items()
    }


def place_weights(model: ModelT, places: Mapping[str, WeightPlace], weights: Mapping[str, Any]) -> ModelT:
    """Return the model holding `weights`, names as in `places` (`match_names`), in PyTorch layout; traceable.

    They are cast to the dtypes of the model's own arrays.
    """
    graphdef, state = nnx.split(model)
    leaves = dict(nnx.to_flat_state(state))
    for name, (path, operation) in places.items():
        leaves[path] = leaves[path].replace(to_flax_layout(weights[name], operation).astype(leaves[path].dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(list(leaves.items())))


def extract_parameters(model: nnx.Module) -> dict:
    """Return the model's arrays as nested dicts, a plain pytree that `rgsp_jax.merge` and `jax.tree` take."""
    return nnx.to_pure_dict(nnx.state(model))


def replace_parameters(model: ModelT, parameters: Mapping) -> ModelT:
    """Return a model of the same structure holding `parameters`, as `extract_parameters` gives them.

    Nothing is copied and nothing leaves a trace: `jax.jit(lambda p, x: replace_parameters(model, p)(x))` is the
    functional call of a merged tree. Raises ValueError at trace time where the trees' paths differ.
    """
    graphdef, state = nnx.split(model)
    given: dict[str, Any] = nnx.restore_int_paths(dict(parameters))  # a tree read back from disk has string indices
    expected_paths, paths = _paths_of(nnx.to_pure_dict(state)), _paths_of(given)
    if paths != expected_paths:
        raise ValueError(
            f"parameters do not have the tree structure of {type(model).__name__}: "
            f"missing {sorted(expected_paths - paths)}, unexpected {sorted(paths - expected_paths)}"
        )
    nnx.replace_by_pure_dict(state, given)
    return nnx.merge(graphdef, state)


def _table_of(model: nnx.Module) -> WeightTable:
    table = getattr(type(model), "weight_table", None)
    if not isinstance(table, WeightTable):
        raise TypeError(f"{type(model).__name__} has no weight_table: it is no model family")
    return table


def _paths_of(tree: Mapping) -> set[str]:
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)}


def normalise_key(name: str, expected: Container[str], table: WeightTable) -> str | None:
    """Return the table's key for a name in a checkpoint, None for what is no weight.

    A name that the table does not know comes back with its renames made, and is not in `expected`.
    """
    key = name
    for pattern, replacement in table.renames:
        key = re.sub(pattern, replacement, key)
    if key not in expected:
        key = next((key.removeprefix(p) for p in table.prefixes if key.startswith(p)), key)
    if key not in expected and any(re.fullmatch(pattern, key) for pattern in table.ignored):
        return None
    return key


def _normalise_keys(
    names: Iterable[str], expected: Container[str], table: WeightTable
) -> tuple[dict[str, str], list[str]]:
    """Return table key -> name in the checkpoint, and a problem for each two names with the same key."""
    given: dict[str, str] = {}
    problems = []
    for name in names:
        key = normalise_key(name, expected, table)
        if key is None:
            continue
        if key in given:
            problems.append(f"weights {given[key]!r} and {name!r} are the same weight; keep one")
        given[key] = name
    return given, problems


@cache
def _compile_template(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(rf"(?P<{part}>\d+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _translate(name: str, templates: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Return (translation, operation) for every (from, to, operation) template that matches the whole name."""
    found = []
    for source, target, operation in templates:
        match = _compile_template(source).fullmatch(name)
        if match:
            found.append((target.format(**match.groupdict()), operation))
    return found
