"""A Qwen2-VL from its files alone: images through its processor, vision tower and decoder both seen."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from activations import tiny_models as tiny
from activations.test_torch_capture import check_second_moment, see_inputs
from rgsp_jax.activations import CovarianceSettings, collect_covariances, read_examples
from rgsp_jax.activations.torch_model import load_processor
from rgsp_jax.checkpoint import find_foreign, open_checkpoint, open_covariances

TEMPLATE = (
    "{% for message in messages %}{{ 'who ' if message.role == 'user' else 'saw ' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SIZES = ((16, 24), (24, 16), (16, 16), (32, 16), (8, 16))


@pytest.fixture
def data(tmp_path):
    """Five images of five sizes with a question each."""
    (tmp_path / "data/pictures").mkdir(parents=True)
    lines = []
    for number, (text, (height, width)) in enumerate(zip(tiny.draw_texts(5), SIZES, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/pictures/{number}.png")
        lines.append({"text": text, "image": f"pictures/{number}.png", "answer": "the mat"})
    file = tmp_path / "data/train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["placeholder", "chat"])
def test_text_and_images_reach_both_towers(tmp_path, data, template):
    directory = tiny.save_qwen2_vl(tmp_path / "model", template)
    settings = CovarianceSettings(held_back=0, batch_size=2, pair_field="answer" if template else None)
    result = collect_covariances(directory, data, tmp_path / "c.safetensors", settings)
    processor = load_processor(directory, "qwen2_vl")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    batches = []
    for example in read_examples(data).examples:
        text = image + example.text if template is None else f"who {image} {example.text}saw  the mat"
        batch = dict(processor(text=[text], images=[Image.open(example.image)], return_tensors="pt"))
        batches.append(batch | {"pixel_values": batch["pixel_values"].double()})
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory)
    oracle = see_inputs(model, batches)
    pixels = torch.cat([batch["pixel_values"] for batch in batches]).numpy()
    with open_covariances(tmp_path / "c.safetensors") as covariances, open_checkpoint(directory) as checkpoint:
        assert find_foreign(covariances, checkpoint) == [] and result.not_covered == {}
        check_second_moment(covariances, "visual.patch_embed.proj.weight", pixels, 1e-5)
        for on_disk, in_memory in (
            ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
            ("visual.merger.mlp.0", "model.visual.merger.mlp.0"),
            ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
            ("model.layers.1.mlp.down_proj", "model.language_model.layers.1.mlp.down_proj"),
            ("lm_head", "lm_head"),
        ):
            check_second_moment(covariances, f"{on_disk}.weight", oracle[in_memory], 1e-5)


def test_image_files_go_through_the_models_own_processor(tmp_path):
    directory = tiny.save_model(tmp_path / "model", tiny.make_vit(channels=3))
    half = [0.5, 0.5, 0.5]
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "resample": 2}
    settings |= {"image_mean": half, "image_std": half, "rescale_factor": 1 / 255}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 10, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.save(tmp_path / f"pictures/{number}.png")
        values = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR)) / 255 * 2 - 1
        rows.append(values.reshape(2, 4, 2, 4, 3).transpose(0, 2, 4, 1, 3).reshape(4, 48))
    result = collect_covariances(
        directory, tmp_path / "pictures", tmp_path / "c.safetensors", CovarianceSettings(held_back=0, batch_size=4)
    )
    with open_covariances(tmp_path / "c.safetensors") as covariances:
        check_second_moment(covariances, "embeddings.patch_embeddings.projection.weight", np.concatenate(rows))
    assert result.not_covered == {} and result.examples == 6


def test_texts_alone_leave_the_vision_tower_out(tmp_path):
    directory = tiny.save_qwen2_vl(tmp_path / "model")
    texts = tiny.write_texts(tmp_path / "texts.jsonl", tiny.draw_texts(5))
    result = collect_covariances(directory, texts, tmp_path / "c.safetensors", CovarianceSettings(held_back=0))
    assert all("never reached it" in reason for reason in result.not_covered.values())
    assert all(name.startswith("visual.") for name in result.not_covered) and len(result.not_covered) == 7
