"""What the numbers mean: for every pair of models, for all of them, and what to do about it.

No threshold here is tuned. Whether a matrix shares its coordinates is a test at a level (see `coordinates`); a pair is
what most of its tested parameters are, half being the only number that favours neither; and what independent models
would give is stated beside every number. For distances that is rho = 1: independent weights of mean zero have inner
products that vanish, so |A - B| = |A + B|.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import ml_dtypes
import numpy as np

from rgsp_jax.comparison.measure import PairMeasures, TensorMeasures, divide

Relation = Literal["same", "rounded", "siblings", "permuted", "unrelated", "architectures", "unknown"]
Level = Literal["good", "check", "serious"]
MERGEABLE: frozenset[str] = frozenset({"same", "rounded", "siblings"})
WORDS: Mapping[str, str] = {
    "same": "the same model",
    "rounded": "the same model but for rounding",
    "siblings": "siblings of one ancestor, in the same coordinates",
    "permuted": "one model or siblings, but with neurons in another order",
    "unrelated": "unrelated",
    "architectures": "of different architectures",
    "unknown": "too small to tell",
}
SHORT_WORDS: Mapping[str, str] = {
    "same": "the same",
    "rounded": "the same, rounded",
    "siblings": "siblings",
    "permuted": "permuted",
    "unrelated": "unrelated",
    "architectures": "architectures differ",
    "unknown": "too small to tell",
}
MEASURED_RHO = (0.0071, 0.097)
"""Between these, `relative` was measured."""
TESTED = ("shared", "permuted", "unlike")
FAR_FACTOR = 2
"""An odd one out among siblings is more than this many times as far from its nearest as the others are apart."""


@dataclass(frozen=True)
class PairVerdict:
    """How two models relate. Counts are of tensors, shares of parameters."""

    models: tuple[int, int]
    relation: Relation
    rho: float | None
    """`|A - B| / |A + B|` over all matrices together (SPEC.md section 3); 0 the same, 1 independent."""
    cosine: float | None
    overlap: float | None
    """Mean squared cosine between leading subspaces."""
    chance_overlap: float | None
    gw_cost: float | None
    sign_agreement: float | None
    coverage: float
    """Share of the smaller model's parameters that the other has in the same shape."""
    shared: float | None
    """Share of tested parameters whose coordinates are shared."""
    permuted: float | None
    states: Mapping[str, int] = field(default_factory=dict)
    exceptions: tuple[str, ...] = ()
    """Tensors that are not as the relation says."""


@dataclass(frozen=True)
class Verdict:
    """The answer."""

    level: Level
    headline: str
    sentences: tuple[str, ...]
    advice: tuple[str, ...]
    pairs: tuple[PairVerdict, ...]
    families: tuple[tuple[int, ...], ...]
    """Models that can be merged with each other, the largest family first."""
    odd: tuple[int, ...]
    """Models outside of the largest family, or far from the rest of it."""
    rho: float | None
    """Of all models (SPEC.md section 3), where all are of one family."""


def unit_roundoff(name: str) -> float:
    """Largest relative error of one rounding to a dtype: half the distance between neighbours."""
    return float(ml_dtypes.finfo(name).eps) / 2


def judge_pair(
    models: tuple[int, int], tensors: Sequence[TensorMeasures], parameters: Sequence[int], differences: bool
) -> PairVerdict:
    """The relation of two models from their tensors.

    Args:
        models: which two.
        tensors: measures of all.
        parameters: of every model, buffers left out.
        differences: True where their architectures differ in anything.
    """
    found = [(tensor, pair) for tensor in tensors for pair in tensor.pairs if pair.models == models]
    common = sum(tensor.size for tensor, _ in found)
    coverage = common / max(1, min(parameters[i] for i in models))
    # Embeddings often hold most parameters and come from elsewhere: layers decide, where there are any to test.
    layers = sum_states((t, p) for t, p in found if t.rule == "matrix")
    sizes = layers if any(layers[state] for state in TESTED) else sum_states(found)
    tested = sum(sizes[state] for state in TESTED)
    relation = relate(found, coverage, sizes, differences)
    matrices = [(t, p) for t, p in found if t.rule == "matrix"] or found
    sums = [(t.sums["differences"][k], t.sums["totals"][k]) for t, p in matrices for k in [t.pairs.index(p)]]
    distance, total = (np.sqrt(np.sum(x)) for x in zip(*sums, strict=True)) if sums else (np.nan, np.nan)
    states = Counter(state_of(pair) for _, pair in found)
    overlaps = [
        (p.left_overlap + p.right_overlap) / 2
        for _, p in found
        if p.left_overlap is not None and p.right_overlap is not None
    ]
    chances = [sum(t.chance_overlap) / 2 for t, p in found if t.chance_overlap and p.left_overlap is not None]
    normal = {"siblings": ("shared", "vector"), "permuted": ("permuted", "vector"), "unrelated": ("unlike", "vector")}
    usual = normal.get(relation)
    odd = [t.name for t, p in found if usual and state_of(p) not in (*usual, "untestable")]
    return PairVerdict(
        models=models,
        relation=relation,
        rho=divide(distance, total),
        cosine=mean_of([p.cosine for _, p in matrices]),
        overlap=mean_of(overlaps),
        chance_overlap=mean_of(chances),
        gw_cost=mean_of([p.gw_cost for _, p in found]),
        sign_agreement=mean_of([p.sign_agreement for _, p in matrices]),
        coverage=coverage,
        shared=divide(sizes["shared"], tested),
        permuted=divide(sizes["permuted"], tested),
        states=dict(states),
        exceptions=tuple(odd),
    )


def sum_states(found: Iterable[tuple[TensorMeasures, PairMeasures]]) -> Counter[str]:
    """Parameters by state."""
    sizes: Counter[str] = Counter()
    for tensor, pair in found:
        sizes[state_of(pair)] += tensor.size
    return sizes


def state_of(pair: PairMeasures) -> str:
    """Of one tensor: what the coordinates are; equal matrices share them, vectors do not tell."""
    if pair.coordinates is None:
        return "shared" if pair.equal else "vector"
    return pair.coordinates.state


def relate(
    found: Sequence[tuple[TensorMeasures, PairMeasures]],
    coverage: float,
    sizes: Mapping[str, int],
    differences: bool,
) -> Relation:
    """The relation that most of the tested parameters show; a single permuted matrix is enough to spoil a merge."""
    if coverage <= 0.5:
        return "architectures"
    if not differences and all(pair.equal for _, pair in found):
        return "same"
    if not differences and all(only_rounded(tensor, pair) for tensor, pair in found):
        return "rounded"
    tested = sum(sizes[state] for state in TESTED)
    if not tested:
        return "unknown"
    if 2 * (sizes["shared"] + sizes["permuted"]) <= tested:
        return "unrelated"
    return "permuted" if sizes["permuted"] else "siblings"


def only_rounded(tensor: TensorMeasures, pair: PairMeasures) -> bool:
    """True where two tensors of different dtypes differ by no more than the coarser one's rounding."""
    if pair.equal:
        return True
    dtypes = [tensor.dtypes[tensor.models.index(model)] for model in pair.models]
    if dtypes[0] == dtypes[1] or pair.relative_distance is None:
        return False
    return pair.relative_distance <= max(map(unit_roundoff, dtypes))


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of what is there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def find_families(count: int, pairs: Sequence[PairVerdict]) -> tuple[tuple[int, ...], ...]:
    """Models joined by pairs that can be merged, the largest family first."""
    family = list(range(count))
    for pair in pairs:
        if pair.relation in MERGEABLE:
            first, second = (family[i] for i in pair.models)
            family = [first if one == second else one for one in family]
    groups = [tuple(i for i in range(count) if family[i] == one) for one in dict.fromkeys(family)]
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def find_far(family: Sequence[int], pairs: Sequence[PairVerdict]) -> int | None:
    """The one sibling that stands apart from all others, which are close to each other; None where there is none."""
    if len(family) < 3:
        return None
    rho = {pair.models: pair.rho for pair in pairs}
    for one in family:
        rest = [i for i in family if i != one]
        among = [rho[pair] for pair in combinations(rest, 2)]
        apart = [rho[min(one, i), max(one, i)] for i in rest]
        if None in among or None in apart:
            continue
        if min(x for x in apart if x is not None) > FAR_FACTOR * max(x for x in among if x is not None):
            return one
    return None


def pool_rho(tensors: Sequence[TensorMeasures], count: int) -> float | None:
    """`mean_i |theta_i - mean| / |mean|` over the matrices that all models have, taken as one vector."""
    whole = [t for t in tensors if len(t.models) == count]
    chosen = [t for t in whole if t.rule == "matrix"] or whole
    if not chosen:
        return None
    departures = np.sqrt(sum(t.sums["departures"] for t in chosen))
    return divide(float(np.mean(departures)), float(np.sqrt(sum(t.sums["mean"] for t in chosen))))
