"""PyTorch files: mapped or legacy, nested, sharded, with shared storages and strange strides."""

import json

import numpy as np
import pytest
import torch

from checkpoint.builders import CONFIG, same_bytes
from rgsp_jax.checkpoint import find_problems, open_checkpoint
from rgsp_jax.errors import RefusedError

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
]


def as_bytes(tensor):
    contiguous = tensor.contiguous()
    return bytes(contiguous.reshape(-1).view(torch.uint8).numpy()) if contiguous.numel() else b""


def make_state_dict():
    torch.manual_seed(0)
    base = (torch.randn(6, 4) * 20).abs()
    tensors = {f"t.{str(dtype)[6:]}": base.to(dtype) for dtype in DTYPES}
    tensors |= {
        "transposed": base.T,
        "transposed_bf16": base.bfloat16().T,
        "strided": base[::2, 1:3],
        "expanded": torch.tensor([1.5, 2.5]).expand(3, 2),
        "slice": base[2:4],
        "scalar": torch.tensor(3.5),
        "scalar_bf16": torch.tensor(3.5).bfloat16(),
        "empty": torch.zeros(0, 3),
    }
    return tensors


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_every_dtype_and_stride(tmp_path, suffix, zip_format):
    tensors = make_state_dict()
    if not zip_format:  # the legacy format has no storages of these
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith(("t.uint16", "t.uint32", "t.uint64"))
        }
    torch.save(tensors, tmp_path / f"m{suffix}", _use_new_zipfile_serialization=zip_format)
    checkpoint = open_checkpoint(tmp_path / f"m{suffix}")
    assert checkpoint.format == "torch"
    assert list(checkpoint.specs) == list(tensors)
    for name, tensor in tensors.items():
        array = checkpoint.read(name)
        assert array.shape == tuple(tensor.shape) == checkpoint.specs[name].shape
        assert array.tobytes() == as_bytes(tensor)
        part = np.empty(array.size - array.size // 3, array.dtype)
        checkpoint.read_into(name, part, array.size // 3)
        assert same_bytes(part, array.reshape(-1)[array.size // 3 :])


def test_contiguous_tensors_are_read_by_position(tmp_path):
    tensors = {"a": torch.randn(300, 30), "b": torch.randn(30, 300).T, "c": torch.randn(7)}
    torch.save(tensors, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    content = (tmp_path / "m.pt").read_bytes()
    assert set(checkpoint._positions) == {"a", "c"}
    for name, position in checkpoint._positions.items():
        assert content[position:].startswith(as_bytes(tensors[name]))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"state_dict": tensors, "epoch": 3, "optimizer": {"state": {}}},
        lambda tensors: {"model_state_dict": tensors},
        lambda tensors: {"model": tensors, "lr": 0.1},
        lambda tensors: {"module": tensors},
        lambda tensors: {"model": {"state_dict": tensors}, "step": 1},
    ],
)
def test_nested_state_dicts_are_found(tmp_path, wrap):
    tensors = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}
    torch.save(wrap(tensors), tmp_path / "m.ckpt")
    checkpoint = open_checkpoint(tmp_path / "m.ckpt")
    assert list(checkpoint.specs) == list(tensors)
    assert checkpoint.read("a.weight").tobytes() == as_bytes(tensors["a.weight"])


def test_what_lay_around_is_recorded(tmp_path):
    torch.save({"model": {"state_dict": {"a": torch.zeros(2)}, "x": 1}, "epoch": 3}, tmp_path / "m.pt")
    metadata = open_checkpoint(tmp_path / "m.pt").metadata
    assert metadata["nested_under"] == "model/state_dict"
    assert metadata["ignored"] == ["epoch", "x"]


def test_parameters_and_modules_state_dict(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert checkpoint.specs["1.num_batches_tracked"].kind == "integer"
    assert checkpoint.read("0.weight").tobytes() == as_bytes(model[0].weight.detach())
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "p.pt")
    assert open_checkpoint(tmp_path / "p.pt").read("w").tolist() == [1, 1]


def test_only_identical_views_are_aliases(tmp_path):
    shared = torch.randn(4, 4)
    tensors = {"embed": shared, "head": shared, "turned": shared.T, "part": shared[:2], "copy": shared.clone()}
    torch.save(tensors, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert dict(checkpoint.aliases) == {"head": "embed"}
    assert set(checkpoint.specs) == set(tensors)
    assert checkpoint.nbytes == (16 * 3 + 8) * 4
    assert same_bytes(checkpoint.read("head"), checkpoint.read("embed"))


def write_shards(directory):
    directory.mkdir()
    shards = [{"a": torch.randn(2, 2), "b": torch.randn(3)}, {"c": torch.randn(4)}]
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return shards[0] | shards[1]


def test_sharded_files(tmp_path):
    tensors = write_shards(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert list(checkpoint.specs) == ["a", "b", "c"]
    assert len(checkpoint.weight_files) == 2
    assert checkpoint.config == CONFIG
    assert all(checkpoint.read(name).tobytes() == as_bytes(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.bin", "model.pt", "best.ckpt"])
def test_single_file_in_a_directory(tmp_path, name):
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / other).write_bytes(b"not weights")
    assert open_checkpoint(tmp_path).read("a").tolist() == [1, 1]


def test_safetensors_are_preferred(tmp_path):
    from rgsp_jax.checkpoint import write_safetensors

    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2, np.float32)})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "safetensors"
    assert find_problems([checkpoint, open_checkpoint(tmp_path / "pytorch_model.bin")]) == []


@pytest.mark.parametrize("change", ["append", "replace"])
def test_a_changed_file_is_refused(tmp_path, change):
    torch.save({"a": torch.ones(2), "b": torch.ones(2, 2).T}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    content = (tmp_path / "m.pt").read_bytes()
    if change == "append":
        with (tmp_path / "m.pt").open("ab") as file:
            file.write(b"x")
    else:
        (tmp_path / "n.pt").write_bytes(content)
        (tmp_path / "n.pt").rename(tmp_path / "m.pt")
    for name in ("a", "b"):
        with pytest.raises(RefusedError, match="was changed"):
            checkpoint.read(name)


def test_closed_checkpoints_are_not_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        pass
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("a")
