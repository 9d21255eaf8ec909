"""RoBERTa: BERT's encoder with positions counted from the padding's, and heads of its own (Liu et al., 2019).

XLM-RoBERTa and CamemBERT are the same network.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.bert import BERT_TABLE, Bert, BertConfig, BertTokenClassifier, MaskedLmHead
from rgsp_jax.models.weights import WeightRule, WeightTable, linear, nest, norm


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes of a RoBERTa encoder, named as Hugging Face names them; refused as BertConfig is.

    `pad_token_id` is part of the network here: its row of the position embeddings is the padding's, and texts start
    at the next one, so that they may be `pad_token_id + 1` tokens shorter than `max_position_embeddings`.
    """

    vocab_size: int = 50265
    pad_token_id: int = 1

    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.pad_token_id, int) or not 0 <= self.pad_token_id < self.max_position_embeddings - 1:
            raise RefusedError(
                f"config field 'pad_token_id' is {self.pad_token_id!r}; positions are counted from it: an integer "
                f"from 0 to 'max_position_embeddings' - 2 = {self.max_position_embeddings - 2} is needed"
            )

    @property
    def max_tokens(self) -> int:
        """Length of the longest text."""
        return self.max_position_embeddings - self.pad_token_id - 1


ROBERTA_TABLE = BERT_TABLE._replace(prefixes=("roberta.",))


class Roberta(Bert):
    """RoBERTa encoder; equal to transformers' RobertaModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = ROBERTA_TABLE
    config: RobertaConfig

    def find_positions(self, input_ids: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
        """Return the rows of the position embeddings: p at padding, p + 1, p + 2, ... at the tokens, p the padding id.

        Padding is what equals the padding id, whatever the attention mask says, as in transformers.
        """
        padding = self.config.pad_token_id
        tokens = (input_ids != padding).astype(jnp.int32)
        return jnp.cumsum(tokens, axis=1, dtype=jnp.int32) * tokens + padding


class RobertaClassifier(nnx.Module):
    """RoBERTa with two layers on the first token; equal to RobertaForSequenceClassification in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(
        ROBERTA_TABLE,
        "roberta.",
        "encoder.",
        (*linear("classifier.dense", "dense"), *linear("classifier.out_proj", "head")),
    )

    def __init__(self, config: RobertaConfig, classes: int, *, rngs: nnx.Rngs):
        self.encoder = Roberta(config, rngs=rngs)
        self.dense = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, classes, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Return the logits: `head(tanh(dense(first token)))`."""
        first = self.encoder(input_ids, attention_mask, token_type_ids)[:, 0]
        return self.head(jnp.tanh(self.dense(first)))


class RobertaTokenClassifier(BertTokenClassifier):
    """RoBERTa with a linear head on every token; equal to RobertaForTokenClassification in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(ROBERTA_TABLE, "roberta.", "encoder.", linear("classifier", "head"))
    encoder_type: ClassVar[type[Bert]] = Roberta


class RobertaMaskedLm(nnx.Module):
    """RoBERTa with the tied head of masked tokens; equal to RobertaForMaskedLM in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(
        ROBERTA_TABLE,
        "roberta.",
        "encoder.",
        (
            *linear("lm_head.dense", "head.dense"),
            *norm("lm_head.layer_norm", "head.norm"),
            WeightRule("lm_head.bias", "head.bias"),
        ),
    )

    def __init__(self, config: RobertaConfig, *, rngs: nnx.Rngs):
        self.encoder = Roberta(config, rngs=rngs)
        self.head = MaskedLmHead(config, "gelu", rngs=rngs)  # whatever the encoder's activation is

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time vocabulary"]:
        """Return the logits over the vocabulary."""
        return self.head(self.encoder(input_ids, attention_mask, token_type_ids), self.encoder.word)
