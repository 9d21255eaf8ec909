"""Records of a merge made ready for tables and plots: where a tensor stands in the model, and its numbers."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

Record = Mapping[str, Any]
"""One line of report.jsonl; see `TensorRow.of` for what is read from it."""

_CONTAINER = r"(?:[A-Za-z0-9]+_)*(?:layers?|blocks?|resblocks|layer_groups|groups|features|h)"
_OUTER = r"(?:stages?|layers)[._]\d+[.]"  # stages of blocks: the block is the layer, the stage part of the stack
_LAYER = re.compile(rf"(?:^|[.])(?P<stack>(?:{_OUTER})?{_CONTAINER}|stages?)[._](?P<index>[0-9]{{1,6}})(?=[.]|$)")
_LAYER_GLUED = re.compile(
    r"(?:^|[.])(?P<stack>[A-Za-z]*(?:[Ll]ayer|[Bb]lock|[Ss]tage)s?)_?(?P<index>[0-9]{1,6})(?=[.]|$)"
)

_LEAF = re.compile(r"[.](?:weight|kernel|bias|scale|embedding|gamma|beta|w|b|running_mean|running_var)$")
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (  # the first that is found in the lowered name without its leaf
        ("Norm", r"norm|(?:^|[._])(?:ln|bn)_?(?:[0-9]+|f|pre|post|final)?$"),
        ("Query, key, value fused", r"qkv|query_key_value|(?:^|[.])c_attn|in_proj_(?:weight|bias)$"),
        ("Query", r"(?:^|[._])(?:q|query|wq|to_q)(?:_proj|_lin|_a_proj|_b_proj)?$"),
        ("Key", r"(?:^|[._])(?:k|key|wk|to_k|kv)(?:_proj|_lin|_a_proj|_b_proj)?$"),
        ("Value", r"(?:^|[._])(?:v|value|wv|to_v)(?:_proj|_lin)?$"),
        (
            "Attention output",
            r"(?:^|[._])(?:o_proj|out_lin|to_out)|(?:attn|attention)(?:_[0-9]+)?[.].*(?:dense|proj|wo|out|o)$",
        ),
        ("Embedding", r"embed|(?:^|[.])(?:wte|wpe|shared|cls_token|class_token)$|patch_emb|position"),
        (
            "Head",
            r"(?:^|[.])(?:lm_head|heads?|classifier|score|cls|qa_outputs|pooler|(?:text|visual)_projection)(?:[.]|$)",
        ),
        ("Router", r"router|expert_gate$|(?:moe|mlp|ffn)[.]gate$"),
        ("MLP gate", r"gate_proj|gate_up|(?:^|[._])w1$|wi_0$"),
        ("MLP up", r"up_proj|intermediate|c_fc|(?:^|[._])(?:fc1|lin1|linear1|w3|wi|wi_1)$|h_to_4h|mlp[.]dense_0"),
        ("MLP down", r"down_proj|(?:^|[._])(?:fc2|lin2|linear2|w2|wo)$|output[.]dense$|c_proj|4h_to_h|mlp[.]dense_1"),
        ("Convolution", r"conv|downsample"),
    )
)
KIND_ORDER: tuple[str, ...] = (
    *("Query", "Key", "Value", "Query, key, value fused", "Attention output", "MLP gate", "MLP up", "MLP down"),
    *("Router", "Convolution", "Embedding", "Head", "Other", "Norm", "Bias"),
)


class Location(NamedTuple):
    """Where a tensor stands: the index of its layer in a named stack of layers."""

    stack: str
    layer: int


def locate(name: str) -> Location | None:
    """Layer of a tensor read off its name (`.layers.12.`, `.h.7.`, `blocks/4/`, `Block_2/`), or None without one."""
    path = name.replace("/", ".")
    found = _LAYER.search(path) or _LAYER_GLUED.search(path)
    if found is None:
        return None
    return Location(path[: found.end("stack")], int(found["index"]))


def name_module_kind(name: str, shape: Sequence[int]) -> str:
    """One of `KIND_ORDER` for a tensor, from its name; vectors are Norm or Bias whatever module they belong to."""
    path = name.replace("/", ".")
    lowered = _LEAF.sub("", path.lower())
    kind = next((kind for kind, pattern in _KINDS if pattern.search(lowered)), "Other")
    if len(shape) <= 1 and kind not in ("Norm", "Embedding"):
        return "Bias"
    return kind


@dataclass(frozen=True)
class LayerAxis:
    """The layers of a model in a row, stack after stack (encoder, then decoder)."""

    locations: tuple[Location, ...]

    @classmethod
    def of(cls, locations: Iterable[Location | None]) -> "LayerAxis":
        """Axis over every layer among `locations`, once each and in order of depth."""
        return cls(tuple(sorted({place for place in locations if place is not None}, key=order_location)))

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks in order."""
        return tuple(dict.fromkeys(place.stack for place in self.locations))

    @property
    def breaks(self) -> tuple[int, ...]:
        """Positions at which a new stack starts, the first one left out."""
        pairs = zip(self.locations, self.locations[1:], strict=False)
        return tuple(i for i, (a, b) in enumerate(pairs, start=1) if a.stack != b.stack)


def order_naturally(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts `layers.10` after `layers.9`."""
    parts = [(part.lstrip("0"), part) for part in re.split(r"([0-9]+)", name)]
    return tuple((0, len(digits), digits) if i % 2 else (1, 0, part) for i, (digits, part) in enumerate(parts))


def order_location(place: Location) -> tuple[bool, tuple[tuple[int, int, str], ...], int]:
    """Sort key by depth; a decoder runs after its encoder, whatever the alphabet says."""
    return ("decoder" in place.stack, order_naturally(place.stack), place.layer)


class TensorRow(NamedTuple):
    """One record made ready for tables and plots: finite numbers or None, stacks of slices reduced to one number."""

    name: str
    kind: str
    location: Location | None
    shape: tuple[int, ...]
    dtype: str
    rule: str
    method: str
    settings: str
    change: tuple[float | None, ...]
    stats: dict[str, float | str | None]
    overlap: tuple[tuple[float | None, ...], ...]
    flags: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, record: Record) -> "TensorRow":
        """Row of a record; every key but the name may be missing or null."""
        name = str(record["name"])
        shape = tuple(record.get("shape") or ())
        stats = dict(record.get("stats") or {})
        return cls(
            name=name,
            kind=name_module_kind(name, shape),
            location=locate(name),
            shape=shape,
            dtype=str(record.get("dtype") or ""),
            rule=str(record.get("rule") or ""),
            method=str(record.get("method") or ""),
            settings=format_settings(record.get("hyperparameters") or {}),
            change=tuple(_as_number(value) for value in record.get("relative_change") or ()),
            stats=dict(_reduce_stats(stats)),
            overlap=average_matrices(stats.get("subspace_overlap")),
            flags=tuple(str(flag) for flag in record.get("flags") or ()),
            digest=str(record.get("digest") or ""),
        )

    @property
    def largest_change(self) -> float:
        """Largest relative change against any parent; -1 where none is known."""
        return max((value for value in self.change if value is not None), default=-1.0)


def _as_number(value: Any) -> float | None:
    """Finite number or None; true and false are flags, not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _leaves(value: Any) -> Iterator[float]:
    """Finite numbers in nested lists."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    elif (number := _as_number(value)) is not None:
        yield number


def mean_present(values: Sequence[float | None]) -> float | None:
    """Mean of the numbers that are there; None where none is."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def _reduce_stats(stats: Mapping[str, Any]) -> Iterator[tuple[str, float | str | None]]:
    """One number per statistic: mean over slices, the worst where the glossary says so; psi and overlap by parts."""
    for name, value in stats.items():
        if name == "psi" and isinstance(value, list) and value:
            codes = value if isinstance(value[0], list) else [value]
            for i, part in enumerate("shd"):
                yield f"psi_{part}", mean_present([_as_number(code[i]) for code in codes if i < len(code)])
        elif name == "subspace_overlap":
            matrix = average_matrices(value)
            yield "overlap", mean_present([v for i, line in enumerate(matrix) for j, v in enumerate(line) if i < j])
        elif isinstance(value, str):
            yield name, value
        elif not isinstance(value, bool):
            worst = load_glossary()["stats"].get(name, {}).get("worst", False)
            yield name, max(_leaves(value), default=None) if worst else mean_present(list(_leaves(value)))


def average_matrices(value: Any) -> tuple[tuple[float | None, ...], ...]:
    """[K][K], or its mean over the slices of [S][K][K]; empty where there is none."""
    if not (isinstance(value, list) and value and isinstance(value[0], list) and value[0]):
        return ()
    slices = value if isinstance(value[0][0], list) else [value]
    size = max(len(one) for one in slices)
    cell = [
        [[_as_number(one[i][j]) for one in slices if i < len(one) and j < len(one[i] or ())] for j in range(size)]
        for i in range(size)
    ]
    return tuple(tuple(mean_present(values) for values in line) for line in cell)


def format_value(value: Any) -> str:
    """Setting as it stands in a configuration, without quotes where it is plain text."""
    if isinstance(value, str):
        return value
    return (
        f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str, sort_keys=True)
    )


def format_settings(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items())


@cache
def load_glossary() -> dict[str, Any]:
    """What rules, methods, statistics and flags mean, by kind and name."""
    text = resources.files("rgsp_jax.pipeline").joinpath("templates/glossary.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
