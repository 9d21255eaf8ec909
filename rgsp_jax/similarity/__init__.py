"""How alike two weight matrices are: pure kernels, and what independent matrices would give."""

from rgsp_jax.similarity.elements import ElementSums, sum_elements
from rgsp_jax.similarity.matching import RowAgreement, can_tell_apart, chance_of_coincidences, compare_rows
from rgsp_jax.similarity.subspaces import SubspaceAngles, compare_subspaces, share_basis

__all__ = [
    "ElementSums",
    "RowAgreement",
    "SubspaceAngles",
    "can_tell_apart",
    "chance_of_coincidences",
    "compare_rows",
    "compare_subspaces",
    "share_basis",
    "sum_elements",
]
