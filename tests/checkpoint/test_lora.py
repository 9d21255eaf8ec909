"""LoRA adapters opened as models: against PEFT's own merges, in any slices, merged further, refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from checkpoint.builders import same_bytes, write_model
from rgsp_jax.checkpoint import convert_to_huggingface, open_checkpoint, write_safetensors
from rgsp_jax.checkpoint.lora import LoraFactors
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import merge_checkpoints, parse_config

GOLDEN = Path(__file__).parent / "golden" / "lora"  # by make_lora_golden.py
CASES = sorted(path.name for path in GOLDEN.iterdir())


def read_all(location):
    with open_checkpoint(location) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_makes_of_it(case):
    found, expected = read_all(GOLDEN / case / "adapter"), read_all(GOLDEN / case / "merged.safetensors")
    assert found.keys() == expected.keys()
    changed = 0
    base = read_all(GOLDEN / case / "base")
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        rounding = 0 if case == "half" else 5e-7
        np.testing.assert_allclose(found[name].astype(np.float64), array.astype(np.float64), rtol=0, atol=rounding)
        changed += not np.array_equal(array, base[name])
    assert changed >= 3


@pytest.mark.parametrize("case", ["plain", "transposed", "convolution", "saved_modules"])
def test_any_slice_is_a_slice_of_the_whole(case):
    rng = np.random.default_rng(0)
    with open_checkpoint(GOLDEN / case / "adapter") as checkpoint:
        for name, spec in checkpoint.specs.items():
            whole = checkpoint.read(name).reshape(-1)
            first, last = sorted(map(int, rng.integers(0, spec.size + 1, 2)))
            part = np.empty(last - first, spec.dtype)
            checkpoint.read_into(name, part, first)
            np.testing.assert_allclose(part, whole[first:last], rtol=0, atol=5e-7)


def test_the_factors_are_the_update():
    with open_checkpoint(GOLDEN / "plain" / "adapter") as checkpoint:
        assert checkpoint.format == "lora" and checkpoint.path.name == "adapter" and checkpoint.root.name == "base"
        name, factors = next(iter(checkpoint.factors.items()))
        merged = checkpoint.read(name)
    assert isinstance(factors, LoraFactors) and factors.scaling == 3.0
    base = read_all(GOLDEN / "plain" / "base")[name]
    update = factors.scaling * factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    np.testing.assert_allclose(merged - base, update, rtol=0, atol=5e-7)


def test_two_adapters_of_one_base_merge_as_models(tmp_path):
    shutil.copytree(GOLDEN / "plain", tmp_path / "plain")
    other = tmp_path / "plain" / "other"
    shutil.copytree(tmp_path / "plain" / "adapter", other)
    factors = read_all_raw(other / "adapter_model.safetensors")
    doubled = {name: array * 2 if "lora_B" in name else array for name, array in factors.items()}
    (other / "adapter_model.safetensors").unlink()
    write_safetensors(other / "adapter_model.safetensors", doubled)
    models = (str(tmp_path / "plain" / "adapter"), f"{tmp_path / 'plain' / 'base'}+{other}")
    out = tmp_path / "merged"
    merge_checkpoints(parse_config({"models": models, "method": "average"}, "test"), out)
    first, second, found = (read_all(model) for model in (*models, out))
    for name, array in found.items():
        np.testing.assert_allclose(array, (first[name] + second[name]) / 2, rtol=0, atol=1e-6)
    assert (out / "config.json").read_bytes() == (GOLDEN / "plain" / "base" / "config.json").read_bytes()
    with open_checkpoint(models[1]) as checkpoint:
        convert_to_huggingface(checkpoint, tmp_path / "whole")
    whole = read_all(tmp_path / "whole")
    assert all(same_bytes(whole[name], array) for name, array in second.items())


def read_all_raw(path):
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.fixture
def adapter(tmp_path):
    """A copy of the plain case to break: (adapter directory, `change(settings)`, `rewrite(tensors)`)."""
    shutil.copytree(GOLDEN / "plain", tmp_path / "case")
    directory = tmp_path / "case" / "adapter"

    def change(**settings):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    def rewrite(edit):
        path = directory / "adapter_model.safetensors"
        tensors = edit(dict(read_all_raw(path)))
        path.unlink()
        write_safetensors(path, tensors)

    return directory, change, rewrite


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "'IA3'; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes its base as well"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"lora_alpha": "many"}, "must be numbers"),
        ({"alpha_pattern": {"(": 2}}, "no regular expression"),
        ({"base_model_name_or_path": "owner/model"}, r"'owner/model', which is no directory here.*BASE\+"),
        ({"base_model_name_or_path": None}, "no directory here"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(adapter, settings, words):
    directory, change, _ = adapter
    change(**settings)
    with pytest.raises(RefusedError, match=words):
        open_checkpoint(directory)


def test_all_refused_settings_come_at_once(adapter):
    directory, change, _ = adapter
    change(use_dora=True, lora_bias=True, layer_replication=[[0, 1]])
    with pytest.raises(RefusedError) as refused:
        open_checkpoint(directory)
    assert len(refused.value.problems) == 3


QUERY = "layer.0.attention.self.query.lora"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if f"{QUERY}_A" not in k}, "only one of its two"),
        (lambda t: {k.replace("encoder.layer.1", "encoder.layer.7"): v for k, v in t.items()}, "is this its base"),
        (lambda t: {k: v[:, :5] if f"{QUERY}_A" in k else v for k, v in t.items()}, "do not fit"),
        (lambda t: {k: v[:, :1] if f"{QUERY}_B" in k else v for k, v in t.items()}, "do not fit"),
        (lambda t: {**t, "base_model.model.x.lora_magnitude_vector": np.ones(3)}, "no factor of a plain LoRA"),
        (lambda t: {"base_model.model.classifier.weight": np.ones((3, 8), np.float32)}, "no factors"),
    ],
)
def test_factors_that_fit_nothing_are_refused(adapter, edit, words):
    directory, _, rewrite = adapter
    rewrite(edit)
    with pytest.raises(RefusedError, match=words):
        open_checkpoint(directory)


def test_a_damaged_config_and_a_hostile_file_are_refused(adapter, tmp_path):
    directory, _, _ = adapter
    (directory / "adapter_config.json").write_text("[]")
    with pytest.raises(RefusedError, match="not a JSON object"):
        open_checkpoint(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(RefusedError, match="cannot be read"):
        open_checkpoint(directory)
    outside = tmp_path / "outside.safetensors"
    shutil.copyfile(directory / "adapter_model.safetensors", outside)
    shutil.copyfile(GOLDEN / "plain" / "adapter" / "adapter_config.json", directory / "adapter_config.json")
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.safetensors").symlink_to(outside)
    with pytest.raises(RefusedError, match="link out of its directory"):
        open_checkpoint(directory)


def test_a_model_beside_an_adapter_is_opened_itself(tmp_path):
    model = write_model(tmp_path / "model")
    for file in (GOLDEN / "plain" / "adapter").iterdir():
        shutil.copyfile(file, model / file.name)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.format == "safetensors"
