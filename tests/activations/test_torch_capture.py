"""Covariances of Hugging Face models against plain hooks on single examples in float64."""

import json

import numpy as np
import pytest
import torch
import transformers

from activations import tiny_models as tiny
from rgsp_jax.activations import CovarianceSettings, collect_covariances
from rgsp_jax.activations.capture import WeightIndex, find_margins, unfold
from rgsp_jax.activations.sites import Place
from rgsp_jax.checkpoint import find_foreign, open_checkpoint, open_covariances

ALL = CovarianceSettings(held_back=0, batch_size=5)


def collect(model, data, out, settings=ALL):
    result = collect_covariances(model, data, out, settings)
    return result, open_covariances(out)


def see_inputs(model, batches):
    """Module name -> rows of everything that its linear layers saw, float64, by plain forward pre-hooks."""
    seen = {}
    model = model.double().eval()

    def watch(name):
        def hook(module, arguments):
            seen.setdefault(name, []).append(arguments[0].reshape(-1, arguments[0].shape[-1]))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat(rows).numpy() for name, rows in seen.items()}


def check_second_moment(covariances, weight, rows, tolerance=2e-6):
    site = covariances.site_of[weight]
    exact = rows.T @ rows / len(rows)
    assert site.rows == len(rows)
    found = covariances.read(site.name, "covariance")
    assert np.abs(found - exact).max() < tolerance * np.abs(exact).max(), weight
    assert np.abs(covariances.read(site.name, "mean") - rows.mean(0)).max() < tolerance * np.abs(rows).max()


def encode(directory, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return [dict(tokenizer(text, return_tensors="pt")) for text in texts]


LANGUAGE_MODELS = {
    "bert": (lambda: tiny.make_bert(3), lambda module: f"{module}.weight", 14),
    "gpt2": (tiny.make_gpt2, lambda module: f"{module}.weight", 8),
    "llama": (lambda: tiny.make_llama(tied=False), lambda module: f"{module}.weight", 15),
}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_language_models_without_their_padding(tmp_path, family):
    make, name_weight, linears = LANGUAGE_MODELS[family]
    directory = tiny.save_model(tmp_path / "model", make(), tiny.make_tokenizer())
    texts = tiny.draw_texts(12)
    result, covariances = collect(
        directory, tiny.write_texts(tmp_path / "data.jsonl", texts), tmp_path / "c.safetensors"
    )
    with covariances, open_checkpoint(directory) as checkpoint:
        reloaded = getattr(transformers, checkpoint.config["architectures"][0]).from_pretrained(directory)
        oracle = see_inputs(reloaded, encode(directory, texts))
        covered = {module: rows for module, rows in oracle.items() if name_weight(module) in covariances.site_of}
        assert len(covered) == linears
        for module, rows in covered.items():
            check_second_moment(covariances, name_weight(module), rows)
        assert find_foreign(covariances, checkpoint) == []
        assert result.not_covered == {} and result.sketches == ()
        words = next(
            site for name, site in covariances.sites.items() if "word_emb" in name or "wte" in name or "tokens" in name
        )
        counts = np.bincount([tiny.VOCABULARY[w] for text in texts for w in text.split()], minlength=words.width)
        assert words.kind == "counts" and np.array_equal(covariances.read(words.name, "counts"), counts)


def test_one_input_of_several_weights_is_kept_once(tmp_path):
    directory = tiny.save_model(tmp_path / "model", tiny.make_llama(), tiny.make_tokenizer())
    data = tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(6))
    result, covariances = collect(directory, data, tmp_path / "c.safetensors")
    with covariances:
        for layer in range(2):
            prefix = f"model.layers.{layer}"
            attention = {f"{prefix}.self_attn.{name}_proj.weight" for name in "qkv"}
            assert set(covariances.site_of[f"{prefix}.self_attn.q_proj.weight"].weights) == attention
            mlp = {f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up")}
            assert set(covariances.site_of[f"{prefix}.mlp.gate_proj.weight"].weights) == mlp
        tied = covariances.site_of["model.embed_tokens.weight"]
        assert tied.kind == "counts" and result.sites == {"counts": 1, "full": 8}


def test_positions_are_counted_per_text(tmp_path):
    directory = tiny.save_model(tmp_path / "model", tiny.make_gpt2(), tiny.make_tokenizer())
    texts = ["how many cats", "cats sat", "who"]
    _, covariances = collect(directory, tiny.write_texts(tmp_path / "d.jsonl", texts), tmp_path / "c.safetensors")
    with covariances:
        counts = covariances.read("transformer.wpe", "counts")
        assert list(counts[:4]) == [3, 2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_found_in_any_dtype(tmp_path, dtype):
    directory = tiny.save_model(tmp_path / "model", tiny.make_bert(), tiny.make_tokenizer(), dtype=dtype)
    data = tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(4))
    for number, computed in enumerate(("float32", "bfloat16")):
        settings = CovarianceSettings(held_back=0, dtype=computed)
        result, covariances = collect(directory, data, tmp_path / f"{number}.safetensors", settings)
        with covariances, open_checkpoint(directory) as checkpoint:
            assert find_foreign(covariances, checkpoint) == []
            assert result.sites == {"counts": 3, "full": 9} and result.not_covered == {}


def test_experts_see_the_tokens_that_are_sent_to_them(tmp_path):
    directory = tiny.save_model(tmp_path / "model", tiny.make_mixtral(), tiny.make_tokenizer())
    texts = tiny.draw_texts(20)
    result, covariances = collect(directory, tiny.write_texts(tmp_path / "d.jsonl", texts), tmp_path / "c.safetensors")
    tokens = sum(len(text.split()) for text in texts)
    with covariances, open_checkpoint(directory) as checkpoint:
        block = "model.layers.0.block_sparse_moe"
        experts = [covariances.site_of[f"{block}.experts.{i}.w1.weight"] for i in range(4)]
        for i, site in enumerate(experts):
            assert set(site.weights) == {f"{block}.experts.{i}.w1.weight", f"{block}.experts.{i}.w3.weight"}
        assert sum(site.rows for site in experts) == 2 * tokens
        gate = covariances.site_of[f"{block}.gate.weight"]
        assert gate.rows == tokens and gate.kind == "full"
        # Every token goes to two experts, so that their second moments add up to twice the router's.
        total = sum(site.rows * covariances.read(site.name, "covariance") for site in experts)
        np.testing.assert_allclose(total, 2 * tokens * covariances.read(gate.name, "covariance"), rtol=1e-4, atol=1e-4)
        assert find_foreign(covariances, checkpoint) == [] and result.not_covered == {}


def test_decoders_are_fed_the_text(tmp_path):
    directory = tiny.save_model(tmp_path / "model", tiny.make_t5(), tiny.make_tokenizer())
    texts = tiny.draw_texts(8)
    _, covariances = collect(directory, tiny.write_texts(tmp_path / "d.jsonl", texts), tmp_path / "c.safetensors")
    inputs = encode(directory, texts)
    for batch in inputs:
        batch.pop("token_type_ids", None)
        batch["decoder_input_ids"] = torch.cat(
            [torch.zeros_like(batch["input_ids"][:, :1]), batch["input_ids"][:, :-1]], 1
        )
    oracle = see_inputs(transformers.T5ForConditionalGeneration.from_pretrained(directory), inputs)
    with covariances:
        cross = covariances.site_of["decoder.block.0.layer.1.EncDecAttention.k.weight"]
        assert "decoder.block.0.layer.1.EncDecAttention.v.weight" in cross.weights
        for module in ("encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.1.EncDecAttention.k"):
            check_second_moment(covariances, f"{module}.weight", oracle[module])


def test_patches_are_rows_in_the_order_of_the_kernel(tmp_path):
    model = tiny.make_vit(classes=3)
    directory = tiny.save_model(tmp_path / "model", model)
    images = np.random.default_rng(0).standard_normal((10, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=images)
    result, covariances = collect(directory, tmp_path / "images.npz", tmp_path / "c.safetensors")
    with covariances:
        site = covariances.site_of["vit.embeddings.patch_embeddings.projection.weight"]
        patches = images.reshape(10, 1, 2, 4, 2, 4).transpose(0, 2, 4, 1, 3, 5).reshape(40, 16)
        check_second_moment(covariances, next(iter(site.weights)), patches.astype(np.float64))
        oracle = see_inputs(model, [{"pixel_values": torch.from_numpy(images).double()}])
        check_second_moment(covariances, "classifier.weight", oracle["classifier"])
        assert covariances.site_of["classifier.weight"].rows == 10
        assert result.not_covered == {}


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
def test_unfolding_multiplies_like_the_convolution(padding):
    x, weight = torch.randn(3, 2, 7, 9, dtype=torch.float64), torch.randn(5, 2, 3, 2, dtype=torch.float64)
    stride, dilation = (1, 1) if padding == "same" else (2, 1), (1, 2)
    exact = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation)
    rows = unfold(x, (3, 2), stride, find_margins(padding, (3, 2), dilation), dilation)
    found = (rows @ weight.reshape(5, -1).T).reshape(3, *exact.shape[2:], 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, exact)


def test_parts_and_transposes_of_a_parameter_are_told_apart():
    stacked = torch.randn(2, 6, 4)
    places = {
        "first.gate": Place("stacked", 0, 12),
        "first.up": Place("stacked", 12, 12),
        "second.gate": Place("stacked", 24, 12),
    }
    index = WeightIndex({"stacked": stacked}, places)
    assert index.find(stacked[0]) == ("first.gate", "first.up")
    assert index.find(stacked[0].T) == ("first.gate", "first.up")
    assert index.find(stacked[1]) == ()  # half of it is no tensor of the checkpoint
    assert index.find(stacked[1][:3]) == ("second.gate",)
    assert index.find(stacked[0][:, :2]) == () and index.find(torch.randn(6, 4)) == () and index.find(None) == ()


def test_what_depends_on_absent_weights_is_left_out(tmp_path):
    directory = tiny.save_model(tmp_path / "model", tiny.make_bert(), tiny.make_tokenizer())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    data = tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(5))
    result, covariances = collect(directory, data, tmp_path / "c.safetensors")
    with covariances:
        assert set(result.not_covered) == {
            "pooler.dense.weight"
        }  # it reads layer 2, which the checkpoint does not have
        assert "encoder.layer.1.output.dense.weight" in covariances.site_of
        assert any("encoder.layer.2" in warning for warning in result.warnings)
