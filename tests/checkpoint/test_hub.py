"""Models of the hub, through a stand-in for huggingface_hub: nothing here touches a network."""

import sys
import types
from fnmatch import fnmatch

import pytest
import torch

from checkpoint.builders import write_model
from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.errors import RefusedError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository directory; `snapshot_download` honours the patterns and records its calls."""
    module = types.ModuleType("huggingface_hub")
    module.calls, module.remote, module.cache = [], tmp_path / "remote", tmp_path / "cache"

    def snapshot_download(repo_id, *, revision=None, allow_patterns, ignore_patterns):
        module.calls.append((repo_id, revision))
        if not module.remote.is_dir():
            raise ConnectionError("no route\nto host")
        for path in module.remote.rglob("*"):
            name = path.relative_to(module.remote).as_posix()
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_file() and wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                target = module.cache / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return str(module.cache)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


@pytest.mark.parametrize(
    ("location", "call"),
    [
        ("hf://owner/name", ("owner/name", None)),
        ("hf://owner/na.me-2@v1.0", ("owner/na.me-2", "v1.0")),
        ("hf://name@refs/pr/3", ("name", "refs/pr/3")),
    ],
)
def test_weights_and_companions_are_fetched(hub, location, call):
    write_model(hub.remote)
    for name in ("tokenizer.json", "vocab.txt", "1_Pooling/config.json", "model.onnx", "pytorch_model.bin", "demo.mp4"):
        (hub.remote / name).parent.mkdir(exist_ok=True)
        (hub.remote / name).write_bytes(b"{}")
    checkpoint = open_checkpoint(location)
    assert hub.calls == [call]
    names = [path.as_posix() for path in checkpoint.companions]
    assert names == ["1_Pooling/config.json", "config.json", "tokenizer.json", "vocab.txt"]
    assert sorted(path.name for path in hub.cache.glob("*model*")) == ["model.safetensors"]


def test_pytorch_files_are_fetched_where_there_is_nothing_else(hub):
    hub.remote.mkdir()
    torch.save({"a": torch.ones(2)}, hub.remote / "pytorch_model.bin")
    assert open_checkpoint("hf://owner/name").read("a").tolist() == [1, 1]
    assert len(hub.calls) == 2


def test_a_failing_network_is_one_sentence(hub):
    with pytest.raises(
        RefusedError, match=r"hf://owner/name could not be fetched: .*ConnectionError: no route to host"
    ):
        open_checkpoint("hf://owner/name")


@pytest.mark.parametrize("location", ["hf://", "hf://a/b/c", "hf://owner/name@", "hf://../../etc/passwd", "hf://a b/c"])
def test_malformed_names_are_refused(hub, location):
    with pytest.raises(RefusedError, match="is no hub location"):
        open_checkpoint(location)
    assert hub.calls == []


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RefusedError, match="needs huggingface_hub, which is not installed"):
        open_checkpoint("hf://owner/name")
