"""Small perceptrons whose neurons the tests permute."""

import jax.numpy as jnp
import numpy as np

SPEC = {
    "in.weight": ("h1", None),
    "in.bias": ("h1",),
    "mid.weight": ("h2", "h1"),
    "mid.bias": ("h2",),
    "out.weight": (None, "h2"),
    "out.bias": (None,),
}
SIZES = {"h1": 12, "h2": 9}
INPUTS = jnp.asarray(np.random.default_rng(99).normal(size=(20, 16)))


def mlp(seed, spread=1.0, around=None):
    rng = np.random.default_rng(seed)
    shapes = {"in.weight": (12, 16), "mid.weight": (9, 12), "out.weight": (3, 9)}
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    drawn = {name: jnp.asarray(spread * rng.normal(size=shape)) for name, shape in shapes.items()}
    return drawn if around is None else {name: around[name] + x for name, x in drawn.items()}


def outputs(params, x):
    for layer in ("in", "mid", "out"):
        x = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"][None]
        x = x if layer == "out" else jnp.maximum(x, 0)
    return np.asarray(x)


def shuffle(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.permutation(size), jnp.int32) for name, size in SIZES.items()}
