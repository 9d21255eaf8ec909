"""Which module holds a weight, and so how it is laid out: from a family's table, or as transformers builds the model.

The layout follows the type of the module, never the shape. Nothing of a checkpoint's own code is run.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rgsp_jax.checkpoint.huggingface import choose_architecture, explain_unknown, load_config, quiet
from rgsp_jax.checkpoint.specs import Checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.layouts import OPERATIONS


class Place(NamedTuple):
    """How one weight is held: its operation, the name of its leaf in Flax, the collection, the module's type."""

    operation: str
    leaf: str
    statistic: bool = False
    module: str = ""


MODULES: tuple[tuple[re.Pattern[str], Mapping[str, Place]], ...] = tuple(
    (re.compile(pattern), MappingProxyType(places))
    for pattern, places in (
        (r"Linear", {"weight": Place("linear", "kernel"), "bias": Place("identity", "bias")}),
        (r"Conv1D", {"weight": Place("identity", "kernel"), "bias": Place("identity", "bias")}),
        (r"Embedding|EmbeddingBag", {"weight": Place("embedding", "embedding")}),
        *(
            (
                rf"Conv(Transpose)?{n}d",
                {"weight": Place(f"conv{n}d", "kernel"), "bias": Place("identity", "bias")},
            )
            for n in (1, 2, 3)
        ),
        (
            r"(Sync)?BatchNorm(\dd)?",
            {
                "weight": Place("norm", "scale"),
                "bias": Place("identity", "bias"),
                "running_mean": Place("identity", "mean", True),
                "running_var": Place("identity", "var", True),
            },
        ),
        (r"\w*Norm(\dd)?", {"weight": Place("norm", "scale"), "bias": Place("identity", "bias")}),
    )
)
"""Class of a PyTorch module (or of one it derives from) -> its weights' places. `Conv1D` is GPT-2's linear layer, which
is stored as [inputs, outputs]; norms are every class called so. The first matching row counts."""

PIECES: Mapping[int, Place] = MappingProxyType(
    {2: Place("linear", "kernel"), 3: Place("conv1d", "kernel"), 4: Place("conv2d", "kernel")}
    | {5: Place("conv3d", "kernel")}
)
"""Rank -> place of weights that transformers fuses while it loads (experts, patch embeddings): on disk they are
those of a module each, whose type is gone."""


def find_place(types: tuple[str, ...], leaf: str, rank: int) -> Place:
    """The place of a parameter called `leaf` in a module whose class and its bases are `types`.

    A parameter of no known module keeps its name and layout.
    """
    for name in types:
        for pattern, places in MODULES:
            if pattern.fullmatch(name):
                place = places.get(leaf)
                axes = None if place is None else OPERATIONS[place.operation]
                if place is not None and (axes is None or len(axes) == rank):
                    return place._replace(module=types[0])
                return Place("identity", leaf, module=types[0])
    return Place("identity", leaf, module=types[0] if types else "")


def infer_places(checkpoint: Checkpoint) -> dict[str, Place | None]:
    """Key on disk -> its place in the model that transformers builds of the config, without memory for weights.

    None for buffers; keys that the model does not know are left out.

    Raises:
        RefusedError: transformers or torch is missing, or has no such model.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        raise RefusedError(
            f"{checkpoint.path}: the modules of a model of type {(checkpoint.config or {}).get('model_type')!r} are "
            "read from transformers, which is not installed with torch: pip install transformers torch"
        ) from None
    config = load_config(checkpoint)
    architecture = choose_architecture(config)
    try:
        with quiet(), torch.device("meta"):
            model = getattr(architecture, "from_config", architecture)(config)
    except Exception as error:
        raise explain_unknown(checkpoint, "build", error) from None
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    places: dict[str, Place | None] = {}
    for key, spec in checkpoint.specs.items():
        name, fused = rename_key(model, key, held)
        if name not in held:
            continue
        owner, _, leaf = name.rpartition(".")
        types = tuple(base.__name__ for base in type(model.get_submodule(owner)).__mro__)
        if fused:
            piece = PIECES.get(len(spec.shape)) if key.endswith(".weight") else None
            places[key] = piece or Place("identity", key.rpartition(".")[2])
            continue
        place = find_place(types, leaf, len(spec.shape))
        places[key] = None if name in buffers and not place.statistic else place
    return places


def rename_key(model: Any, key: str, held: dict[str, Any]) -> tuple[str, bool]:
    """Name in memory of a key on disk, and whether several keys become that one."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers before 5 keeps names as they are, but for the prefix of a base model
        prefix = f"{model.base_model_prefix}."
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in held:
                return name, False
        return key, False
    if not hasattr(model, "_rgsp_key_conversions"):
        found = get_model_conversion_mapping(model)
        model._rgsp_key_conversions = (
            [entry for entry in found if isinstance(entry, WeightRenaming)],
            [entry for entry in found if isinstance(entry, WeightConverter)],
        )
    renamings, converters = model._rgsp_key_conversions
    name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, held)
    return name, converted is not None
