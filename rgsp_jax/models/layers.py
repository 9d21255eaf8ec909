"""The pieces every model family is wired from: attention, MLP, norm and the table of activations."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from rgsp_jax.errors import RefusedError

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)
"""Name in a Hugging Face config -> function. `gelu` is the exact one, as there; flax's own default is tanh."""


def check_activation(name: str, field: str) -> None:
    """Raise RefusedError unless `name`, the value of the config's `field`, is in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise RefusedError(f"config field {field!r} is {name!r}; known activations: {', '.join(sorted(ACTIVATIONS))}")


def layer_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a LayerNorm over the last axis, with the two-pass variance that PyTorch computes."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head softmax attention with separate query, key, value and output projections.

    `softmax(q k^T / sqrt(head_width)) v`, `head_width = width / heads`.
    """

    def __init__(self, width: int, heads: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.heads = heads
        self.query = nnx.Linear(width, width, use_bias=use_bias, rngs=rngs)
        self.key = nnx.Linear(width, width, use_bias=use_bias, rngs=rngs)
        self.value = nnx.Linear(width, width, use_bias=use_bias, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"], mask: Bool[Array, "batch #heads #time time"] | None = None
    ) -> Float[Array, "batch time width"]:
        """Attend over `time`; `mask` is True where the key (last axis) may be seen by the query."""
        batch, time, width = x.shape
        split = (batch, time, self.heads, width // self.heads)
        query, key, value = (project(x).reshape(split) for project in (self.query, self.key, self.value))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // self.heads) ** -0.5
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), value)
        return self.output(attended.reshape(batch, time, width))


class Mlp(nnx.Module):
    """Two linear maps with an activation between: `down(activation(up(x)))`."""

    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Apply the MLP to the last axis."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
