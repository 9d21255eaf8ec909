"""GPT-2: pre-norm causal decoder over learned positions, its projections fused (Radford et al., 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.layers import (
    ACTIVATIONS,
    CausalLm,
    FusedAttention,
    Mlp,
    PreNormLayer,
    causal_mask,
    layer_norm,
    padding_mask,
)
from rgsp_jax.models.weights import WeightRule, WeightTable, embedding, linear, nest, norm

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
)
"""Field as other model types name it -> as GPT-2 does; a config.json may hold either."""


@dataclass(frozen=True)
class Gpt2Config:
    """Sizes of a GPT-2, named as Hugging Face names them.

    Raises RefusedError, with all problems at once, for an unknown activation and heads that do not divide the width.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    """None is `4 n_embd`."""
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        problems = []
        if self.activation_function not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            problems.append(
                f"config field 'activation_function' is {self.activation_function!r}; known activations: {known}"
            )
        if self.n_embd % self.n_head:
            problems.append(f"config field 'n_embd' is {self.n_embd}, not a multiple of 'n_head' = {self.n_head}")
        if problems:
            raise RefusedError(problems)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "Gpt2Config":
        """Read a parsed `config.json`.

        Raises RefusedError for another model type, cross-attention, and one size under two names that disagree.
        """
        problems = [
            f"config field {field!r} is {config[field]!r}; the GPT-2 family here has {value!r} only"
            for field, value in (("model_type", "gpt2"), ("add_cross_attention", False))
            if config.get(field, value) != value
        ]
        problems += [
            f"config fields {alias!r} = {config[alias]!r} and {name!r} = {config[name]!r} are one size; keep one"
            for alias, name in ALIASES.items()
            if alias in config and config.get(name, config[alias]) != config[alias]
        ]
        if problems:
            raise RefusedError(problems)
        given = {ALIASES.get(name, name): value for name, value in config.items()}
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})

    def attention_scale(self, layer: int) -> float:
        """Return what the logits of a layer's attention are multiplied by."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def gpt2_layer(config: Gpt2Config, layer: int, *, rngs: nnx.Rngs) -> PreNormLayer:
    """Return the layer of that number."""
    width, epsilon = config.n_embd, config.layer_norm_epsilon
    return PreNormLayer(
        attention_norm=layer_norm(width, epsilon, rngs=rngs),
        attention=FusedAttention(width, config.n_head, scale=config.attention_scale(layer), rngs=rngs),
        mlp_norm=layer_norm(width, epsilon, rngs=rngs),
        mlp=Mlp(width, config.n_inner or 4 * width, config.activation_function, rngs=rngs),
    )


def linear_in_out(key: str, path: str) -> tuple[WeightRule, WeightRule]:
    """Return the rules of what GPT-2 calls Conv1D: a linear map stored (in, out), as nnx.Linear stores it."""
    return WeightRule(f"{key}.weight", f"{path}.kernel"), WeightRule(f"{key}.bias", f"{path}.bias")


GPT2_TABLE = WeightTable(
    rules=(
        *embedding("wte", "word"),
        *embedding("wpe", "position"),
        *norm("h.{layer}.ln_1", "layers.{layer}.attention_norm"),
        *linear_in_out("h.{layer}.attn.c_attn", "layers.{layer}.attention.fused"),
        *linear_in_out("h.{layer}.attn.c_proj", "layers.{layer}.attention.output"),
        *norm("h.{layer}.ln_2", "layers.{layer}.mlp_norm"),
        *linear_in_out("h.{layer}.mlp.c_fc", "layers.{layer}.mlp.up"),
        *linear_in_out("h.{layer}.mlp.c_proj", "layers.{layer}.mlp.down"),
        *norm("ln_f", "final_norm"),
    ),
    prefixes=("transformer.",),
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
)


class Gpt2(nnx.Module):
    """GPT-2 without a head; equal to transformers' GPT2Model in evaluation mode."""

    weight_table: ClassVar[WeightTable] = GPT2_TABLE

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.word = nnx.Embed(config.vocab_size, config.n_embd, rngs=rngs)
        self.position = nnx.Embed(config.n_positions, config.n_embd, rngs=rngs)
        self.layers = nnx.List([gpt2_layer(config, layer, rngs=rngs) for layer in range(config.n_layer)])
        self.final_norm = layer_norm(config.n_embd, config.layer_norm_epsilon, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the last hidden states; `attention_mask` is nonzero at tokens and 0 at padding.

        Positions count from the first column, padding or not, as in transformers' forward pass. Raises ValueError at
        trace time if the sequence is longer than the position embeddings.
        """
        time = input_ids.shape[1]
        if time > self.config.n_positions:
            raise ValueError(f"{time} tokens, but only {self.config.n_positions} position embeddings")
        mask = causal_mask(time)
        if attention_mask is not None:
            mask = mask & padding_mask(attention_mask)
        x = self.word(input_ids) + self.position(jnp.arange(time, dtype=jnp.int32))[None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)


class Gpt2Lm(CausalLm):
    """GPT-2 with a head; equal to transformers' GPT2LMHeadModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(GPT2_TABLE, "transformer.", "decoder.", linear("lm_head", "lm_head"))

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        super().__init__(Gpt2(config, rngs=rngs), tied=config.tie_word_embeddings, rngs=rngs)


class Gpt2OpenAi(Gpt2Lm):
    """The same, of checkpoints as OpenAI's own are stored: a tied head, and keys without `transformer.`."""

    weight_table: ClassVar[WeightTable] = nest(GPT2_TABLE, "", "decoder.")
