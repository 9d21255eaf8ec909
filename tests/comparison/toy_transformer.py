"""A small transformer in NumPy whose neurons can be put into another order without changing what it computes."""

from collections.abc import Mapping

import numpy as np

WIDTH, HEADS, INNER, WORDS, LAYERS = 32, 4, 64, 150, 2
CONFIG = {"model_type": "toy", "architectures": ["ToyModel"], "num_attention_heads": HEADS}
Tensors = dict[str, np.ndarray]


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "attention.query.weight": (WIDTH, WIDTH),
        "attention.key.weight": (WIDTH, WIDTH),
        "attention.value.weight": (WIDTH, WIDTH),
        "attention.value.bias": (WIDTH,),
        "attention.output.weight": (WIDTH, WIDTH),
        "mlp.up.weight": (INNER, WIDTH),
        "mlp.up.bias": (INNER,),
        "mlp.down.weight": (WIDTH, INNER),
    }
    found = {"embed_tokens.weight": (WORDS, WIDTH)}
    return found | {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def ancestor(seed: int) -> Tensors:
    """A model drawn at random."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes().items()}


def fine_tune(model: Mapping[str, np.ndarray], seed: int, step: float) -> Tensors:
    """A descendant: low-rank and dense steps of relative size `step` together."""
    rng = np.random.default_rng(1000 + seed)
    tuned = {}
    for name, x in model.items():
        change = rng.normal(size=x.shape)
        if x.ndim == 2:
            change += 3 * np.outer(rng.normal(size=x.shape[0]), rng.normal(size=x.shape[1]))
        tuned[name] = x + step * np.linalg.norm(x) / np.linalg.norm(change) * change
    return tuned


def permute_neurons(model: Mapping[str, np.ndarray], seed: int, *, stream: bool = False) -> Tensors:
    """The same function: MLP neurons, heads and what is in them reordered; with `stream`, the residual stream too."""
    rng = np.random.default_rng(2000 + seed)
    twin = dict(model)
    size = WIDTH // HEADS
    for i in range(LAYERS):
        inner, heads = rng.permutation(INNER), rng.permutation(HEADS)
        scores = np.concatenate([head * size + rng.permutation(size) for head in heads])
        values = np.concatenate([head * size + rng.permutation(size) for head in heads])
        for name, order, axis in (
            ("mlp.up.weight", inner, 0),
            ("mlp.up.bias", inner, 0),
            ("mlp.down.weight", inner, 1),
            ("attention.query.weight", scores, 0),
            ("attention.key.weight", scores, 0),
            ("attention.value.weight", values, 0),
            ("attention.value.bias", values, 0),
            ("attention.output.weight", values, 1),
        ):
            twin[f"layers.{i}.{name}"] = np.take(twin[f"layers.{i}.{name}"], order, axis)
    if stream:
        order = rng.permutation(WIDTH)
        for name, x in twin.items():
            if x.ndim == 2:
                axis = 0 if name.endswith(("output.weight", "down.weight")) else 1
                twin[name] = np.take(x, order, axis)
    return twin


def answer(model: Mapping[str, np.ndarray], words: np.ndarray) -> np.ndarray:
    """Logits with tied embeddings, [words, vocabulary]."""
    x = model["embed_tokens.weight"][words]
    for i in range(LAYERS):
        layer = {n.removeprefix(f"layers.{i}."): w for n, w in model.items() if n.startswith(f"layers.{i}.")}
        q, k, v = (x @ layer[f"attention.{part}.weight"].T for part in ("query", "key", "value"))
        v = v + layer["attention.value.bias"]
        heads = []
        for h in range(HEADS):
            part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
            scores = np.exp(q[:, part] @ k[:, part].T)
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        x = x + np.concatenate(heads, 1) @ layer["attention.output.weight"].T
        x = x + np.maximum(x @ layer["mlp.up.weight"].T + layer["mlp.up.bias"], 0) @ layer["mlp.down.weight"].T
    return x @ model["embed_tokens.weight"].T


def as_float32(model: Mapping[str, np.ndarray]) -> Tensors:
    return {name: x.astype(np.float32) for name, x in model.items()}
