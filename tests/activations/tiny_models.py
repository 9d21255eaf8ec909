"""Random Hugging Face models on disk, mostly of width 16, with tokenizers and processors made here."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH = 16
WORDS = ("how", "many", "cats", "sat", "on", "the", "mat", "and", "who", "saw", "them", "there")
SPECIAL = ("[PAD]", "[UNK]", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
LAYERS = dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)


def draw_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def write_texts(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def make_tokenizer(**options):
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        additional_special_tokens=list(SPECIAL[2:]),
        **options,
    )


def make_bert(classes=None):
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), num_labels=classes or 2, **LAYERS)
    return (transformers.BertModel if classes is None else transformers.BertForSequenceClassification)(config)


def make_gpt2():
    config = transformers.GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=WIDTH, n_inner=WIDTH, n_layer=2, n_head=4, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config)


def make_llama(tied=True):
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY), num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, **LAYERS
    )
    return transformers.LlamaForCausalLM(config)


def make_mixtral():
    config = transformers.MixtralConfig(
        vocab_size=len(VOCABULARY), num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **LAYERS
    )
    return transformers.MixtralForCausalLM(config)


def make_t5():
    config = transformers.T5Config(
        vocab_size=len(VOCABULARY),
        d_model=WIDTH,
        d_kv=4,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def make_vit(classes=None, channels=1):
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=channels, num_labels=classes or 2, **LAYERS
    )
    if classes is None:
        return transformers.ViTModel(config, add_pooling_layer=False)
    return transformers.ViTForImageClassification(config)


def make_qwen2_vl():
    text = dict(
        vocab_size=len(VOCABULARY),
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 0]},
        tie_word_embeddings=False,
        **LAYERS,
    )
    vision = dict(depth=1, embed_dim=WIDTH, hidden_size=WIDTH, num_heads=2, mlp_ratio=1, patch_size=4)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = dict(zip(names, (VOCABULARY[word] for word in SPECIAL[2:]), strict=True))
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    )


def save_model(directory: Path, model, tokenizer=None, seed=0, dtype=torch.float32):
    """Random weights large enough that layers differ, biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.eval().to(dtype).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def save_qwen2_vl(directory: Path, chat_template=None):
    """A Qwen2-VL with its processor's files, as the real ones have them."""
    save_model(directory, make_qwen2_vl(), make_tokenizer())
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 512}
    )
    processor.save_pretrained(directory)
    file = directory / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"processor_class": "Qwen2VLProcessor"}
    file.write_text(json.dumps(settings))
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)
    return directory
