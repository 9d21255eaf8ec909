"""CLIP and ViT's pooler against transformers' own models, on tiny random weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from models.huggingface import TIME, VOCABULARY, as_torch, build_loaded, draw_tokens, randomise, save_and_read
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import (
    FAMILIES,
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipTextProjection,
    ClipVision,
    ClipVisionConfig,
    ClipVisionProjection,
    Vit,
    export_weights,
    load_weights,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": TIME, "projection_dim": 10, "eos_token_id": 30}
VISION = {**SIZES, "hidden_size": 8, "image_size": 8, "patch_size": 4, "projection_dim": 10}
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)


def draw_texts():
    """Texts with the end (30) once, twice and nowhere, and larger ids behind it."""
    ids, mask = draw_tokens(lengths=(TIME, 6, 3))
    ids %= 30
    ids[0, [4, 7]], ids[0, 5], ids[1, 5], ids[1, 6] = 30, 36, 30, 33
    return ids, mask


@torch.no_grad()
def call(model, **inputs):
    return model(**{name: torch.as_tensor(x) for name, x in inputs.items()})


def in_torch(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def check(ours, theirs):
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("end", [30, 2])
def test_clip_equals_transformers(end, tmp_path):
    config = transformers.CLIPConfig(text_config={**TEXT, "eos_token_id": end}, vision_config=VISION, projection_dim=12)
    theirs = randomise(transformers.CLIPModel(config))
    weights, config = save_and_read(theirs, tmp_path)
    ours = build_loaded(config, weights)
    assert type(ours) is Clip
    ids, mask = draw_texts()
    torch_ids, torch_mask = as_torch(ids, mask)
    expected = call(theirs, input_ids=torch_ids, attention_mask=torch_mask, pixel_values=in_torch(IMAGES))
    found = nnx.jit(lambda model, *batch: model(*batch))(ours, ids, IMAGES, mask)
    check(found.logits_per_image, expected.logits_per_image)
    check(found.text_embeds, expected.text_embeds)
    check(found.image_embeds, expected.image_embeds)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": IMAGES}
    np.testing.assert_allclose(FAMILIES["clip"].run(ours, batch).logits_per_image, found.logits_per_image, atol=1e-5)
    assert FAMILIES["clip"].max_tokens(config) == TIME


@pytest.mark.parametrize("projected", [False, True])
def test_towers_alone_equal_transformers(projected, tmp_path):
    suffix = "WithProjection" if projected else ""
    theirs = randomise(getattr(transformers, f"CLIPTextModel{suffix}")(transformers.CLIPTextConfig(**TEXT)))
    weights, config = save_and_read(theirs, tmp_path / "text")
    text = build_loaded(config, weights)
    ids, mask = draw_texts()
    torch_ids, torch_mask = as_torch(ids, mask)
    expected = call(theirs, input_ids=torch_ids, attention_mask=torch_mask)
    unmasked = call(theirs, input_ids=torch_ids)
    theirs = randomise(getattr(transformers, f"CLIPVisionModel{suffix}")(transformers.CLIPVisionConfig(**VISION)))
    weights, config = save_and_read(theirs, tmp_path / "vision")
    vision = build_loaded(config, weights)
    seen = call(theirs, pixel_values=in_torch(IMAGES))
    if projected:
        assert (type(text), type(vision)) == (ClipTextProjection, ClipVisionProjection)
        check(text(ids, mask), expected.text_embeds)
        check(vision(IMAGES), seen.image_embeds)
        return
    assert (type(text), type(vision)) == (ClipText, ClipVision)
    hidden = text(ids, mask)
    check(hidden, expected.last_hidden_state)
    check(text.pool(hidden, ids), expected.pooler_output)
    check(text(ids), unmasked.last_hidden_state)
    check(vision(IMAGES), seen.last_hidden_state)
    check(FAMILIES["clip_vision_model"].run(vision, {"pixel_values": IMAGES}), seen.pooler_output)


def test_weights_of_older_versions_load():
    """Prefixed towers and saved position ids."""
    model = ClipText(ClipTextConfig(**TEXT), rngs=nnx.Rngs(0))
    weights = export_weights(model, "text_model.")
    older = {**weights, "text_model.embeddings.position_ids": np.arange(TIME)[None]}
    assert export_weights(load_weights(model, older), "text_model.").keys() == weights.keys()
    both = Clip(ClipConfig(ClipTextConfig(**TEXT), ClipVisionConfig(**VISION)), rngs=nnx.Rngs(0))
    weights = export_weights(both)
    extra = {f"{tower}_model.embeddings.position_ids": np.arange(5)[None] for tower in ("text", "vision")}
    assert export_weights(load_weights(both, {**weights, **extra})).keys() == weights.keys()


def test_vit_with_pooler_equals_transformers(tmp_path):
    config = {**SIZES, "image_size": 8, "patch_size": 4, "pooler_output_size": 6, "pooler_act": "gelu"}
    theirs = randomise(transformers.ViTModel(transformers.ViTConfig(**config)))
    weights, config = save_and_read(theirs, tmp_path)
    ours = build_loaded(config, weights)
    assert type(ours) is Vit
    check(
        FAMILIES["vit"].run(ours, {"pixel_values": IMAGES}), call(theirs, pixel_values=in_torch(IMAGES)).pooler_output
    )
    with pytest.raises(ValueError, match=r"\[batch, 8, 8, 3\] are needed"):
        jax.eval_shape(ours, jax.ShapeDtypeStruct((1, 4, 16, 3), np.float32))


def test_older_configs_mean_what_transformers_reads():
    given = {
        "model_type": "clip",
        "text_config": {**TEXT, "eos_token_id": 2},
        "text_config_dict": {"hidden_size": 24, "num_attention_heads": 2},
        "vision_config": VISION,
    }
    read, theirs = ClipConfig.from_huggingface(given), transformers.CLIPConfig(**given)
    for ours, config in ((read.text, theirs.text_config), (read.vision, theirs.vision_config), (read, theirs)):
        for name, value in vars(ours).items():
            if name not in ("text", "vision"):
                assert value == getattr(config, name), name
    assert read.text.eos_token_id == 49407 and read.vision.hidden_size == 8


def test_configs_refuse_what_the_family_is_not():
    with pytest.raises(RefusedError) as refused:
        ClipConfig.from_huggingface(
            {
                "text_config": {"hidden_size": 10, "num_attention_heads": 4, "eos_token_id": [2, 3]},
                "vision_config": {"hidden_act": "mish", "image_size": [8, 16]},
            }
        )
    problems = "\n".join(refused.value.problems)
    assert len(refused.value.problems) == 4
    for part in ("text_config: config field 'hidden_size'", "[2, 3]", "vision_config: config field 'hidden_act'", "[8"):
        assert part in problems
    with pytest.raises(RefusedError, match="not a multiple of 'patch_size'"):
        ClipVisionConfig(image_size=9, patch_size=2)
    with pytest.raises(RefusedError, match="'siglip'; the family here is 'clip'"):
        ClipConfig.from_huggingface({"model_type": "siglip"})
    with pytest.raises(RefusedError, match="'clip'; the family here is 'clip_text_model'"):
        ClipTextConfig.from_huggingface({"model_type": "clip"})
    with pytest.raises(RefusedError, match="image classifier"):
        FAMILIES["clip"].build({"model_type": "clip"}, {"classifier.weight": (3, 768)})
    model = ClipText(ClipTextConfig(**TEXT), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="for 9 only"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 10), np.int32))
