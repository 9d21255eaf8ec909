"""LoRA adapters of PEFT as the models they make of their base: merged row by row while they are read."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.guards import resolve_inside
from rgsp_jax.checkpoint.safetensors_header import cap, load_json, read_header
from rgsp_jax.checkpoint.safetensors_source import SafetensorsCheckpoint
from rgsp_jax.checkpoint.specs import FLOATING, Checkpoint, TensorSpec
from rgsp_jax.checkpoint.torch_source import TorchCheckpoint
from rgsp_jax.errors import RefusedError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.(?P<kind>lora|lora_embedding)_(?P<side>[AB])(\.\w+)?(\.weight)?$")
REFUSED_SETTINGS = {
    "use_dora": "DoRA rescales the base's weights",
    "lora_bias": "its factors have biases",
    "target_parameters": "it adapts parameters of stacked experts",
    "trainable_token_indices": "it trains single rows of an embedding",
    "layer_replication": "it repeats layers of its base",
    "megatron_config": "it is divided among devices",
    "use_qalora": "QALoRA pools the inputs",
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_bdlora": "its factors are block-diagonal",
}
"""Settings of adapters that are no sum of their base and a product, and why."""
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")
"""Initialisations that change the base as well: the adapter's factors alone do not say by how much."""


@dataclass(frozen=True)
class LoraFactors:
    """The update of one weight: `scaling * B A`, transposed where the weight is stored as [inputs, outputs].

    `W + (alpha / r) B A` (Hu et al., 2021), or alpha / sqrt(r) where the scaling is rank-stabilised.
    """

    a: np.ndarray
    """[rank, inputs], float32; the window of a convolution is part of the inputs."""
    b: np.ndarray
    """[outputs, rank], float32."""
    scaling: float
    transposed: bool
    """Whether the weight is [inputs, outputs]: embeddings, and GPT-2's linear layers."""

    def add_rows(self, rows: np.ndarray, first: int) -> np.ndarray:
        """float32 rows [first, first + k) of the weight as a matrix, the update added."""
        chosen = slice(first, first + len(rows))
        if self.transposed:
            return rows + (self.a.T[chosen] @ self.b.T) * np.float32(self.scaling)
        return rows + (self.b[chosen] @ self.a) * np.float32(self.scaling)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of PEFT and no model of its own."""
    return (directory / CONFIG).is_file() and any((directory / name).exists() for name in WEIGHTS)


class LoraCheckpoint(Checkpoint):
    """The model that an adapter makes of its base: every read adds what the adapter changes.

    Sums are taken in float32 and rounded to the base's dtype once, as PEFT's `merge_and_unload` does. `factors` has the
    updates by key; `path` is the adapter's, `root` the base's.
    """

    format = "lora"

    def __init__(self, adapter: Path, base: Checkpoint):
        self._base = base
        config = read_adapter_config(adapter)
        with open_weights(adapter) as weights:
            tensors = {name: weights.read(name) for name in weights.specs}
            files = weights.weight_files
        self.factors, self._replaced = resolve(adapter, config, tensors, base)
        specs = dict(base.specs)
        for key, array in self._replaced.items():
            specs[key] = TensorSpec(key, array.shape, array.dtype)
        aliases = {key: owner for key, owner in base.aliases.items() if not {key, owner} & self._replaced.keys()}
        super().__init__(
            adapter,
            specs,
            (*base.weight_files, *files),
            aliases=aliases,
            companions=base.companions,
            config=base.config,
            metadata=base.metadata,
            root=base.root,
        )

    def _fill(self, spec: TensorSpec, out: np.ndarray, start: int) -> None:
        if spec.name in self._replaced:
            out[:] = self._replaced[spec.name].reshape(-1)[start : start + out.size]
            return
        factors = self.factors.get(self.aliases.get(spec.name, spec.name))
        if factors is None:
            self._base.read_into(spec.name, out, start)
            return
        width = math.prod(spec.shape[1:])
        first, last = start // width, -(-(start + out.size) // width)  # the rows that the run touches
        rows = np.empty((last - first, width), spec.dtype)
        self._base.read_into(spec.name, rows, first * width)
        changed = factors.add_rows(rows.astype(np.float32), first).reshape(-1)
        begin = start - first * width
        out[:] = changed[begin : begin + out.size].astype(spec.dtype)

    def shard_of(self, name: str) -> int:
        return self._base.shard_of(name) if name in self._base.specs else 0

    def close(self) -> None:
        self._base.close()


def read_adapter_config(adapter: Path) -> Mapping[str, Any]:
    """The parsed adapter_config.json of a LoRA; RefusedError with every setting that is no plain LoRA."""
    path = resolve_inside(adapter, CONFIG)
    try:
        config = load_json(path.read_bytes(), unique=False)
    except (OSError, ValueError) as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise RefusedError(f"{path} is not a JSON object")
    kind = config.get("peft_type", "LORA")
    problems = [] if kind == "LORA" else [f"{adapter} is an adapter of type {kind!r}; only LORA is read"]
    problems += [
        f"{adapter} cannot be merged into its base here: {why} ({name})"
        for name, why in REFUSED_SETTINGS.items()
        if config.get(name)
    ]
    start = str(config.get("init_lora_weights", "")).lower()
    problems += [
        f"{adapter} was initialised by {start!r}, which changes its base as well: save it as a plain LoRA first "
        "(PEFT's path_initial_model_for_weight_conversion)"
        for name in CHANGED_BASES
        if start.startswith(name)
    ]
    alphas = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(alpha, int | float) for alpha in alphas):
        problems.append(f"{path}: lora_alpha and alpha_pattern must be numbers")
    if problems:
        raise RefusedError(problems)
    return config


def open_weights(adapter: Path) -> Checkpoint:
    """The adapter's own tensors."""
    for name in WEIGHTS:
        if (adapter / name).exists():
            real = resolve_inside(adapter, name)
            if name.endswith(".safetensors"):
                return SafetensorsCheckpoint(adapter, [read_header(real)])
            return TorchCheckpoint(adapter, (real,))
    raise RefusedError(f"{adapter} has no {' or '.join(WEIGHTS)}")


def find_base(adapter: Path, config: Mapping[str, Any]) -> Path:
    """The directory of an adapter's base that its config names; RefusedError where that is not one here."""
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and name:
        for place in (Path(name).expanduser(), adapter / name):
            if place.is_dir():
                return place
    raise RefusedError(
        f"{adapter} is a LoRA adapter of {name!r}, which is no directory here: give the base model's directory before "
        f"it, as BASE+{adapter}"
    )


def resolve(
    adapter: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], base: Checkpoint
) -> tuple[dict[str, LoraFactors], dict[str, np.ndarray]]:
    """Key on disk -> its update, and key -> what replaces it; RefusedError with everything that does not fit."""
    problems: list[str] = []
    pairs: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        bare = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        match = FACTOR.match(bare)
        if match is not None:
            pairs.setdefault((match["module"], match["kind"]), {})[match["side"]] = array
        elif "lora_" in bare:
            problems.append(f"{adapter}: {name!r} is no factor of a plain LoRA")
        else:
            key = find_key(bare.replace(".modules_to_save.default", ""), base)
            replaced[key or bare] = array
            if key is not None and base.specs[key].dtype in FLOATING and array.dtype not in FLOATING:
                problems.append(f"{adapter}: {name!r} is {array.dtype}, its base has {base.specs[key].dtype}")
    factors: dict[str, LoraFactors] = {}
    for (module, kind), sides in pairs.items():
        found = find_key(f"{module}.weight", base)
        key = None if found is None else base.aliases.get(found, found)
        if set(sides) != {"A", "B"}:
            problems.append(f"{adapter}: {module} has only one of its two factors")
        elif key is None:
            problems.append(f"{adapter} adapts {module!r}, which {base.path} does not have: is this its base?")
        elif key in factors or key in replaced:
            problems.append(f"{adapter}: {key!r} is changed twice (tied weights, or a module that is saved as well)")
        else:
            flip = kind == "lora_embedding" or bool(config.get("fan_in_fan_out"))
            made = make_factors(sides["A"], sides["B"], find_alpha(module, config), config, flip)
            if isinstance(made, LoraFactors) and matches(made, base.specs[key].shape):
                factors[key] = made
            else:
                shapes = f"{list(sides['A'].shape)} and {list(sides['B'].shape)}"
                problems.append(
                    f"{adapter}: factors {shapes} of {module!r} do not fit {list(base.specs[key].shape)} in {base.path}"
                )
    if not factors and not problems:
        problems.append(f"{adapter} holds no factors of a LoRA")
    if problems:
        raise RefusedError(cap(problems))
    return factors, replaced


def make_factors(
    a: np.ndarray, b: np.ndarray, alpha: float, config: Mapping[str, Any], flip: bool
) -> LoraFactors | None:
    """The factors as matrices in float32; None where they are no pair of one rank."""
    if a.ndim < 2 or b.ndim < 2 or not a.shape[0] or a.shape[0] != b.shape[1] or math.prod(b.shape[2:]) != 1:
        return None
    rank = a.shape[0]
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    flat_a, flat_b = a.reshape(rank, -1).astype(np.float32), b.reshape(-1, rank).astype(np.float32)
    return LoraFactors(flat_a, flat_b, scaling, flip and a.ndim == 2)


def matches(factors: LoraFactors, shape: tuple[int, ...]) -> bool:
    """Whether an update has a weight's shape, its window flattened."""
    if len(shape) < 2:
        return False
    outputs, inputs = factors.b.shape[0], factors.a.shape[1]
    return (shape[0], math.prod(shape[1:])) == ((inputs, outputs) if factors.transposed else (outputs, inputs))


def find_alpha(module: str, config: Mapping[str, Any]) -> float:
    """A module's alpha: that of the first pattern its name ends with or, where it begins with `^`, matches."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        expression = pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
        try:
            if re.match(expression, module):
                return alpha
        except re.error:
            raise RefusedError(f"{CONFIG}: alpha_pattern {pattern!r} is no regular expression") from None
    return config.get("lora_alpha", 8)


def find_key(name: str, base: Checkpoint) -> str | None:
    """The base's key of a name in the adapted model: the same, or one that differs by a leading prefix alone."""
    if name in base.specs:
        return name
    longer = [key for key in base.specs if key.endswith(f".{name}")]
    shorter = [key for key in base.specs if name.endswith(f".{key}")]
    found = longer or sorted(shorter, key=len)[-1:]
    return found[0] if len(found) == 1 else None
