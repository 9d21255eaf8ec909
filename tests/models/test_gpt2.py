"""GPT-2 against transformers' own models, on tiny random weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from models.huggingface import as_torch, build_loaded, draw_tokens, randomise, save_and_read
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import FAMILIES, Gpt2, Gpt2Config, Gpt2Lm, Gpt2OpenAi, export_weights, load_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 37, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 4},
    **{"attn_implementation": "eager", "layer_norm_epsilon": 1e-6},
}
CASES = {
    "tied": {},
    "untied, narrow": {"tie_word_embeddings": False, "n_inner": 24, "activation_function": "relu"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "not scaled": {"scale_attn_weights": False},
}


def make(head="GPT2LMHeadModel", **options):
    return randomise(getattr(transformers, head)(transformers.GPT2Config(**{**SIZES, **options})))


def call(model, *batch):
    return nnx.jit(lambda model, *batch: model(*batch))(model, *batch)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    theirs = make(**CASES[name])
    weights, config = save_and_read(theirs, tmp_path)
    ours = build_loaded(config, weights)
    assert type(ours) is Gpt2Lm and (ours.lm_head is None) == CASES[name].get("tie_word_embeddings", True)
    ids, mask = draw_tokens()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    logits = call(ours, ids, mask)
    assert logits.dtype == np.float32 and np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_headless_model_and_openais_own_layout(tmp_path):
    theirs = make("GPT2Model")
    weights, config = save_and_read(theirs, tmp_path)
    assert "h.1.attn.c_attn.weight" in weights and config["architectures"] == ["GPT2Model"]
    headless = build_loaded(config, weights)
    assert type(headless) is Gpt2
    ids, _ = draw_tokens()
    with torch.no_grad():
        expected = theirs(*as_torch(ids)).last_hidden_state.numpy()
    hidden = call(headless, ids)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-5)
    whole = build_loaded({**config, "architectures": ["GPT2LMHeadModel"]}, weights)
    assert type(whole) is Gpt2OpenAi
    np.testing.assert_allclose(call(whole, ids), hidden @ weights["wte.weight"].T, rtol=0, atol=1e-5)


def test_buffers_prefixes_and_half_precision_of_older_checkpoints(tmp_path):
    weights, config = save_and_read(make().to(torch.bfloat16), tmp_path)
    old = dict(weights)
    for layer in range(2):
        old[f"transformer.h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.uint8))
        old[f"transformer.h.{layer}.attn.masked_bias"] = np.float32(-1e4)
    model = FAMILIES["gpt2"].build(config, {key: np.shape(array) for key, array in old.items()})
    for key, array in export_weights(load_weights(model, old)).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, weights[key].astype(np.float32))
    bare = Gpt2(Gpt2Config.from_huggingface(config), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(
        export_weights(load_weights(bare, old))["h.1.mlp.c_fc.weight"],
        weights["transformer.h.1.mlp.c_fc.weight"].astype(np.float32),
    )


def test_what_a_gpt2_is_not_is_refused():
    given = {"model_type": "gpt2", **SIZES}
    with pytest.raises(RefusedError) as refused:
        Gpt2Config.from_huggingface({**given, "add_cross_attention": True, "hidden_size": 8})
    assert len(refused.value.problems) == 2
    with pytest.raises(RefusedError) as refused:
        Gpt2Config.from_huggingface({**given, "n_head": 3, "activation_function": "mish"})
    assert len(refused.value.problems) == 2
    with pytest.raises(RefusedError, match="'gpt_neo'"):
        Gpt2Config.from_huggingface({"model_type": "gpt_neo"})
    assert Gpt2Config.from_huggingface({"num_attention_heads": 4, "hidden_size": 16}) == Gpt2Config(n_embd=16, n_head=4)
    assert FAMILIES["gpt2"].max_tokens(given) == 12
    model = nnx.eval_shape(lambda: Gpt2(Gpt2Config.from_huggingface(given), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="12 position embeddings"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 13), np.int32))
