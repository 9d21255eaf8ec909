"""Before a merge: do these models share an ancestor, and can they be merged?"""

from rgsp_jax.comparison.compare import Comparison, compare_checkpoints, write_comparison

__all__ = ["Comparison", "compare_checkpoints", "write_comparison"]
