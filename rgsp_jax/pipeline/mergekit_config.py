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
PARAMETERS = {"linear": frozenset({"weight", "normalize"}), "slerp": frozenset({"t"})}
SOURCE_PARAMETERS = {"linear": frozenset({"weight"}), "slerp": frozenset[str]()}
LAYERS = "(layers?|h|blocks?)"
AFTER_LAYERS = (
    r"(?!.*embed(?!_out))(.*\.)?(norm|final_norm|final_layernorm|final_layer_norm|ln_f|ln_post|post_layernorm|lm_head"
    r"|embed_out|head|pooler|cls|classifier|score|qa_outputs)(\.|$)"
)
"""Modules that stand behind the last layer, in the families of transformers."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
KNOWN = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"} | IGNORED


def is_mergekit(fields: Mapping[str, Any]) -> bool:
    """True for a YAML in mergekit's format."""
    return "merge_method" in fields


def translate(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of a MergeConfig from a mergekit config; RefusedError lists everything that has no counterpart here."""
    problems = [f"mergekit setting {key!r} has no counterpart here" for key in fields if key not in KNOWN]
    method = fields["merge_method"]
    sources: list[Mapping[str, Any]] = []
    try:
        sources = read_sources(fields)
    except ValueError as error:
        problems.append(str(error))
    if isinstance(method, str) and method in METHODS:
        problems += find_unknown_parameters(method, fields.get("parameters"), PARAMETERS[method], "parameters")
        for entry in sources:
            where = f"parameters of {entry['model']}"
            problems += find_unknown_parameters(method, entry.get("parameters"), SOURCE_PARAMETERS[method], where)
    else:
        problems.append(f"merge_method {method!r} has no counterpart here; there are {', '.join(METHODS)}")
    if problems:
        raise RefusedError(f"{source}: {problem}" for problem in problems)
    try:
        translated = {"linear": translate_linear, "slerp": translate_slerp}[method](fields, sources)
    except ValueError as error:
        raise RefusedError(f"{source}: {error}") from None
    dtype = fields.get("out_dtype") or fields.get("dtype")
    return {"method": METHODS[method], **translated, **({"dtype": dtype} if dtype else {})}


def find_unknown_parameters(method: str, parameters: Any, known: frozenset[str], where: str) -> list[str]:
    """One sentence for each parameter that would be left out of account."""
    if parameters is None:
        return []
    if not isinstance(parameters, Mapping):
        return [f"{where} must be a mapping, not {parameters!r}"]
    return [f"{where}: {key!r} of {method} has no counterpart here" for key in parameters if key not in known]


def read_sources(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models with their own parameters; slices must take every layer of every model once."""
    models = fields.get("models")
    if slices := fields.get("slices"):
        whole = isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], Mapping)
        if models or not whole or slices[0].keys() != {"sources"}:
            raise ValueError("only whole models are merged here; give one slice of `sources` alone, or `models`")
        models = slices[0]["sources"]
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("model"), str) for m in models):
        raise ValueError("`models` must be a list of entries with a `model`")
    unknown = sorted({str(key) for entry in models for key in entry} - {"model", "parameters", "layer_range"})
    if unknown:
        raise ValueError(f"settings {', '.join(unknown)} of a model have no counterpart here")
    for entry in models:
        layers = layer_count(entry["model"])
        if "layer_range" in entry and (layers is None or entry["layer_range"] != [0, layers]):
            raise ValueError(
                f"layer_range {entry['layer_range']} of {entry['model']} does not span the whole model"
                + (f", which has {layers} layers" if layers is not None else ": no config.json there says how many")
            )
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
    if not isinstance(config, dict):
        return None
    keys = ("num_hidden_layers", "n_layer", "num_layers")
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def translate_linear(fields: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`weight` of every model; they are divided by their sum, as mergekit does by default."""
    models = [entry["model"] for entry in sources]
    if (base := locate_base(fields)) not in (None, *models):
        raise ValueError(f"base_model {base} is not among the models of a linear merge: list it there with its weight")
    common = fields.get("parameters") or {}
    if common.get("normalize", True) is not True:
        raise ValueError("only normalize: true has a counterpart here: `average` divides the weights by their sum")
    weights = [(entry.get("parameters") or {}).get("weight", common.get("weight", 1.0)) for entry in sources]
    if not all(map(is_number, weights)):
        raise ValueError(
            "linear: `weight` must be one number for each model; gradients over layers have no counterpart"
        )
    return {"models": models, "hyperparameters": {"coefficients": [float(w) for w in weights]}}


def translate_slerp(fields: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`t`: a number, a gradient over the layers, or a list of either behind filters on the tensor's name."""
    models = [entry["model"] for entry in sources]
    base = locate_base(fields)
    if base is not None and base not in models:
        models = [base, *models]
    if len(models) != 2:
        raise ValueError(f"slerp takes 2 models, not {len(models)}")
    if base is not None:  # t = 0 is the base
        models.sort(key=lambda model: model != base)
    setting = (fields.get("parameters") or {}).get("t")
    if setting is None:
        raise ValueError("slerp needs parameters: t")
    filtered = isinstance(setting, list) and any(isinstance(entry, Mapping) for entry in setting)
    conditions = setting if filtered else [{"value": setting}]
    if not all(isinstance(c, Mapping) and c.keys() <= {"filter", "value"} and "value" in c for c in conditions):
        raise ValueError("t must be a number, a list of numbers, or a list of entries with `filter` and `value`")
    if all(is_narrow(condition) for condition in conditions):
        raise ValueError("t has no value for tensors that no filter matches: end the list with an entry without filter")
    layers = layer_count(models[0])
    overrides: list[dict[str, Any]] = []
    for condition in reversed(conditions):  # there the first match decides, here the last
        needle = re.escape(str(condition["filter"])) if is_narrow(condition) else ""
        overrides += override_by_layer(needle, condition["value"], layers)
    return {"models": models, "overrides": overrides}


def locate_base(fields: Mapping[str, Any]) -> str | None:
    base = fields.get("base_model")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base_model must be one path or name, not {base!r}")
    return locate(base) if base else None


def is_narrow(condition: Mapping[str, Any]) -> bool:
    """True for an entry that only some tensors match."""
    return condition.get("filter") not in (None, "*")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def override_by_layer(needle: str, value: Any, layers: int | None) -> list[dict[str, Any]]:
    """Overrides of t for one condition: tensors before the layers get the gradient's start, after them its end."""

    def override(pattern: str, t: float) -> dict[str, Any]:
        return {"pattern": f"re:{pattern}", "hyperparameters": {"t": float(t)}}

    if is_number(value):
        return [override(needle, value)]
    if not isinstance(value, list) or not value or not all(map(is_number, value)):
        raise ValueError(f"t must be a number or a list of numbers, not {value!r}")
    if layers is None:
        raise ValueError("a gradient over layers needs a config.json that says how many there are")
    has = f"^(?=.*{needle})" if needle else "^"
    inside = [
        override(rf"{has}(.*\.)?{LAYERS}\.{i}\.", interpolate(value, i / (layers - 1) if layers > 1 else 1.0))
        for i in range(layers)
    ]
    return [override(needle, value[0]), override(has + AFTER_LAYERS, value[-1]), *inside]


def interpolate(values: Sequence[float], position: float) -> float:
    """Piecewise linear through equally spaced values, position in [0, 1]."""
    x = position * (len(values) - 1)
    i = min(int(x), len(values) - 2) if len(values) > 1 else 0
    return values[i] if len(values) == 1 else values[i] + (x - i) * (values[i + 1] - values[i])
