"""Rotary position embeddings (Su et al., 2021): frequencies, their scalings, the rotation of queries and keys."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rgsp_jax.errors import RefusedError


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, both halves of a head alike: what `rotate` turns a head by."""

    cosine: Float[Array, "#batch time head_width"]
    sine: Float[Array, "#batch time head_width"]


def rotary_frequencies(width: int, theta: float) -> Float[np.ndarray, " half"]:
    """Return `theta^(-2i / width)` for `i < width / 2`, radians per position, in float32 as transformers has them."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    # The power is taken in float64: what is left of PyTorch's rounding grows with the position.
    return np.float32(1) / (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


def rotation_of(positions: Int[Array, "#batch time"], frequencies: Float[np.ndarray, " half"]) -> Rotation:
    """Return the rotation of heads of width `2 half` at integer positions."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None, :]
    return rotation_by(angles)


def rotation_of_axes(
    positions: Int[Array, "axes #batch time"], frequencies: Float[np.ndarray, " half"], sections: Sequence[int]
) -> Rotation:
    """Return the rotation of heads at positions on several axes: time, height and width of what a token stands for.

    Args:
        positions: of every token, on every axis.
        frequencies: of a head's pairs, radians per position.
        sections: how many of them in turn follow each axis, the first again after the last (M-RoPE, Wang et al.,
            2024). They sum to `half`.
    """
    axis_of = np.repeat(np.arange(len(sections)) % positions.shape[0], sections)
    chosen = jnp.moveaxis(positions[axis_of], 0, -1).astype(jnp.float32)
    return rotation_by(chosen * jnp.asarray(frequencies, jnp.float32)[None, None, :])


def rotation_by(angles: Float[Array, "#batch time half"]) -> Rotation:
    """Return the rotation by given angles (radians), one for each pair of a head's elements `i`, `i + half`."""
    both = jnp.concatenate([angles, angles], axis=-1)
    return Rotation(jnp.cos(both), jnp.sin(both))


def rotate(
    x: Float[Array, "batch time heads head_width"], rotation: Rotation
) -> Float[Array, "batch time heads head_width"]:
    """Turn each pair of elements `i`, `i + half` of every head by its position's angle (the rotate-half convention)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cosine, sine = (part.astype(x.dtype)[:, :, None, :] for part in rotation)
    return x * cosine + turned * sine


def _scale_linear(frequencies: np.ndarray, rotary: "Rotary") -> np.ndarray:
    return frequencies / np.float32(rotary.factor)


def _scale_llama3(frequencies: np.ndarray, rotary: "Rotary") -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = rotary.original_max_position_embeddings / wavelengths  # in the context the model was pretrained on
    blend = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return ((1 - blend) * frequencies / rotary.factor + blend * frequencies).astype(np.float32)


SCALINGS: Mapping[str, Callable[[np.ndarray, "Rotary"], np.ndarray]] = MappingProxyType(
    {"default": lambda frequencies, rotary: frequencies, "linear": _scale_linear, "llama3": _scale_llama3}
)
"""`rope_type` of a Hugging Face config -> how it changes the frequencies."""
FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
)
"""`rope_type` -> the fields that its scaling reads."""


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of a model, fields named as Hugging Face names them."""

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, head_width: int) -> Float[np.ndarray, " half"]:
        """Return the scaled frequencies of a head's pairs, radians per position."""
        return SCALINGS[self.rope_type](rotary_frequencies(head_width, self.rope_theta), self)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, default_theta: float = 10_000.0) -> "Rotary":
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`, of a parsed `config.json`.

        Raises RefusedError for scalings other than SCALINGS, missing or unusable factors, rotation of a part of the
        head and rotations that differ between layers.
        """
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = given.get("rope_type", given.get("type", "default"))
        partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        nested = [name for name, value in given.items() if isinstance(value, Mapping)]
        problems = []
        if kind not in SCALINGS:
            problems.append(f"config field 'rope_type' is {kind!r}; the rotary scalings here are {', '.join(SCALINGS)}")
        if partial not in (None, 1):
            problems.append(f"config field 'partial_rotary_factor' is {partial!r}; heads are rotated whole here")
        if nested:
            problems.append(f"config field 'rope_parameters' differs between layers ({', '.join(nested)}); give one")
        # The pretraining length stands beside the scaling, in it, or is the model's own length, in this order.
        lengths = (config.get("original_max_position_embeddings"), given.get("original_max_position_embeddings"))
        length = next((n for n in lengths if n is not None), config.get("max_position_embeddings"))
        values = {"rope_theta": config.get("rope_theta", default_theta), **given}
        values["original_max_position_embeddings"] = length
        values = {name: values.get(name) for name in ("rope_theta", *FIELDS.get(kind, ()))}
        problems += [
            f"config field {name!r} of rope_type {kind!r} is {value!r}; a positive number is needed"
            for name, value in values.items()
            if not nested and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0)
        ]
        if not problems and kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
            problems.append("config field 'high_freq_factor' is not above 'low_freq_factor'; nothing can be blended")
        if problems:
            raise RefusedError(problems)
        return cls(rope_type=kind, **values)
