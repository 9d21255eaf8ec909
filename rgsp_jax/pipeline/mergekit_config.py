"""mergekit YAML read as it is, for the methods both projects have (linear and slerp of whole models)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgsp_jax.errors import RefusedError

METHODS = {"linear": "average", "slerp": "slerp"}
IGNORED = {"tokenizer_source", "tokenizer", "chat_template", "name"}
"""Settings that do not change the weights; the tokenizer copied is the first model's."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
KNOWN = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"} | IGNORED


def is_mergekit(fields: Mapping[str, Any]) -> bool:
    """True for a YAML in mergekit's format."""
    return "merge_method" in fields


def translate(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of a MergeConfig from a mergekit config; RefusedError lists everything that has no counterpart here."""
    problems = [f"{source}: mergekit setting {key!r} has no counterpart here" for key in fields if key not in KNOWN]
    method = fields["merge_method"]
    if method not in METHODS:
        problems.append(f"{source}: merge_method {method!r} has no counterpart here; there are {', '.join(METHODS)}")
    try:
        sources = read_sources(fields)
    except ValueError as error:
        problems.append(f"{source}: {error}")
        sources = []
    if problems:
        raise RefusedError(problems)
    try:
        translated = {"linear": translate_linear, "slerp": translate_slerp}[method](fields, sources)
    except ValueError as error:
        raise RefusedError(f"{source}: {error}") from None
    dtype = fields.get("out_dtype") or fields.get("dtype")
    return {"method": METHODS[method], **translated, **({"dtype": dtype} if dtype else {})}


def read_sources(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models with their own parameters; slices must take every layer of every model once."""
    models = fields.get("models")
    if slices := fields.get("slices"):
        if models or len(slices) != 1:
            raise ValueError("only whole models are merged here; give one slice over all layers, or `models`")
        models = slices[0].get("sources", [])
        for entry in models:
            first, last = entry.get("layer_range", (0, None))
            if first != 0 or (last is not None and last != layer_count(entry["model"])):
                raise ValueError(f"layer_range {[first, last]} of {entry['model']} does not span the whole model")
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("model"), str) for m in models):
        raise ValueError("`models` must be a list of entries with a `model`")
    return [{**entry, "model": locate(entry["model"])} for entry in models]


def locate(model: str) -> str:
    """A path as it is; a name of the Hub, where there is no such path, behind `hf://`."""
    is_name = HUB_NAME.fullmatch(model) is not None and not Path(model).exists()
    return f"hf://{model}" if is_name else model


def layer_count(model: str) -> int | None:
    """Layers by the model's config.json; None where it does not say."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    keys = ("num_hidden_layers", "n_layer", "num_layers")
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def translate_linear(fields: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`weight` of every model; they are divided by their sum, as mergekit does by default."""
    common = fields.get("parameters") or {}
    if common.get("normalize", True) is False:
        raise ValueError("normalize: false has no counterpart here: `average` divides the weights by their sum")
    weights = [(entry.get("parameters") or {}).get("weight", common.get("weight", 1.0)) for entry in sources]
    if not all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in weights):
        raise ValueError(
            "linear: `weight` must be one number for each model; gradients over layers have no counterpart"
        )
    return {"models": [e["model"] for e in sources], "hyperparameters": {"coefficients": [float(w) for w in weights]}}


def translate_slerp(fields: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`t`: a number, a gradient over the layers, or a list of either behind filters on the tensor's name."""
    models = [entry["model"] for entry in sources]
    base = locate(fields["base_model"]) if fields.get("base_model") else None
    if base is not None and base not in models:
        models = [base, *models]
    if len(models) != 2:
        raise ValueError(f"slerp takes 2 models, not {len(models)}")
    if base is not None:  # t = 0 is the base
        models.sort(key=lambda model: model != base)
    setting = (fields.get("parameters") or {}).get("t")
    if setting is None:
        raise ValueError("slerp needs parameters: t")
    conditions = (
        setting if isinstance(setting, list) and setting and isinstance(setting[0], dict) else [{"value": setting}]
    )
    layers = layer_count(models[0])
    overrides: list[dict[str, Any]] = []
    for condition in reversed(conditions):  # there the first match decides, here the last
        overrides += override_by_layer(condition.get("filter"), condition.get("value"), layers)
    return {"models": models, "overrides": overrides}


def override_by_layer(condition: str | None, value: Any, layers: int | None) -> list[dict[str, Any]]:
    """Overrides of t for one condition: tensors before the layers get the gradient's start, after them its end."""
    needle = "" if condition in (None, "*") else re.escape(str(condition))

    def override(pattern: str, t: float) -> dict[str, Any]:
        return {"pattern": f"re:{pattern}", "hyperparameters": {"t": float(t)}}

    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [override(needle, value)]
    if not isinstance(value, list) or not value or not all(isinstance(x, (int, float)) for x in value):
        raise ValueError(f"t must be a number or a list of numbers, not {value!r}")
    if layers is None:
        raise ValueError("a gradient over layers needs a config.json that says how many there are")
    has = f"(?=.*{needle})" if needle else ""
    last = "(norm|ln_f|lm_head|final)" if not needle else f"(?=.*{needle}).*(norm|ln_f|lm_head|final)"
    outside = [override(needle, value[0]), override(f"^{last}|^model\\.{last}", value[-1])]
    inside = [
        override(rf"^{has}.*(layers?|h|blocks?)\.{i}\.", interpolate(value, i / (layers - 1) if layers > 1 else 1.0))
        for i in range(layers)
    ]
    return outside + inside


def interpolate(values: Sequence[float], position: float) -> float:
    """Piecewise linear through equally spaced values, position in [0, 1]."""
    x = position * (len(values) - 1)
    i = min(int(x), len(values) - 2) if len(values) > 1 else 0
    return values[i] if len(values) == 1 else values[i] + (x - i) * (values[i + 1] - values[i])
