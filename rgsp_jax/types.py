"""Array records that kernels return. A record's fields say their shapes; boolean fields and entries are flags."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class TruncatedSVD(NamedTuple):
    """`w ~= u @ diag(s) @ v.T`, singular values descending, the largest entry of every u column positive (SPEC R1).

    Under a run-time `active_rank` the columns and singular values past it are exactly zero.
    """

    u: Float[Array, "m r"]
    s: Float[Array, "r"]
    v: Float[Array, "n r"]
    residual: Float[Array, ""]
    """max_i of |w v_i - s_i u_i| and |w^T u_i - s_i v_i|, relative to s_1: 0 is exact; dimensionless."""


class Coupling(NamedTuple):
    """Solution of an entropic (fused) Gromov-Wasserstein problem."""

    plan: Float[Array, "ra rb"]
    cost: Float[Array, ""]
    """Transport cost at the plan, without the entropy term."""
    marginal_error: Float[Array, ""]
    """L1 distance of both of the plan's marginals from the given ones, summed."""
    plan_change: Float[Array, ""]
    """L1 change of the plan in one more outer step: the distance from a fixed point."""
    converged: Bool[Array, ""]


class InputStatistics(NamedTuple):
    """What is known of the inputs k of a matrix [m, n] in c models: whole covariances, sketches or spectra of them.

    For a sketch, `sketch^T sketch ~= C`, and the trace is exact.
    """

    covariance: Float[Array, "c n n"] | None = None
    """`C = mean k k^T`."""
    drift: Float[Array, "c n n"] | None = None
    """`mean (k_i - k) k^T`, where k are the inputs in the merged model and k_i in model i; C is of k then."""
    sketch: Float[Array, "c l n"] | None = None
    trace: Float[Array, "c"] | None = None
    values: Float[Array, "c k"] | None = None
    """Or eigenvalues, descending, of the leading k,"""
    basis: Float[Array, "c n k"] | None = None
    """eigenvectors"""
    rest: Float[Array, "c"] | None = None
    """and the eigenvalue of every direction outside."""
    held_back: Float[Array, "c rows n"] | None = None
    """Inputs that are not in C, for proof; rows of zeros do not count."""


class MergeOutput(NamedTuple):
    """One merged matrix and what there is to say of it.

    `stats` maps names to scalars or small arrays of fixed shape; boolean scalars are flags of numerical trouble
    (True is bad) and end up as warnings in the report.
    """

    merged: Float[Array, "m n"]
    stats: dict[str, Array]
