"""The only code that touches weight files: opening, checking, reading, writing and publishing models."""

from rgsp_jax.checkpoint.companions import OWN_FILES, copy_companions
from rgsp_jax.checkpoint.compatibility import find_problems
from rgsp_jax.checkpoint.conversion import build_manifest, from_flax, to_flax
from rgsp_jax.checkpoint.convert import Conversion, convert_to_flax, convert_to_huggingface, save_huggingface
from rgsp_jax.checkpoint.covariance_file import (
    CovarianceFile,
    DataRecord,
    Site,
    find_foreign,
    open_covariances,
    write_covariances,
)
from rgsp_jax.checkpoint.flax_checkpoint import load_manifest, load_orbax, save_orbax, start_saving
from rgsp_jax.checkpoint.hashing import digest, hash_file
from rgsp_jax.checkpoint.manifest import STYLES, Manifest, WeightRecord
from rgsp_jax.checkpoint.orbax_writer import convert_to_orbax
from rgsp_jax.checkpoint.output import check_disk, check_output, format_bytes, publish
from rgsp_jax.checkpoint.renamed import RenamedCheckpoint, as_on_disk
from rgsp_jax.checkpoint.shard_plan import Placement, Shard, ShardPlan, plan_shards
from rgsp_jax.checkpoint.shard_writer import ShardWriter, replace_file, write_safetensors
from rgsp_jax.checkpoint.source import open_checkpoint
from rgsp_jax.checkpoint.specs import DTYPES, Checkpoint, TensorSpec

__all__ = [
    "DTYPES",
    "OWN_FILES",
    "STYLES",
    "Checkpoint",
    "Conversion",
    "CovarianceFile",
    "DataRecord",
    "Manifest",
    "Placement",
    "RenamedCheckpoint",
    "Shard",
    "ShardPlan",
    "ShardWriter",
    "Site",
    "TensorSpec",
    "WeightRecord",
    "as_on_disk",
    "build_manifest",
    "check_disk",
    "check_output",
    "convert_to_flax",
    "convert_to_huggingface",
    "convert_to_orbax",
    "copy_companions",
    "digest",
    "find_foreign",
    "find_problems",
    "format_bytes",
    "from_flax",
    "hash_file",
    "load_manifest",
    "load_orbax",
    "open_checkpoint",
    "open_covariances",
    "plan_shards",
    "publish",
    "replace_file",
    "save_huggingface",
    "save_orbax",
    "start_saving",
    "to_flax",
    "write_covariances",
    "write_safetensors",
]
