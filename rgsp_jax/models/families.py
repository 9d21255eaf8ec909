"""Model types that have a family here: how each is built from a Hugging Face config and run on a batch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.bert import Bert, BertClassifier, BertConfig, BertMaskedLm, BertTokenClassifier
from rgsp_jax.models.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipTextProjection,
    ClipVision,
    ClipVisionConfig,
    ClipVisionProjection,
)
from rgsp_jax.models.decoder import KINDS, Decoder, DecoderConfig, DecoderLm
from rgsp_jax.models.gpt2 import Gpt2, Gpt2Config, Gpt2Lm, Gpt2OpenAi
from rgsp_jax.models.qwen2_vl import Qwen2Vl, Qwen2VlConfig, find_positions
from rgsp_jax.models.roberta import (
    Roberta,
    RobertaClassifier,
    RobertaConfig,
    RobertaMaskedLm,
    RobertaTokenClassifier,
)
from rgsp_jax.models.t5 import T5, T5Config, T5Encoder, T5Lm
from rgsp_jax.models.vit import Vit, VitClassifier, VitConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Key on disk -> shape there: which heads a checkpoint holds, and how many classes they have."""
HEAD, ROBERTA_HEAD, LM_HEAD = "classifier.weight", "classifier.out_proj.weight", "lm_head.weight"


def read_max_tokens(config: Mapping[str, Any]) -> int:
    """Length of the longest text, of models that embed every position."""
    return int(config.get("max_position_embeddings", 512))


class Family(NamedTuple):
    """A model type of Hugging Face as flax.nnx modules."""

    build: Callable[[Mapping[str, Any], Shapes], nnx.Module]
    """(parsed config.json, shapes) -> the model that a checkpoint holds, abstract (`nnx.eval_shape`).

    Raises RefusedError where the config describes what the family is not.
    """
    inputs: frozenset[str]
    """Names of the arrays that `run` takes, of those that Hugging Face models are called with."""
    run: Callable[[Any, Mapping[str, Array]], Any]
    """(model, named arrays) -> its output, every layer applied that such a batch reaches."""
    max_tokens: Callable[[Mapping[str, Any]], int] = read_max_tokens
    """Parsed config.json -> length of the longest text."""


def holds(shapes: Shapes, name: str) -> bool:
    """Whether a checkpoint holds a key of that name, after any prefix."""
    return any(key == name or key.endswith(f".{name}") for key in shapes)


def check_tied(config: Mapping[str, Any]) -> None:
    """Refuse a masked-LM head with output embeddings of its own."""
    if not config.get("tie_word_embeddings", True):
        raise RefusedError("config field 'tie_word_embeddings' is False; the masked-LM heads here are tied only")


def build_bert(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A BERT of the config's sizes, with the pooler and the head that the checkpoint holds."""
    sizes = BertConfig.from_huggingface(config, pooler=holds(shapes, "pooler.dense.weight"))
    if "cls.predictions.bias" in shapes:
        check_tied(config)
        relation = "cls.seq_relationship.weight" in shapes
        return nnx.eval_shape(lambda: BertMaskedLm(sizes, next_sentence=relation, rngs=nnx.Rngs(0)))
    if HEAD in shapes:
        classifier = BertClassifier if sizes.pooler else BertTokenClassifier
        return nnx.eval_shape(lambda: classifier(sizes, shapes[HEAD][0], rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: Bert(sizes, rngs=nnx.Rngs(0)))


def build_roberta(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A RoBERTa of the config's sizes, with the pooler and the head that the checkpoint holds."""
    sizes = RobertaConfig.from_huggingface(config, pooler=holds(shapes, "pooler.dense.weight"))
    if "lm_head.bias" in shapes:
        check_tied(config)
        return nnx.eval_shape(lambda: RobertaMaskedLm(sizes, rngs=nnx.Rngs(0)))
    if ROBERTA_HEAD in shapes:
        return nnx.eval_shape(lambda: RobertaClassifier(sizes, shapes[ROBERTA_HEAD][0], rngs=nnx.Rngs(0)))
    if HEAD in shapes:
        return nnx.eval_shape(lambda: RobertaTokenClassifier(sizes, shapes[HEAD][0], rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: Roberta(sizes, rngs=nnx.Rngs(0)))


def run_bert(model: Any, batch: Mapping[str, Array]) -> Any:
    """The logits (both of a pretraining model), or the pooled or last hidden states of a model without a head."""
    inputs = (batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    if isinstance(model, BertMaskedLm) and model.relation is not None:
        hidden = model.encoder(*inputs)
        return model.head(hidden, model.encoder.word), model.relate(hidden)
    output = model(*inputs)
    return model.pool(output) if isinstance(model, Bert) and model.pooler is not None else output


def build_vit(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A ViT of the config's sizes, with the pooler or the classifier that the checkpoint holds."""
    sizes = VitConfig.from_huggingface(config, pooler=holds(shapes, "pooler.dense.weight"))
    if HEAD in shapes:
        return nnx.eval_shape(lambda: VitClassifier(sizes, shapes[HEAD][0], rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: Vit(sizes, rngs=nnx.Rngs(0)))


def run_vit(model: Any, batch: Mapping[str, Array]) -> Any:
    """The logits, or the pooled or last hidden states of a model without a head."""
    output = model(batch["pixel_values"])
    return model.pool(output) if isinstance(model, Vit) and model.pooler is not None else output


def build_decoder(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A decoder of the config's sizes, with the head, tied or its own, that the checkpoint holds."""
    sizes = DecoderConfig.from_huggingface(config)
    if any(key.startswith("model.") for key in shapes):
        tied = sizes.tie_word_embeddings and LM_HEAD not in shapes
        return nnx.eval_shape(lambda: DecoderLm(replace(sizes, tie_word_embeddings=tied), rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: Decoder(sizes, rngs=nnx.Rngs(0)))


def build_gpt2(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A GPT-2 of the config's sizes, with the head, tied or its own, that the checkpoint holds.

    OpenAI's own checkpoints have the keys of a model without a head; their config names the one with a tied head.
    """
    sizes = Gpt2Config.from_huggingface(config)
    sizes = replace(sizes, tie_word_embeddings=sizes.tie_word_embeddings and LM_HEAD not in shapes)
    if any(key.startswith("transformer.") for key in shapes):
        return nnx.eval_shape(lambda: Gpt2Lm(sizes, rngs=nnx.Rngs(0)))
    if LM_HEAD in shapes or "GPT2LMHeadModel" in (config.get("architectures") or ()):
        return nnx.eval_shape(lambda: Gpt2OpenAi(sizes, rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: Gpt2(sizes, rngs=nnx.Rngs(0)))


def run_text(model: Any, batch: Mapping[str, Array]) -> Any:
    """The logits, or the last hidden states of a model without a head."""
    return model(batch["input_ids"], batch["attention_mask"])


def build_clip(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A CLIP of the config's sizes."""
    sizes = ClipConfig.from_huggingface(config)
    if HEAD in shapes:
        raise RefusedError(f"the checkpoint holds {HEAD!r}: CLIP's image classifier is no family here")
    return nnx.eval_shape(lambda: Clip(sizes, rngs=nnx.Rngs(0)))


def build_clip_text(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """CLIP's text tower of the config's sizes, with the projection that the checkpoint holds."""
    sizes = ClipTextConfig.from_huggingface(config)
    kind = ClipTextProjection if "text_projection.weight" in shapes else ClipText
    return nnx.eval_shape(lambda: kind(sizes, rngs=nnx.Rngs(0)))


def build_clip_vision(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """CLIP's image tower of the config's sizes, with the projection that the checkpoint holds."""
    sizes = ClipVisionConfig.from_huggingface(config)
    kind = ClipVisionProjection if "visual_projection.weight" in shapes else ClipVision
    return nnx.eval_shape(lambda: kind(sizes, rngs=nnx.Rngs(0)))


def run_clip_vision(model: Any, batch: Mapping[str, Array]) -> Any:
    """The projected images, or the pooled states of a tower alone."""
    output = model(batch["pixel_values"])
    return model.pool(output) if isinstance(model, ClipVision) else output


def build_qwen2_vl(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A Qwen2-VL of the config's sizes, with the head, tied or its own, that the checkpoint holds."""
    sizes = Qwen2VlConfig.from_huggingface(config)
    tied = sizes.text.tie_word_embeddings and LM_HEAD not in shapes
    sizes = replace(sizes, text=replace(sizes.text, tie_word_embeddings=tied))
    return nnx.eval_shape(lambda: Qwen2Vl(sizes, rngs=nnx.Rngs(0)))


def run_qwen2_vl(model: Any, batch: Mapping[str, Array]) -> Any:
    """The logits. Outside of jit where the batch has images: their grids, and so the shapes, depend on values."""
    if "pixel_values" not in batch:
        return run_text(model, batch)
    ids, mask, grids = (np.asarray(batch[name]) for name in ("input_ids", "attention_mask", "image_grid_thw"))
    image_grids = tuple((int(time), int(height), int(width)) for time, height, width in grids)
    positions = find_positions(model.config, ids, mask, image_grids)
    return model(ids, mask, positions=positions, pixel_values=batch["pixel_values"], image_grids=image_grids)


def build_t5(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A T5 of the config's sizes: the encoder alone, or with the decoder and the head that the checkpoint holds.

    A tied head leaves no trace in the keys: there is one unless the config names the model without.
    """
    words = {f"{part}_word": f"{part}.embed_tokens.weight" in shapes for part in ("encoder", "decoder")}
    sizes = T5Config.from_huggingface(config, **words)
    if not any(key.startswith("decoder.") for key in shapes):
        return nnx.eval_shape(lambda: T5Encoder(sizes, rngs=nnx.Rngs(0)))
    if LM_HEAD not in shapes and "T5Model" in (config.get("architectures") or ()):
        return nnx.eval_shape(lambda: T5(sizes, rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: T5Lm(sizes, tied=LM_HEAD not in shapes, rngs=nnx.Rngs(0)))


def run_t5(model: Any, batch: Mapping[str, Array]) -> Any:
    """The logits, or the last hidden states of the decoder, or those of the encoder where it is all there is."""
    inputs = (batch["input_ids"], batch["attention_mask"])
    return model(*inputs) if isinstance(model, T5Encoder) else model(inputs[0], batch["decoder_input_ids"], inputs[1])


HEADLESS: tuple[type[nnx.Module], ...] = (Bert, Vit, Decoder, Gpt2, T5, T5Encoder, ClipText, ClipVision)
"""Models whose output is hidden states; the others give logits."""


def without_pooler(shapes: Shapes) -> Shapes:
    """The same without a pooler, which hides the last hidden states of a model without a head."""
    return {name: shape for name, shape in shapes.items() if "pooler." not in name}


TEXT = frozenset({"input_ids", "attention_mask"})
IMAGE = frozenset({"pixel_values"})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family(build_bert, TEXT | {"token_type_ids"}, run_bert),
        **{
            name: Family(
                build_roberta, TEXT, run_bert, lambda config: RobertaConfig.from_huggingface(config).max_tokens
            )
            for name in RobertaConfig.model_types
        },
        **dict.fromkeys(KINDS, Family(build_decoder, TEXT, run_text)),
        "gpt2": Family(build_gpt2, TEXT, run_text, lambda config: Gpt2Config.from_huggingface(config).n_positions),
        "clip": Family(
            build_clip,
            TEXT | IMAGE,
            lambda model, batch: model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]),
            lambda config: ClipConfig.from_huggingface(config).text.max_position_embeddings,
        ),
        "clip_text_model": Family(
            build_clip_text,
            TEXT,
            run_text,
            lambda config: ClipTextConfig.from_huggingface(config).max_position_embeddings,
        ),
        "clip_vision_model": Family(build_clip_vision, IMAGE, run_clip_vision),
        "qwen2_vl": Family(
            build_qwen2_vl,
            TEXT | IMAGE | {"image_grid_thw"},
            run_qwen2_vl,
            lambda config: read_max_tokens(config.get("text_config") or config),
        ),
        "t5": Family(build_t5, TEXT | {"decoder_input_ids"}, run_t5),
        "vit": Family(build_vit, IMAGE, run_vit),
    }
)
"""`model_type` of a config.json -> its family. Images are [batch, height, width, channels]."""
