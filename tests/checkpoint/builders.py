"""Models on disk for tests: small, of every dtype, broken on request."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rgsp_jax.checkpoint import DTYPES, ShardWriter, TensorSpec, plan_shards

CONFIG = {"model_type": "toy", "architectures": ["ToyModel"], "torch_dtype": "float32"}


def make_tensor(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random elements of any supported dtype."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 100, shape).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def sample_tensors() -> dict[str, np.ndarray]:
    """One tensor per dtype, scalars, empty tensors and a transposed view."""
    tensors = {f"layer.{code}": make_tensor(dtype, (3, 5), seed) for seed, (code, dtype) in enumerate(DTYPES.items())}
    tensors |= {f"scalar.{code}": make_tensor(dtype, (), 7) for code, dtype in DTYPES.items()}
    tensors["empty"] = np.zeros((0, 3), np.float16)
    tensors["transposed"] = make_tensor(np.dtype(np.float32), (4, 6)).T
    tensors["transposed_bf16"] = make_tensor(np.dtype(ml_dtypes.bfloat16), (4, 6)).T
    tensors["Ünïcode \U0001f600"] = make_tensor(np.dtype(np.float32), (2,))
    return tensors


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Three float32 tensors of a model that is fine."""
    shapes = {"encoder.weight": (4, 3), "encoder.bias": (4,), "norm.weight": (3,)}
    return {name: make_tensor(np.dtype(np.float32), shape, seed) for name, shape in shapes.items()}


def raw_file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_model(
    directory: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    config: dict[str, Any] | None = CONFIG,
    max_shard_size: int = 1 << 40,
) -> Path:
    """A Hugging Face directory, sharded by `max_shard_size`."""
    tensors = tiny_tensors() if tensors is None else tensors
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()]
    writer = ShardWriter(directory, plan_shards(specs, max_shard_size))
    for name, array in tensors.items():
        writer.write(name, array)
    writer.finish()
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal shape, dtype and bits, NaN included."""
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
