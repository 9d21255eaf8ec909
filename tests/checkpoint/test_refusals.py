"""Every model that is refused when opened, by name, with the sentence that says why."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.builders import CONFIG, raw_file, tiny_tensors, write_model
from rgsp_jax.checkpoint import open_checkpoint, write_safetensors
from rgsp_jax.errors import RefusedError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def lone(header, data=bytes(8)):
    def build(tmp_path: Path) -> Path:
        path = tmp_path / "m.safetensors"
        path.write_bytes(raw_file(header, data))
        return path

    return build


def lone_bytes(content, name="m.safetensors"):
    def build(tmp_path: Path) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return build


def named(*names, dtype=np.float32, shape=(2, 2)):
    def build(tmp_path: Path) -> Path:
        return write_model(tmp_path / "m", tiny_tensors() | {name: np.zeros(shape, dtype) for name in names})

    return build


def configured(**config):
    return lambda tmp_path: write_model(tmp_path / "m", config=CONFIG | config)


def sharded(change):
    """A model in three shards after `change(directory, index)`; the index is written back."""

    def build(tmp_path: Path) -> Path:
        directory = write_model(tmp_path / "m", max_shard_size=1)
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(directory, index)
        path.write_text(json.dumps(index))
        return directory

    return build


def saved(value, name="m.pt"):
    def build(tmp_path: Path) -> Path:
        torch.save(value, tmp_path / name)
        return tmp_path / name

    return build


def in_directory(*files: tuple[str, bytes]):
    def build(tmp_path: Path) -> Path:
        for name, content in files:
            path = tmp_path / "m" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "m"

    return build


def repoint(name, shard):
    def change(directory, index):
        index["weight_map"][name] = shard

    return sharded(change)


def link_shard(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "m", max_shard_size=1)
    shard = directory / "model-00001-of-00003.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    return directory


def link_single(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "m")
    (directory / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (directory / "model.safetensors").symlink_to("../outside.safetensors")
    return directory


def link_config(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "m", config=None)
    (tmp_path / "secret.json").write_text("{}")
    (directory / "config.json").symlink_to(tmp_path / "secret.json")
    return directory


def link_beside_a_cache(tmp_path: Path) -> Path:
    """Looks like a cache's snapshot, but links into another repository's blobs."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    write_model(snapshot)
    blob = tmp_path / "models--c--d" / "blobs" / "abcd"
    blob.parent.mkdir(parents=True)
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    return snapshot


def loop_of_links(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "m", max_shard_size=1)
    shard = directory / "model-00001-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    return directory


def duplicate_across_shards(directory, index):
    first = directory / "model-00001-of-00003.safetensors"
    tensors = {name: np.zeros(3, np.float32) for name in ("norm.weight", "encoder.weight")}
    write_safetensors(first, tensors)


def swap_shards(directory, index):
    shards = index["weight_map"]
    shards["encoder.bias"], shards["norm.weight"] = shards["norm.weight"], shards["encoder.bias"]


def truncate_shard(directory, index):
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def sharded_torch(change):
    def build(tmp_path: Path) -> Path:
        directory = tmp_path / "m"
        directory.mkdir()
        torch.save({"a": torch.zeros(2)}, directory / "pytorch_model-00001-of-00002.bin")
        torch.save({"b": torch.zeros(2)}, directory / "pytorch_model-00002-of-00002.bin")
        weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        change(weight_map)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return build


def compressed_archive(tmp_path: Path) -> Path:
    torch.save({"a": torch.zeros(200)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return tmp_path / "m.pt"


def big_endian(tmp_path: Path) -> Path:
    torch.save({"a": torch.zeros(200)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(tmp_path / "m.pt", "w") as target:
        for entry in source.infolist():
            little = source.read(entry)
            target.writestr(entry.filename, b"big" if entry.filename.endswith("/byteorder") else little)
    return tmp_path / "m.pt"


def script(tmp_path: Path) -> Path:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    return tmp_path / "m.pt"


def orbax_without_metadata(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "_CHECKPOINT_METADATA").write_text("{}")
    return tmp_path / "m"


def nested_json(depth):
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


REFUSALS = {
    # where it lies
    "missing": (lambda tmp: tmp / "nothing" / "here", "does not exist"),
    "misspelt": (lambda tmp: write_model(tmp / "model-a").with_name("modle-a"), "did you mean .*model-a?"),
    "dangling link": (lambda tmp: (tmp / "m").symlink_to("gone") or tmp / "m", "leads nowhere"),
    "other file": (lone_bytes(b"hello", "notes.txt"), "no weight file by its name"),
    "index given": (lone_bytes(b"{}", "model.safetensors.index.json"), "give its directory"),
    "empty directory": (in_directory(("config.json", b"{}")), "holds no weights"),
    "other formats": (in_directory(("model.gguf", b"GGUF")), "model.gguf is of a format not read here"),
    "component folders": (in_directory(("unet/model.safetensors", b"")), "its folder.* unet hold weights"),
    "several candidates": (
        in_directory(("a.safetensors", raw_file({})), ("b.safetensors", raw_file({}))),
        r"several other candidates \(a.safetensors, b.safetensors\)",
    ),
    "several indices": (
        in_directory(("a.safetensors.index.json", b"{}"), ("b.safetensors.index.json", b"{}")),
        "keep the one index meant",
    ),
    # what is no model of its own
    "lfs weights": (
        in_directory(("model.safetensors", POINTER)),
        "model.safetensors is a Git LFS pointer.*git lfs pull",
    ),
    "lfs torch weights": (in_directory(("pytorch_model.bin", POINTER)), "pytorch_model.bin is a Git LFS pointer"),
    "lfs lone": (lone_bytes(POINTER), "is a Git LFS pointer"),
    "lfs index": (in_directory(("model.safetensors.index.json", POINTER)), "index.json is a Git LFS pointer"),
    "lfs config": (
        in_directory(("config.json", POINTER), ("model.safetensors", b"")),
        "config.json is a Git LFS pointer",
    ),
    "lfs shard": (
        sharded(lambda folder, _: (folder / "model-00002-of-00003.safetensors").write_bytes(POINTER)),
        "model-00002-of-00003.safetensors is a Git LFS pointer",
    ),
    "lfs tokenizer": (
        lambda tmp: ((write_model(tmp / "m") / "tokenizer.model").write_bytes(POINTER), tmp / "m")[1],
        "tokenizer.model is a Git LFS pointer",
    ),
    "adapter directory": (
        in_directory(("adapter_config.json", b"{}"), ("adapter_model.safetensors", raw_file({}))),
        "is a LoRA adapter of None, which is no directory here",
    ),
    "adapter without weights": (
        in_directory(("adapter_config.json", b"{}")),
        "is a LoRA adapter without its weights",
    ),
    "adapter names": (named("q_proj.lora_A.weight", "q_proj.lora_B.weight"), "is an adapter, not a model"),
    "no tensors": (lone({}, b""), "holds no tensor"),
    "no tensors in torch": (saved({}), "holds no tensor"),
    # quantised
    "quantization_config": (
        configured(quantization_config={"bits": 4}),
        "is quantised: its config.json has quantization",
    ),
    "nested quantization_config": (
        configured(text_config={"quantization_config": {"a": 1}}),
        "text_config.quantization",
    ),
    "compression_config": (configured(compression_config={"format": "x"}), "has compression_config"),
    "gptq": (named("q_proj.qweight", dtype=np.int32), "'q_proj.qweight' holds quantised"),
    "gptq zeros": (named("q_proj.qzeros", dtype=np.int32), "'q_proj.qzeros' holds quantised"),
    "bitsandbytes": (named("q.weight.absmax", "q.weight.quant_state.bitsandbytes__nf4"), "'q.weight.absmax' holds"),
    "int8 state": (named("q_proj.SCB"), "'q_proj.SCB' holds quantised"),
    "fp8 scales": (named("q_proj.weight_scale_inv"), "'q_proj.weight_scale_inv' holds"),
    "mxfp4 scales": (named("experts.down_proj_scales", dtype=np.uint8), "'experts.down_proj_scales' holds"),
    "quanto": (named("q_proj.weight._data", dtype=np.int8), "'q_proj.weight._data' holds"),
    "hqq": (named("q_proj.W_q", dtype=np.uint8), "'q_proj.W_q' holds quantised"),
    "mxfp4 blocks": (named("experts.down_proj_blocks", dtype=np.uint8), "'experts.down_proj_blocks' holds"),
    "packed": (named("q_proj.weight", dtype=np.uint8), "'q_proj.weight' holds quantised"),
    "F8_E4M3": (lone({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}), r"quantised \(F8_E4M3\)"),
    "F8_E5M2": (lone({"a": {"dtype": "F8_E5M2", "shape": [8], "data_offsets": [0, 8]}}), r"quantised \(F8_E5M2\)"),
    "F8_E8M0": (lone({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}), r"quantised \(F8_E8M0\)"),
    "F4": (lone({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}), r"quantised \(F4\)"),
    "F6": (lone({"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}), r"quantised \(F6_E2M3\)"),
    "torch float8": (saved({"a": torch.zeros(4).to(torch.float8_e4m3fn)}), r"quantised \(float8_e4m3fn\)"),
    "complex": (lone({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}), r"is complex \(C64\)"),
    "torch complex": (saved({"a": torch.zeros(4, dtype=torch.complex64)}), r"is complex \(complex64\)"),
    "unknown dtype": (lone({"a": F32 | {"dtype": "Q5_K"}}), "unsupported dtype Q5_K"),
    # headers that lie
    "too short": (lone_bytes(b"abc"), "has only 3 bytes"),
    "empty file": (lone_bytes(b""), "has only 0 bytes"),
    "header past the file": (lone_bytes((1000).to_bytes(8, "little") + b"{}"), "cut short: its header needs 1008"),
    "header past the limit": (lone_bytes(b"\xff" * 8), "announces a header"),
    "no json": (lone(b"{nonsense"), "not valid JSON"),
    "no object": (lone(b"[1, 2]"), "does not start with"),
    "leading space": (lone(b' {"a": 1}'), "does not start with"),
    "no utf-8": (lone(b'{"\xff": 1}'), "not valid JSON"),
    "lone surrogate": (lone({"\ud800": F32}), "not valid Unicode"),
    "too deep": (lone(nested_json(200_000)), "not valid JSON"),
    "duplicate keys": (lone(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2)), "names 'a' twice"),
    "no entry": (lone({"a": 3}), "'a' has no description"),
    "no dtype": (lone({"a": {"shape": [2], "data_offsets": [0, 8]}}), "'a' has no dtype"),
    "negative shape": (lone({"a": F32 | {"shape": [-2]}}), "impossible shape"),
    "float shape": (lone({"a": F32 | {"shape": [2.0]}}), "impossible shape"),
    "boolean shape": (lone({"a": F32 | {"shape": [True, 2]}}), "impossible shape"),
    "huge shape": (lone({"a": F32 | {"shape": [0, 2**40, 2**40]}}), "impossible shape"),
    "65 axes": (lone({"a": F32 | {"shape": [2] + [1] * 64}}), "impossible shape"),
    "three offsets": (lone({"a": F32 | {"data_offsets": [0, 4, 8]}}), "impossible data_offsets"),
    "backward offsets": (lone({"a": F32 | {"data_offsets": [8, 0]}}), "claims -8 bytes"),
    "wrong size": (lone({"a": F32 | {"shape": [3]}}), r"claims 8 bytes for F32 \[3\], which takes 12"),
    "overlap": (lone({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "'b' overlaps"),
    "same bytes twice": (lone({"a": F32, "b": F32}), "'b' overlaps"),
    "hole": (lone({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)), "4 bytes before tensor 'b'"),
    "hole at the start": (lone({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "4 bytes before tensor 'a'"),
    "truncated data": (lone({"a": F32}, bytes(7)), "is cut short: its header describes"),
    "trailing data": (lone({"a": F32}, bytes(9)), "1 bytes at its end"),
    "metadata": (lone({"__metadata__": {"a": 1}, "a": F32}), "__metadata__ is not a map of strings"),
    "bad booleans": (
        lone({"a": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, b"\2" * 8),
        "other than 0 and 1",
    ),
    # indices
    "absent shard": (repoint("norm.weight", "model-00009-of-00009.safetensors"), "names the shard .*00009.*not there"),
    "tensor in another shard": (
        sharded(swap_shards),
        "says model-0000[23]-of-00003.safetensors holds tensor 'norm.weight', but model-0000[23].* does",
    ),
    "tensor in no shard": (
        repoint("ghost", "model-00001-of-00003.safetensors"),
        "holds tensor 'ghost', but it does not",
    ),
    "extra tensor": (
        sharded(
            lambda folder, index: write_safetensors(
                folder / index["weight_map"]["norm.weight"],
                {"norm.weight": np.zeros(3, np.float32), "stray": np.zeros(3, np.float32)},
            )
        ),
        "does not name tensor 'stray'",
    ),
    "duplicate across shards": (sharded(duplicate_across_shards), "'norm.weight' lies in several shards"),
    "truncated shard": (sharded(truncate_shard), "model-00002-of-00003.safetensors is cut short"),
    "no weight map": (in_directory(("model.safetensors.index.json", b"{}")), "has no weight_map"),
    "index is a list": (in_directory(("model.safetensors.index.json", b"[]")), "has no weight_map"),
    "index of numbers": (
        in_directory(("model.safetensors.index.json", b'{"weight_map": {"a": 1}}')),
        "has no weight_map",
    ),
    "empty index": (in_directory(("model.safetensors.index.json", b'{"weight_map": {}}')), "names no tensor"),
    "broken index": (in_directory(("model.safetensors.index.json", b"{")), "cannot be read as an index"),
    "duplicates in index": (
        in_directory(("model.safetensors.index.json", b'{"weight_map": {"a": "x", "a": "y"}}')),
        "names 'a' twice",
    ),
    "torch absent shard": (sharded_torch(lambda map_: map_.update(b="gone.bin")), "names the shard 'gone.bin'"),
    "torch wrong shard": (
        sharded_torch(
            lambda map_: map_.update(b="pytorch_model-00001-of-00002.bin", a="pytorch_model-00002-of-00002.bin")
        ),
        "holds tensor 'a', but pytorch_model-00001",
    ),
    # paths out
    "shard climbs": (repoint("norm.weight", "../other/model.safetensors"), "which is not inside the directory"),
    "shard climbs inside": (repoint("norm.weight", "a/../../x.safetensors"), "which is not inside the directory"),
    "shard absolute": (repoint("norm.weight", "/etc/passwd"), "which is not inside the directory"),
    "shard backslash": (repoint("norm.weight", "..\\x.safetensors"), "which is not inside the directory"),
    "shard null": (repoint("norm.weight", "a\0b"), "which is not inside the directory"),
    "shard is directory": (repoint("norm.weight", "."), "which is not there"),
    "shard links out": (link_shard, "is a symbolic link out of its directory"),
    "single file links out": (link_single, "is a symbolic link out of its directory"),
    "config links out": (link_config, "config.json is a symbolic link out"),
    "links beside a cache": (link_beside_a_cache, "is a symbolic link out of its directory"),
    "loop of links": (loop_of_links, "symbolic link that leads nowhere|is not there"),
    # configs
    "broken config": (
        in_directory(("config.json", b"{"), ("model.safetensors", raw_file({}))),
        "config.json cannot be read",
    ),
    "config is a list": (
        in_directory(("config.json", b"[]"), ("model.safetensors", raw_file({}))),
        "not a JSON object",
    ),
    # PyTorch files
    "pickled object": (
        saved({"a": torch.zeros(2), "trap": Trap("/nonexistent/x")}),
        "torch's safe loader .* refuses it",
    ),
    "raw pickle": (lone_bytes(pickle.dumps({"a": 1, "b": Trap("/nonexistent/x")}), "m.pt"), "safe loader"),
    "random bytes": (lone_bytes(bytes(range(256)) * 8, "m.bin"), "safe loader"),
    "truncated archive": (
        lambda tmp: (
            (saved({"a": torch.zeros(500)})(tmp), (tmp / "m.pt").write_bytes((tmp / "m.pt").read_bytes()[:900]))
            and tmp / "m.pt"
        ),
        "safe loader",
    ),
    "compressed archive": (compressed_archive, "is a compressed archive"),
    "big-endian": (big_endian, "big-endian"),
    "TorchScript": (script, "is a TorchScript archive"),
    "one tensor": (saved(torch.zeros(3)), "holds a Tensor, not a state dict"),
    "non-tensor entries": (saved({"a": torch.zeros(3), "epoch": 3}), "the entry 'epoch' is a int, not a tensor"),
    "keys that are no names": (saved({3: torch.zeros(3)}), "the entry 3 is a Tensor"),
    "sparse": (saved({"a": torch.eye(3).to_sparse()}), "'a' is sparse"),
    "meta": (saved({"a": torch.zeros(3, device="meta")}), "'a' is sparse, quantised or without data"),
    # Orbax
    "no orbax metadata": (orbax_without_metadata, "cannot be read as an Orbax checkpoint"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_is_one_clear_sentence(tmp_path, name):
    build, expected = REFUSALS[name]
    location = build(tmp_path)
    with pytest.raises(RefusedError, match=expected) as raised:
        checkpoint = open_checkpoint(location)
        for tensor in checkpoint.specs:
            checkpoint.read(tensor)
    assert all(problem and "\n" not in problem for problem in raised.value.problems)
    assert "Traceback" not in str(raised.value)


ACCEPTED = {
    "float scales": named("attention.scales", "layer_scale", "logit_scale", "k_scale", "blocks"),
    "integer buffers": named("position_ids", "relative_position_index", "num_batches_tracked", dtype=np.int64),
    "integer weight vector": named("class_weight", "codes.weight", dtype=np.int64, shape=(3,)),
    "scale buffers": named("norm.scale", "weight_g", "weight_v", "parametrizations.weight.original0"),
    "empty quantization_config": configured(quantization_config=None),
    "leftover adapter config": lambda tmp: (
        (write_model(tmp / "m") / "adapter_config.json").write_text("{}") and tmp / "m"
    ),
    "consolidated beside shards": lambda tmp: add_consolidated(write_model(tmp / "m", max_shard_size=1)),
    "shard names of any kind": lambda tmp: rename_index(write_model(tmp / "m", max_shard_size=1)),
    "one file of any name": lambda tmp: rename_single(write_model(tmp / "m")),
}


def add_consolidated(directory):
    write_safetensors(directory / "consolidated.safetensors", {"x": np.zeros(2, np.float32)})
    return directory


def rename_index(directory):
    (directory / "model.safetensors.index.json").rename(directory / "model.fp16.safetensors.index.json")
    return directory


def rename_single(directory):
    (directory / "model.safetensors").rename(directory / "diffusion_pytorch_model.safetensors")
    return directory


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_only_looks_wrong_is_accepted(tmp_path, name):
    checkpoint = open_checkpoint(ACCEPTED[name](tmp_path))
    assert set(tiny_tensors()) <= set(checkpoint.specs)
    assert checkpoint.read("encoder.bias").shape == (4,)


def test_all_offenders_are_named_at_once(tmp_path):
    bad = {f"q{i}.qweight": np.zeros((2, 2), np.int32) for i in range(3)}
    model = write_model(tmp_path / "m", tiny_tensors() | bad, config=CONFIG | {"quantization_config": {"bits": 4}})
    (model / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(RefusedError) as raised:
        open_checkpoint(model)
    text = str(raised.value)
    assert all(f"'q{i}.qweight'" in text for i in range(3))
    assert "quantization_config" in text and "tokenizer.model is a Git LFS pointer" in text


def test_all_shards_are_examined(tmp_path):
    model = write_model(tmp_path / "m", max_shard_size=1)
    for number in (1, 3):
        path = model / f"model-0000{number}-of-00003.safetensors"
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(RefusedError) as raised:
        open_checkpoint(model)
    assert [f"0000{n}-of" in str(raised.value) for n in (1, 2, 3)] == [True, False, True]


def test_long_lists_are_cut(tmp_path):
    bad = {f"q{i:03d}.qweight": np.zeros(2, np.int32) for i in range(50)}
    with pytest.raises(RefusedError) as raised:
        open_checkpoint(write_model(tmp_path / "m", bad))
    assert len(raised.value.problems) == 21
    assert "and 30 more" in raised.value.problems[-1]


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "beside"])
def test_hostile_pickles_never_run(tmp_path, zip_format, place):
    target = tmp_path / "ran"
    value = {"a": Trap(target)} if place == "value" else {"state_dict": {"a": torch.zeros(2)}, "args": Trap(target)}
    torch.save(value, tmp_path / "m.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(RefusedError, match="safe loader"):
        open_checkpoint(tmp_path / "m.pt")
    assert not target.exists()
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert target.exists()  # the trap works where it is let


def test_old_torch_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(RefusedError, match=r"install torch 2\.6 or newer"):
        open_checkpoint(tmp_path / "m.pt")


def test_missing_torch_is_said(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(RefusedError, match="torch is not installed"):
        open_checkpoint(tmp_path / "m.pt")
