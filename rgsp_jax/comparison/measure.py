"""The numbers of one tensor in all models: distances, angles, transport cost, coordinates."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.comparison.coordinates import Finding, PairOrders, find_coordinates
from rgsp_jax.comparison.tensors import CommonTensor, MatrixStack, read_chunks, read_matrices, spread
from rgsp_jax.linalg import resolve_rank, truncated_svd
from rgsp_jax.rgsp import pair_svds, solve_pair
from rgsp_jax.similarity import SubspaceAngles, compare_subspaces, share_basis, sum_elements
from rgsp_jax.types import TruncatedSVD

RANK = 0.05
"""Directions of a matrix that are compared, as a fraction of min(m, n): `relative`'s default."""
MOST_DIRECTIONS = 64
"""`rgsp`'s default."""
MOST_SIDE = 1536
"""Of a longer axis only so many evenly spread places are factorised: a flat spectrum costs a full SVD."""
TOLERANCE = 1e-4
"""Residual of the singular triples: a report shows three digits."""


@dataclass(frozen=True)
class PairMeasures:
    """One tensor in two models."""

    models: tuple[int, int]
    relative_distance: float | None
    """`|A - B| / sqrt((|A|^2 + |B|^2) / 2)`: 0 equal, sqrt(2) independent."""
    rho: float | None
    """`|A - B| / |A + B|`, SPEC.md section 3 for these two: 0 equal, 1 independent."""
    cosine: float | None
    sign_agreement: float | None
    """Share of equal signs among elements that are zero in neither; 1/2 is chance."""
    equal: bool
    left_overlap: float | None = None
    right_overlap: float | None = None
    left_angles: tuple[float, float, float] | None = None
    """Smallest, median and largest principal angle of the leading subspaces of outputs, in degrees."""
    right_angles: tuple[float, float, float] | None = None
    gw_cost: float | None = None
    """Gromov-Wasserstein cost of the coupling that `rgsp` would merge these two by; in [0, 1]."""
    gw_converged: bool | None = None
    coordinates: Finding | None = None


@dataclass(frozen=True)
class TensorMeasures:
    """One tensor in all models that have it."""

    name: str
    rule: str
    shape: tuple[int, ...]
    size: int
    models: tuple[int, ...]
    dtypes: tuple[str, ...]
    finite: bool
    rho: float | None
    """Mean of |theta_i - mean| / |mean|, SPEC.md section 3."""
    departures: tuple[float | None, ...]
    """|theta_i - mean| / |mean| of every model."""
    sums: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    """Sums of squares to pool over tensors: `departures` [k], `mean` [], `differences` [p], `totals` |A + B|^2 [p]."""
    rank: int | None = None
    chance_overlap: tuple[float, float] | None = None
    """Left and right overlap of independent subspaces of this rank."""
    factorised: tuple[int, int] | None = None
    """Rows and columns, evenly spread, whose subspaces are compared."""
    partial: bool = False
    """Coordinates are of evenly spread places of one axis, for want of memory."""
    pairs: tuple[PairMeasures, ...] = ()

    def record(self) -> dict[str, Any]:
        """As a line of compare.jsonl."""
        record = asdict(replace(self, sums={}))
        del record["sums"]
        return record


_sum_elements = jax.jit(sum_elements)
_share_basis = jax.jit(share_basis)


@jax.jit
def _compare_factors(a: TruncatedSVD, b: TruncatedSVD) -> tuple[SubspaceAngles, Array, Array]:
    """Angles, and the cost that `rgsp` reports as gw_cost."""
    coupling = solve_pair(pair_svds(a, b)).coupling
    return compare_subspaces(a, b), coupling.cost, coupling.converged


def measure_tensor(
    checkpoints: Sequence[Checkpoint],
    tensor: CommonTensor,
    orders: dict[tuple[int, int], PairOrders],
    level: float,
    memory: int,
) -> TensorMeasures:
    """All numbers of a tensor.

    Args:
        checkpoints: of all models.
        tensor: what to compare.
        orders: permutations found so far, by pair of models; added to.
        level: probability of one test of the coordinates to be wrong about independently trained models.
        memory: bytes to take.
    """
    measures = measure_elements(checkpoints, tensor)
    if not measures.finite or tensor.view is None or all(pair.equal for pair in measures.pairs):
        return measures
    stacks = read_matrices(checkpoints, tensor, memory)
    found = [measure_matrices(tensor, stack, measures, orders, level) for stack in stacks]
    return combine_slices(found)


def find_again(
    checkpoints: Sequence[Checkpoint],
    tensor: CommonTensor,
    measures: TensorMeasures,
    orders: dict[tuple[int, int], PairOrders],
    level: float,
    memory: int,
) -> TensorMeasures:
    """The coordinates of pairs in `orders` that nothing was found for, now that more permutations are known."""
    found = []
    for stack in read_matrices(checkpoints, tensor, memory):
        found.append(replace(measures, pairs=tuple(find_pairs(stack, measures, orders, level))))
    return combine_slices(found) if found else measures


def find_pairs(
    stack: MatrixStack, measures: TensorMeasures, orders: dict[tuple[int, int], PairOrders], level: float
) -> Iterator[PairMeasures]:
    """Every pair of models with its coordinates."""
    place = {model: k for k, model in enumerate(measures.models)}
    for pair in measures.pairs:
        i, j = pair.models
        if pair.equal or pair.models not in orders or not (pair.coordinates is None or is_open(pair)):
            yield pair
            continue
        a, b = stack.matrices[place[i]], stack.matrices[place[j]]
        finding = find_coordinates(a, b, orders[pair.models], level, stack.partial_axis)
        yield replace(pair, coordinates=finding)


def is_open(pair: PairMeasures) -> bool:
    """True where the matrices could be tested and nothing was found."""
    return pair.coordinates is not None and pair.coordinates.state == "unlike"


def measure_matrices(
    tensor: CommonTensor,
    stack: MatrixStack,
    measures: TensorMeasures,
    orders: dict[tuple[int, int], PairOrders],
    level: float,
) -> TensorMeasures:
    """Coordinates of one matrix of the tensor, and of what is multiplied, angles and transport cost."""
    pairs = list(find_pairs(stack, measures, orders, level))
    partial = stack.partial_axis is not None
    if tensor.rule.kind != "matrix":
        return replace(measures, pairs=tuple(pairs), partial=partial)
    places = np.ix_(*(spread(side, MOST_SIDE) for side in stack.matrices[0].shape))
    matrices = [x[places] if max(x.shape) > MOST_SIDE else x for x in stack.matrices]
    m, n = matrices[0].shape
    rank = min(resolve_rank(RANK, m, n), MOST_DIRECTIONS)
    svds = [factorise(x, rank) for x in matrices]
    place = {model: k for k, model in enumerate(measures.models)}
    for p, pair in enumerate(pairs):
        a, b = (svds[place[model]] for model in pair.models)
        # Neither angles nor costs see which basis the factors are written in; in a small one, matrices of all shapes
        # share one compilation.
        angles, cost, converged = _compare_factors(*_share_basis(a, b))
        pairs[p] = replace(
            pair,
            left_overlap=float(angles.left_overlap),
            right_overlap=float(angles.right_overlap),
            left_angles=describe_angles(angles.left),
            right_angles=describe_angles(angles.right),
            gw_cost=float(cost),
            gw_converged=bool(converged),
        )
    chance = (rank / m, rank / n)
    return replace(measures, pairs=tuple(pairs), partial=partial, rank=rank, chance_overlap=chance, factorised=(m, n))


def factorise(w: np.ndarray, rank: int) -> TruncatedSVD:
    """Leading singular triples; wide matrices are turned, so that both shapes of an MLP share one compilation."""
    turned = w.shape[0] < w.shape[1]
    tall = jnp.asarray(np.ascontiguousarray(w.T) if turned else w)
    svd = truncated_svd(tall, rank, tolerance=TOLERANCE)
    return svd._replace(u=svd.v, v=svd.u) if turned else svd


def describe_angles(angles: Array) -> tuple[float, float, float]:
    """Smallest, median and largest, in degrees."""
    degrees = np.rad2deg(np.asarray(angles, np.float64))
    return float(degrees.min()), float(np.median(degrees)), float(degrees.max())


MEANS = ("left_overlap", "right_overlap", "gw_cost")


def combine_slices(slices: Sequence[TensorMeasures]) -> TensorMeasures:
    """A stack of experts as one tensor: overlaps and costs averaged, angles and coordinates of the worst slice."""
    if len(slices) == 1:
        return slices[0]
    pairs = []
    for versions in zip(*(one.pairs for one in slices), strict=True):
        worst = max(versions, key=lambda pair: pair.left_angles[1] if pair.left_angles else 0.0)
        findings = [pair.coordinates for pair in versions if pair.coordinates is not None]
        values = {name: [getattr(pair, name) for pair in versions] for name in MEANS}
        pairs.append(
            replace(
                worst,
                **{name: float(np.mean(x)) if None not in x else None for name, x in values.items()},
                gw_converged=all(pair.gw_converged is not False for pair in versions)
                if worst.gw_converged is not None
                else None,
                coordinates=min(findings, key=lambda one: one.found / max(one.tested, 1)) if findings else None,
            )
        )
    return replace(slices[0], pairs=tuple(pairs))


def measure_elements(checkpoints: Sequence[Checkpoint], tensor: CommonTensor) -> TensorMeasures:
    """Distances, cosines and sign agreements, from all elements."""
    totals: list[np.ndarray] = []
    for chunk in read_chunks(checkpoints, tensor):
        sums = [np.asarray(x, np.float64).sum(-1) for x in _sum_elements(chunk)]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    squares, mean_square, departed, differences, products, unequal, same, signed = totals
    finite = bool(np.isfinite(squares).all() and np.isfinite(differences).all())
    relative = [divide(np.sqrt(x), np.sqrt(mean_square)) for x in departed] if finite else [None] * len(squares)
    known = [x for x in relative if x is not None]
    pairs, added = [], np.zeros_like(products)
    for p, (i, j) in enumerate(combinations(range(len(tensor.models)), 2)):
        size = squares[i] + squares[j]
        added[p] = total = max(size + 2 * products[p], 0.0)
        pairs.append(
            PairMeasures(
                models=(tensor.models[i], tensor.models[j]),
                relative_distance=divide(np.sqrt(differences[p]), np.sqrt(size / 2)),
                rho=divide(np.sqrt(differences[p]), np.sqrt(total)),
                cosine=divide(products[p], np.sqrt(squares[i] * squares[j])),
                sign_agreement=divide(same[p], signed[p]),
                equal=not unequal[p],
            )
        )
    return TensorMeasures(
        name=tensor.name,
        rule=tensor.rule.kind,
        shape=tensor.shape,
        size=tensor.size,
        models=tensor.models,
        dtypes=tensor.dtypes,
        finite=finite,
        rho=sum(known) / len(known) if known else None,
        departures=tuple(relative),
        sums={"departures": departed, "mean": mean_square, "differences": differences, "totals": added},
        pairs=tuple(pairs),
    )


def divide(a: float, b: float) -> float | None:
    """a / b; None where that is no number."""
    return float(a / b) if b > 0 and np.isfinite(a) and np.isfinite(b) else None
