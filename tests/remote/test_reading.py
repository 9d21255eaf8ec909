"""Models in stores are read as local ones are, by ranges, and refused for the same reasons."""

import json
import sys
import uuid

import fsspec
import numpy as np
import pytest

from pipeline.toy_models import CONFIG, read_model, same_bits, toy_family, tree_bytes, write_family, write_model
from remote.toy_store import ToyStore
from rgsp_jax.checkpoint import (
    ShardWriter,
    TensorSpec,
    copy_companions,
    open_checkpoint,
    plan_shards,
    remote_source,
)
from rgsp_jax.checkpoint import (
    store as stores,
)
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, overview, prepare


def refusal(location):
    with pytest.raises(RefusedError) as caught:
        open_checkpoint(location).close()
    return "\n".join(caught.value.problems)


def write_shards(directory, tensors, max_bytes):
    writer = ShardWriter(
        directory, plan_shards([TensorSpec(n, x.shape, x.dtype) for n, x in tensors.items()], max_bytes)
    )
    for name, array in tensors.items():
        writer.write(name, array)
    writer.finish()
    (directory / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture
def family():
    return toy_family(2, dtypes=("bfloat16", "float32"))


def test_a_directory_in_a_store_is_the_local_one(store, tmp_path, family):
    local = write_model(store / "bucket/model", family[0])
    (local / "checkpoint-3").mkdir()
    (local / "checkpoint-3/config.json").write_text("{}")
    with open_checkpoint("toy://bucket/model/") as remote, open_checkpoint(local) as known:
        assert remote.specs == known.specs and list(remote.specs) == list(known.specs)
        assert (remote.companions, remote.config, remote.metadata) == (known.companions, known.config, known.metadata)
        assert all(same_bits(remote.read(name), known.read(name)) for name in known.specs)
        assert remote.bytes_read == known.bytes_read == known.nbytes
        copies = []
        for checkpoint, name in ((remote, "remote"), (known, "known")):
            (tmp_path / name).mkdir()
            copy_companions(checkpoint, tmp_path / name, dtype="bfloat16")
            copies.append(tree_bytes(tmp_path / name))
        assert copies[0] == copies[1] and copies[0]
        root = remote.root
    assert str(remote.path) == "toy://bucket/model" and not root.exists()
    assert not any("checkpoint-3" in str(request) and request[0] == "read" for request in ToyStore.requests)


def test_memory_and_file_systems_are_stores(tmp_path, family):
    write_model(tmp_path / "model", family[0])
    place = f"/{uuid.uuid4().hex}/model"
    memory = fsspec.filesystem("memory")
    for name, content in tree_bytes(tmp_path / "model").items():
        memory.pipe_file(f"{place}/{name}", content)
    expected = read_model(tmp_path / "model")
    for location in (f"memory:/{place}", f"memory:/{place}/model.safetensors", f"file://{tmp_path}/model"):
        found = read_model(location)
        assert found.keys() == expected.keys() and all(same_bits(found[n], expected[n]) for n in expected)


def test_shards_are_read_through_their_index(store, family):
    write_shards(store / "bucket/model", family[1], 4_000)
    with open_checkpoint("toy://bucket/model") as remote, open_checkpoint(store / "bucket/model") as known:
        assert len(remote.weight_files) > 2 and list(remote.specs) == list(known.specs)
        assert [remote.shard_of(n) for n in known.specs] == [known.shard_of(n) for n in known.specs]
        assert all(same_bits(remote.read(name), known.read(name)) for name in known.specs)


def test_requests_are_of_sensible_sizes(store, monkeypatch):
    """Long tensors in several requests, near rows of a block in one, one request and one look for a small tensor."""
    monkeypatch.setattr(remote_source, "REQUEST_BYTES", 4096)
    monkeypatch.setattr(remote_source, "GAP_BYTES", 64)
    rng = np.random.default_rng(0)
    tensors = {"long": rng.normal(size=5000), "wide": rng.normal(size=(40, 100)), "small": rng.normal(size=3)}
    write_model(store / "b/m", tensors, None)
    with open_checkpoint("toy://b/m") as remote:

        def count(read):
            ToyStore.requests.clear()
            found = read()
            ranges = [end - start for what, _, start, end in (r for r in ToyStore.requests if r[0] == "read")]
            return found, ranges, len(ToyStore.requests) - len(ranges)

        found, ranges, looks = count(lambda: remote.read("long"))
        assert same_bits(found, tensors["long"]) and ranges == [4096] * 9 + [40000 - 9 * 4096] and looks == 1
        block = (slice(3, 33), slice(4, 97))  # gaps of 56 bytes between runs of 744: five to a request
        found, ranges, looks = count(lambda: remote.read_block("wide", block))
        assert same_bits(found, tensors["wide"][block]) and ranges == [4 * 800 + 744] * 6 and looks == 1
        found, ranges, looks = count(lambda: remote.read_block("wide", (slice(0, 3), slice(0, 50))))
        assert same_bits(found, tensors["wide"][:3, :50]) and ranges == [400] * 3
        found, ranges, looks = count(lambda: remote.read("small"))
        assert same_bits(found, tensors["small"]) and (ranges, looks) == ([24], 1)
        assert remote.bytes_read == 40000 + found.nbytes


def test_long_headers_take_a_second_request(store, monkeypatch, family):
    write_model(store / "b/m", family[0])
    monkeypatch.setattr(remote_source, "FIRST_BYTES", 100)
    monkeypatch.setattr(remote_source, "REQUEST_BYTES", 1000)
    with open_checkpoint("toy://b/m/model.safetensors") as remote, open_checkpoint(store / "b/m") as known:
        assert remote.specs == known.specs
        assert all(same_bits(remote.read(name), known.read(name)) for name in known.specs)


def test_refusals_are_those_of_local_models(store, family, tmp_path):
    assert "toy://b/none does not exist, or nothing lies below it" in refusal("toy://b/none")
    model = write_model(store / "b/cut", family[0])
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-7])
    assert "toy://b/cut/model.safetensors is cut short" in refusal("toy://b/cut")
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    assert "Git LFS pointer" in refusal("toy://b/cut")
    (model / "model.safetensors").write_bytes(data)
    (model / "config.json").write_text('{"quantization_config": {"bits": 4}, "model_type": "toy"}')
    assert "toy://b/cut is quantised: its config.json has quantization_config" in refusal("toy://b/cut")
    (model / "config.json").write_text("[]")
    problem = refusal("toy://b/cut")
    assert "toy://b/cut/config.json is not a JSON object" in problem and "/tmp" not in problem
    write_shards(store / "b/shards", family[1], 40_000)
    index = store / "b/shards/model.safetensors.index.json"
    content = json.loads(index.read_text())
    one, other = list(content["weight_map"])[:2]
    secret = write_model(store / "b/secret", {one: family[1][one]}, None)
    content["weight_map"][one] = "../secret/model.safetensors"
    index.write_text(json.dumps(content))
    assert "names the file '../secret/model.safetensors', which is not inside" in refusal("toy://b/shards")
    assert secret.exists() and not any("secret" in str(r) for r in ToyStore.requests)
    content["weight_map"] |= {one: "model-00009-of-00009.safetensors", other: "sub/model.safetensors"}
    index.write_text(json.dumps(content))
    problem = refusal("toy://b/shards")
    assert "names the shard 'model-00009-of-00009.safetensors', which is not there" in problem
    assert "toy://b/shards/sub/model.safetensors is no object" in problem


def test_what_is_not_safetensors_is_not_read_from_stores(store):
    (store / "b/torch").mkdir(parents=True)
    (store / "b/torch/pytorch_model.bin").write_bytes(b"\x80\x02pickle")
    (store / "b/torch/adapter_config.json").write_text("{}")
    problem = refusal("toy://b/torch")
    assert "no model as safetensors (but adapter_config.json, pytorch_model.bin)" in problem and "fetch it" in problem
    assert "no .safetensors file" in refusal("toy://b/torch/pytorch_model.bin")
    assert not any(request[0] == "read" for request in ToyStore.requests)


@pytest.mark.parametrize("remote", [False, True])
def test_a_lone_shard_is_no_model(store, family, remote):
    write_shards(store / "b/m", family[0], 40_000)
    for path in store.glob("b/m/*"):
        if "00001-of" not in path.name:
            path.unlink()
    assert "has one shard of" in refusal("toy://b/m" if remote else store / "b/m")


def test_a_changed_object_is_refused_and_a_short_answer_fails(store, family):
    model = write_model(store / "b/m", family[0])
    name = "encoder.layer.0.output.dense.weight"
    with open_checkpoint("toy://b/m") as remote:
        ToyStore.faults["read"] = lambda key, data: data[:-1]
        with pytest.raises(OSError, match=r"the store gave \d+ of \d+ bytes"):
            remote.read(name)
        ToyStore.faults["read"] = ConnectionError("reset by peer")
        with pytest.raises(OSError, match="ConnectionError: reset by peer") as caught:
            remote.read(name)
        assert caught.value.filename == "toy://b/m/model.safetensors"
        ToyStore.faults.clear()
        remote.read(name)
        write_model(model, family[0])
        with pytest.raises(RefusedError, match=r"toy://b/m/model\.safetensors was changed while it was being read"):
            remote.read(name)
    ToyStore.faults["info"] = PermissionError("no credentials")
    assert "toy://b/m cannot be read: the store failed (PermissionError: no credentials)" in refusal("toy://b/m")


def test_a_missing_package_is_one_sentence(monkeypatch):
    def install_first(*_, **__):
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", install_first)
    expected = "needs gcsfs, which is not installed: pip install 'rgsp_jax[remote]'"
    assert refusal("gs://bucket/model") == f"gs://bucket/model {expected}"
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "s3://bucket/model needs s3fs" in refusal("s3://bucket/model")


@pytest.mark.parametrize("location", ["toy://", "toy://b/../c", "nosuchstore://b/c"])
def test_locations_that_name_nothing(store, location):
    assert location in refusal(location) and not ToyStore.requests


def test_merging_from_a_store_is_merging_local_copies(store, tmp_path, monkeypatch, family):
    monkeypatch.setattr(overview, "render_report", lambda summary, records: "<p></p>")
    models = write_family(store / "b", family)
    urls = [f"toy://b/{path.rpartition('/')[2]}" for path in models]
    outs = [
        merge_checkpoints(MergeConfig(models=paths, method="average"), tmp_path / name)
        for paths, name in ((models, "local"), (urls, "remote"))
    ]
    trees = [tree_bytes(result.out) for result in outs]
    same = [name for name in trees[0] if name not in ("README.md", "merge_config.yaml", "merge_summary.json")]
    assert trees[0].keys() == trees[1].keys() and all(trees[0][name] == trees[1][name] for name in same)
    assert outs[0].bytes_in == outs[1].bytes_in
    parents = json.loads(trees[1]["merge_summary.json"])["parents"]
    assert [parent["label"] for parent in parents] == urls
    assert all(parent["files"][0][1].startswith("md5Hash:") for parent in parents)
    with prepare(MergeConfig(models=urls, method="average"), tmp_path / "new") as preparation:
        assert preparation.plan.bytes_in == outs[0].bytes_in


def test_stores_give_marks_in_their_own_words():
    identity = stores.ObjectIdentity(3, (("generation", "17"), ("ETag", '"abc-2"')))
    assert identity.label == "ETag:abc-2"
    assert stores.find_md5({"ETag": '"0123456789abcdef0123456789abcdef"'}) == "0123456789abcdef0123456789abcdef"
    assert stores.find_md5({"ETag": '"0123456789abcdef0123456789abcdef-4"'}) is None
    assert stores.find_md5({"md5Hash": "kAFQmDzST7DWlj99KOF/cg=="}) == "900150983cd24fb0d6963f7d28e17f72"  # of "abc"
