"""The verdict in words."""

from collections.abc import Iterator, Sequence, Set
from itertools import combinations

from rgsp_jax.comparison.measure import TensorMeasures
from rgsp_jax.comparison.verdict import (
    MEASURED_RHO,
    WORDS,
    Level,
    PairVerdict,
    Relation,
    Verdict,
    find_families,
    find_far,
    judge_pair,
    pool_rho,
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
    largest = len(family) > max(map(len, families[1:]), default=1)
    odd = tuple(i for i in range(count) if largest and i not in family) or (() if far is None else (far,))
    rho = pool_rho(tensors, count) if len(family) == count else None
    relations = {pair.relation for pair in pairs}
    sentences = [*describe_pairs(codes, pairs, far), *describe_flaws(codes, tensors, pairs, differences)]
    advice = list(advise(codes, pairs, families, rho, differences))
    mergeable = len(family) == count
    blocked = bool(differences) or any(not tensor.finite for tensor in tensors)
    level: Level = "serious" if len(family) == 1 else "good"
    if level == "good" and (not mergeable or blocked or far is not None or any(p.exceptions for p in pairs)):
        level = "check"
    headline = write_headline(codes, relations, families, rho, bool(differences))
    return Verdict(level, headline, tuple(sentences), tuple(advice), pairs, families, odd, rho)


def write_headline(
    codes: Sequence[str],
    relations: Set[str],
    families: Sequence[Sequence[int]],
    rho: float | None,
    blocked: bool,
) -> str:
    """One sentence on all models."""
    family, names = families[0], "These models"
    if len(family) == len(codes):
        if relations == {"same"}:
            return "These are the same model: there is nothing to merge."
        if relations <= {"same", "rounded"}:
            return "These are the same model but for rounding: there is nothing to merge."
        apart = f", {rho:.2g} apart (rho)" if rho is not None else ""
        what = "what they have in common can be merged" if blocked else "they can be merged"
        return f"{names} are siblings of one ancestor, in the same coordinates{apart}: {what}."
    if len(family) > 1:
        inside, *more = (join_words([codes[i] for i in one]) for one in families if len(one) > 1)
        others = [codes[one[0]] for one in families if len(one) == 1]
        text = f"{inside} can be merged with each other" + "".join(f", and so can {names}" for names in more)
        if others:
            text += f"; {join_words(sorted(others))} {'belong' if len(others) > 1 else 'belongs'} to none of them"
        return text + "."
    if relations == {"permuted"}:
        return f"{names} share their weights, but not the order of their neurons: align them before merging."
    if relations == {"architectures"}:
        return f"{names} are of different architectures: their weights cannot be merged."
    if relations == {"unrelated"}:
        return f"{names} are unrelated: their average would be noise."
    if relations == {"unknown"}:
        return f"{names} are too small to tell whether they share an ancestor."
    return "No two of these models can be merged as they are."


def describe_pairs(codes: Sequence[str], pairs: Sequence[PairVerdict], far: int | None) -> list[str]:
    """What was found: a sentence on each relation, with the pairs that have it."""
    groups: dict[Relation, list[PairVerdict]] = {}
    for pair in pairs:
        groups.setdefault(pair.relation, []).append(pair)
    sentences = []
    for relation in sorted(groups, key=list(WORDS).index):
        group = groups[relation]
        names = join_words([f"{codes[i]}\u2013{codes[j]}" for i, j in (pair.models for pair in group)])
        names = "All pairs" if len(group) == len(pairs) > 1 else names
        sentences.append(f"{names}: {WORDS[relation]}{explain(group)}.")
    if far is not None:
        sentences.append(f"{codes[far]} is the odd one out: far from all others, which are close to each other.")
    return sentences


def explain(group: Sequence[PairVerdict]) -> str:
    """The evidence for a relation in half a sentence, over the pairs that have it."""
    relation = group[0].relation
    if relation == "architectures":
        coverage = describe_share(max(pair.coverage for pair in group), "at most")
        return f", {coverage} of the parameters have a counterpart of equal name and shape"
    if relation in ("same", "unknown"):
        return ""
    parts = []
    rho = [pair.rho for pair in group if pair.rho is not None]
    if rho:
        low, high = f"{min(rho):.2g}", f"{max(rho):.2g}"
        parts.append(f"rho {low}" if low == high else f"rho {low} to {high}")
    shared = [pair.shared for pair in group if pair.shared is not None]
    permuted = [pair.permuted for pair in group if pair.permuted is not None]
    if relation == "siblings" and shared:
        parts.append(f"coordinates shared in {describe_share(min(shared), 'at least')} of what was tested")
    if relation == "permuted" and permuted:
        parts.append(f"neurons permuted in {describe_share(min(permuted), 'at least')} of what was tested")
    if relation == "unrelated" and shared:
        related = max(a + b for a, b in zip(shared, permuted, strict=True))
        parts.append(f"coordinates shared or permuted in {describe_share(related, 'at most')} of what was tested")
    return ", " + ", ".join(parts) if parts else ""


def describe_share(share: float, bound: str) -> str:
    """A bound on a share; all and none need no bound."""
    return {0.0: "none", 1.0: "all"}.get(share, f"{bound} {format_percent(share)}")


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
    relations = {pair.relation for pair in pairs}
    advice = [sentence for family in families for sentence in advise_family(codes, pairs, family, rho)]
    if advice:
        advice.append("Shared coordinates do not make tasks agree: where these contradict each other, no merge helps.")
    if "permuted" in relations:
        advice.append(
            "Align permuted models first (`rgsp align` for heads and MLP units in another order; for a residual stream "
            "in another order `rgsp_jax.merging.match_weights`, then `permute`), compare again, then merge."
        )
    if "unrelated" in relations:
        advice.append("Do not average unrelated models: choose one, or train a student on the answers of both.")
    if differences and len(families[0]) > 1:
        advice.append(
            "Tensors that only some have, or in another shape, must be left out: `rgsp merge --exclude PATTERN`."
        )
    return advice


def advise_family(
    codes: Sequence[str], pairs: Sequence[PairVerdict], family: Sequence[int], rho: float | None
) -> Iterator[str]:
    """How to merge models that can be; nothing for copies."""
    inside = [pair for pair in pairs if set(pair.models) <= set(family)]
    if not {pair.relation for pair in inside} - {"same", "rounded"}:
        return
    largest = rho if rho is not None else max((pair.rho for pair in inside if pair.rho is not None), default=0.0)
    names = join_words([codes[i] for i in family])
    if len(family) == 2:
        yield (
            f"Merge {names} with `--method rgsp`, the default for two; it stays near their average, which is the row to"
            " beat."
        )
    else:
        yield f"Merge {names} with `--method relative`, the default from three models on."
    if largest > MEASURED_RHO[1]:
        yield (
            f"{names} are farther apart than the models this was measured on (rho up to {MEASURED_RHO[1]:g}): score the"
            " merge against the plain average."
        )


def name_pair(codes: Sequence[str], pair: PairVerdict) -> str:
    """ "A and B"."""
    return join_words([codes[i] for i in pair.models])


def name_some(names: Sequence[str]) -> str:
    """The first few names and how many there are besides."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
