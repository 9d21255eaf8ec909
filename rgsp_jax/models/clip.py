"""CLIP: a causal text tower and an image tower, projected to one space (Radford et al., 2021)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    Mlp,
    PreNormLayer,
    causal_mask,
    check_image_shape,
    layer_norm,
    padding_mask,
)
from rgsp_jax.models.weights import WeightRule, WeightTable, conv2d, embedding, join, linear, nest, norm

LEGACY_EOS = 2
"""`eos_token_id` of the first configs, wrong there: with it the end of a text is its largest id."""


@dataclass(frozen=True)
class ClipTowerConfig:
    """Sizes that both towers have, named as Hugging Face names them.

    Raises RefusedError, with all problems at once, for an unknown activation and for sizes that do not fit.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    model_type: ClassVar[str]

    def __post_init__(self):
        if problems := self.find_problems():
            raise RefusedError(problems)

    def find_problems(self) -> list[str]:
        """Return a sentence for each field that cannot be."""
        problems = []
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            problems.append(f"config field 'hidden_act' is {self.hidden_act!r}; known activations: {known}")
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"config field 'hidden_size' is {self.hidden_size}, not a multiple of "
                f"'num_attention_heads' = {self.num_attention_heads}"
            )
        return problems

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """Read a parsed `config.json` of the tower, or its part of CLIP's; RefusedError for another model type."""
        if config.get("model_type", cls.model_type) != cls.model_type:
            raise RefusedError(
                f"config field 'model_type' is {config['model_type']!r}; the family here is {cls.model_type!r}"
            )
        return cls(**{item.name: config[item.name] for item in fields(cls) if item.name in config})


@dataclass(frozen=True)
class ClipTextConfig(ClipTowerConfig):
    """Sizes of the text tower, and the id that ends its texts."""

    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    model_type: ClassVar[str] = "clip_text_model"

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        if not isinstance(self.eos_token_id, int):
            problems.append(f"config field 'eos_token_id' is {self.eos_token_id!r}; one integer ends a text here")
        return problems


@dataclass(frozen=True)
class ClipVisionConfig(ClipTowerConfig):
    """Sizes of the image tower; images and patches are square."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    model_type: ClassVar[str] = "clip_vision_model"

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        uneven = [
            f"config field {name!r} is {getattr(self, name)!r}; one integer (square images and patches) is needed"
            for name in ("image_size", "patch_size")
            if not isinstance(getattr(self, name), int)
        ]
        if not uneven and self.image_size % self.patch_size:
            uneven = [
                f"config field 'image_size' is {self.image_size}, not a multiple of 'patch_size' = {self.patch_size}"
            ]
        return problems + uneven

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, and the width of the space that they are projected to."""

    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    projection_dim: int = 512

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "ClipConfig":
        """Read a parsed `config.json`; RefusedError, of both towers at once, where one is refused.

        The older `text_config_dict` and `vision_config_dict` overrule everything in `text_config` and `vision_config`,
        what they leave out by its default, as in transformers.
        """
        if config.get("model_type", "clip") != "clip":
            raise RefusedError(f"config field 'model_type' is {config['model_type']!r}; the family here is 'clip'")
        towers: dict[str, Any] = {}
        problems: list[str] = []
        for name, kind in (("text", ClipTextConfig), ("vision", ClipVisionConfig)):
            given = config.get(f"{name}_config") or {}
            overruling = config.get(f"{name}_config_dict")
            if overruling is not None:
                given = {**given, **asdict(kind()), **overruling}
            try:
                towers[name] = kind.from_huggingface(given)
            except RefusedError as error:
                problems += [f"{name}_config: {problem}" for problem in error.problems]
        if problems:
            raise RefusedError(problems)
        return cls(**towers, projection_dim=config.get("projection_dim", 512))


def encoder_layers(config: ClipTowerConfig, *, rngs: nnx.Rngs) -> nnx.List:
    """Return the layers of one tower."""
    width = config.hidden_size
    return nnx.List(
        [
            PreNormLayer(
                attention_norm=layer_norm(width, config.layer_norm_eps, rngs=rngs),
                attention=Attention(width, config.num_attention_heads, rngs=rngs),
                mlp_norm=layer_norm(width, config.layer_norm_eps, rngs=rngs),
                mlp=Mlp(width, config.intermediate_size, config.hidden_act, rngs=rngs),
            )
            for _ in range(config.num_hidden_layers)
        ]
    )


LAYER_RULES = (
    *norm("encoder.layers.{layer}.layer_norm1", "layers.{layer}.attention_norm"),
    *linear("encoder.layers.{layer}.self_attn.q_proj", "layers.{layer}.attention.query"),
    *linear("encoder.layers.{layer}.self_attn.k_proj", "layers.{layer}.attention.key"),
    *linear("encoder.layers.{layer}.self_attn.v_proj", "layers.{layer}.attention.value"),
    *linear("encoder.layers.{layer}.self_attn.out_proj", "layers.{layer}.attention.output"),
    *norm("encoder.layers.{layer}.layer_norm2", "layers.{layer}.mlp_norm"),
    *linear("encoder.layers.{layer}.mlp.fc1", "layers.{layer}.mlp.up"),
    *linear("encoder.layers.{layer}.mlp.fc2", "layers.{layer}.mlp.down"),
)
TEXT_TABLE = WeightTable(
    rules=(
        *embedding("embeddings.token_embedding", "word"),
        *embedding("embeddings.position_embedding", "position"),
        *LAYER_RULES,
        *norm("final_layer_norm", "final_norm"),
    ),
    prefixes=("text_model.",),
    ignored=(r"embeddings\.position_ids",),
)
VISION_TABLE = WeightTable(
    rules=(
        WeightRule("embeddings.class_embedding", "class_embedding"),
        *conv2d("embeddings.patch_embedding", "patch"),
        *embedding("embeddings.position_embedding", "position"),
        *norm("pre_layrnorm", "first_norm"),  # spelt so on disk
        *LAYER_RULES,
        *norm("post_layernorm", "final_norm"),
    ),
    prefixes=("vision_model.",),
    ignored=(r"embeddings\.position_ids",),
)


class ClipText(nnx.Module):
    """Text tower; equal to transformers' CLIPTextModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = TEXT_TABLE

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.word = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)
        self.layers = encoder_layers(config, rngs=rngs)
        self.final_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Return the last hidden states; a token sees itself and those before it that `attention_mask` leaves.

        Raises ValueError at trace time if the sequence is longer than the position embeddings.
        """
        time = input_ids.shape[1]
        if time > self.config.max_position_embeddings:
            raise ValueError(f"{time} tokens, but position embeddings for {self.config.max_position_embeddings} only")
        x = self.word(input_ids) + self.position(jnp.arange(time, dtype=jnp.int32)[None])
        mask = causal_mask(time)
        if attention_mask is not None:
            mask = mask & padding_mask(attention_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)

    def pool(
        self, hidden: Float[Array, "batch time width"], input_ids: Int[Array, "batch time"]
    ) -> Float[Array, "batch width"]:
        """Return the hidden state of each text's end: the first `eos_token_id`, or the largest id if that is 2."""
        end = self.config.eos_token_id
        found = input_ids if end == LEGACY_EOS else (input_ids == end).astype(jnp.int32)
        return jnp.take_along_axis(hidden, jnp.argmax(found, axis=1)[:, None, None], axis=1)[:, 0]


class ClipVision(nnx.Module):
    """Image tower; equal to transformers' CLIPVisionModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = VISION_TABLE

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        width, size = config.hidden_size, (config.patch_size, config.patch_size)
        self.config = config
        self.patch = nnx.Conv(
            config.num_channels, width, size, strides=size, padding="VALID", use_bias=False, rngs=rngs
        )
        self.class_embedding = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), jnp.float32))
        self.position = nnx.Embed(1 + config.patches, width, rngs=rngs)
        self.first_norm = layer_norm(width, config.layer_norm_eps, rngs=rngs)
        self.layers = encoder_layers(config, rngs=rngs)
        self.final_norm = layer_norm(width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch time hidden"]:
        """Return the last hidden states, not normed: the class token first, then the patches in reading order.

        Raises ValueError at trace time for images of another size: position embeddings are not interpolated.
        """
        config = self.config
        check_image_shape(images.shape, config.image_size, config.num_channels)
        patches = self.patch(images).reshape(images.shape[0], config.patches, config.hidden_size)
        start = jnp.broadcast_to(self.class_embedding[...], (images.shape[0], 1, config.hidden_size))
        positions = self.position(jnp.arange(1 + config.patches, dtype=jnp.int32)[None])
        x = self.first_norm(jnp.concatenate([start, patches], axis=1) + positions)
        for layer in self.layers:
            x = layer(x)
        return x

    def pool(self, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch hidden"]:
        """Return the normed class token."""
        return self.final_norm(hidden[:, 0])


class ClipTextProjection(nnx.Module):
    """Text tower and its projection; equal to transformers' CLIPTextModelWithProjection in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(
        TEXT_TABLE, "text_model.", "tower.", linear("text_projection", "projection")
    )

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.tower = ClipText(config, rngs=rngs)
        self.projection = nnx.Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch projected"]:
        """Return the projected texts, not of unit length."""
        return self.projection(self.tower.pool(self.tower(input_ids, attention_mask), input_ids))


class ClipVisionProjection(nnx.Module):
    """Image tower and its projection; equal to transformers' CLIPVisionModelWithProjection in evaluation mode."""

    weight_table: ClassVar[WeightTable] = nest(
        VISION_TABLE, "vision_model.", "tower.", linear("visual_projection", "projection")
    )

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        self.tower = ClipVision(config, rngs=rngs)
        self.projection = nnx.Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch projected"]:
        """Return the projected images, not of unit length."""
        return self.projection(self.tower.pool(self.tower(images)))


class ClipOutput(NamedTuple):
    """What CLIP says of some images and some texts."""

    logits_per_image: Float[Array, "images texts"]
    """Cosine of each image with each text, times the exponential of the learned scale."""
    text_embeds: Float[Array, "texts projected"]
    """Of unit length."""
    image_embeds: Float[Array, "images projected"]
    """Of unit length."""


class Clip(nnx.Module):
    """Both towers; equal to transformers' CLIPModel in evaluation mode."""

    weight_table: ClassVar[WeightTable] = join(
        nest(ClipTextProjection.weight_table, "", "text."),
        nest(ClipVisionProjection.weight_table, "", "vision.", (WeightRule("logit_scale", "logit_scale"),)),
    )

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.text = ClipTextProjection(replace(config.text, projection_dim=config.projection_dim), rngs=rngs)
        self.vision = ClipVisionProjection(replace(config.vision, projection_dim=config.projection_dim), rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))

    def __call__(
        self,
        input_ids: Int[Array, "texts time"],
        images: Float[Array, "images height width channels"],
        attention_mask: Int[Array, "texts time"] | Bool[Array, "texts time"] | None = None,
    ) -> ClipOutput:
        """Compare every image with every text."""
        text = self.text(input_ids, attention_mask)
        image = self.vision(images)
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
        image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
        return ClipOutput(image @ text.T * jnp.exp(self.logit_scale[...]), text, image)
