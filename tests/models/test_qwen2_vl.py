"""Qwen2-VL against transformers' own model, on tiny random weights: texts, images, videos, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.huggingface import as_torch, build_loaded, draw_tokens, randomise, save_and_read
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import (
    FAMILIES,
    Decoder,
    Qwen2Vl,
    Qwen2VlConfig,
    export_weights,
    extract_parameters,
    find_positions,
    load_weights,
    replace_parameters,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE, VIDEO = 35, 36
TEXT = {
    **{"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 100.0},
}
VISION = {
    **{"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2},
    **{"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2},
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 33, "vision_end_token_id": 34}
VALUES = 3 * 2 * 2 * 2


def make(tied=False, **text):
    text_config = {**TEXT, **text, "tie_word_embeddings": tied}
    config = transformers.Qwen2VLConfig(
        text_config=text_config, vision_config=dict(VISION), **TOKENS, tie_word_embeddings=tied
    )
    return randomise(transformers.Qwen2VLForConditionalGeneration(config))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Their model, ours of the weights it saves, and the config there."""
    theirs = make()
    weights, config = save_and_read(theirs, tmp_path_factory.mktemp("qwen2_vl"))
    return theirs, build_loaded(config, weights), config


def draw_patches(grids, seed=0):
    count = sum(int(np.prod(grid)) for grid in grids)
    return np.random.default_rng(seed).normal(size=(count, VALUES)).astype(np.float32)


def write_texts(*texts):
    """Ids and mask of texts that are lists of tokens or (token, count); padded behind, the first before."""
    rows = [[t for part in text for t in ([part] if isinstance(part, int) else [part[0]] * part[1])] for text in texts]
    width = max(map(len, rows)) + 1
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        start = 1 if i == 0 else 0
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, mask


@torch.no_grad()
def call(model, ids, mask, **inputs):
    torch_ids, torch_mask = as_torch(ids, mask)
    inputs = {name: torch.tensor(x) for name, x in inputs.items()}
    if inputs:
        inputs["mm_token_type_ids"] = (torch_ids == IMAGE).int() + 2 * (torch_ids == VIDEO).int()
    return model(input_ids=torch_ids, attention_mask=torch_mask, **inputs).logits.numpy()


def check(ours, theirs, mask):
    """Equal at every token; at padding transformers has what nothing depends on."""
    assert np.ptp(theirs) > 1
    np.testing.assert_allclose(np.asarray(ours)[mask == 1], theirs[mask == 1], rtol=0, atol=1e-5)


def test_texts_alone_equal_transformers(pair):
    theirs, ours, config = pair
    assert type(ours) is Qwen2Vl and ours.lm_head is not None
    ids, mask = draw_tokens()
    ids %= 33
    logits = nnx.jit(lambda model, *batch: FAMILIES["qwen2_vl"].run(model, dict(zip(NAMES, batch, strict=True))))
    check(logits(ours, ids, mask), call(theirs, ids, mask), mask)
    assert FAMILIES["qwen2_vl"].max_tokens(config) == 32768


NAMES = ("input_ids", "attention_mask")


def test_one_image_equals_transformers(pair):
    theirs, ours, _ = pair
    grids = [(1, 4, 6)]
    ids, mask = write_texts([5, 33, (IMAGE, 6), 34, 7, 8])
    pixels = draw_patches(grids)
    expected = call(theirs, ids, mask, pixel_values=pixels, image_grid_thw=np.array(grids))
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": np.array(grids)}
    check(FAMILIES["qwen2_vl"].run(ours, batch), expected, mask)


def test_images_and_videos_of_several_texts_equal_transformers(pair):
    theirs, ours, _ = pair
    images, videos = ((1, 2, 4), (1, 4, 2)), ((2, 2, 4),)
    ids, mask = write_texts(
        [1, 33, (IMAGE, 2), 34, 2, 3, 33, (VIDEO, 4), 34, 9], [(IMAGE, 2), 34, 5], [4, 6, 8, 10, 12]
    )
    pixels, frames = draw_patches(images), draw_patches(videos, seed=1)
    inputs = {"pixel_values": pixels, "pixel_values_videos": frames}
    expected = call(theirs, ids, mask, **inputs, image_grid_thw=np.array(images), video_grid_thw=np.array(videos))
    positions = find_positions(ours.config, ids, mask, images, videos)
    torch_ids, torch_mask = as_torch(ids, mask)
    kinds = (torch_ids == IMAGE).int() + 2 * (torch_ids == VIDEO).int()
    theirs_at, _ = theirs.model.get_rope_index(torch_ids, kinds, torch.tensor(images), torch.tensor(videos), torch_mask)
    np.testing.assert_array_equal(positions, theirs_at.numpy())

    @nnx.jit
    def run(model, ids, mask, positions, inputs):
        return model(ids, mask, positions=positions, **inputs, image_grids=images, video_grids=videos)

    check(run(ours, ids, mask, positions, inputs), expected, mask)


def test_a_tied_head_and_windows_equal_transformers(tmp_path):
    theirs = make(tied=True, use_sliding_window=True, sliding_window=3, max_window_layers=1, num_key_value_heads=2)
    weights, config = save_and_read(theirs, tmp_path)
    assert "lm_head.weight" not in weights
    ours = build_loaded(config, weights)
    assert ours.lm_head is None and ours.config.text.windows == (None, 3)
    ids, mask = draw_tokens()
    check(ours(ids, mask), call(theirs, ids, mask), mask)


def test_the_decoder_alone_equals_transformers(tmp_path):
    theirs = randomise(transformers.Qwen2VLTextModel(transformers.Qwen2VLTextConfig(**TEXT)))
    weights, config = save_and_read(theirs, tmp_path)
    ours = build_loaded(config, weights)
    assert type(ours) is Decoder and ours.config.rotary.rope_theta == 100.0
    ids, mask = draw_tokens()
    with torch.no_grad():
        expected = theirs(*as_torch(ids, mask)).last_hidden_state.numpy()
    check(ours(ids, mask), expected, mask)


def test_hub_configs_and_newer_names_load(pair):
    """The decoder's fields beside the tower's, `mrope` as a scaling; keys as transformers names them in memory."""
    _, ours, config = pair
    flat = {"model_type": "qwen2_vl", "rms_norm_eps": 1e-5, "vision_config": {**VISION, "model_type": "qwen2_vl"}}
    assert Qwen2VlConfig.from_huggingface({**flat, **TEXT, **TOKENS}) == Qwen2VlConfig.from_huggingface(config)
    newer = {
        name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): array
        for name, array in export_weights(ours).items()
    }
    loaded = export_weights(load_weights(ours, newer))
    assert all((loaded[name] == array).all() for name, array in export_weights(ours).items())


def test_gradients_pass_through_images(pair):
    _, ours, _ = pair
    grids = ((1, 2, 2),)
    ids, mask = write_texts([5, IMAGE, 7])
    positions, pixels = find_positions(ours.config, ids, mask, grids), draw_patches(grids)

    def loss(parameters):
        model = replace_parameters(ours, parameters)
        logits = model(ids, mask, positions=positions, pixel_values=pixels, image_grids=grids)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, -1, 7])

    gradient = jax.jit(jax.grad(loss))(extract_parameters(ours))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["visual"]["patch"]["kernel"]).max() > 0
    assert not np.abs(gradient["decoder"]["word"]["embedding"][IMAGE]).max()  # the patch stands in its place


def test_configs_refuse_what_the_family_is_not():
    good = {**TEXT, "vision_config": VISION}

    def refuse(**changes):
        with pytest.raises(RefusedError) as refused:
            Qwen2VlConfig.from_huggingface({**good, **changes})
        return refused.value.problems

    assert "'qwen2_5_vl'" in refuse(model_type="qwen2_5_vl")[0]
    yarn = {"type": "yarn", "factor": 4.0, "mrope_section": [1, 1, 2]}
    problems = refuse(rope_scaling=yarn, vision_config={"hidden_act": "mish", "embed_dim": 12})
    assert [problem.split(":")[0] for problem in problems] == ["text_config", *["vision_config"] * 2]
    assert "'yarn'" in problems[0]
    assert "two axes" in refuse(vision_config={"rope_parameters": {"rope_type": "linear"}})[0]
    problems = refuse(rope_scaling=None, head_dim=6, vision_config={**VISION, "hidden_size": 8})
    assert len(problems) == 3 and "'mrope_section'" in problems[0] and "'head_dim'" in problems[1]
    assert "[2, 2]" in refuse(vision_config={**VISION, "patch_size": [2, 2]})[0]
    assert "num_hidden_layers" in refuse(num_hidden_layers=None)[0]


def test_images_that_do_not_fit_are_refused(pair):
    _, ours, _ = pair
    ids, mask = write_texts([5, (IMAGE, 2), 7])
    with pytest.raises(ValueError, match=r"text 0 has 2 tokens .* \(1, 2, 2\)"):
        find_positions(ours.config, ids, mask, ((1, 4, 4),))
    with pytest.raises(ValueError, match=r"text 0 has 2 tokens .* \(0, 0, 0\)"):
        find_positions(ours.config, ids, mask, (), ((1, 2, 4),))
    with pytest.raises(ValueError, match="1 grids more"):
        find_positions(ours.config, ids, mask, ((1, 2, 4), (1, 2, 4)))
    np.testing.assert_array_equal(find_positions(ours.config, ids)[2], np.arange(ids.shape[1])[None])

    def trace(grids, count, **options):
        patches = jax.ShapeDtypeStruct((count, VALUES), np.float32)
        jax.eval_shape(lambda pixels: ours(ids, pixel_values=pixels, image_grids=grids, **options), patches)

    with pytest.raises(ValueError, match="give find_positions"):
        trace(((1, 2, 4),), 8)
    positions = np.zeros((3, *ids.shape), np.int32)
    with pytest.raises(ValueError, match="another number"):
        trace(((1, 2, 4),), 12, positions=positions)
    with pytest.raises(ValueError, match="squares of 2"):
        trace(((1, 3, 4),), 12, positions=positions)
