"""BERT: post-norm encoder over word, position and token-type embeddings (Devlin et al., 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.layers import ACTIVATIONS, Attention, Mlp, check_activation, layer_norm
from rgsp_jax.models.weights import WeightRule, WeightTable, embedding, linear, nest, norm


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder, named as Hugging Face names them.

    Raises RefusedError for an unknown activation and for heads that do not divide the width.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pooler: bool = True

    model_types: ClassVar[tuple[str, ...]] = ("bert",)

    def __post_init__(self):
        check_activation(self.hidden_act, "hidden_act")
        if self.hidden_size % self.num_attention_heads:
            raise RefusedError(
                f"config field 'hidden_size' is {self.hidden_size}, not a multiple of "
                f"'num_attention_heads' = {self.num_attention_heads}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, pooler: bool = True) -> Self:
        """Read a parsed `config.json`; `pooler` says whether the checkpoint holds `pooler.dense` (the file does not).

        Raises RefusedError where the config describes another model: type, position embedding or decoder.
        """
        expected = (
            ("model_type", cls.model_types),
            ("position_embedding_type", ("absolute",)),
            ("is_decoder", (False,)),
            ("add_cross_attention", (False,)),
        )
        problems = [
            f"config field {field!r} is {config[field]!r}; this family has {' or '.join(map(repr, values))} only"
            for field, values in expected
            if config.get(field, values[0]) not in values
        ]
        if problems:
            raise RefusedError(problems)
        names = {field.name for field in fields(cls)} - {"pooler"}
        return cls(**{name: config[name] for name in names if name in config}, pooler=pooler)

    @property
    def max_tokens(self) -> int:
        """Length of the longest text."""
        return self.max_position_embeddings


class BertLayer(nnx.Module):
    """One post-norm layer: `x = norm(x + attention(x)); x = norm(x + mlp(x))`."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config.hidden_size, config.num_attention_heads, rngs=rngs)
        self.attention_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act, rngs=rngs)
        self.mlp_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"], mask: Bool[Array, "batch 1 1 time"]
    ) -> Float[Array, "batch time width"]:
        """Apply the layer; `mask` is True at the tokens that may be attended to."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.mlp_norm(x + self.mlp(x))


BERT_TABLE = WeightTable(
    rules=(
        *embedding("embeddings.word_embeddings", "word"),
        *embedding("embeddings.position_embeddings", "position"),
        *embedding("embeddings.token_type_embeddings", "token_type"),
        *norm("embeddings.LayerNorm", "embedding_norm"),
        *linear("encoder.layer.{layer}.attention.self.query", "layers.{layer}.attention.query"),
        *linear("encoder.layer.{layer}.attention.self.key", "layers.{layer}.attention.key"),
        *linear("encoder.layer.{layer}.attention.self.value", "layers.{layer}.attention.value"),
        *linear("encoder.layer.{layer}.attention.output.dense", "layers.{layer}.attention.output"),
        *norm("encoder.layer.{layer}.attention.output.LayerNorm", "layers.{layer}.attention_norm"),
        *linear("encoder.layer.{layer}.intermediate.dense", "layers.{layer}.mlp.up"),
        *linear("encoder.layer.{layer}.output.dense", "layers.{layer}.mlp.down"),
        *norm("encoder.layer.{layer}.output.LayerNorm", "layers.{layer}.mlp_norm"),
        *linear("pooler.dense", "pooler"),
    ),
    prefixes=("bert.",),
    ignored=(r"embeddings\.(position_ids|token_type_ids)",),
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)


class Bert(nnx.Module):
    """BERT encoder; equal to transformers' BertModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = BERT_TABLE

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config = config
        self.word = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.embedding_norm = layer_norm(width, config.layer_norm_eps, rngs=rngs)
        self.layers = nnx.List([BertLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.pooler = nnx.Linear(width, width, rngs=rngs) if config.pooler else None

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the last hidden states; `attention_mask` is nonzero at tokens and 0 at padding.

        Raises ValueError at trace time if the sequence is longer than the position embeddings.
        """
        batch, time = input_ids.shape
        if time > self.config.max_tokens:
            raise ValueError(f"{time} tokens, but position embeddings for {self.config.max_tokens} only")
        if attention_mask is None:
            attention_mask = jnp.ones((batch, time), bool)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        positions = self.position(self.find_positions(input_ids))
        x = self.embedding_norm(self.word(input_ids) + positions + self.token_type(token_type_ids))
        mask = attention_mask.astype(bool)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def find_positions(self, input_ids: Int[Array, "batch time"]) -> Int[Array, "#batch time"]:
        """Return the rows of the position embeddings: 0, 1, ... along every text."""
        return jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]

    def pool(self, hidden: Float[Array, "batch time width"]) -> Float[Array, "batch width"]:
        """Return `tanh` of the pooler's linear map of the first token; ValueError if the config has no pooler."""
        if self.pooler is None:
            raise ValueError("this BERT was configured without a pooler")
        return jnp.tanh(self.pooler(hidden[:, 0]))


class MaskedLmHead(nnx.Module):
    """Logits over the vocabulary, by the word embeddings again: `norm(activation(dense(x))) words^T + bias`."""

    def __init__(self, config: BertConfig, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        self.dense = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32))

    def __call__(
        self, hidden: Float[Array, "batch time width"], words: nnx.Embed
    ) -> Float[Array, "batch time vocabulary"]:
        """Return the logits; `words` are the encoder's, tied."""
        return words.attend(self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))) + self.bias[...][None, None]


class BertClassifier(nnx.Module):
    """BERT with a linear head on the pooled first token; equal to BertForSequenceClassification in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(BERT_TABLE, "bert.", "encoder.", linear("classifier", "head"))

    def __init__(self, config: BertConfig, classes: int, *, rngs: nnx.Rngs):
        self.encoder = Bert(config, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, classes, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Return the logits."""
        return self.head(self.encoder.pool(self.encoder(input_ids, attention_mask, token_type_ids)))


class BertTokenClassifier(nnx.Module):
    """BERT with a linear head on every token; equal to BertForTokenClassification in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(BERT_TABLE, "bert.", "encoder.", linear("classifier", "head"))
    encoder_type: ClassVar[type[Bert]] = Bert

    def __init__(self, config: BertConfig, classes: int, *, rngs: nnx.Rngs):
        self.encoder = self.encoder_type(config, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, classes, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time classes"]:
        """Return the logits of every token."""
        return self.head(self.encoder(input_ids, attention_mask, token_type_ids))


class BertMaskedLm(nnx.Module):
    """BERT with the tied head of masked tokens, and of next sentences if asked.

    Equal to BertForMaskedLM, and with `next_sentence` to BertForPreTraining, in evaluation mode.
    """

    weight_table: ClassVar[WeightTable] = nest(
        BERT_TABLE,
        "bert.",
        "encoder.",
        (
            *linear("cls.predictions.transform.dense", "head.dense"),
            *norm("cls.predictions.transform.LayerNorm", "head.norm"),
            WeightRule("cls.predictions.bias", "head.bias"),
            *linear("cls.seq_relationship", "relation"),
        ),
    )

    def __init__(self, config: BertConfig, *, next_sentence: bool = False, rngs: nnx.Rngs):
        self.encoder = Bert(config, rngs=rngs)
        self.head = MaskedLmHead(config, config.hidden_act, rngs=rngs)
        self.relation = nnx.Linear(config.hidden_size, 2, rngs=rngs) if next_sentence else None

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time vocabulary"]:
        """Return the logits over the vocabulary."""
        return self.head(self.encoder(input_ids, attention_mask, token_type_ids), self.encoder.word)

    def relate(self, hidden: Float[Array, "batch time width"]) -> Float[Array, "batch 2"]:
        """Return the logits of the encoder's `hidden`: does the second text follow the first, or not."""
        if self.relation is None:
            raise ValueError("this BERT was configured without the head of next sentences")
        return self.relation(self.encoder.pool(hidden))
