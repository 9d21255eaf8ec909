"""Many merges of the same models, scored."""

from rgsp_jax.sweep.frontier import FrontierPoint, mark_pareto, plan_points, run_frontier

__all__ = ["FrontierPoint", "mark_pareto", "plan_points", "run_frontier"]
