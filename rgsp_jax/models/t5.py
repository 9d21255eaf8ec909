"""T5: encoder and decoder with relative position biases, v1.0 and v1.1 with gated MLPs (Raffel et al., 2020)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.layers import ACTIVATIONS, Attention, GatedMlp, Mlp, causal_mask, padding_mask, rms_norm
from rgsp_jax.models.weights import WeightRule, WeightTable, embedding, linear, nest, norm

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "hidden_size": "d_model",
        "head_dim": "d_kv",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }
)
"""Field as other model types name it -> as T5 does; a config.json may hold either."""


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5, named as Hugging Face names them.

    Raises RefusedError, with all problems at once, for an unknown activation and for buckets that no distance fits.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    """None is `num_layers`."""
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    scale_decoder_outputs: bool = True
    """Whether the head reads the decoder's outputs divided by `sqrt(d_model)` (v1.0)."""
    encoder_word: bool = False
    """Whether the encoder has word embeddings of its own beside the shared ones; `decoder_word` the decoder."""
    decoder_word: bool = False

    def __post_init__(self):
        problems = []
        if self.dense_act_fn not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            problems.append(f"config field 'dense_act_fn' is {self.dense_act_fn!r}; known activations: {known}")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4:
            problems.append(f"config field 'relative_attention_num_buckets' is {buckets}; 4 or more are needed")
        if distance <= buckets // 2:
            problems.append(
                f"config field 'relative_attention_max_distance' is {distance}; more than half of "
                f"'relative_attention_num_buckets' = {buckets} is needed"
            )
        if problems:
            raise RefusedError(problems)

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any], *, encoder_word: bool = False, decoder_word: bool = False
    ) -> "T5Config":
        """Read a parsed `config.json`; which embeddings the checkpoint holds the file does not say.

        Raises RefusedError for another model type, a decoder alone, an MLP that is not of T5's two forms, and one size
        under two names that disagree.
        """
        problems = [
            f"config field {field!r} is {config[field]!r}; the T5 family here has {value!r} only"
            for field, value in (("model_type", "t5"), ("is_decoder", False))
            if config.get(field, value) != value
        ]
        problems += [
            f"config fields {alias!r} = {config[alias]!r} and {name!r} = {config[name]!r} are one size; keep one"
            for alias, name in ALIASES.items()
            if alias in config and config.get(name, config[alias]) != config[alias]
        ]
        form = config.get("feed_forward_proj", "relu")
        gate, _, activation = form.rpartition("-")
        if gate not in ("", "gated"):
            problems.append(
                f"config field 'feed_forward_proj' is {form!r}; an activation is needed, or gated-ACTIVATION"
            )
        if problems:
            raise RefusedError(problems)
        given = {
            "dense_act_fn": "gelu_new" if form == "gated-gelu" else activation,
            "is_gated_act": gate == "gated",
            # Files older than this field tell by their ties: v1.0 is tied and scales, v1.1 does neither.
            "scale_decoder_outputs": config.get("tie_word_embeddings") is not False,
            **{ALIASES.get(name, name): value for name, value in config.items()},
        }
        names = {field.name for field in fields(cls)} - {"encoder_word", "decoder_word"}
        sizes = {name: given[name] for name in names if name in given}
        if sizes.get("num_decoder_layers") is None and "num_layers" in sizes:
            sizes["num_decoder_layers"] = sizes["num_layers"]
        return cls(**sizes, encoder_word=encoder_word, decoder_word=decoder_word)


def bucket_positions(
    distances: Int[np.ndarray, " distances"], buckets: int, longest: int, bidirectional: bool
) -> Int[np.ndarray, " distances"]:
    """Return the bucket of each distance, key position minus query position.

    Half of the buckets hold one distance each, the others the longer ones up to `longest` in logarithmic steps; what is
    beyond is in the last. `bidirectional` gives keys after the query half of all buckets; else they share bucket 0.
    """
    after = np.zeros_like(distances)
    if bidirectional:
        buckets //= 2
        after = np.where(distances > 0, buckets, 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = buckets // 2
    # In float32 as transformers does: whole steps fall on either side of a bucket's edge by rounding alone.
    ratios = np.log(np.maximum(distances, exact).astype(np.float32) / exact) / math.log(longest / exact)
    steps = np.minimum(exact + (ratios * (buckets - exact)).astype(distances.dtype), buckets - 1)
    return after + np.where(distances < exact, distances, steps)


class T5Layer(nnx.Module):
    """One pre-norm layer: self-attention, in a decoder attention over the encoder's outputs, and the MLP."""

    def __init__(self, config: T5Config, *, decoder: bool, rngs: nnx.Rngs):
        width, epsilon = config.d_model, config.layer_norm_epsilon

        def attention() -> Attention:
            return Attention(
                width,
                config.num_heads,
                head_width=config.d_kv,
                use_bias=False,
                output_bias=False,
                scale=1.0,
                rngs=rngs,
            )

        def mlp(kind: type[Mlp] | type[GatedMlp]) -> Any:
            return kind(width, config.d_ff, config.dense_act_fn, use_bias=False, rngs=rngs)

        self.attention_norm = rms_norm(width, epsilon, rngs=rngs)
        self.attention = attention()
        self.cross_norm = rms_norm(width, epsilon, rngs=rngs) if decoder else None
        self.cross = attention() if decoder else None
        self.mlp_norm = rms_norm(width, epsilon, rngs=rngs)
        # Two names, because on disk too the two forms name their matrices differently.
        self.mlp = None if config.is_gated_act else mlp(Mlp)
        self.gated_mlp = mlp(GatedMlp) if config.is_gated_act else None

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Bool[Array, "#batch 1 #time time"] | None,
        bias: Float[Array, "1 heads time time"],
        source: Float[Array, "batch source width"] | None = None,
        source_mask: Bool[Array, "batch 1 1 source"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Apply the layer; the masks are True where a key may be seen, `source` is what a decoder's layer reads."""
        x = x + self.attention(self.attention_norm(x), mask, bias=bias)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), source_mask, source=source)
        mlp: Any = self.mlp if self.gated_mlp is None else self.gated_mlp
        return x + mlp(self.mlp_norm(x))


class T5Stack(nnx.Module):
    """The encoder's or the decoder's layers, with the position biases that they share and the last norm."""

    def __init__(self, config: T5Config, *, decoder: bool, rngs: nnx.Rngs):
        layers = config.num_layers if not decoder or config.num_decoder_layers is None else config.num_decoder_layers
        own = config.decoder_word if decoder else config.encoder_word
        self.config = config
        self.decoder = decoder
        self.word = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs) if own else None
        self.relative = nnx.Embed(config.relative_attention_num_buckets, config.num_heads, rngs=rngs)
        self.layers = nnx.List([T5Layer(config, decoder=decoder, rngs=rngs) for _ in range(layers)])
        self.final_norm = rms_norm(config.d_model, config.layer_norm_epsilon, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "batch time"],
        shared: nnx.Embed,
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        source: Float[Array, "batch source width"] | None = None,
        source_mask: Int[Array, "batch source"] | Bool[Array, "batch source"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the last hidden states of tokens looked up in this stack's own embeddings or the shared ones."""
        time = ids.shape[1]
        x = (shared if self.word is None else self.word)(ids)
        mask = causal_mask(time) if self.decoder else None
        if attention_mask is not None:
            padding = padding_mask(attention_mask)
            mask = padding if mask is None else mask & padding
        bias = self.position_bias(time)
        seen = None if source_mask is None else padding_mask(source_mask)
        for layer in self.layers:
            x = layer(x, mask, bias, source, seen)
        return self.final_norm(x)

    def position_bias(self, time: int) -> Float[Array, "1 heads time time"]:
        """Return what the logits of every layer's self-attention are added."""
        buckets = bucket_positions(
            np.arange(1 - time, time, dtype=np.int32),
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
            bidirectional=not self.decoder,
        )
        steps = jnp.arange(time, dtype=jnp.int32)
        distances = steps[None, :] - steps[:, None]
        return self.relative(jnp.asarray(buckets)[distances + (time - 1)]).transpose(2, 0, 1)[None]


def stack_rules(stack: str, *, decoder: bool) -> tuple[WeightRule, ...]:
    """Return the rules of the encoder or decoder; on disk the parts of a layer are numbered."""
    key, path = f"{stack}.block.{{layer}}.layer", f"{stack}.layers.{{layer}}"
    mlp = f"{key}.{2 if decoder else 1}.DenseReluDense"
    crossing = (
        *norm(f"{key}.1.layer_norm", f"{path}.cross_norm"),
        *attention_rules(f"{key}.1.EncDecAttention", f"{path}.cross"),
    )
    return (
        *embedding(f"{stack}.embed_tokens", f"{stack}.word"),
        *embedding(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.relative"),
        *norm(f"{key}.0.layer_norm", f"{path}.attention_norm"),
        *attention_rules(f"{key}.0.SelfAttention", f"{path}.attention"),
        *(crossing if decoder else ()),
        *norm(f"{key}.{2 if decoder else 1}.layer_norm", f"{path}.mlp_norm"),
        *linear(f"{mlp}.wi", f"{path}.mlp.up"),
        *linear(f"{mlp}.wo", f"{path}.mlp.down"),
        *linear(f"{mlp}.wi_0", f"{path}.gated_mlp.gate"),
        *linear(f"{mlp}.wi_1", f"{path}.gated_mlp.up"),
        *linear(f"{mlp}.wo", f"{path}.gated_mlp.down"),
        *norm(f"{stack}.final_layer_norm", f"{stack}.final_norm"),
    )


def attention_rules(key: str, path: str) -> tuple[WeightRule, ...]:
    """Return the rules of one attention's four projections."""
    names = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    return tuple(rule for theirs, ours in names for rule in linear(f"{key}.{theirs}", f"{path}.{ours}"))


T5_TABLE = WeightTable(
    rules=(*embedding("shared", "word"), *stack_rules("encoder", decoder=False), *stack_rules("decoder", decoder=True)),
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)


class T5Encoder(nnx.Module):
    """T5's encoder alone; equal to transformers' T5EncoderModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = T5_TABLE

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.word = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = T5Stack(config, decoder=False, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the last hidden states; `attention_mask` is nonzero at tokens and 0 at padding."""
        return self.encoder(input_ids, self.word, attention_mask)


class T5(nnx.Module):
    """T5's encoder and decoder without a head; equal to transformers' T5Model in evaluation mode."""

    weight_table: ClassVar[WeightTable] = T5_TABLE

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.word = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = T5Stack(config, decoder=False, rngs=rngs)
        self.decoder = T5Stack(config, decoder=True, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch source"],
        decoder_input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch source"] | Bool[Array, "batch source"] | None = None,
        decoder_attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the decoder's last hidden states; the masks are nonzero at tokens and 0 at padding."""
        source = self.encoder(input_ids, self.word, attention_mask)
        return self.decoder(decoder_input_ids, self.word, decoder_attention_mask, source, attention_mask)


class T5Lm(nnx.Module):
    """T5 with a head on the decoder; equal to transformers' T5ForConditionalGeneration in evaluation mode.

    Args:
        tied: whether the head is the shared word embedding; else it is a Linear without bias.
    """

    weight_table: ClassVar[WeightTable] = nest(T5_TABLE, "", "model.", linear("lm_head", "lm_head"))

    def __init__(self, config: T5Config, *, tied: bool = True, rngs: nnx.Rngs):
        self.model = T5(config, rngs=rngs)
        self.lm_head = None if tied else nnx.Linear(config.d_model, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch source"],
        decoder_input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch source"] | Bool[Array, "batch source"] | None = None,
        decoder_attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time vocabulary"]:
        """Return the logits of the next token at every position of the decoder."""
        hidden = self.model(input_ids, decoder_input_ids, attention_mask, decoder_attention_mask)
        if self.model.config.scale_decoder_outputs:
            hidden = hidden * self.model.config.d_model**-0.5
        return self.model.word.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
