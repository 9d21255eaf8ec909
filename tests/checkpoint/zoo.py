"""Tiny models of many families, made on the fly with random weights and saved as transformers saves them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**WIDTH, "vocab_size": 40}
DECODER = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
VISION = {"image_size": 8, "patch_size": 4}


def _clip() -> Any:
    text = {**TEXT, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 39}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config={**WIDTH, **VISION}, projection_dim=8)
    )


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 1e4}}
    tokens = {"image_token_id": 36, "video_token_id": 37, "vision_start_token_id": 38, "vision_end_token_id": 39}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    )


def _t5() -> Any:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def _whisper() -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
    places = {"max_source_positions": 10, "max_target_positions": 12, "decoder_start_token_id": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**layers, **sizes, **places, **tokens)
    )


def _causal(name: str, **settings: Any) -> Callable[[], Any]:
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    return lambda: model(config(**{**DECODER, **settings}))


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT, max_position_embeddings=12)),
    "bert classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, max_position_embeddings=12, num_labels=3)
    ),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**TEXT, max_position_embeddings=14)),
    "roberta masked LM": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**TEXT, max_position_embeddings=14)
    ),
    "bert masked LM": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, max_position_embeddings=12)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**WIDTH, **VISION, num_labels=5)),
    "clip": _clip,
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=12)
    ),
    "llama": _causal("Llama", tie_word_embeddings=False),
    "llama tied": _causal("Llama", tie_word_embeddings=True),
    "mistral": _causal("Mistral", sliding_window=None),
    "qwen2": _causal("Qwen2", tie_word_embeddings=True),
    "qwen3": _causal("Qwen3", head_dim=8),
    "t5": _t5,
    "qwen2_vl": _qwen2_vl,
}
"""Model types with a family in `rgsp_jax.models`."""

OTHERS: Mapping[str, Callable[[], Any]] = {
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)
    ),
    "mixtral": _causal("Mixtral", num_local_experts=3),
    "gemma": _causal("Gemma", head_dim=4, tie_word_embeddings=True),
    "whisper": _whisper,
    "deberta": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, max_position_embeddings=8
        )
    ),
}
"""Model types that are converted under the names of their PyTorch modules."""


def make_model(name: str, seed: int = 0) -> Any:
    """A model of the zoo with random weights everywhere, norms, biases and running statistics too."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **OTHERS}[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.1 + 0.3 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def save_model(model: Any, directory: Path, **options: Any) -> Path:
    """The directory that transformers makes of a model."""
    model.save_pretrained(directory, **options)
    return directory


def add_sentence_transformer(directory: Path) -> Path:
    """Lay the files beside an encoder that make its directory a sentence-transformers model."""
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16}))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    return directory
