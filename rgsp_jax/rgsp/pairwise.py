"""RGSP-TEFM of two matrices: the six steps composed, literally (`rgsp_seed`) and as a well-posed reading (`rgsp`).

Both are one function of the same settings; `rgsp` with the literal value of every keyword is `rgsp_seed`.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import resolve_rank, truncated_svd
from rgsp_jax.method import ActiveRank, Hyperparameter, Rank, choice, switch
from rgsp_jax.rgsp.alignment import OVERLAPS, PRECISION, active_mask, dynamic_map, pair_signs
from rgsp_jax.rgsp.encoding import Encoding, adjust_coupling, encode, importance, overlap_score
from rgsp_jax.rgsp.fusion import fuse, fusion_coefficient, project
from rgsp_jax.rgsp.stats import svd_stats
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


class PairTrace(NamedTuple):
    """Every intermediate of the six steps, in the names of SPEC.md section 1."""

    m: Float[Array, "r r"]
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
    tau: Float[Array, "m n"]


def relative_task_vector(
    a: TruncatedSVD,
    b: TruncatedSVD,
    *,
    active_rank: Array | int | None = None,
    beta: Array | float = 1.0,
    epsilon: Array | float = 0.05,
    projection: str = "two_sided",
    overlap: str = "two_sided",
    temperature: Array | float | None = 0.05,
    align_signs: bool = True,
    geometry: str = "spectral",
    fused_penalty: Array | float = 0.0,
    spectrum: str = "relative",
    total_importance: str = "sum",
    mapped: bool = True,
    w_q: Float[Array, "r r"] | None = None,
    w_k: Float[Array, "r r"] | None = None,
    plan: Float[Array, "r r"] | None = None,
) -> PairTrace:
    """Steps 2 to 6 of SPEC.md section 1 on two truncated SVDs, up to tau and lambda.

    Args:
        a, b: truncated SVDs of A and B [m, n] at the same rank r.
        active_rank: run-time rank; the result equals that of SVDs truncated there.
        mapped: False replaces the dynamic map by the identity.
        plan: a coupling [r, r] to use in place of the solver's (it stays in the record as given).
        others: see `rgsp`.
    """
    dtype, rank = a.s.dtype, a.s.shape[0]
    active = active_mask(rank, active_rank)
    both = active[:, None] & active[None, :]
    count = jnp.sum(active).astype(dtype)
    overlaps = OVERLAPS[overlap](a, b, w_q, w_k)
    if mapped:
        m = dynamic_map(overlaps, jnp.sqrt(count) if temperature is None else jnp.asarray(temperature, dtype), active)
    else:
        m = jnp.diag(active.astype(dtype))
    mixing = m * pair_signs(a, b) if align_signs else m
    u_b, v_b = (jnp.matmul(x, mixing.T, precision=PRECISION) for x in (b.u, b.v))
    # Distances of mixed points must not see the signs: those of A would turn a point of B against its neighbours.
    points_a, points_b = (x.u if geometry == "orthonormal" else x.u * x.s[None, :] for x in (a, b))
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
    change = b.s - a.s
    scale = (a.s + b.s) / 2 if spectrum == "relative" else jnp.ones_like(change)
    unit_free = change / jnp.where(scale > 0, scale, 1.0)
    code = encode(unit_free, share_by_row(cost_a, cost_b, coupling.plan), active)
    tfi = importance(code)
    tos = overlap_score(code, beta)
    adjusted = adjust_coupling(coupling.plan, tos, active)
    delta_s = jnp.matmul(m, jnp.matmul(adjusted, change, precision=PRECISION), precision=PRECISION)
    tau = project((a.u + u_b) / 2, delta_s, (a.v + v_b) / 2, projection)
    lam = fusion_coefficient(code.d_bar, tfi.sum() / (count if total_importance == "mean" else 1))
    return PairTrace(m, cost_a, cost_b, coupling, change, code, tfi, tos, adjusted, delta_s, lam, tau)


def pair_stats(trace: PairTrace, svds: list[TruncatedSVD], active_rank: Array | int | None) -> dict[str, Array]:
    """What the report says of one pairwise merge."""
    code, coupling = trace.code, trace.coupling
    return svd_stats(svds, active_rank) | {
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


def literal_trace(
    stack: Float[Array, "2 m n"], rank: int | float, active_rank: Array | int | None = None, **settings: Any
) -> tuple[PairTrace, list[TruncatedSVD]]:
    """Steps 1 to 6 exactly as SPEC.md section 1 reads the source, with the two SVDs."""
    svds = decompose(stack, rank, active_rank)
    return relative_task_vector(*svds, active_rank=active_rank, **LITERAL | settings), svds


def decompose(stack: Float[Array, "k m n"], rank: int | float, active_rank: Array | int | None) -> list[TruncatedSVD]:
    """Truncated SVD of every matrix of the stack, masked at the run-time rank."""
    rank = resolve_rank(rank, *stack.shape[1:])
    batch = map_batch(lambda w: truncated_svd(w, rank, active_rank=active_rank), stack)  # compiled once, not K times
    return [jax.tree.map(lambda x, k=k: x[k], batch) for k in range(stack.shape[0])]


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
    a, b = stack
    trace, svds = literal_trace(
        stack, rank, active_rank, beta=beta, epsilon=epsilon, projection=projection, w_q=w_q, w_k=w_k
    )
    merged = fuse((a + b) / 2, b - a, trace.tau, trace.lam, 1 - trace.lam)
    return MergeOutput(merged, pair_stats(trace, svds, active_rank))


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
    holds only where the map is a permutation; `symmetric` averages both orders and makes it exact.

    Args:
        stack: A and B [2, m, n] (outputs x inputs).
        rank: leading directions r kept of each.
        beta: TOS decays as exp(-beta d), dimensionless. d is one number for the layer, so the factor cancels when the
            coupling's rows are normalised (R5): the merge does not depend on beta unless TOS meets its floor.
        epsilon: entropic regularisation on costs normalised to [0, 1].
        others: as annotated.
    """
    svds = decompose(stack, rank, active_rank)
    settings: dict[str, Any] = dict(
        active_rank=active_rank,
        beta=beta,
        epsilon=epsilon,
        projection=projection,
        overlap=overlap,
        temperature=temperature,
        align_signs=align_signs,
        geometry=geometry,
        fused_penalty=fused_penalty,
        spectrum=spectrum,
        total_importance=total_importance,
        w_q=w_q,
        w_k=w_k,
    )
    orders = [(0, 1), (1, 0)] if symmetric else [(0, 1)]
    sides = [jax.tree.map(lambda *x: jnp.stack(x), *(svds[order[side]] for order in orders)) for side in (0, 1)]

    def step_from(first: TruncatedSVD, second: TruncatedSVD, difference: Array) -> tuple[Array, PairTrace]:
        trace = relative_task_vector(first, second, **settings)
        on_rest = 1 - trace.lam if rest_term else 0.0
        return fuse(jnp.zeros_like(difference), difference, trace.tau, trace.lam, on_rest), trace

    differences = jnp.stack([stack[j] - stack[i] for i, j in orders])
    steps, traces = map_batch(step_from, *sides, differences)
    stats = pair_stats(jax.tree.map(lambda x: x[0], traces), svds, active_rank)
    stats["gw_unconverged"] = ~traces.coupling.converged.all()
    return MergeOutput((stack[0] + stack[1]) / 2 + steps.sum(0) / len(orders), stats)
