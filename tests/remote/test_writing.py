"""Merges into stores: equal to local ones, complete or not to be mistaken for it, resumed part by part."""

import json
import uuid

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.test_resume import PowerCut, fail_at
from pipeline.toy_models import read_model, same_bits, toy_family, tree_bytes, write_family
from remote.toy_store import ToyStore
from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.checkpoint.store import locate
from rgsp_jax.cli import cli
from rgsp_jax.errors import NotFiniteError, RefusedError
from rgsp_jax.pipeline import MergeConfig, delivery, merge_checkpoints, overview, plan
from rgsp_jax.pipeline.processes import Alone

OUT, PLACE = "toy://b/out", "b/out.incomplete"
OWN = "merge_processes.json"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(plan, "ITEM_ELEMENTS", 160)
    monkeypatch.setattr(overview, "render_report", lambda summary, records: f"<p>{len(records)}</p>")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("parents"), toy_family(2, dtypes=("bfloat16", "float32")))


@pytest.fixture
def config(models):
    return MergeConfig(models=models, method="slerp", max_shard_size=1500)


@pytest.fixture
def room(tmp_path):
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def without_own(tree):
    return {name: data for name, data in tree.items() if name != OWN}


@pytest.fixture
def local(config, tmp_path):
    """Bytes of the same merge, cut the same way, into a local directory of the same name."""
    (tmp_path / "local").mkdir()
    return without_own(tree_bytes(merge_checkpoints(config, tmp_path / "local/out", processes=Alone()).out))


def writes(*, below="b/out/"):
    return [key for what, key, *_ in ToyStore.requests if what == "write" and key.startswith(below)]


def refuse(config, out=OUT, **options):
    with pytest.raises(RefusedError) as caught:
        merge_checkpoints(config, out, **options)
    return "\n".join(caught.value.problems)


def test_the_bytes_are_those_of_a_local_merge(store, config, local, room):
    result = merge_checkpoints(config, OUT, scratch=room)
    assert without_own(tree_bytes(store / "b/out")) == local
    assert (str(result.out), result.resumed_items) == (OUT, 0) and len(result.files) > 3
    assert (result.processes["parts"], result.processes["bytes_read"]) == (len(result.files), [result.bytes_in])
    assert [path.name for path in (store / "b").iterdir()] == ["out"] and not list(room.iterdir())
    order = [key.removeprefix("b/out/") for key in writes()]
    assert order[-2:] == ["config.json", "model.safetensors.index.json"]
    assert set(order[: len(result.files)]) == set(result.files) and len(order) == len(set(order)) == len(local) + 1
    with open_checkpoint(OUT) as merged:
        assert len(merged.weight_files) == len(result.files)


def test_a_merge_of_one_part_gets_its_weights_last(store, config, tmp_path):
    whole = config.model_copy(update={"max_shard_size": 10**9})
    (tmp_path / "local").mkdir()
    expected = without_own(tree_bytes(merge_checkpoints(whole, tmp_path / "local/out").out))
    merge_checkpoints(whole, OUT)
    assert without_own(tree_bytes(store / "b/out")) == expected
    assert [key.removeprefix("b/out/") for key in writes()][-2:] == ["config.json", "model.safetensors"]
    assert not (store / PLACE).exists()


def test_memory_and_file_systems_take_merges(tmp_path, config, local):
    for base in (f"memory://{uuid.uuid4().hex}", f"file://{tmp_path}/files"):
        merge_checkpoints(config, f"{base}/out")
        place = locate(f"{base}/out")
        found = {name: (place / name).read_bytes() for name in local}
        assert found == local and not place.beside("out.incomplete").list_entries()


@pytest.mark.parametrize("part", [0, 2])
def test_finished_parts_are_taken_as_they_are(store, config, local, monkeypatch, part):
    """Whatever ends a run: the parts before are there, the part it was at is done again, and nothing is a model yet."""
    with monkeypatch.context() as patch:
        fail_at(patch, delivery, "upload", part)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, OUT)
    assert len(list((store / "b/out").glob("*.safetensors"))) == len(list((store / PLACE).glob("part-*"))) == part
    with pytest.raises(RefusedError):
        open_checkpoint(OUT)
    assert f"{OUT}.incomplete is left from an earlier merge" in refuse(config)
    assert "begun with other settings" in refuse(config.model_copy(update={"seed": 1}), resume=True)
    ToyStore.requests.clear()
    result = merge_checkpoints(config, OUT, resume=True)
    assert bool(result.resumed_items) == bool(part)
    uploaded = [key for key in writes() if key.endswith(".safetensors")]
    assert len(uploaded) == len(result.files) - part
    assert without_own(tree_bytes(store / "b/out")) == local and not (store / PLACE).exists()


def test_the_last_objects_make_it_whole(store, config, local, monkeypatch):
    """Killed at every upload after the weights: no reader takes it for whole, and resuming reads no weights."""
    parts = sum(name.endswith(".safetensors") for name in local)
    beside = len(local) + 1 - parts
    for number in range(beside):
        with monkeypatch.context() as patch:
            fail_at(patch, delivery, "upload", number if number else parts)
            with pytest.raises(PowerCut):
                merge_checkpoints(config, OUT, resume=number > 0)
        assert (store / "b/out/config.json").exists() == (number == beside - 1)
        with pytest.raises(RefusedError, match="several other candidates"):
            open_checkpoint(OUT)
    result = merge_checkpoints(config, OUT, resume=True)
    assert result.processes["bytes_read"] == [0] and without_own(tree_bytes(store / "b/out")) == local


def test_a_run_killed_after_its_last_object_is_told_so(store, config, local, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, type(locate(OUT)), "remove_all", 0)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, OUT)
    assert f"{OUT} is complete, there is nothing to resume" in refuse(config, resume=True)
    assert without_own(tree_bytes(store / "b/out")) == local and not (store / PLACE).exists()


def test_damaged_objects_are_made_again(store, config, local, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, delivery, "complete", 0)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, OUT)
    first, second, third = sorted((store / "b/out").glob("*.safetensors"))[:3]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    (store / PLACE / "part-00003.json").write_text("{")
    ToyStore.requests.clear()
    merge_checkpoints(config, OUT, resume=True)
    weights = [key.rpartition("/")[2] for key in writes() if key.endswith(".safetensors")]
    assert weights == [first.name, second.name, third.name]
    assert without_own(tree_bytes(store / "b/out")) == local


@pytest.mark.parametrize("tells_md5", [True, False])
def test_uploads_that_arrive_otherwise_are_found(store, config, monkeypatch, tells_md5):
    """A truncated object by its size; one of other bytes by the store's MD5, or by reading it back."""
    monkeypatch.setattr(ToyStore, "tells_md5", tells_md5)

    def truncate(key, data):
        return data[:-1] if "00002-of" in key else data

    def flip(key, data):
        return data[:-1] + bytes([data[-1] ^ 1]) if "00002-of" in key else data

    ToyStore.faults["write"] = truncate
    problem = refuse(config)
    assert "bytes after an upload of" in problem and "mend it and use --resume" in problem
    ToyStore.faults["write"] = flip
    assert "the store has other bytes than were uploaded" in refuse(config, resume=True)
    ToyStore.faults.clear()
    assert merge_checkpoints(config, OUT, resume=True).resumed_items


def test_stores_that_fail_or_deny_are_refused_in_a_sentence(store, config, room, local):
    ToyStore.faults["write"] = PermissionError("read-only")
    problem = refuse(config, scratch=room)
    assert problem == f"{OUT}.incomplete/parts.json cannot be written: the store failed (PermissionError: read-only)"
    assert not list(store.iterdir()) and not list(room.iterdir())
    ToyStore.faults["write"] = lambda key, data: data
    calls = []

    def reset(key, data):
        calls.append(key)
        if len(calls) == 9:
            raise ConnectionError("reset by peer")
        return data

    ToyStore.faults["write"] = reset
    problem = refuse(config)
    assert "the store failed (ConnectionError: reset by peer)" in problem and "what is done so far is in" in problem
    ToyStore.faults.clear()
    merge_checkpoints(config, OUT, resume=True)
    assert without_own(tree_bytes(store / "b/out")) == local


def test_places_that_are_taken(store, config, models, tmp_path):
    (store / "b/out").mkdir(parents=True)
    (store / "b/out/notes.txt").write_text("mine")
    assert f"the output {OUT} is already there and not empty" in refuse(config)
    assert f"the output {OUT}/notes.txt is already there and is an object" in refuse(config, f"{OUT}/notes.txt")
    assert tree_bytes(store) == {"b/out/notes.txt": b"mine"}
    write_family(store / "b/models", toy_family(2))
    urls = ["toy://b/models/a", "toy://b/models/b"]
    inside = config.model_copy(update={"models": tuple(urls)})
    assert "lies inside the input toy://b/models/a" in refuse(inside, "toy://b/models/a/out")
    assert "lies inside the output toy://b/models" in refuse(inside, "toy://b/models")
    assert "--scratch" in refuse(config, "toy://b/new", scratch=tmp_path / "nowhere")
    assert "goes with an output in a store" in refuse(config, tmp_path / "out", scratch=tmp_path)


def test_another_run_that_begins_at_once_is_refused(store, config, monkeypatch):
    begin = delivery.begin

    def late(*arguments):
        (store / PLACE).mkdir(parents=True)
        (store / PLACE / "parts.json").write_text("{}")
        monkeypatch.setattr("rgsp_jax.pipeline.site.StoreSite.read_cut", lambda site: None)
        return begin(*arguments)

    monkeypatch.setattr(delivery, "begin", late)
    assert "was begun by another process just now" in refuse(config)
    assert tree_bytes(store) == {f"{PLACE}/parts.json": b"{}"}


def test_what_is_not_finite_leaves_nothing(store, tmp_path):
    family = toy_family(2)
    family[1]["encoder.layer.1.output.dense.weight"][3, 4] = np.inf
    paths = write_family(tmp_path / "models", family)
    config = MergeConfig(models=paths, method="average", max_shard_size=1500)
    assert "encoder.layer.1.output.dense.weight" in refuse(config)
    assert not tree_bytes(store)
    for model in family:
        model["encoder.layer.1.output.dense.weight"][:] = 1e5  # past what float16 holds
    large = {"models": tuple(write_family(tmp_path / "large", family)), "dtype": "float16"}
    config = config.model_copy(update=large)
    with pytest.raises(NotFiniteError):
        merge_checkpoints(config, OUT)
    assert not tree_bytes(store)


def test_the_command_line_reads_and_writes_stores(store, models, room):
    write_family(store / "b/models", toy_family(2))
    urls = ["toy://b/models/a", "toy://b/models/b"]
    run = CliRunner().invoke
    planned = run(cli, ["merge", *urls, "--plan", "--json", "--out", OUT])
    assert planned.exit_code == 0 and json.loads(planned.stdout)
    assert not (store / "b/out").exists()
    arguments = ["merge", *urls, "-m", "average", "--out", OUT, "--scratch", str(room)]
    done = run(cli, [*arguments, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["out"] == OUT
    expected = read_model(store / "b/out")
    found = read_model(OUT)
    assert expected.keys() == found.keys() and all(same_bits(expected[n], found[n]) for n in expected)
    shown = run(cli, [*arguments[:-4], "--out", "toy://b/again"])
    assert shown.exit_code == 0 and "toy://b/again/report.html" in shown.output
    refused = run(cli, ["merge", *urls, "--out", str(room / "out"), "--scratch", str(room)])
    assert "--scratch goes with" in str(refused.exception)
    compared = run(cli, ["compare", *urls, "--json"])
    assert compared.exit_code == 0 and json.loads(compared.stdout), compared.exception


def test_nothing_is_listed_from_a_cache(monkeypatch):
    """What another process put there a moment ago is seen."""
    asked = []
    original = fsspec.core.url_to_fs

    def note(url, **options):
        asked.append(options)
        return original(url, **options)

    monkeypatch.setattr(fsspec.core, "url_to_fs", note)
    locate("memory://x/y")
    assert asked == [{"use_listings_cache": False}]
