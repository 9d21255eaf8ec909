"""KnOTS: task vectors in one common output basis, then TIES there."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg import truncated_svd
from rgsp_jax.linalg.dense import matmul
from rgsp_jax.merging.task_arithmetic import Scale, TaskCoefficients, task_vectors
from rgsp_jax.merging.ties import Density, Normalize, merge_by_sign, trim
from rgsp_jax.merging.tsv import SVD_TOLERANCE, side_by_side
from rgsp_jax.types import MergeOutput


def knots(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    density: Density = 0.2,
    scale: Scale = 1.0,
    coefficients: TaskCoefficients = None,
    normalize: Normalize = True,
) -> MergeOutput:
    """`base + scale * U ties(S V_1^T, ..., S V_K^T)`, `U S [V_1^T ... V_K^T]` the SVD of the task vectors side by side.

    KnOTS-TIES (Stoica et al. 2025, arXiv 2410.19735). `S V_i^T = U^T tau_i`: the i-th task vector in the
    basis of output directions that they share. Any linear merge there is the same merge of the task vectors. The
    paper trims the whole model at once and tunes the scale; this trims every matrix by itself. It is meant for LoRA
    updates, whose task vectors hardly align as they are.

    Args:
        stack: K >= 1 models [K, m, n] (outputs x inputs).
        base: their common ancestor [m, n].
        density: 0.2 in the paper's vision experiments.
        scale, coefficients, normalize: see `ties`.

    Returns:
        stats: `sign_agreement`, in the common basis; `residual` of the SVD; `svd_inexact`, a flag.
    """
    vectors = task_vectors(stack, base)
    together = side_by_side(vectors)
    svd = truncated_svd(together, min(together.shape))
    parts = jnp.stack([matmul(svd.u.T, x) for x in vectors])
    merged, agreement = merge_by_sign(trim(parts, density), coefficients, normalize)
    stats = {
        "sign_agreement": agreement,
        "residual": svd.residual,
        "svd_inexact": ~(svd.residual <= SVD_TOLERANCE),
    }
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * matmul(svd.u, merged), stats)
