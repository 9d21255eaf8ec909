"""mergekit YAML read as it is, for the methods both projects have.

Computed is in float32 whatever `dtype` says, and rounded once, to `out_dtype` or `dtype`. Random methods draw from our
own key, so that a merge repeats mergekit's in distribution, and `rescale: true` divides by the density, as the paper
has it: mergekit restores the L1 norm of the tensor drawn, which tends to the same for large tensors.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rgsp_jax.errors import RefusedError

Fields = Mapping[str, Any]

IGNORED = {"tokenizer_source", "tokenizer", "chat_template", "name"}
"""Settings that do not change the weights; the tokenizer copied is the first model's."""
LACKING = {
    "della": "mergekit restores each task vector's L1 norm with one factor, which favours its large entries, where"
    " `della` here divides every entry by its own probability, as the paper; write a config of rgsp's own",
    "della_linear": "there is no `della` here that elects no signs",
    "breadcrumbs_ties": "`breadcrumbs` here elects no signs",
}
"""Methods that we have by a similar name, and what is missing."""
LAYERS = "(layers?|h|blocks?)"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
KNOWN = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"} | IGNORED


def is_mergekit(fields: Fields) -> bool:
    """True for a YAML in mergekit's format."""
    return "merge_method" in fields


@dataclass(frozen=True)
class Counterpart:
    """What a merge_method is here, and which of its parameters are read."""

    method: str
    translate: Callable[[Fields, Sequence[Fields], "Counterpart"], dict[str, Any]]
    common: frozenset[str] = frozenset()
    """Parameters of the whole merge."""
    own: frozenset[str] = frozenset()
    """Parameters that every model may have for itself."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of these the ones that must be one number for all models here, with mergekit's defaults."""
    sparsity: Literal["none", "magnitude", "random"] = "none"
    elects: bool = False
    """It merges by sign, and `normalize` is its own; elsewhere `normalize` divides by the sum of the weights."""
    normalize: bool = False
    """mergekit's default."""


def translate(fields: Fields, source: str) -> dict[str, Any]:
    """Fields of a MergeConfig from a mergekit config; RefusedError lists everything that has no counterpart here."""
    problems = [f"mergekit setting {key!r} has no counterpart here" for key in fields if key not in KNOWN]
    name = fields["merge_method"]
    sources: list[Fields] = []
    try:
        sources = read_sources(fields)
    except ValueError as error:
        problems.append(str(error))
    counterpart = COUNTERPARTS.get(name) if isinstance(name, str) else None
    if counterpart is None:
        reason = LACKING.get(name) if isinstance(name, str) else None
        known = f"; there are {', '.join(COUNTERPARTS)}"
        problems.append(f"merge_method {name!r} has no counterpart here{f': {reason}' if reason else known}")
    else:
        problems += find_unknown_parameters(name, fields.get("parameters"), counterpart.common, "parameters")
        for entry in sources:
            where = f"parameters of {entry['model']}"
            problems += find_unknown_parameters(name, entry.get("parameters"), counterpart.own, where)
    if problems or counterpart is None:
        raise RefusedError(f"{source}: {problem}" for problem in problems)
    try:
        translated = counterpart.translate(fields, sources, counterpart)
    except RefusedError as error:
        raise RefusedError(f"{source}: {problem}" for problem in error.problems) from None
    except ValueError as error:
        raise RefusedError(f"{source}: {error}") from None
    dtype = fields.get("out_dtype") or fields.get("dtype")
    return {"method": counterpart.method, **translated, **({"dtype": dtype} if dtype else {})}


def find_unknown_parameters(method: str, parameters: Any, known: frozenset[str], where: str) -> list[str]:
    """One sentence for each parameter that would be left out of account."""
    if parameters is None:
        return []
    if not isinstance(parameters, Mapping):
        return [f"{where} must be a mapping, not {parameters!r}"]
    return [f"{where}: {key!r} of {method} has no counterpart here" for key in parameters if key not in known]


def read_sources(fields: Fields) -> list[Fields]:
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


def translate_linear(fields: Fields, sources: Sequence[Fields], _: Counterpart) -> dict[str, Any]:
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


def translate_slerp(fields: Fields, sources: Sequence[Fields], _: Counterpart) -> dict[str, Any]:
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


def translate_karcher(fields: Fields, sources: Sequence[Fields], _: Counterpart) -> dict[str, Any]:
    """`max_iter`; the base model is one model more. Iteration goes on to its end, so that `tol` can only be small."""
    common, models = fields.get("parameters") or {}, [entry["model"] for entry in sources]
    base = locate_base(fields)
    if base is not None and base not in models:
        models.append(base)
    tolerance = common.get("tol", 1e-5)
    if not is_number(tolerance) or tolerance > 1e-5:
        raise ValueError(f"karcher: tol must be at most 1e-5 here, where no step is left out, not {tolerance!r}")
    return {"models": models, "hyperparameters": {"iterations": common.get("max_iter", 10)}}


def translate_model_stock(fields: Fields, sources: Sequence[Fields], _: Counterpart) -> dict[str, Any]:
    """Of whole tensors, not row by row."""
    base = require_base(fields)
    if (fields.get("parameters") or {}).get("filter_wise", False) is not False:
        raise ValueError("model_stock: only filter_wise: false has a counterpart here, one angle for each tensor")
    return {"models": [entry["model"] for entry in sources if entry["model"] != base], "base": base}


def translate_task_vectors(fields: Fields, sources: Sequence[Fields], row: Counterpart) -> dict[str, Any]:
    """`weight` is one of the coefficients, `lambda` the scale; RefusedError names everything that cannot be."""
    name, base, common = fields["merge_method"], require_base(fields), fields.get("parameters") or {}
    entries = [entry for entry in sources if entry["model"] != base]
    problems = []

    def own(parameter: str, default: Any) -> list[Any]:
        return [(entry.get("parameters") or {}).get(parameter, common.get(parameter, default)) for entry in entries]

    weights, factor = own("weight", None), common.get("lambda", 1.0)
    if not all(map(is_number, weights)):
        problems.append(f"{name}: `weight` must be one number a model; gradients and filters have no counterpart")
    if not is_number(factor):
        problems.append(f"{name}: `lambda` must be one number, not {factor!r}")
    shares = {parameter: own(parameter, default) for parameter, default in row.shares.items()}
    for parameter, values in shares.items():
        if not all(map(is_number, values)):
            problems.append(f"{name}: `{parameter}` must be one number; gradients and filters have no counterpart")
        elif len(set(values)) > 1:
            given = ", ".join(map(str, values))
            problems.append(f"{name}: `{parameter}` must be the same for every model here, not {given}")
    flags = {"normalize": row.normalize, "rescale": row.sparsity == "random", "int8_mask": False}
    flags = {flag: common.get(flag, default) for flag, default in flags.items()}
    problems += [f"{name}: `{f}` must be true or false, not {v!r}" for f, v in flags.items() if not isinstance(v, bool)]
    if row.sparsity == "magnitude" and flags["rescale"] is True:
        problems.append(
            f"{name}: only rescale: false has a counterpart here; what a trim leaves is not brought back to its L1 norm"
        )
    if problems:
        raise RefusedError(problems)
    numbers = {parameter: float(values[0]) for parameter, values in shares.items() if values}
    hyperparameters = scale_task_vectors(weights, float(factor), numbers, flags, row)
    return {"models": [entry["model"] for entry in entries], "base": base, "hyperparameters": hyperparameters}


def scale_task_vectors(
    weights: Sequence[float], scale: float, shares: Mapping[str, float], flags: Mapping[str, bool], row: Counterpart
) -> dict[str, Any]:
    """Hyperparameters from mergekit's: the scale takes up `normalize`, and the lack of `rescale`."""
    density = min(shares.get("density", 1.0), 1.0)  # from 1 on mergekit keeps everything
    if row.sparsity == "random" and not flags["rescale"]:
        scale *= density
    total = math.fsum(weights)
    if flags["normalize"] and not row.elects and abs(total) >= 1e-8:
        scale /= total
    return {
        "coefficients": [float(weight) for weight in weights],
        "scale": scale,
        **({"density": density} if row.sparsity == "magnitude" else {}),
        **({"drop_rate": round(1 - density, 12)} if row.sparsity == "random" else {}),
        **({"gamma": shares["gamma"]} if "gamma" in shares else {}),
        **({"normalize": flags["normalize"]} if row.elects else {}),
    }


def require_base(fields: Fields) -> str:
    base = locate_base(fields)
    if base is None:
        raise ValueError(f"{fields['merge_method']} needs base_model, the common ancestor of the models")
    return base


def locate_base(fields: Fields) -> str | None:
    base = fields.get("base_model")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base_model must be one path or name, not {base!r}")
    return locate(base) if base else None


def is_narrow(condition: Fields) -> bool:
    """True for an entry that only some tensors match."""
    return condition.get("filter") not in (None, "*")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def override_by_layer(needle: str, value: Any, layers: int | None) -> list[dict[str, Any]]:
    """Overrides of t for one condition: tensors outside the layers get the gradient's start.

    So has mergekit 0.1.5 the ones behind the layers too; its early releases gave those the gradient's end.
    """

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
    return [override(needle, value[0]), *inside]


def interpolate(values: Sequence[float], position: float) -> float:
    """Piecewise linear through equally spaced values, position in [0, 1]."""
    x = position * (len(values) - 1)
    i = min(int(x), len(values) - 2) if len(values) > 1 else 0
    return values[i] if len(values) == 1 else values[i] + (x - i) * (values[i + 1] - values[i])


FLAGS = frozenset({"weight", "lambda", "normalize", "rescale", "int8_mask", "density"})
WEIGHED = frozenset({"weight", "density"})
DENSITY = {"density": 1.0}

COUNTERPARTS: Mapping[str, Counterpart] = {
    "linear": Counterpart("average", translate_linear, frozenset({"weight", "normalize"}), frozenset({"weight"})),
    "slerp": Counterpart("slerp", translate_slerp, frozenset({"t"})),
    "karcher": Counterpart("karcher", translate_karcher, frozenset({"max_iter", "tol"})),
    "task_arithmetic": Counterpart("task_arithmetic", translate_task_vectors, FLAGS, WEIGHED),
    "ties": Counterpart(
        "ties", translate_task_vectors, FLAGS, WEIGHED, DENSITY, sparsity="magnitude", elects=True, normalize=True
    ),
    "dare_linear": Counterpart("dare", translate_task_vectors, FLAGS, WEIGHED, DENSITY, sparsity="random"),
    "dare_ties": Counterpart(
        "dare_ties", translate_task_vectors, FLAGS, WEIGHED, DENSITY, sparsity="random", elects=True
    ),
    "breadcrumbs": Counterpart(
        "breadcrumbs",
        translate_task_vectors,
        FLAGS | {"gamma"},
        WEIGHED | {"gamma"},
        {**DENSITY, "gamma": 0.01},
        sparsity="magnitude",
    ),
    "model_stock": Counterpart("model_stock", translate_model_stock, frozenset({"filter_wise"})),
}
"""merge_method -> what it is here; task_arithmetic has a density that mergekit does not use either."""
