"""Qwen2-VL: an image and video tower whose patches take the place of tokens in a Qwen2 decoder (Wang et al., 2024)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.errors import RefusedError
from rgsp_jax.models.decoder import DecoderConfig, DecoderLm
from rgsp_jax.models.layers import ACTIVATIONS, FusedAttention, Mlp, PreNormLayer, layer_norm
from rgsp_jax.models.rotary import Rotation, rotary_frequencies, rotation_by, rotation_of_axes
from rgsp_jax.models.weights import WeightTable, conv3d, join, linear, nest, norm

Grids = Sequence[tuple[int, int, int]]
"""Of each image or video, how many patches it has in time, height and width."""
VISION_EPSILON = 1e-6
"""Of the tower's norms; no config names it."""


@dataclass(frozen=True)
class Qwen2VlVisionConfig:
    """Sizes of the image tower, named as Hugging Face names them.

    Raises RefusedError, with all problems at once, for an unknown activation and for sizes that do not fit.
    """

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584
    hidden_act: str = "quick_gelu"
    mlp_ratio: int = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    rope_theta: float = 10_000.0

    def __post_init__(self):
        problems = [
            f"config field {name!r} is {getattr(self, name)!r}; one integer is needed"
            for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")
            if not isinstance(getattr(self, name), int)
        ]
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            problems.append(f"config field 'hidden_act' is {self.hidden_act!r}; known activations: {known}")
        if self.embed_dim % (4 * self.num_heads):
            problems.append(
                f"config field 'embed_dim' is {self.embed_dim}, not a multiple of 4 'num_heads' = {4 * self.num_heads}"
            )
        if problems:
            raise RefusedError(problems)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "Qwen2VlVisionConfig":
        """Read the `vision_config` of a parsed `config.json`; RefusedError for rotary embeddings not of two axes."""
        rope = config.get("rope_parameters") or {}
        kind = rope.get("rope_type", "axial")
        if kind not in ("axial", "default"):
            raise RefusedError(f"config field 'rope_type' is {kind!r}; images are rotated by two axes here ('axial')")
        given = {**config, "rope_theta": rope.get("rope_theta", 10_000.0)}
        return cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given})


@dataclass(frozen=True)
class Qwen2VlConfig:
    """Sizes of the decoder and the image tower, and the ids that stand for patches.

    Raises RefusedError, with all problems at once, for rotary sections that do not fill a head and for widths that
    differ.
    """

    text: DecoderConfig
    vision: Qwen2VlVisionConfig = field(default_factory=Qwen2VlVisionConfig)
    mrope_section: tuple[int, ...] = (16, 24, 24)
    image_token_id: int = 151655
    video_token_id: int = 151656

    def __post_init__(self):
        problems = []
        if 2 * sum(self.mrope_section) != self.text.head_dim:
            problems.append(
                f"config field 'mrope_section' is {list(self.mrope_section)}; its sum must be half of a head's width "
                f"{self.text.head_dim}"
            )
        if self.text.head_dim * self.text.num_attention_heads != self.text.hidden_size:
            problems.append(
                f"config field 'head_dim' is {self.text.head_dim}; 'num_attention_heads' = "
                f"{self.text.num_attention_heads} of them must make the width {self.text.hidden_size}"
            )
        if self.vision.hidden_size != self.text.hidden_size:
            problems.append(
                f"config field 'hidden_size' of vision_config is {self.vision.hidden_size}; the decoder's is "
                f"{self.text.hidden_size}, and patches take the place of its tokens"
            )
        if problems:
            raise RefusedError(problems)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "Qwen2VlConfig":
        """Read a parsed `config.json`, the decoder's fields in `text_config` or, as on the hub, beside it.

        Raises RefusedError, of both parts at once, for another model type, what DecoderConfig refuses (rotary scalings,
        sizes) and towers that differ from this one.
        """
        if config.get("model_type", "qwen2_vl") != "qwen2_vl":
            raise RefusedError(f"config field 'model_type' is {config['model_type']!r}; the family here is 'qwen2_vl'")
        given = config.get("text_config") or {k: v for k, v in config.items() if k != "vision_config"}
        tied = bool(config.get("tie_word_embeddings", False) or given.get("tie_word_embeddings", False))
        rope = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
        if rope.get("rope_type", rope.get("type")) == "mrope":
            rope["rope_type"] = "default"
        sections = rope.pop("mrope_section", (16, 24, 24))
        text = {**given, "model_type": "qwen2_vl_text", "rope_scaling": rope, "tie_word_embeddings": tied}
        problems: list[str] = []
        parts: dict[str, Any] = {}
        for name, read in (
            ("text", lambda: DecoderConfig.from_huggingface(text)),
            ("vision", lambda: Qwen2VlVisionConfig.from_huggingface(config.get("vision_config") or {})),
        ):
            try:
                parts[name] = read()
            except RefusedError as error:
                problems += [f"{name}_config: {problem}" for problem in error.problems]
        if problems:
            raise RefusedError(problems)
        tokens = {name: config[name] for name in ("image_token_id", "video_token_id") if name in config}
        return cls(**parts, **tokens, mrope_section=tuple(sections))


VISION_TABLE = WeightTable(
    rules=(
        *conv3d("patch_embed.proj", "patch"),
        *norm("blocks.{layer}.norm1", "layers.{layer}.attention_norm"),
        *linear("blocks.{layer}.attn.qkv", "layers.{layer}.attention.fused"),
        *linear("blocks.{layer}.attn.proj", "layers.{layer}.attention.output"),
        *norm("blocks.{layer}.norm2", "layers.{layer}.mlp_norm"),
        *linear("blocks.{layer}.mlp.fc1", "layers.{layer}.mlp.up"),
        *linear("blocks.{layer}.mlp.fc2", "layers.{layer}.mlp.down"),
        *norm("merger.ln_q", "merger_norm"),
        *linear("merger.mlp.0", "merger.up"),
        *linear("merger.mlp.2", "merger.down"),
    ),
)


class Qwen2VlVision(nnx.Module):
    """Image tower; equal to the `visual` of transformers' Qwen2-VL in evaluation mode."""

    weight_table: ClassVar[WeightTable] = VISION_TABLE

    def __init__(self, config: Qwen2VlVisionConfig, *, rngs: nnx.Rngs):
        width, merged = config.embed_dim, config.embed_dim * config.spatial_merge_size**2
        window = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.config = config
        self.patch = nnx.Conv(
            config.in_channels, width, window, strides=window, padding="VALID", use_bias=False, rngs=rngs
        )
        self.layers = nnx.List(
            [
                PreNormLayer(
                    attention_norm=layer_norm(width, VISION_EPSILON, rngs=rngs),
                    attention=FusedAttention(width, config.num_heads, rngs=rngs),
                    mlp_norm=layer_norm(width, VISION_EPSILON, rngs=rngs),
                    mlp=Mlp(width, int(width * config.mlp_ratio), config.hidden_act, rngs=rngs),
                )
                for _ in range(config.depth)
            ]
        )
        self.merger_norm = layer_norm(width, VISION_EPSILON, rngs=rngs)
        self.merger = Mlp(merged, merged, "gelu", output=config.hidden_size, rngs=rngs)

    def __call__(self, pixel_values: Float[Array, "patches values"], grids: Grids) -> Float[Array, "merged hidden"]:
        """Return what takes the place of tokens, image after image, one row for each square of merged patches.

        Args:
            pixel_values: flattened patches [channels, time, height, width], as transformers' processor orders them:
                by image, frame, then by squares of merged patches in reading order.
            grids: of the images; a constant of the trace.

        Raises ValueError at trace time where the grids have another number of patches, or sides that squares do not
        fill.
        """
        config = self.config
        merge, (count, _) = config.spatial_merge_size, pixel_values.shape
        if any(side % merge for _, *sides in grids for side in sides):
            raise ValueError(f"grids {list(grids)} have sides that squares of {merge} patches do not fill")
        if sum(int(np.prod(grid)) for grid in grids) != count:
            raise ValueError(f"{count} patches, but the grids {list(grids)} have another number of them")
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        windows = jnp.moveaxis(pixel_values.reshape(count, config.in_channels, *size), 1, -1)
        x = self.patch(windows).reshape(1, count, config.embed_dim)
        frames = np.concatenate([np.repeat(np.arange(t), h * w) for t, h, w in grids])
        images = np.repeat(np.arange(len(grids)), [int(np.prod(grid)) for grid in grids])
        places = np.stack([images, frames])
        mask = jnp.asarray((places[:, :, None] == places[:, None, :]).all(axis=0))[None, None]
        rotation = self.rotation(grids)
        for layer in self.layers:
            x = layer(x, mask, rotation=rotation)
        return self.merger(self.merger_norm(x).reshape(count // merge**2, -1))

    def rotation(self, grids: Grids) -> Rotation:
        """Return the rotation of every patch: half of a head's pairs by its row, the others by its column."""
        frequencies = rotary_frequencies(self.config.embed_dim // self.config.num_heads // 2, self.config.rope_theta)
        places = np.concatenate([patch_places(grid, self.config.spatial_merge_size) for grid in grids])
        angles = places.astype(np.float32)[:, :, None] * frequencies
        return rotation_by(jnp.asarray(angles.reshape(1, len(places), -1)))


def patch_places(grid: tuple[int, int, int], merge: int) -> Int[np.ndarray, "patches 2"]:
    """Return row and column of an image's patches, by frame, then by squares of `merge` in reading order."""
    time, height, width = grid
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    squares = places.reshape(height // merge, merge, width // merge, merge, 2).swapaxes(1, 2)
    return np.tile(squares.reshape(-1, 2), (time, 1))


class Qwen2Vl(DecoderLm):
    """Decoder that reads texts, images and videos; equal to Qwen2VLForConditionalGeneration in evaluation mode."""

    weight_table: ClassVar[WeightTable] = join(
        DecoderLm.weight_table, nest(VISION_TABLE, "visual.", "visual.")
    )._replace(renames=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")))

    def __init__(self, config: Qwen2VlConfig, *, rngs: nnx.Rngs):
        super().__init__(config.text, rngs=rngs)
        self.config = config
        self.visual = Qwen2VlVision(config.vision, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        *,
        positions: Int[Array, "3 batch time"] | None = None,
        pixel_values: Float[Array, "patches values"] | None = None,
        image_grids: Grids = (),
        pixel_values_videos: Float[Array, "patches values"] | None = None,
        video_grids: Grids = (),
    ) -> Float[Array, "batch time vocabulary"]:
        """Return the logits of the next token at every position.

        Args:
            input_ids: with `image_token_id` (`video_token_id`) where a square of merged patches stands.
            attention_mask: nonzero at tokens, 0 at padding.
            positions: of the tokens in time, height and width, by `find_positions`; None counts the columns, for texts.
            pixel_values: of all images, see `Qwen2VlVision`; `pixel_values_videos` of all videos.
            image_grids: of all images; `video_grids` of all videos. Constants of the trace.

        Raises ValueError at trace time for images or videos without positions, and for patches that are not the grids'.
        """
        x = self.decoder.word(input_ids)
        if positions is None:
            if pixel_values is not None or pixel_values_videos is not None:
                raise ValueError("images and videos need the positions of their patches: give find_positions(...)")
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), (3, 1, input_ids.shape[1]))
        for token, pixels, grids in (
            (self.config.image_token_id, pixel_values, image_grids),
            (self.config.video_token_id, pixel_values_videos, video_grids),
        ):
            if pixels is not None:
                x = put_in_place(x, input_ids == token, self.visual(pixels, grids))
        text = self.config.text
        frequencies = text.rotary.frequencies(text.head_dim)
        rotation = rotation_of_axes(positions, frequencies, self.config.mrope_section)
        return self.predict(self.decoder.run_layers(x, rotation, attention_mask))


def put_in_place(
    x: Float[Array, "batch time width"], places: Bool[Array, "batch time"], rows: Float[Array, "rows width"]
) -> Float[Array, "batch time width"]:
    """Return `x` with `rows` in turn where `places` is True, text after text."""
    index = jnp.cumsum(places.reshape(-1), dtype=jnp.int32) - 1
    taken = jnp.take(rows, index, axis=0, mode="clip").reshape(x.shape).astype(x.dtype)
    return jnp.where(places[:, :, None], taken, x)


def find_positions(
    config: Qwen2VlConfig,
    input_ids: Int[np.ndarray, "batch time"],
    attention_mask: Int[np.ndarray, "batch time"] | Bool[np.ndarray, "batch time"] | None = None,
    image_grids: Grids = (),
    video_grids: Grids = (),
) -> Int[np.ndarray, "3 batch time"]:
    """Return every token's position in time, height and width, counted outside of jit as transformers counts them.

    A text's tokens count up on all three axes alike. The patches of an image start, on every axis, after what stands
    before it, and what follows starts after its longer side. Padding is at 0; without any image or video, columns are
    counted, padding or not.

    Raises ValueError where the tokens that stand for patches are not as many as the grids have, for the first one.
    """
    ids = np.asarray(input_ids)
    if not len(image_grids) and not len(video_grids):
        return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), (3, *ids.shape))
    kept = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    merge = config.vision.spatial_merge_size
    waiting: dict[int, Iterator[tuple[int, int, int]]] = {
        config.image_token_id: iter(image_grids),
        config.video_token_id: iter(video_grids),
    }
    positions = np.zeros((3, *ids.shape), np.int32)
    for row, (tokens, seen) in enumerate(zip(ids, kept, strict=True)):
        parts: list[np.ndarray] = [np.zeros((3, 0), np.int32)]
        start = 0
        for token, run in groupby(int(t) if t in waiting else None for t in tokens[seen]):
            length = len(list(run))
            if token is None:
                parts.append(np.broadcast_to(np.arange(start, start + length), (3, length)))
                start += length
                continue
            time, height, width = next(waiting[token], (0, 0, 0))
            sides = (time, height // merge, width // merge)
            if np.prod(sides) != length:
                raise ValueError(f"text {row} has {length} tokens in a row for the patches of a grid of {sides}")
            parts.append(np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij")).reshape(3, length) + start)
            start += max(height, width) // merge
        positions[:, row, seen] = np.concatenate(parts, axis=1)
    left = sum(len(list(grids)) for grids in waiting.values())
    if left:
        raise ValueError(f"{left} grids more than there are runs of tokens for their patches")
    return positions
