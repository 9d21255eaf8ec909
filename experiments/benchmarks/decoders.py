"""Decoders of random weights as Hugging Face checkpoints: what the benchmarks of whole merges merge.

    python -m experiments.benchmarks.decoders PLACE --models 2 --layers 24 --width 896    # makes and keeps them

A family's matrices are an ancestor with a decaying spectrum plus a departure of a tenth of it for each model, in
bfloat16, in Qwen2's names and shapes (few key heads, biases of query, key and value, tied embeddings).
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DEPARTURE = 0.1
"""Of each model from the ancestor, over its norm."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder; the default has 0.39 billion parameters."""

    layers: int = 24
    width: int = 896
    hidden: int = 4864
    """Of the multilayer perceptrons."""
    heads: int = 14
    key_heads: int = 2
    vocabulary: int = 32000

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors by name in disk order."""
        w, keys = self.width, self.width // self.heads * self.key_heads
        layer = {
            **{f"self_attn.{x}_proj.weight": (n, w) for x, n in (("q", w), ("k", keys), ("v", keys), ("o", w))},
            **{f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", w), ("k", keys), ("v", keys))},
            **{f"mlp.{x}_proj.weight": (self.hidden, w) for x in ("gate", "up")},
            "mlp.down_proj.weight": (w, self.hidden),
            "input_layernorm.weight": (w,),
            "post_attention_layernorm.weight": (w,),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, w),
            **{f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()},
            "model.norm.weight": (w,),
        }

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def nbytes(self) -> int:
        """Of one model's weights."""
        return 2 * self.parameters

    @property
    def config(self) -> dict[str, Any]:
        """Of its config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "max_position_embeddings": 4096,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_heads,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }


def draw_family(shape: tuple[int, ...], number: int, models: int) -> Iterator[np.ndarray]:
    """One tensor of every model."""
    scale = 0.05 * np.geomspace(1, 0.05, shape[-1], dtype=np.float32)
    ancestor = np.random.default_rng(number).standard_normal(shape, np.float32)
    for k in range(models):
        own = np.random.default_rng([number, k]).standard_normal(shape, np.float32)
        own *= DEPARTURE
        own += ancestor
        own *= scale
        yield own.astype(ml_dtypes.bfloat16)


def make_decoders(place: Path, decoder: Decoder, models: int) -> list[Path]:
    """Siblings in PLACE/model-0 and so on, in one file each; those that are there already stay."""
    from rgsp_jax.checkpoint import ShardWriter, TensorSpec, plan_shards

    directories = [place / f"model-{k}" for k in range(models)]
    facts = json.dumps(asdict(decoder))
    if all((d / "decoder.json").exists() and (d / "decoder.json").read_text() == facts for d in directories):
        return directories
    specs = {name: TensorSpec(name, shape, ml_dtypes.bfloat16) for name, shape in decoder.shapes.items()}
    plan = plan_shards(specs, 1 << 40)
    writers = [ShardWriter(directory, plan) for directory in directories]
    for number, (name, shape) in enumerate(decoder.shapes.items()):
        for writer, values in zip(writers, draw_family(shape, number, models), strict=True):
            writer.write(name, values)
    for directory, writer in zip(directories, writers, strict=True):
        writer.finish()
        (directory / "config.json").write_text(json.dumps(decoder.config))
        (directory / "decoder.json").write_text(facts)
    return directories


def make_decoders_apart(place: Path, decoder: Decoder, models: int) -> list[Path]:
    """The same in a process of its own: what this one has held would count as the peak of all that it starts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(make_decoders, place, decoder, models).result()


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoders of random weights.")
    parser.add_argument("place", type=Path)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=896, help="a multiple of 14")
    arguments = parser.parse_args()
    width = arguments.width
    decoder = Decoder(layers=arguments.layers, width=width, hidden=width * 4864 // 896)
    for path in make_decoders(arguments.place, decoder, arguments.models):
        print(f"{path}: {decoder.parameters:,} parameters, {decoder.nbytes:,} bytes")


if __name__ == "__main__":
    main()
