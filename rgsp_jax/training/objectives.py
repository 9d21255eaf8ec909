"""What a merged model is asked for, by name: losses of its answers beside those of the parent whose inputs they are."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rgsp_jax.learning import (
    cross_entropy,
    distillation,
    entropy,
    feature_distance,
    feature_spread,
    weighted_entropy,
)


class Answer(NamedTuple):
    """What a model says to a batch; None where it does not show it."""

    pooled: Any
    """[batch, width], one vector of each input's last hidden states."""
    hidden: Any
    """[batch, time, width], the last hidden states themselves."""
    logits: Any
    """[batch, classes], or [batch, time, classes]."""


class Batch(NamedTuple):
    """Inputs of one model, and which of them count."""

    inputs: dict[str, Any]
    """Named as Hugging Face models name them; `attention_mask` among them for texts."""
    rows: Any
    """[batch], False for what fills the batch up."""
    labels: Any
    """[batch], numbers of classes."""


def where_tokens(batch: Batch, positions: int) -> Bool[Array, "batch time"]:
    """The positions that count: tokens that are no padding, of inputs that fill nothing up."""
    mask = batch.inputs.get("attention_mask")
    kept = jnp.ones((batch.rows.shape[0], positions), bool) if mask is None else mask.astype(bool)
    return kept & batch.rows[:, None]


def where_logits(logits: Array, batch: Batch) -> Bool[Array, "batch *time"]:
    """The logits that count: one for each input, or one for each token."""
    return batch.rows if logits.ndim == 2 else where_tokens(batch, logits.shape[1])


def distil(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """`KL(parent || merged)` of the answers."""
    del spread
    return distillation(merged.logits, teacher.logits, temperature, where_logits(merged.logits, batch))


def match_features(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """Distance of the pooled hidden states from the parent's, in units of their spread over its inputs."""
    del temperature
    return feature_distance(merged.pooled, teacher.pooled, batch.rows, spread["pooled"])


def match_tokens(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """The same of every token's last hidden state."""
    del temperature
    where = where_tokens(batch, teacher.hidden.shape[1])
    return feature_distance(merged.hidden, teacher.hidden, where, spread["hidden"])


def distil_both(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """Sum of the two: features hold what a few answers leave open."""
    answers = distil(merged, teacher, batch, temperature, spread)
    return answers + match_features(merged, teacher, batch, temperature, spread)


def be_certain(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """Entropy of the answers."""
    del teacher, temperature, spread
    return entropy(merged.logits, where_logits(merged.logits, batch))


def be_more_certain(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """Entropy of the answers, weighted by how certain they are."""
    del teacher, temperature, spread
    return weighted_entropy(merged.logits, where_logits(merged.logits, batch))


def name_classes(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """Cross-entropy of the labels."""
    del teacher, temperature, spread
    return cross_entropy(merged.logits, batch.labels, batch.rows)


def tell_next(merged: Answer, teacher: Answer, batch: Batch, temperature: float, spread: Any) -> Array:
    """Cross-entropy of every next token."""
    del teacher, temperature, spread
    where = where_tokens(batch, merged.logits.shape[1])[:, 1:]
    return cross_entropy(merged.logits[:, :-1], batch.inputs["input_ids"][:, 1:], where)


class Objective(NamedTuple):
    """A loss, and what the models must show for it."""

    loss: Callable[..., Array]
    """`loss(merged, teacher, batch, temperature, spread) -> scalar`."""
    needs: str
    """"logits", one for each input "classes", of each token "next tokens", "hidden" states, or "both"."""
    reads: frozenset[str] = frozenset()
    """Fields of the parent's Answer that it is measured by."""


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "distillation": Objective(distil, "logits", frozenset({"logits"})),
        "features": Objective(match_features, "hidden", frozenset({"pooled"})),
        "distillation+features": Objective(distil_both, "both", frozenset({"logits", "pooled"})),
        "tokens": Objective(match_tokens, "hidden", frozenset({"hidden"})),
        "entropy": Objective(be_certain, "logits"),
        "weighted-entropy": Objective(be_more_certain, "logits"),
        "cross-entropy": Objective(name_classes, "classes"),
        "next-token": Objective(tell_next, "next tokens"),
    }
)
"""Name on the command line -> loss."""


def measure_spread(teacher: Answer, batch: Batch, reads: Collection[str]) -> dict[str, Array]:
    """Spread of the parent's own hidden states that a loss reads, the unit in which distances from them are counted."""
    found = {}
    if "pooled" in reads:
        found["pooled"] = feature_spread(teacher.pooled, batch.rows)
    if "hidden" in reads:
        found["hidden"] = feature_spread(teacher.hidden, where_tokens(batch, teacher.hidden.shape[1]))
    return found


def measure_agreement(
    merged: Answer, teacher: Answer | None, batch: Batch, labelled: bool
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(answers that are the label, or the parent's where there are no labels; answers in all)."""
    zero = jnp.zeros((), jnp.float32)
    if merged.logits is None:
        return zero, zero
    where = where_logits(merged.logits, batch)
    answers = merged.logits.argmax(-1).astype(jnp.int32)
    if labelled and answers.ndim == 1:
        right = answers == batch.labels.astype(jnp.int32)
    elif teacher is not None and teacher.logits is not None:
        right = answers == teacher.logits.argmax(-1).astype(jnp.int32)
    else:
        return zero, zero
    return jnp.sum(right & where).astype(jnp.float32), jnp.sum(where).astype(jnp.float32)
