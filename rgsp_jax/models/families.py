"""Model types that have a family here: how each is built from a Hugging Face config and run on a batch."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array

from rgsp_jax.models.bert import Bert, BertClassifier, BertConfig
from rgsp_jax.models.vit import Vit, VitClassifier, VitConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Key on disk -> shape there: which heads a checkpoint holds, and how many classes they have."""
HEAD = "classifier.weight"


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


def build_bert(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A BERT of the config's sizes, with the pooler and the classifier that the checkpoint holds."""
    pooler = any(name.endswith("pooler.dense.weight") for name in shapes)
    sizes = BertConfig.from_huggingface(config, pooler=pooler)
    if HEAD in shapes:
        return nnx.eval_shape(lambda: BertClassifier(sizes, shapes[HEAD][0], rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: Bert(sizes, rngs=nnx.Rngs(0)))


def run_bert(model: Any, batch: Mapping[str, Array]) -> Any:
    """The logits, or the pooled or last hidden states of a model without a head."""
    output = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    return output if hasattr(model, "head") or model.pooler is None else model.pool(output)


def build_vit(config: Mapping[str, Any], shapes: Shapes) -> nnx.Module:
    """A ViT of the config's sizes, with the classifier that the checkpoint holds."""
    sizes = VitConfig.from_huggingface(config)
    if HEAD in shapes:
        return nnx.eval_shape(lambda: VitClassifier(sizes, shapes[HEAD][0], rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: Vit(sizes, rngs=nnx.Rngs(0)))


TEXT = frozenset({"input_ids", "attention_mask"})
IMAGE = frozenset({"pixel_values"})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family(build_bert, TEXT | {"token_type_ids"}, run_bert),
        "vit": Family(build_vit, IMAGE, lambda model, batch: model(batch["pixel_values"])),
    }
)
"""`model_type` of a config.json -> its family. Images are [batch, height, width, channels]."""
