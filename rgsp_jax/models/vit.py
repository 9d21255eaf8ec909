"""Vision transformer: pre-norm encoder over image patches and a class token (Dosovitskiy et al., 2021)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.layers import Attention, Mlp, check_activation, layer_norm
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

    def __post_init__(self):
        check_activation(self.hidden_act, "hidden_act")
        problems = [
            f"config field {whole!r} is {getattr(self, whole)}, not a multiple of {part!r} = {getattr(self, part)}"
            for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size"))
            if getattr(self, whole) % getattr(self, part)
        ]
        if problems:
            raise RefusedError(problems)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "VitConfig":
        """Read a parsed `config.json`; RefusedError if it describes another model type or non-square images."""
        if config.get("model_type", "vit") != "vit":
            raise RefusedError(f"config field 'model_type' is {config['model_type']!r}; the family here is 'vit'")
        problems = [
            f"config field {name!r} is {config[name]!r}; one integer (square images and patches) is needed"
            for name in ("image_size", "patch_size")
            if name in config and not isinstance(config[name], int)
        ]
        if problems:
            raise RefusedError(problems)
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_huggingface(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers' ViTModel reads."""
        return {"architectures": ["ViTModel"], "model_type": "vit", **asdict(self)}

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return (self.image_size // self.patch_size) ** 2


class VitLayer(nnx.Module):
    """One pre-norm layer: `x = x + attention(norm(x)); x = x + mlp(norm(x))`."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.attention = Attention(config.hidden_size, config.num_attention_heads, use_bias=config.qkv_bias, rngs=rngs)
        self.mlp_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Apply the layer."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


VIT_TABLE = WeightTable(
    rules=(
        WeightRule("embeddings.cls_token", "class_token"),
        WeightRule("embeddings.position_embeddings", "position"),
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
    ),
    prefixes=("vit.",),
)


class Vit(nnx.Module):
    """Vision transformer encoder; equal to transformers' ViTModel (no pooler) in evaluation mode."""

    weight_table: ClassVar[WeightTable] = VIT_TABLE

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        width, size = config.hidden_size, (config.patch_size, config.patch_size)
        draw = nnx.initializers.truncated_normal(stddev=0.02)
        self.config = config
        self.patch = nnx.Conv(config.num_channels, width, size, strides=size, padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(draw(rngs.params(), (1, 1, width), jnp.float32))
        self.position = nnx.Param(draw(rngs.params(), (1, 1 + config.patches, width), jnp.float32))
        self.layers = nnx.List([VitLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.final_norm = layer_norm(width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch time hidden"]:
        """Return the last hidden states: the class token first, then the patches in reading order."""
        patches = self.patch(images).reshape(images.shape[0], self.config.patches, self.config.hidden_size)
        start = jnp.broadcast_to(self.class_token[...], (images.shape[0], 1, self.config.hidden_size))
        x = jnp.concatenate([start, patches], axis=1) + self.position[...]
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)


class VitClassifier(nnx.Module):
    """Vision transformer with a linear head on the class token; equal to ViTForImageClassification in evaluation."""

    weight_table: ClassVar[WeightTable] = nest(VIT_TABLE, "vit.", "encoder.", linear("classifier", "head"))

    def __init__(self, config: VitConfig, classes: int, *, rngs: nnx.Rngs):
        self.encoder = Vit(config, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Return the logits."""
        return self.head(self.encoder(images)[:, 0])
