"""The impure shell: plan, read, compute, write, audit, report."""

from rgsp_jax.pipeline.config import MergeConfig, Override, parse_config, read_config_file
from rgsp_jax.pipeline.describe import describe_plan
from rgsp_jax.pipeline.launch import connect_processes
from rgsp_jax.pipeline.merge import MergeResult, merge_checkpoints
from rgsp_jax.pipeline.placement import Devices
from rgsp_jax.pipeline.plan import MergePlan, plan_merge
from rgsp_jax.pipeline.preparation import Preparation, prepare

__all__ = [
    "Devices",
    "MergeConfig",
    "MergePlan",
    "MergeResult",
    "Override",
    "Preparation",
    "connect_processes",
    "describe_plan",
    "merge_checkpoints",
    "parse_config",
    "plan_merge",
    "prepare",
    "read_config_file",
]
