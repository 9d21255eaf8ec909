"""The report of a merge: plain records in, one self-contained HTML page out, the same bytes every time."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup, escape

from rgsp_jax.pipeline.plots import Line, draw_heat_map, draw_lines, find_limits
from rgsp_jax.pipeline.tensor_rows import (
    KIND_ORDER,
    LayerAxis,
    Record,
    TensorRow,
    format_value,
    load_glossary,
    mean_present,
    order_location,
    order_naturally,
)

_SHARED_AXIS = frozenset(KIND_ORDER[: KIND_ORDER.index("Embedding")])  # matrices, drawn on one scale
_MAX_PANELS = 12
_MAX_PAIRS = 12
_TOP = 15
_GLYPHS = "●■▲◆▼✚✖★"  # as plots.MARKERS
_LEVELS = ("serious", "check", "note")


@dataclass(frozen=True)
class Parent:
    """A model that went into a merge. `files` are pairs of file name and sha256."""

    label: str
    """What the user wrote: a path, or `hf://owner/name` for a model of the Hub."""
    files: Sequence[tuple[str, str]] = ()
    architecture: str | None = None
    model_type: str | None = None
    parameters: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class RunSummary:
    """What was merged, how, and what came out: everything of report.html and README.md that is not per tensor."""

    method: str
    hyperparameters: Mapping[str, Any]
    output_name: str
    parents: Sequence[Parent]
    versions: Mapping[str, str]
    config_yaml: str
    parameters: int
    """Parameters of the output."""
    dtype: str
    shards: int
    bytes: int
    """Size of the weight files."""
    counts_by_rule: Mapping[str, int]
    base: Parent | None = None
    architecture: str | None = None
    """Class name in the output's config.json; None where there is no config, so that transformers cannot load it."""
    has_tokenizer: bool = False
    flag_counts: Mapping[str, int] = field(default_factory=dict)
    """Number of tensors per flag, from `count_flags`."""
    calibration: Sequence[str] = ()
    """A sentence on every covariance file."""
    warnings: Sequence[str] = ()
    """Sentences on the run as a whole, such as tokenizers that differ."""


def render_report(summary: RunSummary, records: Sequence[Record]) -> str:
    """Page for the records of a merge (one per output tensor, in any order): self-contained, nothing fetched."""
    rows = sorted((TensorRow.of(record) for record in records), key=lambda row: order_naturally(row.name))
    codes = name_parents(max([len(summary.parents), *(len(row.change) for row in rows)]))
    axis = LayerAxis.of(row.location for row in rows)
    changed = sorted((row for row in rows if row.largest_change >= 0), key=lambda row: -row.largest_change)
    inside = [row for row in changed if row.location is not None]
    view = {
        "summary": summary,
        "glossary": load_glossary(),
        "codes": codes,
        "rows": rows,
        "warnings": describe_flags(rows),
        "verdict": judge(summary, rows, codes),
        "stacks": axis.stacks,
        "change_panels": list(_draw_changes(rows, axis, len(codes))),
        "stat_kinds": _stat_kinds(rows),
        "stat_panels": list(_draw_stats(rows, axis)),
        "overlaps": _draw_overlaps(rows, axis, codes),
        "top": (inside or changed)[:_TOP],
        "outside": [row for row in changed if row.location is None][: 2 * _TOP] if inside else [],
        "table": tabulate(rows, codes),
    }
    return make_encodable(load_templates().get_template("report.html.j2").render(view))


def name_parents(count: int) -> list[str]:
    """Short names of the parents, in their order: A, B, C ... Z, P27, P28 ..."""
    return [string.ascii_uppercase[i] if i < 26 else f"P{i + 1}" for i in range(count)]


def count_flags(records: Sequence[Record]) -> dict[str, int]:
    """Number of tensors that carry each flag, by name."""
    found = Counter(str(flag) for record in records for flag in dict.fromkeys(record.get("flags") or ()))
    return dict(sorted(found.items()))


def explain_flag(flag: str) -> dict[str, str]:
    """Level, title, meaning and advice for a flag; a general text for one that the glossary does not know."""
    known = load_glossary()["flags"].get(flag)
    if known is not None:
        return known
    if flag.endswith("_unconverged") or "not_converged" in flag:
        text = "A numerical solver stopped before it settled; what was computed for these tensors is approximate."
        return {"level": "check", "title": flag, "text": text, "action": "Compare their statistics with the others'."}
    level = "serious" if "nonfinite" in flag or "nan" in flag.split("_") else "check"
    text = "The method marked these tensors with this flag."
    return {"level": level, "title": flag, "text": text, "action": "Look at their statistics in the table of tensors."}


def describe_flags(rows: Sequence[TensorRow]) -> list[dict[str, Any]]:
    """Flags in plain words, the gravest and then the most frequent first, each with the names of its tensors."""
    names: dict[str, list[str]] = {}
    for row in rows:
        for flag in dict.fromkeys(row.flags):
            names.setdefault(flag, []).append(row.name)
    found = [{**explain_flag(flag), "flag": flag, "names": tensors} for flag, tensors in names.items()]
    return sorted(found, key=lambda one: (_LEVELS.index(one["level"]), -len(one["names"]), one["flag"]))


def judge(summary: RunSummary, rows: Sequence[TensorRow], codes: Sequence[str]) -> dict[str, Any]:
    """Level, headline and sentences that say first of all whether the result can be used, and where it lies."""
    flagged = Counter(level for row in rows for level in {explain_flag(flag)["level"] for flag in row.flags})
    sentences = list(_place_result([row for row in rows if row.rule in ("matrix", "method")] or rows, codes))
    if not rows:
        return {"level": "check", "headline": "No tensors were recorded.", "sentences": sentences}
    if flagged["serious"]:
        verb = "tensor is" if flagged["serious"] == 1 else "tensors are"
        headline = f"Do not use this as it is: {flagged['serious']} of {len(rows)} {verb} unsound."
        return {"level": "serious", "headline": headline, "sentences": sentences}
    if flagged["check"] or summary.warnings:
        count = flagged["check"]
        what = f"{count} of {len(rows)} tensors" if count else "a note on the run"
        verb = "is" if count <= 1 else "are"
        headline = f"Merged; {what} {verb} worth a look."
        return {"level": "check", "headline": headline, "sentences": sentences}
    headline = "Merged; nothing but harmless notes." if flagged["note"] else "Merged without a warning."
    return {"level": "good", "headline": headline, "sentences": sentences}


def _place_result(rows: Sequence[TensorRow], codes: Sequence[str]) -> Iterator[str]:
    """Sentences on where the result lies between its parents."""
    by_parent = [
        [v for row in rows if i < len(row.change) and (v := row.change[i]) is not None] for i in range(len(codes))
    ]
    if not codes or not all(by_parent):
        return
    medians = [median(values) for values in by_parent]
    parts = [f"{format_percent(value)} from {code}" for value, code in zip(medians, codes, strict=True)]
    yield f"The typical merged tensor differs by {join_words(parts)}."
    equal = [code for values, code in zip(by_parent, codes, strict=True) if not any(values)]
    nearest, farthest = min(medians), max(medians)
    if len(equal) == len(codes):
        yield "The parents are equal, and the result equals them."
    elif equal:
        yield f"The result equals {join_words(equal)}: nothing of the others went in."
    elif farthest > 2 * nearest:
        near, far = codes[medians.index(nearest)], codes[medians.index(farthest)]
        yield f"It lies much closer to {near} than to {far}."


def _draw_changes(rows: Sequence[TensorRow], axis: LayerAxis, parents: int) -> Iterator[tuple[str, Markup]]:
    """Per kind of module, relative change by layer with one line per parent."""
    if len(axis.locations) < 2:
        return
    kinds = {kind: _spread(rows, axis, kind, lambda row: dict(enumerate(row.change))) for kind in KIND_ORDER}
    shared = [v for kind in _SHARED_AXIS for line in kinds[kind].values() for vs in line.values() for v in vs]
    for i, (kind, found) in enumerate(kinds.items()):
        if found:
            limits = find_limits(shared) if kind in _SHARED_AXIS else None
            lines = [Line(parent, found[parent]) for parent in range(parents) if parent in found]
            label = f"{kind}: relative change against each parent, by layer"
            yield kind, draw_lines(f"change{i}", lines, axis, label=label, percent=True, limits=limits)


def _spread(rows: Sequence[TensorRow], axis: LayerAxis, kind: str, read) -> dict[Any, dict[int, list[float]]]:
    """Numbers that `read` finds in the rows of a kind: by what it calls them, then by position on the axis."""
    position = {place: i for i, place in enumerate(axis.locations)}
    found: dict[Any, dict[int, list[float]]] = {}
    for row in rows:
        if row.kind == kind and row.location is not None:
            for key, value in read(row).items():
                if isinstance(value, float):
                    found.setdefault(key, {}).setdefault(position[row.location], []).append(value)
    return found


def _stat_kinds(rows: Sequence[TensorRow]) -> list[str]:
    """Kinds of module that have statistics, in order: their place is their colour."""
    present = {row.kind for row in rows if row.location is not None and row.stats}
    return [kind for kind in KIND_ORDER if kind in present]


def _draw_stats(rows: Sequence[TensorRow], axis: LayerAxis) -> Iterator[tuple[str, Markup]]:
    """Per statistic, its value by layer with one line per kind of module."""
    if len(axis.locations) < 2:
        return
    by_kind = {kind: _spread(rows, axis, kind, lambda row: row.stats) for kind in _stat_kinds(rows)}
    notes = load_glossary()["stats"]
    present = order_stats({n for found in by_kind.values() for n in found if notes.get(n, {}).get("plot", True)})
    for i, name in enumerate(present[:_MAX_PANELS]):
        lines = [Line(style, found[name]) for style, found in enumerate(by_kind.values()) if name in found]
        note = notes.get(name, {})
        label = f"{note.get('title', name)} by layer, one line per kind of module"
        yield name, draw_lines(f"stat{i}", lines, axis, label=label, log=note.get("log", False))


def _draw_overlaps(rows: Sequence[TensorRow], axis: LayerAxis, codes: Sequence[str]) -> dict[str, Any] | None:
    """Heat maps of how much the models' subspaces coincide: the mean, by layer and pair, by layer and kind."""
    rows = [row for row in rows if len(row.overlap) > 1]
    if not rows:
        return None
    count = min(len(codes), max(len(row.overlap) for row in rows))
    mean = [[_overlap_of(rows, [(i, j)]) for j in range(count)] for i in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    shown = sorted(sorted(pairs, key=lambda p: -(mean[p[0]][p[1]] or 0.0))[:_MAX_PAIRS])
    placed = {place: [row for row in rows if row.location == place] for place in axis.locations}
    placed = {place: found for place, found in placed.items() if found}
    kinds = [kind for kind in KIND_ORDER if any(row.kind == kind for found in placed.values() for row in found)]
    by_pair = [[_overlap_of(found, [pair]) for pair in shown] for found in placed.values()]
    by_kind = [
        [_overlap_of([r for r in found if r.kind == kind], pairs) for kind in kinds] for found in placed.values()
    ]
    values = [mean[i][j] for i, j in pairs] + [value for line in by_pair + by_kind for value in line]
    largest = max((value for value in values if value is not None), default=1.0)
    highest = next((step for step in (0.05, 0.1, 0.2, 0.3, 0.5) if step >= largest), 1.0)
    names = codes[:count]
    maps = [("On average", draw_heat_map("mean", mean, names, names, label="Mean overlap", highest=highest))]
    if placed:
        layers, breaks = [str(place.layer) for place in placed], LayerAxis(tuple(placed)).breaks
        for name, values_of, columns in (
            ("pair of models", by_pair, [f"{codes[i]}\u2013{codes[j]}" for i, j in shown]),
            ("kind of module", by_kind, kinds),
        ):
            title = f"By layer and {name}"
            options: dict[str, Any] = {
                "label": title,
                "highest": highest,
                "breaks": breaks,
                "slanted": columns is kinds,
            }
            maps.append((title, draw_heat_map(name.split()[0], values_of, layers, columns, **options)))
    return {"highest": highest, "dropped": len(pairs) - len(shown), "maps": maps}


def _overlap_of(rows: Sequence[TensorRow], pairs: Sequence[tuple[int, int]]) -> float | None:
    """Mean overlap of some pairs of models in some tensors."""
    entries = (row.overlap[i][j] for row in rows for i, j in pairs if max(i, j) < len(row.overlap))
    return mean_present(list(entries))


def order_stats(names: set[str]) -> list[str]:
    """Statistics in the glossary's order, unknown ones behind by name."""
    known = list(load_glossary()["stats"])
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def tabulate(rows: Sequence[TensorRow], codes: Sequence[str]) -> dict[str, Any]:
    """Columns (title, format, whether shown at once) and cells of the table of tensors, for the page's script."""
    stats = order_stats({name for row in rows for name in row.stats})
    titles = load_glossary()["stats"]
    columns = [("Tensor", "name", True), ("Kind", "text", True), ("Layer", "number", True), ("Shape", "text", True)]
    columns += [("Rule", "text", True), *((f"vs {code}", "percent", True) for code in codes)]
    columns += [(titles.get(n, {}).get("title", n), "number", n in ("gw_cost", "lam", "rho", "scale")) for n in stats]
    columns += [("Warnings", "text", True), ("Method", "text", False), ("Settings", "text", False)]
    columns += [("Type", "text", False), ("Digest", "text", False)]
    layers = sorted({row.location for row in rows if row.location is not None}, key=order_location)
    deepest = {place: i for i, place in enumerate(layers)}
    cells = [
        [row.name, row.kind, row.location.layer if row.location else None, " × ".join(map(str, row.shape)), row.rule]
        + [_shorten(row.change[i]) if i < len(row.change) else None for i in range(len(codes))]
        + [_shorten(row.stats.get(name)) for name in stats]
        + [", ".join(row.flags), row.method, row.settings, row.dtype, row.digest]
        for row in sorted(rows, key=lambda row: deepest[row.location] if row.location else -1)
    ]
    return {"columns": columns, "rows": cells}


def _shorten(value: float | str | None) -> float | str | None:
    """Four significant digits, which is what the table shows."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def format_count(value: float | None) -> str:
    """Count in the thousands, millions or billions, three digits: 22.7 M."""
    return _format_scaled(value, (("", 1.0), ("k", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)))


def format_bytes(value: float | None) -> str:
    """Bytes in decimal units: 45.4 MB."""
    return _format_scaled(value, (("bytes", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)))


def _format_scaled(value: float | None, units: Sequence[tuple[str, float]]) -> str:
    if value is None:
        return "unknown"
    unit, size = next(((u, s) for u, s in reversed(units) if value >= 0.9995 * s), units[0])
    return f"{value / size:.3g} {unit}".strip()


def format_percent(value: float | None) -> str:
    """Share as a percentage of three digits."""
    if value is None:
        return "\u2013"
    return f"{float(f'{100 * value:.3g}'):g} %"


def join_words(words: Sequence[str]) -> str:
    """Words in a row with commas and an "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


@cache
def load_templates(escape_text: Callable[[Any], str] | None = None) -> jinja2.Environment:
    """The packaged templates; what is put into them is escaped by `escape_text`, or for HTML without one."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rgsp_jax.pipeline"),
        autoescape=escape_text is None,
        finalize=escape_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    formats = (format_count, format_bytes, format_percent, format_value)
    environment.filters.update({one.__name__.removeprefix("format_"): one for one in formats})
    environment.filters.update(mark_code=mark_code, breakable=break_name, marker=lambda i: _GLYPHS[i % len(_GLYPHS)])
    return environment


def make_encodable(text: str) -> str:
    """Text without the lone surrogates that stand in paths whose bytes are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def mark_code(text: str) -> Markup:
    """Escaped text whose parts between backticks are code."""
    parts = (escape(part) for part in text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def break_name(name: str) -> Markup:
    """Escaped name that may be broken behind its separators, so that narrow screens show it whole."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[./_])", name))
