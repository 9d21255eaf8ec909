"""The pieces every model family is wired from: attention, masks, MLPs, norms and the table of activations."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.rotary import Rotation, rotate

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


def check_image_shape(shape: tuple[int, ...], size: int, channels: int) -> None:
    """Raise ValueError unless `shape` is [batch, size, size, channels]."""
    if shape[1:] != (size, size, channels):
        raise ValueError(f"images {list(shape)}; [batch, {size}, {size}, {channels}] are needed")


def layer_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a LayerNorm over the last axis, with the two-pass variance that PyTorch computes."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def rms_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Return an RMSNorm over the last axis: `x / sqrt(mean(x^2) + epsilon) * scale`, in float32 at least."""
    return nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)


def causal_mask(time: int, window: int | None = None) -> Bool[Array, "1 1 time time"]:
    """Return True where the key (last axis) is not after the query, nor `window` or more positions before it."""
    query, key = jnp.arange(time)[:, None], jnp.arange(time)[None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask[None, None]


def padding_mask(
    attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"],
) -> Bool[Array, "batch 1 1 time"]:
    """Return True at the keys (last axis) that are tokens, where `attention_mask` is nonzero."""
    return attention_mask.astype(bool)[:, None, None, :]


def attend(
    query: Float[Array, "batch time heads width"],
    key: Float[Array, "batch source groups width"],
    value: Float[Array, "batch source groups width"],
    mask: Bool[Array, "#batch #heads #time source"] | None = None,
    *,
    bias: Float[Array, "#batch heads time source"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch time heads_width"]:
    """Return `softmax(scale q k^T + bias) v` of every head, the heads side by side in the last axis.

    Args:
        query, key, value: projected inputs; query head `h` reads group `h // (heads / groups)` of key and value.
        mask: True where the key may be seen; a query that sees none averages all values.
        bias: added to the scaled logits.
        scale: of the logits; None is `1 / sqrt(width)`.
    """
    batch, time, heads, width = query.shape
    source, groups = key.shape[1:3]
    grouped = query.reshape(batch, time, groups, heads // groups, width)
    logits = jnp.einsum("btghd,bsgd->bghts", grouped, key).reshape(batch, heads, time, source)
    logits = logits * (width**-0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits, axis=-1).reshape(batch, groups, heads // groups, time, source)
    return jnp.einsum("bghts,bsgd->btghd", weights, value).reshape(batch, time, heads * width)


class Attention(nnx.Module):
    """Multi-head softmax attention with separate query, key, value and output projections.

    Args:
        width: of the input and the output.
        heads: number of query heads.
        groups: number of key and value heads, a divisor of `heads` (grouped-query attention); None is `heads`.
        head_width: of one head; None is `width / heads`.
        use_bias: whether query, key and value have biases; `output_bias` the same of the output.
        head_norm: epsilon of an RMSNorm over each query and key head, before the rotation; None is no norm.
        scale: of the logits; None is `1 / sqrt(head_width)`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        groups: int | None = None,
        head_width: int | None = None,
        use_bias: bool = True,
        output_bias: bool = True,
        head_norm: float | None = None,
        scale: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.heads, self.groups = heads, groups or heads
        self.head_width = head_width or width // heads
        self.scale = scale
        inner, shared = self.heads * self.head_width, self.groups * self.head_width
        self.query = nnx.Linear(width, inner, use_bias=use_bias, rngs=rngs)
        self.key = nnx.Linear(width, shared, use_bias=use_bias, rngs=rngs)
        self.value = nnx.Linear(width, shared, use_bias=use_bias, rngs=rngs)
        self.output = nnx.Linear(inner, width, use_bias=output_bias, rngs=rngs)
        self.query_norm = None if head_norm is None else rms_norm(self.head_width, head_norm, rngs=rngs)
        self.key_norm = None if head_norm is None else rms_norm(self.head_width, head_norm, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Bool[Array, "#batch #heads #time source"] | None = None,
        *,
        source: Float[Array, "batch source width"] | None = None,
        rotation: Rotation | None = None,
        bias: Float[Array, "#batch heads time source"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Attend over `source` (cross-attention), or over `x` itself; `mask` is True where the key may be seen.

        `rotation` turns queries and keys by their positions, `bias` is added to the logits (see `attend`).
        """
        read = x if source is None else source
        query = split_heads(self.query(x), self.heads)
        key, value = (split_heads(project(read), self.groups) for project in (self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return self.output(attend(query, key, value, mask, bias=bias, scale=self.scale))


class FusedAttention(nnx.Module):
    """Multi-head softmax attention whose query, key and value are one projection, in this order.

    Args:
        width: of the input and the output, a multiple of `heads`.
        scale: of the logits; None is `1 / sqrt(width / heads)`.
    """

    def __init__(self, width: int, heads: int, *, scale: float | None = None, rngs: nnx.Rngs):
        self.heads = heads
        self.scale = scale
        self.fused = nnx.Linear(width, 3 * width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Bool[Array, "#batch #heads #time time"] | None = None,
        *,
        rotation: Rotation | None = None,
    ) -> Float[Array, "batch time width"]:
        """Attend over `x`; `mask` is True where the key may be seen, `rotation` turns queries and keys."""
        query, key, value = (split_heads(part, self.heads) for part in jnp.split(self.fused(x), 3, axis=-1))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return self.output(attend(query, key, value, mask, scale=self.scale))


def split_heads(x: Float[Array, "batch time width"], heads: int) -> Float[Array, "batch time heads head_width"]:
    """Return `x` with its last axis cut into `heads` equal parts."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class Mlp(nnx.Module):
    """Two linear maps with an activation between: `down(activation(up(x)))`; of the input's width unless `output`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        *,
        output: int | None = None,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = nnx.Linear(width, hidden, use_bias=use_bias, rngs=rngs)
        self.down = nnx.Linear(hidden, output or width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch output"]:
        """Apply the MLP to the last axis."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMlp(nnx.Module):
    """Three linear maps: `down(activation(gate(x)) * up(x))`, SwiGLU with silu and GEGLU with gelu (Shazeer, 2020)."""

    def __init__(self, width: int, hidden: int, activation: str, *, use_bias: bool = False, rngs: nnx.Rngs):
        self.activation = activation
        self.gate = nnx.Linear(width, hidden, use_bias=use_bias, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=use_bias, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Apply the MLP to the last axis."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class PreNormLayer(nnx.Module):
    """One pre-norm layer of parts already built: `x = x + attention(norm(x)); x = x + mlp(norm(x))`."""

    def __init__(self, attention_norm: nnx.Module, attention: nnx.Module, mlp_norm: nnx.Module, mlp: nnx.Module):
        self.attention_norm: Any = attention_norm
        self.attention: Any = attention
        self.mlp_norm: Any = mlp_norm
        self.mlp: Any = mlp

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Bool[Array, "#batch #heads #time time"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch time width"]:
        """Apply the layer; `mask` is True where the key may be seen, `options` are the attention's other arguments."""
        x = x + self.attention(self.attention_norm(x), mask, **options)
        return x + self.mlp(self.mlp_norm(x))


class CausalLm(nnx.Module):
    """A decoder with a head that gives the logits of the next token: its word embedding again, or a matrix of its own.

    Args:
        decoder: module of (input_ids, attention_mask) with an embedding `word`.
        tied: whether the head is that embedding.
    """

    def __init__(self, decoder: Any, *, tied: bool, rngs: nnx.Rngs):
        self.decoder = decoder
        word = self.decoder.word
        self.lm_head = None if tied else nnx.Linear(word.features, word.num_embeddings, use_bias=False, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time vocabulary"]:
        """Return the logits of the next token at every position."""
        return self.predict(self.decoder(input_ids, attention_mask))

    def predict(self, hidden: Float[Array, "batch time width"]) -> Float[Array, "batch time vocabulary"]:
        """Return the logits of the decoder's last hidden states."""
        return self.decoder.word.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
