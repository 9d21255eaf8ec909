"""Many merges of the same models, scored."""

from rgsp_jax.sweep.alpha import AlphaSearch, run_alpha_search
from rgsp_jax.sweep.frontier import FrontierPoint, mark_pareto, plan_points, run_frontier

__all__ = ["AlphaSearch", "FrontierPoint", "mark_pareto", "plan_points", "run_alpha_search", "run_frontier"]
