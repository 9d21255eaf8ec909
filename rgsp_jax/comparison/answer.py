"""The verdict in words."""

from collections.abc import Sequence, Set
from itertools import combinations

from rgsp_jax.comparison.measure import TensorMeasures
from rgsp_jax.comparison.verdict import (
    MEASURED_RHO,
    MERGEABLE,
    WORDS,
    PairVerdict,
    Verdict,
    find_families,
    find_far,
    judge_pair,
    pool_rho,
    scale_at,
)
from rgsp_jax.pipeline.report import format_percent, join_words

NAMED = 4


def judge(
    codes: Sequence[str],
    tensors: Sequence[TensorMeasures],
    parameters: Sequence[int],
    differences: Sequence[tuple[int, int, str]],
) -> Verdict:
    """The verdict on all models.

    Args:
        codes: short names of the models.
        tensors: measures of all tensors.
        parameters: of every model, buffers left out.
        differences: what stands against merging: two models and a sentence.
    """
    count = len(codes)
    differing = {(i, j) for i, j, _ in differences}
    pairs = tuple(judge_pair(pair, tensors, parameters, pair in differing) for pair in combinations(range(count), 2))
    families = find_families(count, pairs)
    family = families[0]
    far = find_far(family, pairs)
    odd = tuple(i for i in range(count) if len(family) > 1 and i not in family) or (() if far is None else (far,))
    rho = pool_rho(tensors, count) if len(family) == count else None
    relations = {pair.relation for pair in pairs}
    sentences = [*describe_pairs(codes, pairs, families, far), *describe_flaws(codes, tensors, pairs, differences)]
    advice = list(advise(codes, pairs, families, rho, differences))
    mergeable = len(family) == count
    blocked = bool(differences) or any(not tensor.finite for tensor in tensors)
    level = "serious" if len(family) == 1 else "good"
    if level == "good" and (not mergeable or blocked or far is not None or any(p.exceptions for p in pairs)):
        level = "check"
    headline = write_headline(codes, relations, families, rho, pairs)
    return Verdict(level, headline, tuple(sentences), tuple(advice), pairs, families, odd, rho)  # type: ignore[arg-type]


def write_headline(
    codes: Sequence[str],
    relations: Set[str],
    families: Sequence[Sequence[int]],
    rho: float | None,
    pairs: Sequence[PairVerdict],
) -> str:
    """One sentence on all models."""
    family, names = families[0], "These models"
    if len(family) == len(codes):
        if relations == {"same"}:
            return "These are the same model: there is nothing to merge."
        if relations <= {"same", "rounded"}:
            return "These are the same model but for rounding: there is nothing to merge."
        apart = f", {rho:.2g} apart (rho)" if rho is not None else ""
        return f"{names} are siblings of one ancestor, in the same coordinates{apart}: they can be merged."
    if len(family) > 1:
        others = join_words([codes[i] for i in range(len(codes)) if i not in family])
        verb = "does" if len(codes) - len(family) == 1 else "do"
        inside = join_words([codes[i] for i in family])
        return f"{inside} can be merged with each other; {others} {verb} not belong to them."
    if relations == {"permuted"}:
        return f"{names} share their weights, but not the order of their neurons: align them before merging."
    if relations == {"architectures"}:
        return f"{names} are of different architectures: their weights cannot be merged."
    if relations == {"unrelated"}:
        return f"{names} are unrelated: their average would be noise."
    if relations == {"unknown"}:
        return f"{names} are too small to tell whether they share an ancestor."
    return "No two of these models can be merged as they are."


def describe_pairs(
    codes: Sequence[str], pairs: Sequence[PairVerdict], families: Sequence[Sequence[int]], far: int | None
) -> list[str]:
    """What was found, pair by pair where pairs differ."""
    sentences = []
    if len(pairs) == 1 or len({pair.relation for pair in pairs}) > 1:
        for pair in pairs:
            sentences.append(f"{name_pair(codes, pair)}: {WORDS[pair.relation]}{explain(pair)}.")
    else:
        shares = [pair.shared for pair in pairs if pair.shared is not None]
        if shares and pairs[0].relation in MERGEABLE:
            sentences.append(
                f"Every pair shares the coordinates of at least {format_percent(min(shares))} of what was tested."
            )
    if far is not None:
        sentences.append(f"{codes[far]} is the odd one out: far from all others, which are close to each other.")
    return sentences


def explain(pair: PairVerdict) -> str:
    """The evidence in half a sentence."""
    if pair.relation == "architectures":
        return f", {format_percent(pair.coverage)} of the parameters have a counterpart of equal name and shape"
    if pair.relation in ("same", "unknown") or pair.rho is None:
        return ""
    parts = [f"rho {pair.rho:.2g}"]
    if pair.shared is not None:
        parts.append(f"coordinates shared by {format_percent(pair.shared)} of what was tested")
    if pair.permuted:
        parts.append(f"permuted in {format_percent(pair.permuted)}")
    return ", " + ", ".join(parts)


def describe_flaws(
    codes: Sequence[str],
    tensors: Sequence[TensorMeasures],
    pairs: Sequence[PairVerdict],
    differences: Sequence[tuple[int, int, str]],
) -> list[str]:
    """Tensors that are not as the rest, values that are no numbers."""
    sentences = []
    for pair in pairs:
        if pair.exceptions and pair.relation == "siblings":
            sentences.append(f"{name_pair(codes, pair)} do not share the coordinates of {name_some(pair.exceptions)}.")
    broken = [tensor.name for tensor in tensors if not tensor.finite]
    if broken:
        sentences.append(f"Infinities or NaN in {name_some(broken)}: nothing can be said of these tensors.")
    if differences:
        count = len(differences)
        sentences.append(
            f"{count} difference{'s' if count > 1 else ''} between the architectures stand against a merge."
        )
    return sentences


def advise(
    codes: Sequence[str],
    pairs: Sequence[PairVerdict],
    families: Sequence[Sequence[int]],
    rho: float | None,
    differences: Sequence[tuple[int, int, str]],
) -> list[str]:
    """What to do, in order."""
    family = families[0]
    inside = [pair for pair in pairs if set(pair.models) <= set(family)]
    relations = {pair.relation for pair in pairs}
    advice = []
    if len(family) > 1 and {pair.relation for pair in inside} - {"same", "rounded"}:
        apart = [pair.rho for pair in inside if pair.rho is not None]
        largest = rho if rho is not None else max(apart, default=0.0)
        names = join_words([codes[i] for i in family])
        if len(family) == 2:
            advice.append(
                f"Merge {names} with `--method rgsp`, the default for two; it stays near their average, which is the"
                " row to beat."
            )
        else:
            advice.append(
                f"Merge {names} with `--method relative`, the default from three models on; at rho {largest:.2g} its"
                f" automatic scale is {scale_at(largest):.2g}."
            )
        if largest > MEASURED_RHO[1]:
            advice.append(
                f"They are farther apart than the models this was measured on (rho up to {MEASURED_RHO[1]:g}): score"
                " the merge against the plain average."
            )
        advice.append("Shared coordinates do not make tasks agree: where these contradict each other, no merge helps.")
    if "permuted" in relations:
        advice.append(
            "Align permuted models first (`rgsp_jax.merging.match_weights`, then `permute`), compare again, then merge."
        )
    if "unrelated" in relations:
        advice.append("Do not average unrelated models: choose one, or train a student on the answers of both.")
    if differences and len(family) > 1:
        advice.append(
            "Tensors that only some have, or in another shape, must be left out: `rgsp merge --exclude PATTERN`."
        )
    return advice


def name_pair(codes: Sequence[str], pair: PairVerdict) -> str:
    """ "A and B"."""
    return join_words([codes[i] for i in pair.models])


def name_some(names: Sequence[str]) -> str:
    """The first few names and how many there are besides."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
