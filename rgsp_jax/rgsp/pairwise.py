"""RGSP-TEFM of two matrices: the six steps composed, literally (`rgsp_seed`) and as a well-posed reading (`rgsp`).

Both are one function of the same settings; `rgsp` with the literal value of every keyword is `rgsp_seed`.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.method import ActiveRank, Hyperparameter, Rank, Stages, choice, switch
from rgsp_jax.rgsp.alignment import OVERLAPS, PRECISION, active_mask, decompose, dynamic_map, pair_signs, unstack
from rgsp_jax.rgsp.encoding import Encoding, adjust_coupling, encode, importance, overlap_score
from rgsp_jax.rgsp.fusion import fuse, fusion_coefficient, project
from rgsp_jax.rgsp.stats import mask_svd, svd_stats
from rgsp_jax.transport import gromov_wasserstein, normalize_jointly, share_by_row, squared_distances
from rgsp_jax.types import Coupling, MergeOutput, TruncatedSVD

Projection = Annotated[str, choice("tau = U dS U^T on square matrices, or U dS V^T always", "one_sided", "two_sided")]
Beta = Annotated[Any, Hyperparameter("decay of TOS with the transport cost; cancels in R5", low=0)]
Epsilon = Annotated[Any, Hyperparameter("entropy of the Gromov-Wasserstein plan", low=0, exclusive_low=True)]
Learned = Annotated[Any, Hyperparameter("learnable r x r matrix applied to a left subspace; null is I", optional=True)]
Overlap = Annotated[str, choice("logits from both singular vectors, or the left ones alone", "two_sided", "one_sided")]
Temperature = Annotated[
    Any, Hyperparameter("of the dynamic map; null is the source's sqrt(r)", low=0, exclusive_low=True, optional=True)
]
AlignSigns = Annotated[bool, switch("turn every pair of B towards the pair of A it is mixed into")]
Geometry = Annotated[
    str, choice("points s_i u_i, or the source's u_i, whose distances are all equal", "spectral", "orthonormal")
]
FusedPenalty = Annotated[Any, Hyperparameter("weight of the linear cost 1 - |overlap| in the transport", low=0)]
Spectrum = Annotated[str, choice("p and s from dS / mean(S_A, S_B), or from dS", "relative", "absolute")]
TotalImportance = Annotated[str, choice("TFI summed, or averaged as in the source", "sum", "mean")]
Symmetric = Annotated[bool, switch("average the two orders of A and B, so that their order does not matter")]
RestTerm = Annotated[bool, switch("add the source's order-dependent (1 - lambda)((B - A) - tau)")]


class PairParts(NamedTuple):
    """What every setting of a pairwise merge starts from: the SVDs, and how their singular vectors overlap."""

    a: TruncatedSVD
    b: TruncatedSVD
    left: Float[Array, "r r"]
    """`U_A^T U_B`."""
    right: Float[Array, "r r"]
    """`V_A^T V_B`."""

    def swap(self) -> "PairParts":
        """The same with B first."""
        return PairParts(self.b, self.a, self.left.T, self.right.T)


class PairCoupling(NamedTuple):
    """Steps 2 and 3 of SPEC.md section 1: the dynamic map and the transport, which beta plays no part in."""

    m: Float[Array, "r r"]
    mixing: Float[Array, "r r"]
    """M with B's pairs turned towards those of A: `U_B' = U_B mixing^T`."""
    cost_a: Float[Array, "r r"]
    cost_b: Float[Array, "r r"]
    coupling: Coupling


class PairTrace(NamedTuple):
    """Every intermediate of the six steps but tau, in the names of SPEC.md section 1."""

    m: Float[Array, "r r"]
    mixing: Float[Array, "r r"]
    """M with B's pairs turned towards those of A: `U_B' = U_B mixing^T`."""
    cost_a: Float[Array, "r r"]
    cost_b: Float[Array, "r r"]
    coupling: Coupling
    delta_s_raw: Float[Array, "r"]
    code: Encoding
    tfi: Float[Array, "r"]
    tos: Float[Array, "r r"]
    adjusted_coupling: Float[Array, "r r"]
    delta_s: Float[Array, "r"]
    lam: Float[Array, ""]


def prepare_pair(stack: Float[Array, "2 m n"], rank: int | float, active_rank: Array | int | None = None) -> PairParts:
    """Step 1 of SPEC.md section 1: what is left to do afterwards takes r x r matrices only, and two products."""
    return pair_svds(*unstack(decompose(stack, rank, active_rank)))


def pair_svds(a: TruncatedSVD, b: TruncatedSVD) -> PairParts:
    """Two SVDs of equal shapes and rank with their overlaps."""
    return PairParts(a, b, *(jnp.matmul(x.T, y, precision=PRECISION) for x, y in ((a.u, b.u), (a.v, b.v))))


def couple_pair(
    parts: PairParts,
    active_rank: Array | int | None = None,
    epsilon: Array | float = 0.05,
    overlap: str = "two_sided",
    temperature: Array | float | None = 0.05,
    align_signs: bool = True,
    geometry: str = "spectral",
    fused_penalty: Array | float = 0.0,
    mapped: bool = True,
    w_q: Float[Array, "r r"] | None = None,
    w_k: Float[Array, "r r"] | None = None,
    plan: Float[Array, "r r"] | None = None,
) -> PairCoupling:
    """Steps 2 and 3 of SPEC.md section 1; nearly all that a merge costs behind its SVDs.

    Args:
        parts: of A and B at rank r.
        active_rank: run-time rank; the result equals that of SVDs truncated there.
        mapped: False replaces the dynamic map by the identity.
        plan: a coupling [r, r] to use in place of the solver's (it stays in the record as given).
        others: see `rgsp`.
    """
    dtype, rank = parts.a.s.dtype, parts.a.s.shape[0]
    active = active_mask(rank, active_rank)
    both = active[:, None] & active[None, :]
    count = jnp.sum(active).astype(dtype)
    s_a, s_b = (jnp.where(active, x.s, 0) for x in (parts.a, parts.b))
    overlaps = OVERLAPS[overlap](parts.left, parts.right, w_q, w_k)
    if mapped:
        m = dynamic_map(overlaps, jnp.sqrt(count) if temperature is None else jnp.asarray(temperature, dtype), active)
    else:
        m = jnp.diag(active.astype(dtype))
    mixing = m * pair_signs(parts.left, parts.right) if align_signs else m
    # Coordinates in the models' own singular vectors, which are orthonormal: distances need no vector of length m.
    # Those of mixed points must not see the signs: A's would turn a point of B against its neighbours.
    points_a, points_b = (jnp.diag(find_lengths(x, s, geometry)) for x, s in ((parts.a, s_a), (parts.b, s_b)))
    points_b = jnp.matmul(points_b, m.T, precision=PRECISION)
    cost_a, cost_b = normalize_jointly(
        *(jnp.where(both, squared_distances(points), 0.0) for points in (points_a, points_b))
    )
    marginal = active.astype(dtype) / count
    linear_cost = jnp.where(both, 1 - jnp.abs(overlaps), 0.0)
    if plan is None:
        coupling = gromov_wasserstein(
            cost_a,
            cost_b,
            marginal,
            marginal,
            epsilon=jnp.asarray(epsilon, dtype),
            linear_cost=linear_cost,
            fused_penalty=jnp.asarray(fused_penalty, dtype),
        )
    else:
        zero = jnp.zeros((), dtype)
        coupling = Coupling(plan, zero, zero, zero, jnp.asarray(True))
    return PairCoupling(m, mixing, cost_a, cost_b, coupling)


def trace_pair(
    parts: PairParts,
    coupled: PairCoupling,
    active_rank: Array | int | None = None,
    beta: Array | float = 1.0,
    spectrum: str = "relative",
    total_importance: str = "sum",
) -> PairTrace:
    """Steps 4 to 6 of SPEC.md section 1, up to lambda: a few products of r x r matrices."""
    dtype, rank = parts.a.s.dtype, parts.a.s.shape[0]
    active = active_mask(rank, active_rank)
    count = jnp.sum(active).astype(dtype)
    m, mixing, cost_a, cost_b, coupling = coupled
    s_a, s_b = (jnp.where(active, x.s, 0) for x in (parts.a, parts.b))
    change = s_b - s_a
    scale = (s_a + s_b) / 2 if spectrum == "relative" else jnp.ones_like(change)
    unit_free = change / jnp.where(scale > 0, scale, 1.0)
    code = encode(unit_free, share_by_row(cost_a, cost_b, coupling.plan), active)
    tfi = importance(code)
    tos = overlap_score(code, beta)
    adjusted = adjust_coupling(coupling.plan, tos, active)
    delta_s = jnp.matmul(m, jnp.matmul(adjusted, change, precision=PRECISION), precision=PRECISION)
    # One direction has no entropy, and what is divided by it is no importance.
    total = tfi.sum() / count if total_importance == "mean" else jnp.where(count > 1, tfi.sum(), 0.0)
    lam = fusion_coefficient(code.d_bar, total)
    return PairTrace(m, mixing, cost_a, cost_b, coupling, change, code, tfi, tos, adjusted, delta_s, lam)


def solve_pair(
    parts: PairParts,
    active_rank: Array | int | None = None,
    beta: Array | float = 1.0,
    spectrum: str = "relative",
    total_importance: str = "sum",
    **coupling: Any,
) -> PairTrace:
    """Steps 2 to 6 of SPEC.md section 1, up to lambda; arguments as in `rgsp`, `coupling` those of `couple_pair`."""
    coupled = couple_pair(parts, active_rank, **coupling)
    return trace_pair(parts, coupled, active_rank, beta, spectrum, total_importance)


def find_lengths(svd: TruncatedSVD, s: Float[Array, "r"], geometry: str) -> Float[Array, "r"]:
    """Of the points s_i u_i ("spectral"), or u_i ("orthonormal"); a zero matrix has zero vectors."""
    return jnp.any(svd.u != 0, axis=0).astype(s.dtype) if geometry == "orthonormal" else s


def relative_task_vector(parts: PairParts, trace: PairTrace, projection: str) -> Float[Array, "m n"]:
    """tau of step 6: the change of the spectrum between both models' subspaces, B's carried over by the map."""
    u, v = (
        (x + jnp.matmul(y, trace.mixing.T, precision=PRECISION)) / 2
        for x, y in ((parts.a.u, parts.b.u), (parts.a.v, parts.b.v))
    )
    return project(u, trace.delta_s, v, projection)


def pair_stats(trace: PairTrace, parts: PairParts, active_rank: Array | int | None) -> dict[str, Array]:
    """What the report says of one pairwise merge."""
    code, coupling = trace.code, trace.coupling
    return svd_stats([mask_svd(x, active_rank) for x in parts[:2]], active_rank) | {
        "gw_cost": code.d_bar,
        "gw_marginal_error": coupling.marginal_error,
        "gw_plan_change": coupling.plan_change,
        "gw_unconverged": ~coupling.converged,
        "psi": jnp.stack([code.s_bar, code.h_bar, code.d_bar]),
        "tfi": trace.tfi.sum(),
        "lam": trace.lam,
    }


LITERAL: dict[str, Any] = dict(
    overlap="one_sided",
    temperature=None,
    align_signs=False,
    geometry="orthonormal",
    fused_penalty=0.0,
    spectrum="absolute",
    total_importance="mean",
)
"""The source's own value of every departure that `rgsp` names."""
LITERAL_ENCODING = {name: LITERAL[name] for name in ("spectrum", "total_importance")}
LITERAL_COUPLING = {name: value for name, value in LITERAL.items() if name not in LITERAL_ENCODING}


def couple_literal(
    parts: PairParts,
    active_rank: Array | int | None = None,
    epsilon: Array | float = 0.05,
    w_q: Float[Array, "r r"] | None = None,
    w_k: Float[Array, "r r"] | None = None,
    mapped: bool = True,
    plan: Float[Array, "r r"] | None = None,
) -> PairCoupling:
    """Steps 2 and 3 exactly as SPEC.md section 1 reads the source; see `couple_pair`."""
    return couple_pair(parts, active_rank, epsilon, **LITERAL_COUPLING, w_q=w_q, w_k=w_k, mapped=mapped, plan=plan)


def trace_literal(
    parts: PairParts, coupled: PairCoupling, active_rank: Array | int | None = None, beta: Array | float = 1.0
) -> PairTrace:
    """Steps 4 to 6 likewise."""
    return trace_pair(parts, coupled, active_rank, beta, **LITERAL_ENCODING)


def solve_literal(
    parts: PairParts, active_rank: Array | int | None = None, beta: Array | float = 1.0, **coupling: Any
) -> PairTrace:
    """Steps 2 to 6 likewise; `coupling` are arguments of `couple_literal`."""
    return trace_literal(parts, couple_literal(parts, active_rank, **coupling), active_rank, beta)


def build_seed(
    stack: Float[Array, "2 m n"],
    parts: PairParts,
    coupled: PairCoupling,
    active_rank: Array | int | None = None,
    beta: Array | float = 1.0,
    projection: str = "two_sided",
) -> MergeOutput:
    """`W* = (A + B)/2 + lambda tau + (1 - lambda)((B - A) - tau)`."""
    a, b = stack
    trace = trace_literal(parts, coupled, active_rank, beta)
    tau = relative_task_vector(parts, trace, projection)
    return MergeOutput(fuse((a + b) / 2, b - a, tau, trace.lam, 1 - trace.lam), pair_stats(trace, parts, active_rank))


def rgsp_seed(
    stack: Float[Array, "2 m n"],
    rank: Rank = 64,
    active_rank: ActiveRank = None,
    beta: Beta = 1.0,
    epsilon: Epsilon = 0.05,
    projection: Projection = "two_sided",
    w_q: Learned = None,
    w_k: Learned = None,
) -> MergeOutput:
    """RGSP-TEFM to the letter: `W* = (A + B)/2 + lambda tau + (1 - lambda)((B - A) - tau)` (SPEC.md section 1).

    Kept as the reference of the source, not as a merge to use: with orthonormal U every off-diagonal cost is equal and
    the uniform coupling is stationary (R8), the map is near uniform at large r, lambda is near 0, so that W* is close
    to 1.5 B - 0.5 A and depends on the order of the models. Use `rgsp`.

    Args:
        stack: A and B [2, m, n] (outputs x inputs).
        rank: leading directions r kept of each.
        beta: TOS decays as exp(-beta d), dimensionless. d is one number for the layer, so the factor cancels when the
            coupling's rows are normalised (R5): the merge does not depend on beta unless TOS meets its floor.
        epsilon: entropic regularisation on costs normalised to [0, 1].
        projection: "one_sided" is `U dS U^T` on square matrices (as written), and "two_sided" elsewhere and by default
            (R7).
        w_q, w_k: learnable [r, r] matrices of step 2; None is the identity.
    """
    parts = prepare_pair(stack, rank, active_rank)
    coupled = couple_literal(parts, active_rank, epsilon, w_q, w_k)
    return build_seed(stack, parts, coupled, active_rank, beta, projection)


def rgsp(
    stack: Float[Array, "2 m n"],
    rank: Rank = 64,
    active_rank: ActiveRank = None,
    beta: Beta = 1.0,
    epsilon: Epsilon = 0.05,
    projection: Projection = "two_sided",
    overlap: Overlap = "two_sided",
    temperature: Temperature = 0.05,
    align_signs: AlignSigns = True,
    geometry: Geometry = "spectral",
    fused_penalty: FusedPenalty = 0.0,
    spectrum: Spectrum = "relative",
    total_importance: TotalImportance = "sum",
    symmetric: Symmetric = True,
    rest_term: RestTerm = False,
    w_q: Learned = None,
    w_k: Learned = None,
) -> MergeOutput:
    """Well-posed pairwise RGSP-TEFM: `W* = (A + B)/2 + lambda tau` (SPEC.md section 2, R9).

    Every departure from the source is a keyword that also takes the literal value; with all of them literal
    (`LITERAL`, `symmetric=False`, `rest_term=True`) this is `rgsp_seed`. R9 calls lambda tau even under A <-> B, which
    holds only where the map is a permutation; `symmetric` averages both orders and makes it exact. A single direction
    has no entropy to weigh its importance by: at rank 1 the merge is the mean.

    Args:
        stack: A and B [2, m, n] (outputs x inputs).
        rank: leading directions r kept of each.
        beta: TOS decays as exp(-beta d), dimensionless. d is one number for the layer, so the factor cancels when the
            coupling's rows are normalised (R5): the merge does not depend on beta unless TOS meets its floor.
        epsilon: entropic regularisation on costs normalised to [0, 1].
        others: as annotated.
    """
    parts = prepare_pair(stack, rank, active_rank)
    coupled = couple_orders(
        parts, active_rank, epsilon, overlap, temperature, align_signs, geometry, fused_penalty, symmetric, w_q, w_k
    )
    return build_pair(stack, parts, coupled, active_rank, beta, projection, spectrum, total_importance, rest_term)


def couple_orders(
    parts: PairParts,
    active_rank: Array | int | None = None,
    epsilon: Array | float = 0.05,
    overlap: str = "two_sided",
    temperature: Array | float | None = 0.05,
    align_signs: bool = True,
    geometry: str = "spectral",
    fused_penalty: Array | float = 0.0,
    symmetric: bool = True,
    w_q: Float[Array, "r r"] | None = None,
    w_k: Float[Array, "r r"] | None = None,
) -> PairCoupling:
    """`couple_pair` from A to B and, where symmetric, from B to A, on a leading axis."""

    def couple(parts: PairParts) -> PairCoupling:
        return couple_pair(
            parts, active_rank, epsilon, overlap, temperature, align_signs, geometry, fused_penalty, w_q=w_q, w_k=w_k
        )

    orders = [parts, parts.swap()] if symmetric else [parts]
    return map_batch(couple, jax.tree.map(lambda *x: jnp.stack(x), *orders))


def build_pair(
    stack: Float[Array, "2 m n"],
    parts: PairParts,
    coupled: PairCoupling,
    active_rank: Array | int | None = None,
    beta: Array | float = 1.0,
    projection: str = "two_sided",
    spectrum: str = "relative",
    total_importance: str = "sum",
    rest_term: bool = False,
) -> MergeOutput:
    """`W* = (A + B)/2 + lambda tau`, the mean of the orders there are."""
    a, b = stack
    count = coupled.m.shape[0]
    merged = (a + b) / 2
    traces = []
    for i, (own, difference) in enumerate(((parts, b - a), (parts.swap(), a - b))[:count]):
        order = jax.tree.map(lambda x, i=i: x[i], coupled)
        trace = trace_pair(own, order, active_rank, beta, spectrum, total_importance)
        tau = relative_task_vector(own, trace, projection)
        on_rest = 1 - trace.lam if rest_term else 0.0
        merged = merged + fuse(jnp.zeros_like(a), difference, tau, trace.lam, on_rest) / count
        traces.append(trace)
    stats = pair_stats(traces[0], parts, active_rank)
    stats["gw_unconverged"] = ~coupled.coupling.converged.all()
    return MergeOutput(merged, stats)


PAIR_STAGES = Stages(prepare_pair, couple_orders, build_pair)
SEED_STAGES = Stages(prepare_pair, couple_literal, build_seed)
