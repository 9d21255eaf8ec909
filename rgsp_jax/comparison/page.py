"""compare.html: a comparison in, one self-contained page out in the report's dress."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from rgsp_jax.comparison.compare import LEVEL, Comparison
from rgsp_jax.comparison.coordinates import needed_coincidences
from rgsp_jax.comparison.measure import MOST_DIRECTIONS, MOST_SIDE, RANK, PairMeasures
from rgsp_jax.comparison.verdict import SHORT_WORDS, mean_of
from rgsp_jax.pipeline.plots import Line, draw_heat_map, draw_lines, find_limits
from rgsp_jax.pipeline.report import load_templates, make_encodable
from rgsp_jax.pipeline.tensor_rows import (
    KIND_ORDER,
    LayerAxis,
    Location,
    locate,
    name_module_kind,
    order_location,
    order_naturally,
)

MOST_LINES = 8
"""Pairs drawn in one panel; the least alike are drawn."""
LAYER_KINDS = frozenset(KIND_ORDER[: KIND_ORDER.index("Embedding")])
ReadPair = Callable[[PairMeasures], float | None]


def read_agreement(pair: PairMeasures) -> float | None:
    """As they lie; equal matrices agree in full."""
    if pair.coordinates is None:
        return 1.0 if pair.equal else None
    return pair.coordinates.agreement


def read_matched(pair: PairMeasures) -> float | None:
    """After matching."""
    if pair.coordinates is None:
        return 1.0 if pair.equal else None
    return pair.coordinates.matched


def read_left(pair: PairMeasures) -> float | None:
    """Overlap of the spaces of outputs."""
    return 1.0 if pair.equal and pair.left_overlap is None else pair.left_overlap


def read_right(pair: PairMeasures) -> float | None:
    """Overlap of the spaces of inputs."""
    return 1.0 if pair.equal and pair.right_overlap is None else pair.right_overlap


PANELS: tuple[tuple[str, str, str, ReadPair], ...] = (
    ("left", "Shared leading directions, outputs", "Mean squared cosine of the principal angles.", read_left),
    ("right", "Shared leading directions, inputs", "The same on the side of the inputs.", read_right),
    ("signs", "Equal signs", "Share of the elements with one sign in both; 0.5 is chance.", lambda p: p.sign_agreement),
    ("gw", "Transport cost", "Gromov-Wasserstein cost of the coupling `rgsp` would merge by.", lambda p: p.gw_cost),
)


def render_page(comparison: Comparison) -> str:
    """The page of a comparison: nothing fetched, the same bytes every time."""
    axis = LayerAxis.of(locate(tensor.name) for tensor in comparison.tensors)
    drawn = choose_pairs(comparison)
    view = {
        "comparison": comparison,
        "verdict": comparison.verdict,
        "words": SHORT_WORDS,
        "axis": axis,
        "drawn": drawn,
        "names": ["\u2013".join(comparison.codes[i] for i in pair.models) for pair in comparison.verdict.pairs],
        "distances": draw_distances(comparison, axis),
        "coordinates": draw_coordinates(comparison),
        "panels": draw_panels(comparison, axis, [comparison.verdict.pairs[p].models for p in drawn]),
        "maps": draw_model_maps(comparison),
        "needed": needed_coincidences(comparison.level),
        "level": LEVEL,
        "rank_share": RANK,
        "most_directions": MOST_DIRECTIONS,
        "most_side": MOST_SIDE,
        "table": tabulate(comparison),
        "rules": sorted({tensor.rule for tensor in comparison.tensors}),
        "partial": sum(tensor.partial for tensor in comparison.tensors),
    }
    return make_encodable(load_templates().get_template("compare.html.j2").render(view))


def choose_pairs(comparison: Comparison) -> list[int]:
    """Indices of the pairs to draw, in order."""
    pairs = comparison.verdict.pairs
    cosines = [pair.cosine if pair.cosine is not None else -1.0 for pair in pairs]
    by_cosine = sorted(range(len(pairs)), key=cosines.__getitem__)
    return sorted(by_cosine[:MOST_LINES])


def draw_distances(comparison: Comparison, axis: LayerAxis) -> list[tuple[str, Markup]]:
    """Per kind of module, the distance of every model from the mean by layer."""
    if len(axis.locations) < 2:
        return []
    position = {place: i for i, place in enumerate(axis.locations)}
    kinds: dict[str, dict[int, dict[int, list[float]]]] = {}
    for tensor in comparison.tensors:
        place = locate(tensor.name)
        if place is None:
            continue
        lines = kinds.setdefault(name_module_kind(tensor.name, tensor.shape), {})
        for model, value in zip(tensor.models, tensor.departures, strict=True):
            if value is not None:
                lines.setdefault(model, {}).setdefault(position[place], []).append(value)
    present = [kind for kind in KIND_ORDER if kinds.get(kind)]
    shared = [
        v
        for kind in present
        if kind in LAYER_KINDS
        for line in kinds[kind].values()
        for vs in line.values()
        for v in vs
    ]
    panels = []
    for i, kind in enumerate(present):
        lines_of = [Line(model, values) for model, values in sorted(kinds[kind].items())]
        limits = find_limits(shared) if kind in LAYER_KINDS else None
        label = f"{kind}: distance from the mean of the models, by layer"
        panels.append((kind, draw_lines(f"distance{i}", lines_of, axis, label=label, percent=True, limits=limits)))
    return panels


def draw_coordinates(comparison: Comparison) -> list[list[tuple[str, Markup]]]:
    """Heat maps by layer and kind, of one pair of every relation: agreement of rows as they lie and after matching."""
    maps: list[list[tuple[str, Markup]]] = []
    for p in choose_examples(comparison):
        models = comparison.verdict.pairs[p].models
        found: dict[tuple[Location, str], list[PairMeasures]] = {}
        for tensor in comparison.tensors:
            place = locate(tensor.name)
            for pair in tensor.pairs:
                if place is not None and tensor.rule == "matrix" and pair.models == models:
                    found.setdefault((place, name_module_kind(tensor.name, tensor.shape)), []).append(pair)
        places = sorted({place for place, _ in found}, key=order_location)
        kinds = [kind for kind in KIND_ORDER if any(kind == one for _, one in found)]
        if not found:
            continue
        pair_name = "\u2013".join(comparison.codes[i] for i in models)
        maps.append([])
        for name, title, read in (("lie", "as they lie", read_agreement), ("matched", "after matching", read_matched)):
            values = [[lowest(found.get((place, kind), ()), read) for kind in kinds] for place in places]
            picture = draw_heat_map(
                f"{name}{p}",
                values,
                [str(place.layer) for place in places],
                kinds,
                label=f"{pair_name}: agreement of rows by layer and kind of module, {title}",
                highest=1.0,
                breaks=LayerAxis(tuple(places)).breaks,
                slanted=True,
            )
            maps[-1].append((f"{pair_name} {title}", picture))
    return maps


def choose_examples(comparison: Comparison) -> list[int]:
    """Indices of pairs: of every relation the pair that is least alike."""
    found: dict[str, int] = {}
    pairs = comparison.verdict.pairs
    for p, pair in enumerate(pairs):
        best = found.setdefault(pair.relation, p)
        if (pair.rho or 0.0) > (pairs[best].rho or 0.0):
            found[pair.relation] = p
    return list(found.values())


def lowest(pairs: Sequence[PairMeasures], read: ReadPair) -> float | None:
    """Of all tensors of a kind in a layer, the lowest number."""
    values = [value for pair in pairs if (value := read(pair)) is not None]
    return max(0.0, min(values)) if values else None


def draw_panels(
    comparison: Comparison, axis: LayerAxis, pairs: Sequence[tuple[int, int]]
) -> list[tuple[str, str, Markup]]:
    """One panel per number of a pair, by layer, one line per pair."""
    if len(axis.locations) < 2:
        return []
    position = {place: i for i, place in enumerate(axis.locations)}
    panels = []
    for name, title, note, read in PANELS:
        lines: dict[int, dict[int, list[float]]] = {}
        for tensor in comparison.tensors:
            place = locate(tensor.name)
            if place is None or tensor.rule != "matrix":
                continue
            for pair in tensor.pairs:
                value = read(pair)
                if value is not None and pair.models in pairs:
                    lines.setdefault(pairs.index(pair.models), {}).setdefault(position[place], []).append(value)
        if lines:
            drawn = [Line(style, values) for style, values in sorted(lines.items())]
            limits = None if name == "gw" else (0.0, 1.05)
            panels.append((title, note, draw_lines(name, drawn, axis, label=f"{title} by layer", limits=limits)))
    return panels


def draw_model_maps(comparison: Comparison) -> list[tuple[str, Markup]]:
    """Model against model, where there are more than two."""
    count, codes = len(comparison.codes), comparison.codes
    if count < 3:
        return []
    maps = []
    numbers = (
        ("shared", "Coordinates shared", lambda pair: pair.shared),
        ("related", "Shared or permuted", lambda pair: None if pair.shared is None else pair.shared + pair.permuted),
        ("overlap", "Leading directions shared", lambda pair: pair.overlap),
    )
    for name, title, read in numbers:
        values: list[list[float | None]] = [[1.0 if i == j else None for j in range(count)] for i in range(count)]
        for pair in comparison.verdict.pairs:
            i, j = pair.models
            values[i][j] = values[j][i] = read(pair)
        maps.append((title, draw_heat_map(f"models-{name}", values, codes, codes, label=title, highest=1.0)))
    return maps


def tabulate(comparison: Comparison) -> dict[str, Any]:
    """Columns (title, format, whether shown at once) and cells of the table of tensors, for the page's script."""
    numbers: tuple[tuple[str, ReadPair, bool], ...] = (
        ("cosine", lambda p: p.cosine, True),
        ("equal signs", lambda p: p.sign_agreement, True),
        ("overlap, outputs", read_left, True),
        ("overlap, inputs", read_right, True),
        ("median angle, outputs", lambda p: p.left_angles[1] if p.left_angles else None, False),
        ("median angle, inputs", lambda p: p.right_angles[1] if p.right_angles else None, False),
        ("transport cost", lambda p: p.gw_cost, True),
        ("rows agree", read_agreement, True),
        ("after matching", read_matched, True),
    )
    columns = [("Tensor", "name", True), ("Kind", "text", True), ("Layer", "number", True), ("Shape", "text", True)]
    columns += [("Rule", "text", False), ("rho", "number", True)]
    columns += [(title, "number", shown) for title, _, shown in numbers]
    columns += [("Coordinates", "text", True), ("Warnings", "text", False), ("Models", "text", False)]
    odd = {name for pair in comparison.verdict.pairs for name in pair.exceptions}
    rows = []
    for tensor in sorted(comparison.tensors, key=lambda tensor: order_naturally(tensor.name)):
        place = locate(tensor.name)
        states = sorted(
            {p.coordinates.state for p in tensor.pairs if p.coordinates} | {"equal" for p in tensor.pairs if p.equal}
        )
        warnings = ["not finite"] * (not tensor.finite) + ["exception"] * (tensor.name in odd)
        rows.append(
            [tensor.name, name_module_kind(tensor.name, tensor.shape), place.layer if place else None]
            + [" × ".join(map(str, tensor.shape)), tensor.rule, shorten(tensor.rho)]
            + [shorten(mean_of([read(pair) for pair in tensor.pairs])) for _, read, _ in numbers]
            + [", ".join(states), ", ".join(warnings), "".join(comparison.codes[i] for i in tensor.models)]
        )
    return {"columns": columns, "rows": rows}


def shorten(value: float | None) -> float | None:
    """Four significant digits, which is what the table shows."""
    return None if value is None else float(f"{value:.4g}")
