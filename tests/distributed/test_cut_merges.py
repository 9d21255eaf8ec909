"""A merge that is cut into parts writes the tensors that it writes whole, whoever does which part."""

import json
import shutil

import numpy as np
import pytest

from pipeline.test_resume import PowerCut, fail_at
from pipeline.toy_methods import EXTENDED, USERS
from pipeline.toy_models import read_model, same_bits, toy_family, tree_bytes, write_family
from rgsp_jax.checkpoint import TensorSpec, open_checkpoint, write_safetensors
from rgsp_jax.checkpoint.hashing import sample_file
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge, merge_checkpoints, overview, plan, plan_merge, workshop
from rgsp_jax.pipeline.audit import audit_whole
from rgsp_jax.pipeline.processes import Alone

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture
def toys(monkeypatch):
    for name in USERS:
        monkeypatch.setattr(f"rgsp_jax.pipeline.{name}.methods", EXTENDED)
    monkeypatch.setattr(plan, "ITEM_ELEMENTS", 160)
    monkeypatch.setattr(overview, "render_report", lambda summary, records: f"<p>{len(records)}</p>")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("parents"), toy_family(3, dtypes=("bfloat16", "float32")))


def journals(directory):
    return sorted(path.name for path in directory.glob("journal*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "jitter", "seed": 3},
        {"method": "jitter_elements", "dtype": "float32"},
        {"method": "tilt", "exclude": ("stem.*",)},
        {"method": "relative", "hyperparameters": {"rank": 3}, "include": ("*intermediate*", "*LayerNorm*")},
    ],
    ids=lambda settings: settings["method"],
)
def test_parts_are_the_whole(tmp_path, models, settings):
    config = MergeConfig(models=models, **settings)
    whole = merge_checkpoints(config, tmp_path / "whole")
    parts = merge_checkpoints(config.model_copy(update={"max_shard_size": 1500}), tmp_path / "parts", processes=Alone())
    expected, found = read_model(whole.out), read_model(parts.out)
    assert expected.keys() == found.keys() and len(parts.files) > 3
    assert all(same_bits(expected[name], found[name]) for name in expected)
    assert (whole.out / "report.jsonl").read_bytes() == (parts.out / "report.jsonl").read_bytes()
    assert (whole.processes, parts.processes["parts"]) == (None, len(parts.files))
    assert parts.processes["bytes_read"] == [parts.bytes_in] and parts.processes["predicted_imbalance"] == 1


def test_a_cut_merge_is_resumed_as_it_was_cut(tmp_path, monkeypatch, models):
    """By one process that knows nothing of parts; what is done stays, and the bytes are those of the uninterrupted."""
    config = MergeConfig(models=models, method="tilt", max_shard_size=1500)
    (tmp_path / "uninterrupted").mkdir()
    uninterrupted = merge_checkpoints(config, tmp_path / "uninterrupted/out", processes=Alone())
    out, place = tmp_path / "out", tmp_path / "out.incomplete"
    with monkeypatch.context() as patch:
        fail_at(patch, merge, "publish", 0)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, out, processes=Alone())
    parts = json.loads((place / "parts.json").read_text())["parts"]
    assert journals(place) == [f"journal-{i + 1:05d}.jsonl" for i in range(len(parts))]
    done = [len((place / name).read_bytes().splitlines()) - 1 for name in journals(place)]
    (place / journals(place)[1]).unlink()
    with pytest.raises(RefusedError, match="was begun with other settings"):
        merge_checkpoints(config.model_copy(update={"seed": 1}), out, resume=True)
    resumed = merge_checkpoints(config, out, resume=True)
    assert resumed.resumed_items == sum(done) - done[1]
    expected, found = tree_bytes(uninterrupted.out), tree_bytes(resumed.out)
    work = json.loads(found.pop("merge_processes.json"))
    assert (work["processes"], work["parts"]) == (1, len(parts)) and expected.pop("merge_processes.json")
    assert expected == found


def test_a_journal_of_another_cut_is_refused(tmp_path, monkeypatch, models):
    config = MergeConfig(models=models, method="tilt", max_shard_size=1500)
    out, place = tmp_path / "out", tmp_path / "out.incomplete"
    with monkeypatch.context() as patch:
        fail_at(patch, merge, "audit", 0)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, out, processes=Alone())
    noted = json.loads((place / "parts.json").read_text())
    noted["parts"][0], noted["parts"][1] = noted["parts"][1], noted["parts"][0]
    (place / "parts.json").write_text(json.dumps(noted))
    before = tree_bytes(place)
    with pytest.raises(RefusedError, match="was begun with other settings"):
        merge_checkpoints(config, out, resume=True)
    noted["parts"].pop()
    (place / "parts.json").write_text(json.dumps(noted))
    with pytest.raises(RefusedError, match="was begun with other settings"):
        merge_checkpoints(config, out, resume=True)
    assert {k: v for k, v in tree_bytes(place).items() if k != "parts.json"} == {
        k: v for k, v in before.items() if k != "parts.json"
    }


def test_a_refused_cut_merge_leaves_nothing(tmp_path):
    family = toy_family(2)
    family[0]["stem.conv.weight"][1, 1, 1, 1] = np.inf
    config = MergeConfig(models=write_family(tmp_path, family), method="average", max_shard_size=1500)
    with pytest.raises(RefusedError, match="not finite"):
        merge_checkpoints(config, tmp_path / "out", processes=Alone())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_orbax_parents_give_an_orbax_checkpoint_from_parts(tmp_path):
    from orbax.checkpoint import v1 as orbax

    parents = []
    for name, value in (("a", 1.0), ("b", 3.0)):
        orbax.save(
            tmp_path / name, {"layer": {"kernel": np.full((4, 4), value, np.float32), "bias": np.full(3, value)}}
        )
        parents.append(str(tmp_path / name))
    config = MergeConfig(models=parents, method="average", max_shard_size=20)
    result = merge_checkpoints(config, tmp_path / "out", processes=Alone())
    with open_checkpoint(result.out) as found:
        assert found.format == "orbax" and result.processes["parts"] == 2
        assert len(found.specs) == 2 and all((found.read(name) == 2).all() for name in found.specs)


def test_the_whole_is_every_tensor_once(tmp_path):
    specs = {name: TensorSpec(name, (2,), np.dtype(np.float32)) for name in "abc"}
    whole = plan_merge(MergeConfig(models=("x", "y"), method="average"), [specs, specs])
    with pytest.raises(RefusedError) as refusal:
        audit_whole(tmp_path, whole, [{"a": "1", "b": "2"}, {"b": "2", "d": "4"}])
    assert refusal.value.problems == (
        "audit: 'b' is in 2 finished parts, not in one",
        "audit: 'c' is in 0 finished parts, not in one",
        "audit: 'd' was not to be written",
    )
    write_safetensors(tmp_path / "model.safetensors", {name: np.ones(2, np.float32) for name in "ab"})
    with pytest.raises(RefusedError, match="'c' is missing"):
        audit_whole(tmp_path, whole, [{"a": "1", "b": "2"}, {"c": "3"}])


def test_a_file_system_that_locks_files_alone(tmp_path, monkeypatch):
    """NFS: a lock wants a descriptor that is open for writing."""
    flock = workshop.fcntl.flock

    def choosy(descriptor, operation):
        if workshop.os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(9, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(workshop.fcntl, "flock", choosy)
    with (
        workshop.lock(tmp_path),
        pytest.raises(RefusedError, match="is being written by another process"),
        workshop.lock(tmp_path),
    ):
        pass
    with workshop.lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [workshop.LOCK_FILE]


def test_a_place_is_known_by_its_token(tmp_path, monkeypatch):
    monkeypatch.setattr(workshop, "LOOK_SECONDS", 0.3)
    (tmp_path / "here").mkdir()
    token = workshop.write_token(tmp_path / "here")
    workshop.check_token(tmp_path / "here", token)
    for place, expected in (("here", "another"), ("nowhere", token)):
        with pytest.raises(RefusedError, match="is not the directory that process 0 works in"):
            workshop.check_token(tmp_path / place, expected)


def test_samples_tell_files_apart(tmp_path):
    data = bytearray(np.random.default_rng(0).bytes(3_000_000))
    path = tmp_path / "x"
    path.write_bytes(data)
    first = sample_file(path)
    shutil.copy(path, tmp_path / "y")
    assert sample_file(tmp_path / "y") == first
    for position in (0, len(data) - 1):
        data[position] ^= 1
        path.write_bytes(data)
        assert sample_file(path) != first
        data[position] ^= 1
    path.write_bytes(data[:-1])
    assert sample_file(path) != first
    path.write_bytes(b"")
    assert sample_file(path) != first
