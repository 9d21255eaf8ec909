"""T5 against transformers' own models, on tiny random weights."""

import numpy as np
import pytest
from flax import nnx

from models.huggingface import build_loaded, draw_tokens, randomise, save_and_read
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import FAMILIES, T5, T5Config, T5Encoder, T5Lm, export_weights, load_weights
from rgsp_jax.models.t5 import bucket_positions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 37, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4},
    # Few buckets, so that nine tokens reach the logarithmic ones and the last.
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "attn_implementation": "eager"},
    "decoder_start_token_id": 0,
}
CASES = {
    "v1.0": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
    "gated silu": {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-3},
}


def make(head="T5ForConditionalGeneration", **options):
    return randomise(getattr(transformers, head)(transformers.T5Config(**{**SIZES, **options})))


def call(model, *batch):
    return nnx.jit(lambda model, *batch: model(*batch))(model, *batch)


def draw_pairs():
    """Ids and masks of texts, and of the decoder's, which are shorter."""
    ids, mask = draw_tokens()
    decoder_ids, decoder_mask = draw_tokens(seed=1, lengths=(9, 6, 2, 4))
    return ids, decoder_ids[:, :7], mask, decoder_mask[:, :7]


def call_theirs(model, *batch):
    names = ("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask")
    with torch.no_grad():
        return model(**{name: torch.tensor(array) for name, array in zip(names, batch, strict=False)})


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    theirs = make(**CASES[name])
    weights, config = save_and_read(theirs, tmp_path)
    ours = build_loaded(config, weights)
    batch = draw_pairs()
    expected = call_theirs(theirs, *batch).logits.numpy()
    logits = call(ours, *batch)
    assert logits.dtype == np.float32 and np.ptp(expected) > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    bare = call_theirs(theirs, *batch[:2]).logits.numpy()
    np.testing.assert_allclose(call(ours, *batch[:2]), bare, rtol=0, atol=1e-5)


def test_a_head_of_its_own_as_version_1_1_has_on_disk(tmp_path):
    theirs = make(**CASES["v1.1"])
    head = 0.3 * torch.randn(37, 16, generator=torch.Generator().manual_seed(1))
    weights, config = save_and_read(theirs, tmp_path)
    assert "lm_head.weight" not in weights and config["scale_decoder_outputs"] is False
    weights["lm_head.weight"] = head.numpy()
    theirs.lm_head.weight = torch.nn.Parameter(head)
    batch = draw_pairs()
    expected = call_theirs(theirs, *batch).logits.numpy()
    ours = build_loaded(config, weights)
    np.testing.assert_allclose(call(ours, *batch), expected, rtol=0, atol=1e-5)
    # As transformers 4 wrote the config: the tie alone says that outputs are not scaled.
    older = {name: value for name, value in config.items() if name != "scale_decoder_outputs"}
    again = T5Config.from_huggingface({**older, "tie_word_embeddings": False})
    assert again == ours.model.config


def test_embeddings_that_the_checkpoint_repeats_are_the_models_own(tmp_path):
    weights, config = save_and_read(make(), tmp_path)
    batch = draw_pairs()
    expected = call(build_loaded(config, weights), *batch)
    repeated = {
        **{"encoder.embed_tokens.weight": weights["shared.weight"]},
        **{"decoder.embed_tokens.weight": weights["shared.weight"], "lm_head.weight": weights["shared.weight"]},
    }
    ours = build_loaded(config, {**weights, **repeated})
    np.testing.assert_allclose(call(ours, *batch), expected, rtol=0, atol=1e-6)
    legacy = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    loaded = load_weights(ours, {**weights, **repeated, legacy: np.zeros((8, 4), np.float32)})
    assert legacy not in export_weights(loaded)


@pytest.mark.parametrize("head", ["T5EncoderModel", "T5Model"])
def test_models_without_a_head(head, tmp_path):
    theirs = make(head, **CASES["v1.1"])
    weights, config = save_and_read(theirs, tmp_path)
    ours = build_loaded(config, weights)
    ids, decoder_ids, mask, decoder_mask = draw_pairs()
    if head == "T5EncoderModel":
        assert type(ours) is T5Encoder
        with torch.no_grad():
            expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
        hidden = call(ours, ids, mask)
    else:
        assert type(ours) is T5
        expected = call_theirs(theirs, ids, decoder_ids, mask, decoder_mask).last_hidden_state.numpy()
        hidden = call(ours, ids, decoder_ids, mask, decoder_mask)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-5)


def test_half_precision_is_cast(tmp_path):
    weights, config = save_and_read(make().to(torch.bfloat16), tmp_path)
    model = FAMILIES["t5"].build(config, {key: array.shape for key, array in weights.items()})
    exported = export_weights(load_weights(model, weights))
    assert exported.keys() == weights.keys()
    for key, array in exported.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, weights[key].astype(np.float32), err_msg=key)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_transformers(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-600, 601)
    for buckets, longest in ((4, 3), (8, 6), (20, 64), (32, 128), (33, 1000)):
        ours = bucket_positions(distances, buckets, longest, bidirectional)
        theirs = T5Attention._relative_position_bucket(torch.tensor(distances), bidirectional, buckets, longest)
        np.testing.assert_array_equal(ours, theirs.numpy())
        assert ours.min() == 0 and ours.max() < buckets


def test_configs_say_what_they_say_to_transformers_and_others_are_refused():
    for fields in ({}, {"feed_forward_proj": "gated-gelu"}, {"feed_forward_proj": "gelu"}, {"dense_act_fn": "silu"}):
        theirs = transformers.T5Config(**{**SIZES, **fields}).to_dict()
        assert T5Config.from_huggingface({"model_type": "t5", **SIZES, **fields}) == T5Config.from_huggingface(theirs)
    with pytest.raises(RefusedError) as refused:
        T5Config.from_huggingface(
            {"model_type": "umt5", "is_decoder": True, "feed_forward_proj": "a-b-c", "head_dim": 2, "d_kv": 3}
        )
    assert len(refused.value.problems) == 4
    with pytest.raises(RefusedError) as refused:
        T5Config(dense_act_fn="mish", relative_attention_num_buckets=2, relative_attention_max_distance=1)
    assert len(refused.value.problems) == 3
    model = nnx.eval_shape(lambda: T5Lm(T5Config(), rngs=nnx.Rngs(0)))
    with pytest.raises(RefusedError, match=r"'classification_head\.dense\.weight' has no place"):
        load_weights(model, {"classification_head.dense.weight": np.zeros((2, 2), np.float32)})
