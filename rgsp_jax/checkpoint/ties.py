"""Tied embeddings that a file holds twice: equal bytes under two names of one parameter."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rgsp_jax.checkpoint.specs import Checkpoint, TensorSpec, flat_bytes

INPUT_EMBEDDING = re.compile(r"(^|[./])(embed_tokens|wte|word_embeddings|shared|tok_embeddings|embed_in)\.weight$")
OUTPUT_EMBEDDING = re.compile(r"(^|[./])(lm_head|embed_out|output_projection|predictions\.decoder)\.weight$")
SHARED_EMBEDDING = re.compile(r"(^|[./])shared\.weight$")
SHARING_EMBEDDING = re.compile(r"(^|[./])(encoder|decoder)\.embed_tokens\.weight$")
CHUNK_BYTES = 1 << 20


def find_ties(checkpoint: Checkpoint) -> dict[str, str]:
    """Tied embeddings stored twice: name -> the input embedding whose bytes it repeats.

    Merging the two by different rules would untie them without a word, as transformers does with unequal ones. Looked
    for where a config.json does not deny the tie, between output and input embeddings and between the embeddings of an
    encoder, a decoder and the one they share. Of unequal ones only the first chunk is read.
    """
    if checkpoint.config is None or _denies_ties(checkpoint.config):
        return {}
    specs = [spec for name, spec in checkpoint.specs.items() if name not in checkpoint.aliases]
    shared = [spec for spec in specs if SHARED_EMBEDDING.search(spec.name)]
    sharing = [spec for spec in specs if shared and SHARING_EMBEDDING.search(spec.name)]
    inputs = shared + [spec for spec in specs if INPUT_EMBEDDING.search(spec.name) and spec not in shared + sharing]
    outputs = [spec for spec in specs if OUTPUT_EMBEDDING.search(spec.name)]
    pairs = [(spec, owner) for spec in sharing for owner in shared]
    pairs += [(spec, owner) for spec in outputs for owner in inputs]
    ties: dict[str, str] = {}
    for spec, owner in pairs:
        if spec.name not in ties and _hold_equal_bytes(checkpoint, spec, owner):
            ties[spec.name] = owner.name
    return ties


def _denies_ties(config: Mapping[str, Any]) -> bool:
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(section.get("tie_word_embeddings") is False for section in sections)


def _hold_equal_bytes(checkpoint: Checkpoint, first: TensorSpec, second: TensorSpec) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype or not first.size:
        return False
    step = max(1, CHUNK_BYTES // first.dtype.itemsize)
    left, right = np.empty((2, min(step, first.size)), first.dtype)
    for start in range(0, first.size, step):
        count = min(step, first.size - start)
        checkpoint.read_into(first.name, left[:count], start)
        checkpoint.read_into(second.name, right[:count], start)
        if not np.array_equal(flat_bytes(left[:count]), flat_bytes(right[:count])):
            return False
    return True
