"""What travels with a model besides its weights, what stays behind, and how its dtype is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.builders import CONFIG, write_model
from rgsp_jax.checkpoint import OWN_FILES, copy_companions, find_problems, open_checkpoint, write_safetensors
from rgsp_jax.errors import RefusedError

# fmt: off
KEPT = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "modeling_toy.py", "LICENSE", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "additional_chat_templates/tool.jinja",
]
LEFT = [
    "README.md", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.onnx",
    "rust_model.ot", "model.safetensors.index.json", "pytorch_model.bin.index.json", "optimizer.pt", "scheduler.pt",
    "rng_state_0.pth", "trainer_state.json", "training_args.bin", ".gitattributes", ".git/config", ".cache/x.json",
    "model.gguf", "checkpoint-500/trainer_state.json", "checkpoint-500/config.json", "global_step10/x.json",
    "runs/events.out.tfevents.1", "onnx/config.json", "onnx/model.onnx", "original/params.json",
    "original/consolidated.00.pth", "adapter_config.json", "mergekit_config.yml", "all_results.json", *OWN_FILES,
]
# fmt: on


def fill(directory: Path, names) -> None:
    for name in names:
        path = directory / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())


def write_full(directory: Path) -> Path:
    write_model(directory)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "2_Dense").mkdir()
    write_safetensors(directory / "2_Dense" / "model.safetensors", {"linear.weight": np.ones((2, 2), np.float32)})
    fill(directory, KEPT)
    fill(directory, (name for name in LEFT if not name.endswith("index.json")))
    return directory


def test_companions_are_everything_but_weights_and_training(tmp_path):
    checkpoint = open_checkpoint(write_full(tmp_path / "m"))
    assert [path.as_posix() for path in checkpoint.companions] == sorted(KEPT)
    (tmp_path / "out").mkdir()
    copied = copy_companions(checkpoint, tmp_path / "out")
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert there == set(KEPT) == {path.as_posix() for path in copied}
    for name in KEPT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_lone_files_have_no_companions(tmp_path):
    write_full(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m" / "model.safetensors")
    assert checkpoint.companions == () and checkpoint.config is None


def rewrite(tmp_path, config, dtype="bfloat16"):
    checkpoint = open_checkpoint(write_model(tmp_path / "m", config=config))
    (tmp_path / "out").mkdir()
    copy_companions(checkpoint, tmp_path / "out", dtype=dtype)
    return json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1, "torch_dtype": "float32"}, {"a": 1, "torch_dtype": "bfloat16"}),
        ({"dtype": "float16", "b": None}, {"dtype": "bfloat16", "b": None}),
        ({"dtype": "float16", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"torch_dtype": None}, {"torch_dtype": "bfloat16"}),
        ({"a": 1}, {"a": 1, "dtype": "bfloat16"}),
        (
            {"text_config": {"torch_dtype": "float32", "x": 1}, "vision_config": {"y": 2}},
            {"text_config": {"torch_dtype": "bfloat16", "x": 1}, "vision_config": {"y": 2}, "dtype": "bfloat16"},
        ),
        (
            {"dtype": "torch.float32", "parts": [{"dtype": "float32"}, {"dtype": "categorical"}]},
            {"dtype": "bfloat16", "parts": [{"dtype": "bfloat16"}, {"dtype": "categorical"}]},
        ),
    ],
)
def test_dtype_is_rewritten_wherever_it_is_named(tmp_path, config, expected):
    rewritten = rewrite(tmp_path, config)
    assert rewritten == expected
    assert list(rewritten) == list(expected)


def test_without_dtype_the_config_is_copied_as_it_is(tmp_path):
    directory = write_model(tmp_path / "m")
    (directory / "config.json").write_text('{ "torch_dtype":   "float32", "é": "\\u00e9"}')
    (tmp_path / "out").mkdir()
    copy_companions(open_checkpoint(directory), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (directory / "config.json").read_bytes()


def test_transformers_loads_the_rewritten_dtype(tmp_path):
    from transformers import AutoConfig

    rewrite(tmp_path, {"model_type": "bert", "torch_dtype": "float32"})
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_links_out_are_refused_when_opened_and_when_copied(tmp_path):
    directory = write_model(tmp_path / "m")
    (tmp_path / "secret.txt").write_text("secret")
    (directory / "vocab.txt").write_text("a")
    checkpoint = open_checkpoint(directory)
    (directory / "vocab.txt").unlink()
    (directory / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "out").mkdir()
    with pytest.raises(RefusedError, match=r"vocab.txt is a symbolic link out"):
        copy_companions(checkpoint, tmp_path / "out")
    with pytest.raises(RefusedError, match=r"vocab.txt is a symbolic link out"):
        open_checkpoint(directory)
    (directory / "vocab.txt").unlink()
    with pytest.raises(RefusedError, match=r"vocab.txt vanished"):
        copy_companions(checkpoint, tmp_path / "out")
    (directory / "vocab.txt").symlink_to("gone")
    with pytest.raises(RefusedError, match=r"vocab.txt is a symbolic link that leads nowhere"):
        open_checkpoint(directory)


def test_linked_folders_are_not_walked(tmp_path):
    directory = write_model(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.json").write_text("{}")
    (directory / "extra").symlink_to(tmp_path / "elsewhere")
    assert [path.as_posix() for path in open_checkpoint(directory).companions] == ["config.json"]


def test_links_inside_a_directory_and_to_it_are_followed(tmp_path):
    directory = write_model(tmp_path / "m")
    (directory / "blobs").mkdir()
    (directory / "model.safetensors").rename(directory / "blobs" / "abc")
    (directory / "model.safetensors").symlink_to("blobs/abc")
    (tmp_path / "link").symlink_to(directory)
    checkpoint = open_checkpoint(tmp_path / "link")
    assert checkpoint.read("encoder.bias").shape == (4,)


@pytest.mark.parametrize("max_shard_size", [1, 1 << 30])
def test_snapshots_of_the_hub_cache_open(tmp_path, max_shard_size):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    write_model(snapshot, max_shard_size=max_shard_size)
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text("{}")
    (repository / "blobs").mkdir()
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        path.rename(repository / "blobs" / f"{number:040x}")
        up = "../" * len(path.relative_to(repository).parts[:-1])
        path.symlink_to(f"{up}blobs/{number:040x}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.config == CONFIG
    assert Path("1_Pooling/config.json") in checkpoint.companions
    assert checkpoint.read("encoder.bias").shape == (4,)
    (tmp_path / "out").mkdir()
    copy_companions(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_module_weights_must_agree(tmp_path):
    first, second = write_full(tmp_path / "a"), write_full(tmp_path / "b")
    assert find_problems([open_checkpoint(first), open_checkpoint(second)]) == []
    write_safetensors(second / "2_Dense" / "model.safetensors", {"linear.weight": np.zeros((2, 2), np.float32)})
    (problem,) = find_problems([open_checkpoint(first), open_checkpoint(second)])
    assert "2_Dense/model.safetensors differs" in problem


@pytest.mark.parametrize("content", ["{", "{}"])
def test_broken_module_lists_are_refused(tmp_path, content):
    directory = write_model(tmp_path / "m")
    (directory / "modules.json").write_text(content)
    with pytest.raises(RefusedError, match=r"modules.json (cannot be read|is not a list)"):
        open_checkpoint(directory)
