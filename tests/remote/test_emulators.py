"""gs:// and s3:// through gcsfs and s3fs, against servers on this machine that speak as the stores do.

Skipped where gcsfs and gcp-storage-emulator, or s3fs and moto with its server, are not installed.
"""

import importlib
import socket
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from pipeline.test_resume import PowerCut, fail_at
from pipeline.toy_models import read_model, same_bits, toy_family, tree_bytes, write_family, write_model
from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.checkpoint.store import locate, upload
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, delivery, merge_checkpoints, overview
from rgsp_jax.pipeline.processes import Alone

SERVERS = {
    "gs": ("gcsfs", "gcp_storage_emulator", "from gcp_storage_emulator.__main__ import main; main()"),
    "s3": ("s3fs", "moto.server", "from moto.server import main; main()"),
}
ARGUMENTS = {"gs": ("start", "--in-memory", "--port"), "s3": ("-p",)}


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.fixture(params=list(SERVERS))
def bucket(request, monkeypatch):
    """URL of an empty bucket."""
    client, server, code = SERVERS[request.param]
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google what kind of bucket this is
    pytest.importorskip(client)
    pytest.importorskip(server)
    port = find_port()
    path = f"import sys; sys.path += {sys.path!r}; "
    command = [sys.executable, "-c", path + code, *ARGUMENTS[request.param], str(port)]  # it writes a line per request
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        endpoint = f"http://127.0.0.1:{port}"
        options = {
            "gs": {"gcs": {"token": "anon", "endpoint_url": endpoint, "project": "test"}},
            "s3": {"s3": {"key": "test", "secret": "test", "endpoint_url": endpoint}},
        }
        monkeypatch.setattr(fsspec.config, "conf", options[request.param])
        importlib.import_module(client)
        system = fsspec.filesystem(request.param, skip_instance_cache=True)
        system.mkdir("bucket")
        yield f"{request.param}://bucket"
    finally:
        process.terminate()
        process.wait()


def put(local, url):
    for name in tree_bytes(local):
        upload(local / name, locate(url) / name)


def test_models_are_read_and_written(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "render_report", lambda summary, records: "<p></p>")
    models = write_family(tmp_path, toy_family(2))
    for model in models:
        put(tmp_path / model[-1], f"{bucket}/models/{model[-1]}")
    urls = tuple(f"{bucket}/models/{model[-1]}" for model in models)
    for url, model in zip(urls, models, strict=True):
        with open_checkpoint(url) as remote, open_checkpoint(model) as known:
            assert remote.specs == known.specs and remote.companions == known.companions
            assert all(same_bits(remote.read(name), known.read(name)) for name in known.specs)
            name = "embeddings.word_embeddings.weight"
            block = (slice(5, 900), slice(2, 5))
            assert np.array_equal(remote.read_block(name, block), known.read_block(name, block))
    with pytest.raises(RefusedError, match="does not exist"):
        open_checkpoint(f"{bucket}/models/none")
    config = MergeConfig(models=urls, method="average", max_shard_size=1500)
    out = f"{bucket}/out"
    with monkeypatch.context() as patch:
        fail_at(patch, delivery, "upload", 2)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, out)
    with pytest.raises(RefusedError):
        open_checkpoint(out)
    with pytest.raises(RefusedError, match="is left from an earlier merge"):
        merge_checkpoints(config, out)
    result = merge_checkpoints(config, out, resume=True)
    assert result.resumed_items
    (tmp_path / "local").mkdir()
    local = merge_checkpoints(config, tmp_path / "local/out", processes=Alone()).out
    expected, found = read_model(local), read_model(out)
    assert expected.keys() == found.keys() and all(same_bits(expected[n], found[n]) for n in expected)
    for name, content in tree_bytes(local).items():
        assert name == "merge_processes.json" or (locate(out) / name).read_bytes() == content
    assert not locate(f"{out}.incomplete").list_entries()
    with pytest.raises(RefusedError, match="already there and not empty"):
        merge_checkpoints(config, out)


def test_one_file_and_what_changes_under_a_reader(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "render_report", lambda summary, records: "<p></p>")
    first, second = toy_family(2)
    put(write_model(tmp_path / "a", first, None), f"{bucket}/a")
    place = locate(f"{bucket}/once")
    place.write_bytes(b"1", create=True)
    if bucket.startswith("s3"):  # the emulator of the other takes no notice of the condition that gcsfs sends
        with pytest.raises(FileExistsError):
            place.write_bytes(b"2", create=True)
    assert place.read_bytes() == b"1"
    with open_checkpoint(f"{bucket}/a/model.safetensors") as remote:
        assert same_bits(remote.read("logit_scale"), first["logit_scale"])
        put(write_model(tmp_path / "a", second, None), f"{bucket}/a")
        with pytest.raises(RefusedError, match="was changed while it was being read"):
            remote.read("logit_scale")
    config = MergeConfig(models=(f"{bucket}/a", f"{bucket}/a"), method="average")
    merge_checkpoints(config, f"{bucket}/whole")
    assert all(same_bits(array, second[name]) for name, array in read_model(f"{bucket}/whole").items())
