"""Examples as a Hugging Face model takes them: token ids, pixels, or both through the model's own processor."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from rgsp_jax.activations.examples import Example, check_images, load_image
from rgsp_jax.activations.settings import CovarianceSettings, Prepared
from rgsp_jax.activations.torch_model import load_image_processor, load_processor, load_tokenizer
from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.checkpoint.huggingface import quiet
from rgsp_jax.checkpoint.safetensors_header import describe_failure
from rgsp_jax.errors import RefusedError

Batch = dict[str, torch.Tensor]


class Encoder(Protocol):
    """Examples -> what can be batched -> a model's keyword arguments."""

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]: ...

    def encode(self, batch: Sequence[Prepared]) -> Batch: ...


class TextEncoder:
    """Texts, or pairs of them, by the model's tokenizer."""

    def __init__(self, tokenizer: Any, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        texts = [example.text for example in examples]
        pairs = [example.pair for example in examples] if examples[0].pair is not None else None
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length, return_attention_mask=True)
        rows = [{key: values[i] for key, values in encoded.items()} for i in range(len(texts))]
        return [Prepared(row, len(row["input_ids"])) for row in rows if row["input_ids"]]

    def encode(self, batch: Sequence[Prepared]) -> Batch:
        padded = self.tokenizer.pad([dict(item.payload) for item in batch], return_tensors="pt")
        return dict(padded)


class ImageEncoder:
    """Images alone, by the model's image processor; floats are taken to be what the model wants."""

    def __init__(self, processor: Any, where: str):
        self.processor = processor
        self.where = where

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        raw = any(not isinstance(e.image, np.ndarray) or e.image.dtype == np.uint8 for e in examples)
        if raw and self.processor is None:
            raise RefusedError(
                f"{self.where} has no preprocessor_config.json to prepare images with: copy it there, or give an .npz "
                "with pixel_values as floats, as the model takes them"
            )
        return [Prepared(example, None) for example in examples]

    def encode(self, batch: Sequence[Prepared]) -> Batch:
        images = [item.payload.image for item in batch]
        if isinstance(images[0], np.ndarray) and images[0].dtype != np.uint8:
            return {"pixel_values": torch.from_numpy(np.stack(images).astype(np.float32))}
        return dict(self.processor([to_rgb(image) for image in images], return_tensors="pt"))


class ConversationEncoder:
    """Texts with an image each, by the model's processor and its chat template, or its placeholder for images."""

    def __init__(self, processor: Any, config: Any, where: str):
        self.processor = processor
        self.where = where
        self.placeholder = find_placeholder(processor, config)

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        return [Prepared(example, None) for example in examples]

    def compose(self, example: Example) -> str:
        """The text that goes with an image."""
        text = example.text or ""
        if self.placeholder is None or self.placeholder in text:
            return text
        if getattr(self.processor, "chat_template", None) is None:
            return self.placeholder + text + (example.pair or "")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if example.pair is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": example.pair}]})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=example.pair is None)

    def encode(self, batch: Sequence[Prepared]) -> Batch:
        images = [to_rgb(item.payload.image) for item in batch]
        try:
            texts = [self.compose(item.payload) for item in batch]
            with quiet():
                return dict(self.processor(text=texts, images=images, padding=True, return_tensors="pt"))
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError(f"{self.where}: its processor refuses the data ({describe_failure(error)})") from None


def find_placeholder(processor: Any, config: Any) -> str | None:
    """The text that stands for an image, between the marks that the config names; None where images need none."""
    token = getattr(processor, "image_token", None)
    if token is None:
        return None
    names = ("vision_start_token_id", "vision_end_token_id")
    marks = [getattr(config, name, None) for name in names]
    before, after = ("" if mark is None else processor.tokenizer.convert_ids_to_tokens(mark) or "" for mark in marks)
    return f"{before}{token}{after}"


def to_rgb(image: Any) -> Any:
    """A Pillow image in RGB, of a file or of bytes [height, width, channels]."""
    if not isinstance(image, np.ndarray):
        return load_image(image)
    try:
        from PIL import Image
    except ImportError:
        raise RefusedError("images are prepared with Pillow, which is not installed: pip install Pillow") from None
    return Image.fromarray(image).convert("RGB")


def choose_encoder(
    checkpoint: Checkpoint, config: Any, model: Any, examples: Sequence[Example], settings: CovarianceSettings
) -> Encoder:
    """The encoder for this model and these data.

    Raises:
        RefusedError: the model does not take what the data are, or cannot encode it.
    """
    directory = checkpoint.root
    accepted = set(inspect.signature(model.forward).parameters)
    with_text, with_images = examples[0].text is not None, examples[0].image is not None
    if with_images and "pixel_values" not in accepted:
        raise RefusedError(f"{directory} takes no images, and the data have some: give texts alone")
    if with_text and "input_ids" not in accepted:
        raise RefusedError(f"{directory} takes no texts, and the data have some: give images alone")
    if not with_images:
        if "input_ids" not in accepted:
            raise RefusedError(f"{directory} takes {model.main_input_name}, which these data are not")
        return TextEncoder(load_tokenizer(directory), find_max_length(directory, config, settings.max_length))
    check_images(examples)
    if "input_ids" in accepted:
        return ConversationEncoder(load_processor(directory, config.model_type), config, str(directory))
    return ImageEncoder(load_image_processor(directory), str(directory))


def find_max_length(directory: Any, config: Any, wanted: int) -> int:
    """Tokens that a text may have: as asked for, and no more than there are positions."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return wanted
    offset = getattr(config, "pad_token_id", 0) or 0  # RoBERTa's positions start behind the padding's
    if config.model_type in ROBERTA_LIKE:
        positions -= offset + 1
    return min(wanted, positions)


ROBERTA_LIKE = frozenset(
    {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "xlm-roberta-xl", "data2vec-text"}
)
"""Families with max_position_embeddings that count positions nothing can have."""


def add_decoder_inputs(batch: Batch, config: Any) -> Batch:
    """Of an encoder-decoder: the decoder is fed the text itself, shifted by its start token."""
    if not getattr(config, "is_encoder_decoder", False) or "input_ids" not in batch:
        return batch
    ids = batch["input_ids"]
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
    shifted = torch.cat([torch.full_like(ids[:, :1], start or 0), ids[:, :-1]], dim=1)
    return {**batch, "decoder_input_ids": shifted, "decoder_attention_mask": batch["attention_mask"]}


def narrow_batch(batch: Mapping[str, torch.Tensor]) -> Batch:
    """The same batch without the last column of everything that has a column per token."""
    mask = batch["attention_mask"]
    return {
        name: tensor[:, :-1] if tensor.shape == mask.shape and not tensor.is_floating_point() else tensor
        for name, tensor in batch.items()
    }


def widen_batch(batch: Mapping[str, torch.Tensor], pad_token_id: int) -> Batch:
    """The same batch with one more column of padding in everything that has a column per token."""
    mask = batch["attention_mask"]
    wider = dict(batch)
    for name, tensor in batch.items():
        if tensor.shape == mask.shape and not tensor.is_floating_point():
            filling = pad_token_id if name.endswith("input_ids") else 0
            wider[name] = torch.cat([tensor, torch.full_like(tensor[:, :1], filling)], dim=1)
    return wider
