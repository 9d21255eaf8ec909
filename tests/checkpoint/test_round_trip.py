"""What is written is what is read: by us, by safetensors and by PyTorch; whole, in slices, in shards."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.builders import make_tensor, same_bytes, sample_tensors, tiny_tensors, write_model
from rgsp_jax.checkpoint import DTYPES, TensorSpec, digest, hash_file, open_checkpoint, plan_shards, write_safetensors
from rgsp_jax.errors import RefusedError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_one_file_round_trips_every_dtype_and_shape(tmp_path):
    tensors = sample_tensors()
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert set(checkpoint.specs) == set(tensors)
        assert checkpoint.format == "safetensors"
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.config is None and checkpoint.companions == ()
        for name, array in tensors.items():
            assert checkpoint.specs[name] == TensorSpec(name, array.shape, array.dtype)
            assert same_bytes(checkpoint.read(name), np.asarray(array, order="C"))


@pytest.mark.parametrize("max_shard_size", [1, 64, 200, 1 << 30])
def test_sharded_model_round_trips(tmp_path, max_shard_size):
    tensors = sample_tensors()
    checkpoint = open_checkpoint(write_model(tmp_path / "m", tensors, max_shard_size=max_shard_size))
    assert set(checkpoint.specs) == set(tensors)
    for name, array in tensors.items():
        assert same_bytes(checkpoint.read(name), np.asarray(array, order="C"))
    index = tmp_path / "m" / "model.safetensors.index.json"
    assert index.exists() == (max_shard_size < 1 << 30)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
        assert list(content["weight_map"]) == sorted(tensors)
        assert {path.name for path in checkpoint.weight_files} == set(content["weight_map"].values())
        assert f"-of-{len(checkpoint.weight_files):05d}." in checkpoint.weight_files[0].name


def test_safetensors_and_torch_read_our_files(tmp_path):
    tensors = sample_tensors()
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt", "note": "x"})
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(tensors)
    for name, array in tensors.items():
        assert tuple(loaded[name].shape) == array.shape
        there = (
            loaded[name].view(torch.int16).numpy().view(BFLOAT16) if array.dtype == BFLOAT16 else loaded[name].numpy()
        )
        assert same_bytes(there, np.asarray(array, order="C"))
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_we_read_files_of_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor(2.5), "c": torch.zeros(0, 2), "d": torch.arange(5)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert set(checkpoint.specs) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.read(name).astype(np.float64).tolist() == tensor.double().tolist()


def test_transformers_loads_our_directory_completely(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()
    model.save_pretrained(tmp_path / "a")
    source = open_checkpoint(tmp_path / "a")
    tensors = {name: source.read(name) for name in source.specs}
    write_model(tmp_path / "b", tensors, config=source.config, max_shard_size=4000)
    again, info = BertModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, again.eval()(ids).last_hidden_state)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slices_equal_numpy_slices(tmp_path_factory, data):
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=3)))
    array = make_tensor(dtype, shape, data.draw(st.integers(0, 100)))
    path = tmp_path_factory.mktemp("slices") / "a.safetensors"
    write_safetensors(path, {"before": make_tensor(dtype, (3,)), "a": array})
    begin = data.draw(st.integers(0, array.size))
    end = data.draw(st.integers(begin, array.size))
    out = np.empty(end - begin, dtype)
    open_checkpoint(path).read_into("a", out, begin)
    assert same_bytes(out, array.reshape(-1)[begin:end])


def test_slices_fill_buffers_of_any_shape(tmp_path):
    array = make_tensor(BFLOAT16, (6, 4))
    write_safetensors(tmp_path / "a.safetensors", {"a": array})
    rows = np.empty((2, 4), BFLOAT16)
    open_checkpoint(tmp_path / "a.safetensors").read_into("a", rows, start=8)
    assert same_bytes(rows, array[2:4])
    stack = np.empty((2, 6, 4), BFLOAT16)
    for row in stack:
        open_checkpoint(tmp_path / "a.safetensors").read_into("a", row)
    assert same_bytes(stack[1], array)


@pytest.mark.parametrize(
    ("out", "start"),
    [
        (np.empty(3, np.float64), 0),
        (np.empty(13, np.float32), 0),
        (np.empty(3, np.float32), 10),
        (np.empty(3, np.float32), -1),
        (np.empty((3, 2), np.float32).T, 0),
        (np.empty(6, np.float32)[::2], 0),
        (np.frombuffer(bytes(12), np.float32), 0),
    ],
    ids=["dtype", "too long", "past the end", "before the start", "transposed", "strided", "read-only"],
)
def test_wrong_buffers_are_rejected(tmp_path, out, start):
    checkpoint = open_checkpoint(write_model(tmp_path / "m"))
    with pytest.raises(ValueError):
        checkpoint.read_into("encoder.weight", out, start)


def test_unknown_name_is_a_key_error(tmp_path):
    with pytest.raises(KeyError):
        open_checkpoint(write_model(tmp_path / "m")).read("nothing")


def test_threads_read_at_once(tmp_path):
    tensors = {f"t{i}": make_tensor(np.dtype(np.float32), (64, 64), i) for i in range(16)}
    checkpoint = open_checkpoint(write_model(tmp_path / "m", tensors, max_shard_size=40_000))
    wrong = []

    def read_all(order):
        wrong.extend(name for name in order if not same_bytes(checkpoint.read(name), tensors[name]))

    threads = [threading.Thread(target=read_all, args=(sorted(tensors, reverse=i % 2 == 0),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("change", ["truncated", "replaced", "touched"])
def test_a_file_changed_after_opening_is_refused(tmp_path, change):
    path = write_model(tmp_path / "m") / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path / "m")
    content = path.read_bytes()
    if change == "truncated":
        path.write_bytes(content[:-4])
    elif change == "replaced":
        (tmp_path / "other").write_bytes(content)
        (tmp_path / "other").rename(path)
    else:
        path.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(RefusedError, match="was changed"):
        checkpoint.read("encoder.weight")


def test_order_is_that_of_the_disk(tmp_path):
    names = [f"z{i}" for i in range(9, 0, -1)]
    tensors = {name: make_tensor(np.dtype(np.float32), (4,)) for name in names}
    assert list(open_checkpoint(write_model(tmp_path / "one", tensors)).specs) == names
    assert list(open_checkpoint(write_model(tmp_path / "many", tensors, max_shard_size=32)).specs) == names


def test_digest_is_of_the_bytes_in_c_order():
    array = make_tensor(BFLOAT16, (5, 7))
    assert digest(array.T) == digest(np.asarray(array.T, order="C"))
    assert digest(array.T) != digest(array)
    assert digest(np.zeros((), np.float32)) == digest(np.zeros(2, np.float16))
    assert digest(np.zeros(0)) == "99aa06d3014798d86001c324468d497f"  # XXH3-128 of nothing, from its specification


def test_hash_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_plans_are_deterministic_and_aligned():
    tensors = sample_tensors()
    specs = {name: TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()}
    plan = plan_shards(specs, 100)
    assert plan == plan_shards(list(specs.values()), 100)
    assert plan.total_size == sum(spec.nbytes for spec in specs.values())
    for shard in plan.shards:
        assert len(shard.header) % 64 == 0
        assert sum(specs[name].nbytes for name in shard.names) <= 100 or len(shard.names) == 1
    for placement in plan.placements.values():
        assert placement.offset % placement.spec.dtype.itemsize == 0
    assert sorted(name for shard in plan.shards for name in shard.names) == sorted(specs)
    assert list(plan.weight_map) == sorted(specs)


def test_importing_loads_no_heavy_library(tmp_path):
    path = write_model(tmp_path / "m", tiny_tensors())
    code = (
        "import sys, types, importlib.util, pathlib\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "package = types.ModuleType('rgsp_jax'); package.__path__ = [str(root)]; sys.modules['rgsp_jax'] = package\n"
        "from rgsp_jax.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[2]); checkpoint.read('encoder.bias')\n"
        "print([name for name in ('jax', 'torch', 'orbax', 'flax', 'huggingface_hub') if name in sys.modules])\n"
    )
    import rgsp_jax.checkpoint

    root = Path(rgsp_jax.checkpoint.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


MEASURE = """
import sys
import numpy as np, psutil
from rgsp_jax.checkpoint import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
out = np.empty(4 << 20, np.uint8).view(np.float32)
out[:] = 0
spec = checkpoint.specs["big"]
checkpoint.read_into("small", np.empty(3, np.float32))
before = psutil.Process().memory_info().rss
peak = 0
for start in range(0, spec.size, out.size):
    checkpoint.read_into("big", out[: min(out.size, spec.size - start)], start)
    peak = max(peak, psutil.Process().memory_info().rss)
print(peak - before)
"""


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_streaming_a_large_file_keeps_memory_flat(tmp_path, kind):
    big, small = np.arange(50 << 20, dtype=np.float32), np.zeros(3, np.float32)
    path = tmp_path / f"a.{'pt' if kind == 'torch' else kind}"
    if kind == "torch":
        torch.save({"big": torch.from_numpy(big), "small": torch.from_numpy(small)}, path)
    else:
        write_safetensors(path, {"big": big, "small": small})
    done = subprocess.run([sys.executable, "-c", MEASURE, path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10 << 20
