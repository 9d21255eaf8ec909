"""Llama, Mistral, Qwen2 and Qwen3 against transformers' own models, on tiny random weights."""

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
    DecoderConfig,
    DecoderLm,
    export_weights,
    extract_parameters,
    load_weights,
    replace_parameters,
)
from rgsp_jax.models.rotary import Rotary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama tied, biased, wide heads": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4, "head_dim": 8}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 3, "head_dim": 8}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "hidden_act": "gelu"}),
    "qwen2 tied, with windows": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3 tied, biased, layer types": (
        "Qwen3",
        {
            **{"head_dim": 4, "tie_word_embeddings": True, "attention_bias": True, "use_sliding_window": True},
            **{"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        },
    ),
}


def make(kind, head="ForCausalLM", **options):
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    return randomise(getattr(transformers, f"{kind}{head}")(config))


def call(model, *batch):
    return nnx.jit(lambda model, *batch: model(*batch))(model, *batch)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    kind, options = CASES[name]
    theirs = make(kind, **options)
    weights, config = save_and_read(theirs, tmp_path)
    ours = build_loaded(config, weights)
    assert (ours.lm_head is None) == options.get("tie_word_embeddings", False)
    ids, mask = draw_tokens()
    with torch.no_grad():
        expected = theirs(*as_torch(ids, mask)).logits.numpy()
    logits = call(ours, ids, mask)
    assert logits.dtype == np.float32 and np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_headless_model_and_batches_without_padding(tmp_path):
    theirs = make("Qwen3", "Model")
    weights, config = save_and_read(theirs, tmp_path)
    assert "embed_tokens.weight" in weights
    ours = build_loaded(config, weights)
    ids, _ = draw_tokens()
    with torch.no_grad():
        expected = theirs(*as_torch(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(call(ours, ids), expected, rtol=0, atol=1e-5)
    prefixed = {f"model.{key}": array for key, array in weights.items()}
    np.testing.assert_array_equal(call(load_weights(ours, prefixed), ids), call(ours, ids))


def test_a_tied_head_that_the_checkpoint_holds_all_the_same(tmp_path):
    theirs = make("Llama", tie_word_embeddings=True)
    weights, config = save_and_read(theirs, tmp_path)
    assert "lm_head.weight" not in weights
    ids, mask = draw_tokens()
    tied = call(build_loaded(config, weights), ids, mask)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)  # a buffer of older checkpoints
    model = FAMILIES["llama"].build(config, {key: array.shape for key, array in weights.items()})
    np.testing.assert_array_equal(call(load_weights(model, weights), ids, mask), tied)
    del weights["model.layers.0.self_attn.rotary_emb.inv_freq"]
    # transformers unties without a word where the two differ; here what is on disk is what the model holds.
    held = build_loaded(config, {**weights, "lm_head.weight": 2 * weights["model.embed_tokens.weight"]})
    np.testing.assert_allclose(call(held, ids, mask), 2 * tied, rtol=0, atol=1e-5)
    with pytest.raises(RefusedError, match=r"'lm_head\.weight' is missing"):
        build_loaded({**config, "tie_word_embeddings": False}, weights)


def test_half_precision_is_cast_and_merged_trees_are_used_in_place(tmp_path):
    weights, config = save_and_read(make("Qwen2", tie_word_embeddings=True).to(torch.bfloat16), tmp_path)
    assert weights["model.embed_tokens.weight"].dtype == jnp.bfloat16
    shapes = {key: array.shape for key, array in weights.items()}
    model = load_weights(FAMILIES["qwen2"].build(config, shapes), weights)
    for key, array in export_weights(model).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, weights[key].astype(np.float32))
    ids, mask = draw_tokens()

    @jax.jit
    def find_gradient(parameters, direction):
        def loss(amount):
            merged = jax.tree.map(lambda p, d: p + amount * d, parameters, direction)
            return jnp.square(replace_parameters(model, merged)(ids, mask)).mean()

        return jax.value_and_grad(loss)(jnp.float32(0))

    parameters = extract_parameters(model)
    direction = jax.tree.map(lambda p: p / 8, parameters)
    value, slope = find_gradient(parameters, direction)
    np.testing.assert_allclose(value, np.square(call(model, ids, mask)).mean(), rtol=1e-6)
    step = 1e-2
    ends = [
        find_gradient(jax.tree.map(lambda p: p * (1 + sign * step / 8), parameters), direction)[0]  # noqa: B023
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=2e-3)
    assert abs(slope) > 1e-2


@pytest.mark.parametrize(
    ("kind", "fields", "reasons"),
    [
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["'yarn'"]),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "vocab_size": None},
            ["'dynamic'", "'vocab_size'"],
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            ["'low_freq_", "'high_freq_", "'original_max_"],
        ),
        ("llama", {"rope_scaling": {"type": "linear"}, "partial_rotary_factor": 0.5}, ["'factor'", "'partial_rotary_"]),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, ["'layer_types'"]),
        (
            "llama",
            {"hidden_act": "mish", "num_key_value_heads": 3, "head_dim": 5},
            ["'mish'", "'num_key_", "'head_dim'"],
        ),
        ("mistral", {"sliding_window": 0}, ["'sliding_window' is 0"]),
        ("mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 2}, ["'layer_types'"]),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, ["'layer_types'"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["'layer_types'"]),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 2, "rope_parameters": {"full_attention": {}}},
            ["'layer", "'rope"],
        ),
        ("qwen3_moe", {}, ["'qwen3_moe'"]),
    ],
)
def test_configs_of_other_models_are_refused(kind, fields, reasons):
    with pytest.raises(RefusedError) as refused:
        DecoderConfig.from_huggingface({"model_type": kind, **SIZES, **fields})
    assert len(refused.value.problems) == len(reasons), refused.value.problems
    assert all(any(reason in problem for problem in refused.value.problems) for reason in reasons)


def test_what_older_configs_leave_out_means_what_it_means_in_transformers():
    sparse = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sparse = {**sparse, "num_attention_heads": 32, "hidden_size": 64}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        theirs = getattr(transformers, f"{kind.capitalize()}Config")(**sparse)
        ours = DecoderConfig.from_huggingface({"model_type": kind, **sparse})
        assert ours == DecoderConfig.from_huggingface(theirs.to_dict()), kind
        assert ours.num_key_value_heads == theirs.num_key_value_heads
    given = {"model_type": "llama", **SIZES, "rope_theta": 7.0, "max_position_embeddings": 64}
    old = {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert Rotary.from_huggingface({**given, "rope_scaling": old}).original_max_position_embeddings == 64
    assert Rotary.from_huggingface({**given, "rope_scaling": None}) == Rotary(rope_theta=7.0)


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 4.0}, {**LLAMA3, "factor": 32.0}])
@pytest.mark.parametrize(("width", "theta"), [(128, 5e5), (96, 1e4)])
def test_frequencies_equal_transformers(scaling, width, theta):
    given = {"rope_type": "default", **scaling, "rope_theta": theta}
    config = transformers.LlamaConfig(hidden_size=width, num_attention_heads=1, rope_parameters=given)
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = Rotary.from_huggingface(config.to_dict()).frequencies(width)
    assert ours.dtype == np.float32
    # A few roundings apart: the blend of llama3 subtracts what is almost equal.
    np.testing.assert_allclose(ours, embedding.inv_freq.numpy(), rtol=1e-6, atol=0)


def test_models_are_built_without_a_checkpoint():
    config = DecoderConfig.from_huggingface({"model_type": "mistral", **SIZES, "sliding_window": 2})
    assert config.windows == (2, 2)
    ids, _ = draw_tokens()
    model = DecoderLm(config, rngs=nnx.Rngs(0))
    headless = Decoder(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(call(model.decoder, ids), call(headless, ids))
    changed = ids.copy()
    changed[:, 0] = (ids[:, 0] + 1) % 37
    # Two layers of a window of two reach two positions back: the first token reaches the third and no further.
    differs = np.abs(call(model, ids) - call(model, changed)).max((0, 2)) > 0
    np.testing.assert_array_equal(differs, np.arange(9) < 3)
