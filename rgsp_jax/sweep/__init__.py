"""Many merges of the same models, scored."""

from rgsp_jax.sweep.alpha import AlphaSearch, run_alpha_search
from rgsp_jax.sweep.frontier import FrontierPoint, mark_pareto, plan_points, run_frontier
from rgsp_jax.sweep.grid import Point, Range, SweepConfig, parse_sweep, read_sweep
from rgsp_jax.sweep.merging import sweep_merge

__all__ = [
    "AlphaSearch",
    "FrontierPoint",
    "Point",
    "Range",
    "SweepConfig",
    "mark_pareto",
    "parse_sweep",
    "plan_points",
    "read_sweep",
    "run_alpha_search",
    "run_frontier",
    "sweep_merge",
]
