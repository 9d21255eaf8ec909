"""The only code that touches weight files: opening, checking, reading, writing and publishing models."""

from rgsp_jax.checkpoint.companions import OWN_FILES, copy_companions
from rgsp_jax.checkpoint.compatibility import find_problems
from rgsp_jax.checkpoint.covariance_file import (
    CovarianceFile,
    DataRecord,
    Site,
    find_foreign,
    open_covariances,
    write_covariances,
)
from rgsp_jax.checkpoint.hashing import digest, hash_file
from rgsp_jax.checkpoint.orbax_writer import convert_to_orbax
from rgsp_jax.checkpoint.output import check_disk, check_output, format_bytes, publish
from rgsp_jax.checkpoint.shard_plan import Placement, Shard, ShardPlan, plan_shards
from rgsp_jax.checkpoint.shard_writer import ShardWriter, write_safetensors
from rgsp_jax.checkpoint.source import open_checkpoint
from rgsp_jax.checkpoint.specs import DTYPES, Checkpoint, TensorSpec

__all__ = [
    "DTYPES",
    "OWN_FILES",
    "Checkpoint",
    "CovarianceFile",
    "DataRecord",
    "Placement",
    "Shard",
    "ShardPlan",
    "ShardWriter",
    "Site",
    "TensorSpec",
    "check_disk",
    "check_output",
    "convert_to_orbax",
    "copy_companions",
    "digest",
    "find_foreign",
    "find_problems",
    "format_bytes",
    "hash_file",
    "open_checkpoint",
    "open_covariances",
    "plan_shards",
    "publish",
    "write_covariances",
    "write_safetensors",
]
