"""Vision transformer: pre-norm encoder over image patches and a class token (Dosovitskiy et al., 2021)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    Mlp,
    PreNormLayer,
    check_activation,
    check_image_shape,
    layer_norm,
)
from rgsp_jax.models.weights import WeightRule, WeightTable, conv2d, linear, nest, norm


@dataclass(frozen=True)
class VitConfig:
    """Sizes of a vision transformer, named as Hugging Face names them.

    Raises RefusedError, with all problems at once, for an unknown activation and for sizes that do not divide.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler: bool = False
    pooler_output_size: int | None = None
    """None is `hidden_size`."""
    pooler_act: str = "tanh"

    def __post_init__(self):
        check_activation(self.hidden_act, "hidden_act")
        check_activation(self.pooler_act, "pooler_act")
        problems = [
            f"config field {whole!r} is {getattr(self, whole)}, not a multiple of {part!r} = {getattr(self, part)}"
            for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size"))
            if getattr(self, whole) % getattr(self, part)
        ]
        if problems:
            raise RefusedError(problems)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, pooler: bool = False) -> "VitConfig":
        """Read a parsed `config.json`; `pooler` says whether the checkpoint holds `pooler.dense` (the file does not).

        Raises RefusedError if it describes another model type or images that are not square.
        """
        if config.get("model_type", "vit") != "vit":
            raise RefusedError(f"config field 'model_type' is {config['model_type']!r}; the family here is 'vit'")
        problems = [
            f"config field {name!r} is {config[name]!r}; one integer (square images and patches) is needed"
            for name in ("image_size", "patch_size")
            if name in config and not isinstance(config[name], int)
        ]
        if problems:
            raise RefusedError(problems)
        names = {field.name for field in fields(cls)} - {"pooler"}
        return cls(**{name: config[name] for name in names if name in config}, pooler=pooler)

    def to_huggingface(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers' ViTModel reads."""
        sizes = {name: value for name, value in asdict(self).items() if name != "pooler"}
        return {"architectures": ["ViTModel"], "model_type": "vit", **sizes}

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return (self.image_size // self.patch_size) ** 2


def encoder_layer(config: VitConfig, *, rngs: nnx.Rngs) -> PreNormLayer:
    """Return one layer of the encoder."""
    width = config.hidden_size
    return PreNormLayer(
        attention_norm=layer_norm(width, config.layer_norm_eps, rngs=rngs),
        attention=Attention(width, config.num_attention_heads, use_bias=config.qkv_bias, rngs=rngs),
        mlp_norm=layer_norm(width, config.layer_norm_eps, rngs=rngs),
        mlp=Mlp(width, config.intermediate_size, config.hidden_act, rngs=rngs),
    )


VIT_TABLE = WeightTable(
    rules=(
        WeightRule("embeddings.cls_token", "cls_token"),
        WeightRule("embeddings.position_embeddings", "position_embeddings"),
        *conv2d("embeddings.patch_embeddings.projection", "patch"),
        *norm("encoder.layer.{layer}.layernorm_before", "layers.{layer}.attention_norm"),
        *linear("encoder.layer.{layer}.attention.attention.query", "layers.{layer}.attention.query"),
        *linear("encoder.layer.{layer}.attention.attention.key", "layers.{layer}.attention.key"),
        *linear("encoder.layer.{layer}.attention.attention.value", "layers.{layer}.attention.value"),
        *linear("encoder.layer.{layer}.attention.output.dense", "layers.{layer}.attention.output"),
        *norm("encoder.layer.{layer}.layernorm_after", "layers.{layer}.mlp_norm"),
        *linear("encoder.layer.{layer}.intermediate.dense", "layers.{layer}.mlp.up"),
        *linear("encoder.layer.{layer}.output.dense", "layers.{layer}.mlp.down"),
        *norm("layernorm", "final_norm"),
        *linear("pooler.dense", "pooler"),
    ),
    prefixes=("vit.",),
)


class Vit(nnx.Module):
    """Vision transformer encoder; equal to transformers' ViTModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = VIT_TABLE

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        width, size = config.hidden_size, (config.patch_size, config.patch_size)
        draw = nnx.initializers.truncated_normal(stddev=0.02)
        self.config = config
        self.patch = nnx.Conv(config.num_channels, width, size, strides=size, padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(draw(rngs.params(), (1, 1, width), jnp.float32))
        self.position_embeddings = nnx.Param(draw(rngs.params(), (1, 1 + config.patches, width), jnp.float32))
        self.layers = nnx.List([encoder_layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.final_norm = layer_norm(width, config.layer_norm_eps, rngs=rngs)
        self.pooler = nnx.Linear(width, config.pooler_output_size or width, rngs=rngs) if config.pooler else None

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch time hidden"]:
        """Return the last hidden states: the class token first, then the patches in reading order.

        Raises ValueError at trace time for images of another size: position embeddings are not interpolated.
        """
        check_image_shape(images.shape, self.config.image_size, self.config.num_channels)
        patches = self.patch(images).reshape(images.shape[0], self.config.patches, self.config.hidden_size)
        start = jnp.broadcast_to(self.cls_token[...], (images.shape[0], 1, self.config.hidden_size))
        x = jnp.concatenate([start, patches], axis=1) + self.position_embeddings[...]
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)

    def pool(self, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch pooled"]:
        """Return the activated linear map of the class token; ValueError if the config has no pooler."""
        if self.pooler is None:
            raise ValueError("this ViT was configured without a pooler")
        return ACTIVATIONS[self.config.pooler_act](self.pooler(hidden[:, 0]))


class VitClassifier(nnx.Module):
    """Vision transformer with a linear head on the class token; equal to ViTForImageClassification in evaluation."""

    weight_table: ClassVar[WeightTable] = nest(VIT_TABLE, "vit.", "encoder.", linear("classifier", "head"))

    def __init__(self, config: VitConfig, classes: int, *, rngs: nnx.Rngs):
        self.encoder = Vit(config, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Return the logits."""
        return self.head(self.encoder(images)[:, 0])
