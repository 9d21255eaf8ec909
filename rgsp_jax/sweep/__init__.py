"""Many merges of the same models, scored."""

from rgsp_jax.sweep.alpha import AlphaSearch, run_alpha_search
from rgsp_jax.sweep.frontier import FrontierPoint, mark_pareto, plan_points, run_frontier
from rgsp_jax.sweep.grid import Point, Range, SweepConfig, parse_sweep, read_sweep
from rgsp_jax.sweep.merging import sweep_merge
from rgsp_jax.sweep.results import Result, mark_front, read_results
from rgsp_jax.sweep.run import run_sweep, score_by_command
from rgsp_jax.sweep.study import run_study

__all__ = [
    "AlphaSearch",
    "FrontierPoint",
    "Point",
    "Range",
    "Result",
    "SweepConfig",
    "mark_front",
    "mark_pareto",
    "parse_sweep",
    "plan_points",
    "read_results",
    "read_sweep",
    "run_alpha_search",
    "run_frontier",
    "run_study",
    "run_sweep",
    "score_by_command",
    "sweep_merge",
]
