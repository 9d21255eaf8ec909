"""Make golden/lora: tiny adapters saved by PEFT and what its merge_and_unload makes of their bases.

    pip install peft transformers torch && python tests/checkpoint/make_lora_golden.py

Made with peft 0.21.2, transformers 5.23, torch 2.13.
"""

import json
import shutil
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden" / "lora"
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
LINEAR = ["query", "dense"]


def make_bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, max_position_embeddings=8, num_labels=3)
    )


def make_gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, vocab_size=20)
    )


def make_resnet():
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    )


CASES = {
    "plain": (make_bert, {"r": 2, "lora_alpha": 6, "target_modules": LINEAR}, torch.float32),
    "half": (make_bert, {"r": 2, "lora_alpha": 6, "target_modules": LINEAR}, torch.bfloat16),
    "rank_stabilised": (
        make_bert,
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": LINEAR},
        torch.float32,
    ),
    "patterns": (
        make_bert,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": LINEAR,
            "rank_pattern": {"query": 3, "layer.1.output.dense": 1},
            "alpha_pattern": {"layer.0.attention.self.query": 9, "^bert.encoder.layer.1.*query": 2},
        },
        torch.float32,
    ),
    "saved_modules": (
        make_bert,
        {"r": 2, "target_modules": ["value"], "modules_to_save": ["classifier"], "bias": "lora_only"},
        torch.float32,
    ),
    "embedding": (make_bert, {"r": 2, "target_modules": ["word_embeddings", "key"]}, torch.float32),
    "transposed": (make_gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, torch.float32),
    "convolution": (make_resnet, {"r": 2, "target_modules": ["convolution"]}, torch.float32),
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, (make, settings, dtype) in CASES.items():
        directory = GOLDEN / name
        base = randomise(make(), 0).to(dtype)
        base.save_pretrained(directory / "base")
        adapted = randomise_adapter(peft.get_peft_model(base, peft.LoraConfig(**settings)))
        adapted.save_pretrained(directory / "adapter")
        config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "../base"
        (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=1))
        (directory / "adapter" / "README.md").unlink()
        adapted.merge_and_unload().save_pretrained(directory / "merged")
        weights = load_file(directory / "merged" / "model.safetensors")
        shutil.rmtree(directory / "merged")
        save_file(weights, directory / "merged.safetensors")


def randomise_adapter(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return model


if __name__ == "__main__":
    main()
