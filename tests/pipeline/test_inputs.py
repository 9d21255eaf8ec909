"""Models in every format go in; what comes out loads where they did."""

import json
import logging

import numpy as np
import pytest
import torch

from pipeline.toy_models import CONFIG, read_model, same_bits, toy_family, tree_bytes, write_family, write_model
from rgsp_jax.checkpoint import convert_to_orbax, digest, hash_file, open_checkpoint, write_safetensors
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge, merge_checkpoints

pytestmark = pytest.mark.usefixtures("plain_report")
logging.getLogger("absl").setLevel(logging.ERROR)
FILES = {"model.safetensors", "README.md", "merge_config.yaml", "merge_summary.json", "report.html", "report.jsonl"}


def average_of(tmp_path, models, **settings):
    return merge_checkpoints(
        MergeConfig(models=tuple(map(str, models)), method="average", **settings), tmp_path / "out"
    )


@pytest.fixture
def family():
    return toy_family(2)


@pytest.fixture
def expected(tmp_path, family):
    """The average of the family through plain directories."""
    (tmp_path / "expected").mkdir()
    return read_model(average_of(tmp_path / "expected", write_family(tmp_path / "plain", family)).out)


def as_torch(tensors):
    return {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}


def test_lone_safetensors(tmp_path, family, expected):
    models = [tmp_path / f"{k}.safetensors" for k in "ab"]
    for path, tensors in zip(models, family, strict=True):
        write_safetensors(path, tensors)
    result = average_of(tmp_path, models)
    assert {str(p.relative_to(result.out)) for p in result.out.rglob("*")} == FILES
    merged = read_model(result.out / "model.safetensors")
    assert all(same_bits(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_lone_torch_files(tmp_path, family, expected, suffix):
    models = [tmp_path / f"{k}{suffix}" for k in "ab"]
    for path, tensors in zip(models, family, strict=True):
        torch.save({"model": as_torch(tensors), "epoch": 3} if suffix == ".pt" else as_torch(tensors), path)
    merged = read_model(average_of(tmp_path, models).out)
    assert all(same_bits(merged[name], expected[name]) for name in expected)


def test_a_lone_file_keeps_both_names_of_a_shared_tensor(tmp_path):
    """Without a config nobody ties them again."""
    models = []
    for k in range(2):
        shared = torch.full((3, 4), float(k))
        models.append(tmp_path / f"{k}.pt")
        torch.save({"wte.weight": shared, "lm_head.weight": shared, "w.weight": torch.ones(2, 2)}, models[-1])
    merged = read_model(average_of(tmp_path, models).out)
    assert set(merged) == {"wte.weight", "lm_head.weight", "w.weight"}
    assert same_bits(merged["wte.weight"], merged["lm_head.weight"])
    np.testing.assert_array_equal(merged["wte.weight"], np.full((3, 4), 0.5))


def test_sharded_torch_files_with_tied_weights(tmp_path):
    """As transformers saved them: the tie is stored once or twice, the output has it once."""
    rng = np.random.default_rng(0)
    expected = {}
    for directory in (tmp_path / "a", tmp_path / "b"):
        directory.mkdir()
        embedding = torch.from_numpy(rng.normal(size=(6, 4)).astype(np.float32))
        layers = {
            f"model.layers.{i}.w.weight": torch.from_numpy(rng.normal(size=(4, 4)).astype(np.float32)) for i in (0, 1)
        }
        first = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, **dict(list(layers.items())[:1])}
        second = dict(list(layers.items())[1:])
        torch.save(first, directory / "pytorch_model-00001-of-00002.bin")
        torch.save(second, directory / "pytorch_model-00002-of-00002.bin")
        where = {n: f"pytorch_model-0000{1 + (n in second)}-of-00002.bin" for n in (*first, *second)}
        index = {"metadata": {}, "weight_map": where}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
        for name, tensor in {**first, **second}.items():
            expected[name] = expected.get(name, 0) + tensor.numpy().astype(np.float64) / 2
    result = average_of(tmp_path, [tmp_path / "a", tmp_path / "b"])
    merged = read_model(result.out)
    assert set(merged) == set(expected) - {"lm_head.weight"}
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-6)
    assert not list(result.out.glob("*.bin*"))


def test_formats_may_be_mixed(tmp_path, family, expected):
    write_model(tmp_path / "a", family[0])
    torch.save(as_torch(family[1]), tmp_path / "b.pt")
    merged = read_model(average_of(tmp_path, [tmp_path / "a", tmp_path / "b.pt"]).out)
    assert all(same_bits(merged[name], expected[name]) for name in expected)


@pytest.fixture
def orbax_models(tmp_path):
    """Two Orbax checkpoints of a Flax tree, with a config and a tokenizer beside; and their arrays."""
    from orbax.checkpoint import v1 as orbax

    arrays = []
    for k, directory in enumerate((tmp_path / "a", tmp_path / "b")):
        rng = np.random.default_rng(k)
        tree = {
            "params": {
                "embed": {"embedding": rng.normal(size=(9, 4)).astype(np.float32)},
                "dense": {"kernel": rng.normal(size=(4, 6)).astype(np.float32), "bias": np.ones(6, np.float32) * k},
                "blocks": [{"w": rng.normal(size=(3, 3)).astype(np.float32)} for _ in range(2)],
            },
            "step": 7,
        }
        orbax.save(directory, tree)
        (directory / "config.json").write_text(json.dumps({**CONFIG, "dtype": "float32"}))
        (directory / "tokenizer.json").write_text("{}")
        arrays.append(read_model(directory))
    return [tmp_path / "a", tmp_path / "b"], arrays


def test_orbax_parents_give_an_orbax_checkpoint(tmp_path, orbax_models):
    from orbax.checkpoint import v1 as orbax

    models, arrays = orbax_models
    result = average_of(tmp_path, models)
    with open_checkpoint(result.out) as out:
        assert out.format == "orbax"
        merged = {name: out.read(name) for name in out.specs}
    assert merged.keys() == arrays[0].keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, (arrays[0][name].astype(np.float64) + arrays[1][name]) / 2, atol=1e-6)
    tree = orbax.load(result.out)
    assert tree["step"] == 7
    np.testing.assert_array_equal(tree["params"]["blocks"][1]["w"], merged["params/blocks/1/w"])
    assert json.loads((result.out / "config.json").read_text())["dtype"] == "float32"
    assert (result.out / "tokenizer.json").read_text() == "{}"
    lines = [json.loads(line) for line in (result.out / "report.jsonl").read_text().splitlines()]
    assert {line["name"]: line["digest"] for line in lines} == {name: digest(x) for name, x in merged.items()}
    assert result.files and all(hash_file(result.out / name) == value for name, value in result.files.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


def test_an_orbax_copy_that_is_not_what_was_merged_is_caught(tmp_path, monkeypatch, orbax_models):
    def convert_another(directory, like, destination):
        convert_to_orbax(directory, like, destination)
        monkeypatch.setattr(merge, "digest", lambda array: "another")

    monkeypatch.setattr(merge, "convert_to_orbax", convert_another)
    with pytest.raises(RefusedError, match="audit: 'params/dense/kernel' in the Orbax checkpoint"):
        average_of(tmp_path, orbax_models[0])
    assert not (tmp_path / "out").exists()


def test_names_of_the_hub_without_network_are_one_sentence(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RefusedError) as refusal:
        average_of(tmp_path, ["hf://no-such-owner/no-such-model", "hf://no-such-owner/another@main"])
    assert len(refusal.value.problems) == 2
    for problem, name in zip(refusal.value.problems, ("no-such-model", "another@main"), strict=True):
        assert problem.startswith(f"hf://no-such-owner/{name} could not be fetched") and "\n" not in problem


def test_what_is_no_model_is_refused_for_every_model(tmp_path, family):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    names = ("empty", "text.txt", "broken.safetensors", "absent")
    with pytest.raises(RefusedError) as refusal:
        average_of(tmp_path, [tmp_path / name for name in names])
    assert len(refusal.value.problems) == len(names)
    assert all(str(tmp_path / name) in p for name, p in zip(names, refusal.value.problems, strict=True))


def test_the_output_may_not_touch_an_input(tmp_path, family):
    models = write_family(tmp_path, family)
    before = tree_bytes(tmp_path)
    for out in (models[0], f"{models[1]}/merged", str(tmp_path)):
        with pytest.raises(RefusedError):
            merge_checkpoints(MergeConfig(models=tuple(models), method="average"), out)
    assert tree_bytes(tmp_path) == before
