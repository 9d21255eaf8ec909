"""Core Space: low-rank task vectors merged as small matrices in the bases that they share."""

from collections.abc import Callable
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import resolve_rank, truncated_svd
from rgsp_jax.linalg.dense import matmul, scale_columns
from rgsp_jax.merging.isotropic import iso_c
from rgsp_jax.merging.task_arithmetic import Scale, task_vectors
from rgsp_jax.merging.ties import Density, merge_by_sign, trim
from rgsp_jax.merging.tsv import SVD_TOLERANCE, side_by_side, tsv_m
from rgsp_jax.method import Rank, choice, switch
from rgsp_jax.types import MergeOutput, TruncatedSVD

MergeCores = Callable[[Float[Array, "k p q"], Any], Float[Array, "p q"]]
"""(cores, density) -> the merged core."""

INNER: dict[str, MergeCores] = {
    "tsv_m": lambda cores, density: tsv_m(cores, jnp.zeros_like(cores[0])).merged,
    "ties": lambda cores, density: merge_by_sign(trim(cores, density))[0],
    "sum": lambda cores, density: cores.sum(0),
}

Inner = Annotated[str, choice("how the cores are merged", *INNER)]
Isotropic = Annotated[bool, switch("give the merged core a flat spectrum, as Iso-C does")]


def project_onto_shared_bases(
    svds: TruncatedSVD,
) -> tuple[Float[Array, "m p"], Float[Array, "k p q"], Float[Array, "n q"], Float[Array, ""]]:
    """(U, cores, V, the worse residual) with `u_k diag(s_k) v_k^T = U core_k V^T` for a batch of K SVDs of rank r.

    U and V are the left singular vectors of `[u_1 sqrt(s_1) ... u_K sqrt(s_K)]` and of the same of v; p and q are K r,
    or what m and n allow.
    """
    count = svds.s.shape[0]
    positive = svds.s > 0
    roots = jnp.where(positive, jnp.sqrt(jnp.where(positive, svds.s, 1)), 0)  # the root has no derivative at zero
    bases, parts, residuals = [], [], []
    for x in (svds.u, svds.v):
        weighted = x * roots[:, None, :]
        stacked = side_by_side(weighted)
        shared = truncated_svd(stacked, min(stacked.shape))
        bases.append(shared.u)
        parts.append([matmul(shared.u.T, x[i]) for i in range(count)])
        residuals.append(shared.residual)
    left, right = parts
    cores = [matmul(scale_columns(left[i], svds.s[i]), right[i].T) for i in range(count)]
    return bases[0], jnp.stack(cores), bases[1], jnp.maximum(*residuals)


def core_space(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    rank: Rank = 16,
    inner: Inner = "tsv_m",
    isotropic: Isotropic = False,
    density: Density = 0.2,
    scale: Scale = 1.0,
) -> MergeOutput:
    """`base + scale * U merge(U^T tau_1 V, ..., U^T tau_K V) V^T`, U and V bases of all tau_k's columns and rows.

    Core Space merging (Panariello et al. 2025, arXiv 2509.17786): U [m, K r] are the left singular vectors of the
    stacked factors `[B_1 ... B_K]`, V [n, K r] the right ones of `[A_1; ...; A_K]`, for task vectors
    `tau_k = B_k A_k` of rank r. Every core is K r x K r at most, and nothing is lost where no task vector has a higher
    rank than r. Of a higher one the leading r singular triples are taken, all that a LoRA of rank r can hold of it.
    LoRA factors are not unique; here they are `B_k = u_k sqrt(s_k)`, `A_k = sqrt(s_k) v_k^T`, which only TIES sees: it
    works entry by entry. "sum" is task arithmetic, and with `isotropic` Iso-C.

    Args:
        stack: K >= 1 models [K, m, n] (outputs x inputs).
        base: their common ancestor [m, n].
        rank: of the adapters, the largest where they differ; a fraction is of min(m, n).
        inner: "tsv_m" (see `tsv_m`), "ties" (see `ties`) or "sum".
        isotropic: Iso-C of the merged core, which the authors' code offers after every rule.
        density: of "ties", in each core.
        scale: factor on the merged task vector; the paper tunes it on validation data.

    Returns:
        stats: `captured` [K], share of every task vector's squared norm that rank r holds, 1 where it is zero;
        `residual`, the worst of the SVDs; `svd_inexact`, a flag.
    """
    vectors = task_vectors(stack, base)
    kept = resolve_rank(rank, *base.shape)
    svds = map_batch(lambda x: truncated_svd(x, kept), vectors)
    left, cores, right, residual = project_onto_shared_bases(svds)
    merged = INNER[inner](cores, density)
    if isotropic:
        merged = iso_c(merged[None], jnp.zeros_like(merged)).merged
    sizes = jnp.sum(vectors**2, axis=(1, 2))
    held = jnp.sum(svds.s**2, axis=1)
    worst = jnp.maximum(residual, svds.residual.max())
    stats = {
        "captured": jnp.where(sizes > 0, held / jnp.where(sizes > 0, sizes, 1), 1),
        "residual": worst,
        "svd_inexact": ~(worst <= SVD_TOLERANCE),
    }
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * matmul(matmul(left, merged), right.T), stats)
