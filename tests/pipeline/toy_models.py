"""Small models on disk with a tensor of every sort that the pipeline treats differently."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rgsp_jax.checkpoint import open_checkpoint, write_safetensors

HIDDEN, INNER, WORDS = 8, 20, 4331
CONFIG = {
    "model_type": "toy",
    "architectures": ["ToyModel"],
    "torch_dtype": "float32",
    "num_hidden_layers": 2,
    "text_config": {"dtype": "float32", "hidden_size": HIDDEN},
}
COMPANIONS = {
    "tokenizer.json": '{"version": "1.0"}\n',
    "special_tokens_map.json": "{}\n",
    "chat_template.jinja": "{{ messages }}\n",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}\n',
}
LAYER = {
    "attention.self.query.weight": (HIDDEN, HIDDEN),
    "attention.self.query.bias": (HIDDEN,),
    "attention.output.dense.weight": (HIDDEN, HIDDEN),
    "attention.output.LayerNorm.weight": (HIDDEN,),
    "intermediate.dense.weight": (INNER, HIDDEN),
    "intermediate.dense.bias": (INNER,),
    "output.dense.weight": (HIDDEN, INNER),
}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embeddings.word_embeddings.weight": (WORDS, HIDDEN),
    **{f"encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
    "stem.conv.weight": (6, 2, 3, 3),
    "moe.experts.down_proj": (3, HIDDEN, INNER),
    "logit_scale": (),
    "unused.weight": (0, HIDDEN),
}
MATRICES = {
    **{name: shape for name, shape in SHAPES.items() if "layer" in name and len(shape) == 2},
    "stem.conv.weight": (6, 18),
    "moe.experts.down_proj": (HIDDEN, INNER),
}
"""What a method for matrices sees: (outputs, inputs) of every matrix of a tensor."""
AVERAGED = ("embeddings.word_embeddings.weight", "logit_scale", *(n for n, s in SHAPES.items() if len(s) == 1))

Tensors = dict[str, np.ndarray]


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def toy_family(
    count: int, *, seed: int = 0, spread: float = 0.3, dtypes: Sequence[str] = ("float32",)
) -> list[Tensors]:
    """Siblings of one random ancestor; dtypes by model (the last one for the rest)."""
    rng = np.random.default_rng(seed)
    ancestor = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    family = []
    for k in range(count):
        dtype = dtype_of(dtypes[min(k, len(dtypes) - 1)])
        model = {name: np.asarray(x + spread * rng.normal(size=x.shape)).astype(dtype) for name, x in ancestor.items()}
        family.append(model | {"embeddings.position_ids": np.arange(12).reshape(1, 12)})
    return family


def write_model(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = CONFIG) -> Path:
    """A Hugging Face directory with companions."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        for name, text in COMPANIONS.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text)
    return directory


def write_family(
    directory: Path, family: Sequence[Mapping[str, np.ndarray]], config: Mapping[str, Any] | None = CONFIG
) -> list[str]:
    """Every model in a directory `a`, `b`, ...; their paths."""
    return [str(write_model(directory / "abcdefgh"[k], tensors, config)) for k, tensors in enumerate(family)]


def read_model(path: Path | str) -> Tensors:
    """All tensors of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}


def tree_bytes(directory: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
