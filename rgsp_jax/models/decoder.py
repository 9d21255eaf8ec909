"""Llama, Mistral, Qwen2 and Qwen3: one pre-norm causal decoder with rotary positions and gated MLPs, and its head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    CausalLm,
    GatedMlp,
    PreNormLayer,
    causal_mask,
    padding_mask,
    rms_norm,
)
from rgsp_jax.models.rotary import Rotary, Rotation, rotation_of
from rgsp_jax.models.weights import WeightTable, embedding, linear, nest, norm

Windows = tuple[int | None, ...]
"""Of each layer, how many positions a token sees, itself included; None is all before it."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Fields of a config.json without which nothing is known of the model."""
FULL, SLIDING = "full_attention", "sliding_attention"


def read_no_windows(config: Mapping[str, Any]) -> Windows:
    """No layer has a window; RefusedError if `layer_types` says otherwise."""
    return agree_with_types(config, (None,) * config["num_hidden_layers"])


def read_one_window(config: Mapping[str, Any]) -> Windows:
    """Every layer has the window `sliding_window`, or none; RefusedError if `layer_types` says otherwise."""
    return agree_with_types(config, (check_window(config["sliding_window"]),) * config["num_hidden_layers"])


def read_layer_windows(config: Mapping[str, Any]) -> Windows:
    """The window `sliding_window` in the layers from `max_window_layers` on, if `use_sliding_window`.

    `layer_types`, where given, says which layers instead. Raises RefusedError for layer types of other kinds or number.
    """
    layers = config["num_hidden_layers"]
    window = check_window(config["sliding_window"]) if config["use_sliding_window"] else None
    types = config.get("layer_types")
    if types is None:
        return tuple(window if layer >= config["max_window_layers"] else None for layer in range(layers))
    return agree_with_types(config, tuple(window if kind == SLIDING else None for kind in types))


def check_window(window: Any) -> int | None:
    """Return the window; RefusedError unless it is None or a positive integer."""
    if window is not None and not is_size(window):
        raise RefusedError(f"config field 'sliding_window' is {window!r}; a positive integer or null is needed")
    return window


def agree_with_types(config: Mapping[str, Any], windows: Windows) -> Windows:
    """Return `windows`; RefusedError where `layer_types` is given and describes others."""
    expected = [FULL if window is None else SLIDING for window in windows]
    types = config.get("layer_types")
    if types is not None and (list(types) != expected or len(expected) != config["num_hidden_layers"]):
        raise RefusedError(
            f"config field 'layer_types' is {list(types)}; with the other fields, {config['num_hidden_layers']} layers "
            f"of {' or '.join(sorted(set(expected))) or FULL} were expected"
        )
    return windows


def is_size(value: Any) -> bool:
    """Whether a value of a config is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Kind(NamedTuple):
    """How the config.json of one model type is read."""

    defaults: Mapping[str, Any]
    """What it means where it leaves a field out."""
    query_bias: str | bool = False
    """Whether query, key and value have biases, or the name of the field that tells."""
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    head_norms: bool = False
    windows: Callable[[Mapping[str, Any]], Windows] = read_no_windows


QWEN: Mapping[str, Any] = MappingProxyType(
    {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "llama": Kind({}, "attention_bias", "attention_bias", "mlp_bias"),
        "mistral": Kind({"num_key_value_heads": 8, "sliding_window": 4096}, windows=read_one_window),
        "qwen2": Kind(QWEN, query_bias=True, windows=read_layer_windows),
        "qwen3": Kind(
            {**QWEN, "head_dim": 128},
            query_bias="attention_bias",
            output_bias="attention_bias",
            head_norms=True,
            windows=read_layer_windows,
        ),
        "qwen2_vl_text": Kind(
            {**QWEN, "num_key_value_heads": 8, "max_window_layers": 80, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
            query_bias=True,
            windows=read_layer_windows,
        ),
    }
)
"""`model_type` -> how its config.json is read."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder, named as Hugging Face names them where it has a name.

    Raises RefusedError, with all problems at once, for an unknown activation and for sizes that do not fit.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary: Rotary
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    query_bias: bool = False
    """Whether the query, key and value projections have biases; `output_bias` the same of the output projection."""
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    """Whether queries and keys are normed per head."""
    windows: Windows = ()
    """One per layer; empty is none in any layer."""
    tie_word_embeddings: bool = False

    def __post_init__(self):
        problems = []
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            problems.append(f"config field 'hidden_act' is {self.hidden_act!r}; known activations: {known}")
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"config field 'num_attention_heads' is {self.num_attention_heads}, not a multiple of "
                f"'num_key_value_heads' = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            problems.append(f"config field 'head_dim' is {self.head_dim}; rotary embeddings need an even one")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            problems.append(f"{len(self.windows)} windows for {self.num_hidden_layers} layers; give one per layer")
        if problems:
            raise RefusedError(problems)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read a parsed `config.json` of a type in KINDS.

        Raises RefusedError for another type, missing sizes, windows that contradict each other, and rotary embeddings
        that `Rotary` refuses.
        """
        kind = KINDS.get(config.get("model_type", ""))
        if kind is None:
            raise RefusedError(
                f"config field 'model_type' is {config.get('model_type')!r}; the decoders here are {', '.join(KINDS)}"
            )
        given = {**kind.defaults, **config}
        problems = [
            f"config field {name!r} is {given.get(name)!r}; a positive integer is needed"
            for name in SIZES
            if not is_size(given.get(name))
        ]
        readers: dict[str, Callable[[Mapping[str, Any]], Any]] = {"rotary": Rotary.from_huggingface}
        readers |= {} if problems else {"windows": kind.windows}
        parts: dict[str, Any] = {}
        for name, read in readers.items():
            try:
                parts[name] = read(given)
            except RefusedError as error:
                problems += error.problems
        if problems:
            raise RefusedError(problems)

        def read_switch(switch: str | bool) -> bool:
            return bool(given.get(switch, False)) if isinstance(switch, str) else switch

        heads = given["num_attention_heads"]
        return cls(
            **{name: given[name] for name in SIZES},
            num_key_value_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or given["hidden_size"] // heads,
            **parts,
            hidden_act=given.get("hidden_act", "silu"),
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            query_bias=read_switch(kind.query_bias),
            output_bias=read_switch(kind.output_bias),
            mlp_bias=read_switch(kind.mlp_bias),
            head_norms=kind.head_norms,
            tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
        )


def decoder_layer(config: DecoderConfig, *, rngs: nnx.Rngs) -> PreNormLayer:
    """Return one layer of the decoder."""
    width, epsilon = config.hidden_size, config.rms_norm_eps
    return PreNormLayer(
        attention_norm=rms_norm(width, epsilon, rngs=rngs),
        attention=Attention(
            width,
            config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_width=config.head_dim,
            use_bias=config.query_bias,
            output_bias=config.output_bias,
            head_norm=epsilon if config.head_norms else None,
            rngs=rngs,
        ),
        mlp_norm=rms_norm(width, epsilon, rngs=rngs),
        mlp=GatedMlp(width, config.intermediate_size, config.hidden_act, use_bias=config.mlp_bias, rngs=rngs),
    )


DECODER_TABLE = WeightTable(
    rules=(
        *embedding("embed_tokens", "word"),
        *norm("layers.{layer}.input_layernorm", "layers.{layer}.attention_norm"),
        *linear("layers.{layer}.self_attn.q_proj", "layers.{layer}.attention.query"),
        *linear("layers.{layer}.self_attn.k_proj", "layers.{layer}.attention.key"),
        *linear("layers.{layer}.self_attn.v_proj", "layers.{layer}.attention.value"),
        *linear("layers.{layer}.self_attn.o_proj", "layers.{layer}.attention.output"),
        *norm("layers.{layer}.self_attn.q_norm", "layers.{layer}.attention.query_norm"),
        *norm("layers.{layer}.self_attn.k_norm", "layers.{layer}.attention.key_norm"),
        *norm("layers.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm"),
        *linear("layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.gate"),
        *linear("layers.{layer}.mlp.up_proj", "layers.{layer}.mlp.up"),
        *linear("layers.{layer}.mlp.down_proj", "layers.{layer}.mlp.down"),
        *norm("norm", "final_norm"),
    ),
    prefixes=("model.",),
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
)


class Decoder(nnx.Module):
    """Causal decoder without a head; equal to transformers' LlamaModel and its like in evaluation mode."""

    weight_table: ClassVar[WeightTable] = DECODER_TABLE

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.word = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([decoder_layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.final_norm = rms_norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the last hidden states; `attention_mask` is nonzero at tokens and 0 at padding.

        Positions count from the first column, padding or not, as in transformers' forward pass.
        """
        frequencies = self.config.rotary.frequencies(self.config.head_dim)
        rotation = rotation_of(jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None], frequencies)
        return self.run_layers(self.word(input_ids), rotation, attention_mask)

    def run_layers(
        self,
        x: Float[Array, "batch time width"],
        rotation: Rotation,
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the last hidden states of embedded tokens at the positions of `rotation`."""
        windows = self.config.windows or (None,) * len(self.layers)
        masks = {window: causal_mask(x.shape[1], window) for window in set(windows)}
        if attention_mask is not None:
            masks = {window: mask & padding_mask(attention_mask) for window, mask in masks.items()}
        for layer, window in zip(self.layers, windows, strict=True):
            x = layer(x, masks[window], rotation=rotation)
        return self.final_norm(x)


class DecoderLm(CausalLm):
    """Causal decoder with a head; equal to transformers' LlamaForCausalLM and its like in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(DECODER_TABLE, "model.", "decoder.", linear("lm_head", "lm_head"))

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(Decoder(config, rngs=rngs), tied=config.tie_word_embeddings, rngs=rngs)
