"""The embedded default: experts trained here on scikit-learn's digits, merged by the pipeline, and a table of it."""

from rgsp_jax.demo.comparison import DemoResult, DemoRow, MergeCall, merge_by_pipeline, run
from rgsp_jax.demo.experts import DemoSettings, Expert, evaluate, make_experts
from rgsp_jax.demo.tasks import TASKS, Task

__all__ = [
    "TASKS",
    "DemoResult",
    "DemoRow",
    "DemoSettings",
    "Expert",
    "MergeCall",
    "Task",
    "evaluate",
    "make_experts",
    "merge_by_pipeline",
    "run",
]
