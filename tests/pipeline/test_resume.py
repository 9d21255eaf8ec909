"""An interrupted merge goes on where it stopped, and ends as if nothing had happened."""

import json
import os

import numpy as np
import pytest

from pipeline.toy_models import toy_family, tree_bytes, write_family, write_model
from rgsp_jax.checkpoint import Checkpoint, ShardWriter, open_checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, Override, execute, merge, merge_checkpoints, plan_merge, run
from rgsp_jax.pipeline.journal import Journal

pytestmark = pytest.mark.usefixtures("toy_methods", "small_items", "plain_report")


class PowerCut(Exception):
    pass


def fail_at(monkeypatch, owner, name, call):
    """Make the call with this number (from 0) raise instead; returns the list of calls."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise PowerCut
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    write_family(directory, toy_family(3))
    return directory


@pytest.fixture
def config(place):
    return MergeConfig(models=[str(place / k) for k in "abc"], method="tilt", exclude=("stem.*", "*.1.*bias"))


@pytest.fixture
def uninterrupted(place, config):
    """Bytes of the whole directory of a merge that was left alone."""
    if not (place / "out").exists():
        merge_checkpoints(config, place / "out")
    return tree_bytes(place / "out")


@pytest.fixture
def items(config):
    return plan_merge(config, [open_checkpoint(path).specs for path in config.models]).items


def journal_lines(workshop):
    return (workshop / "journal.jsonl").read_text().splitlines()


def interrupt(monkeypatch, config, out, owner=merge, name="audit", call=0):
    """Begin a merge and break it off; the indices of the items that its journal has."""
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, out)
    assert not out.exists()
    return [json.loads(line)["item"] for line in journal_lines(out.with_name("out.incomplete"))[1:]]


def resume(monkeypatch, config, out):
    """Finish the merge; the result and how many items were computed for it."""
    with monkeypatch.context() as patch:
        calls = fail_at(patch, execute, "run_item", -1)
        result = merge_checkpoints(config, out, resume=True)
    assert not out.with_name("out.incomplete").exists()
    return result, len(calls)


def count_computed(items, finished=()):
    return sum(item.group.action != "copy" for item in items if item.index not in finished)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (execute, "run_item", 0),
        (execute, "run_item", 1),
        (execute, "run_item", 7),
        (execute, "read_matrix", 3),
        (ShardWriter, "write", 0),
        (ShardWriter, "write", 9),
        (ShardWriter, "write", 20),
        (Journal, "record", 4),
        (Journal, "record", 11),
        (ShardWriter, "finish", 0),
        (run, "copy_companions", 0),
        (merge, "audit", 0),
        (run, "build_records", 0),
        (run, "write_overview", 0),
        (merge, "publish", 0),
    ],
)
def test_no_finished_item_is_done_again_and_the_bytes_are_the_same(
    tmp_path, monkeypatch, config, uninterrupted, items, owner, name, call
):
    finished = interrupt(monkeypatch, config, tmp_path / "out", owner, name, call)
    assert len(finished) == len(set(finished)) < len(items) or owner in (merge, run) or name == "finish"
    result, computed = resume(monkeypatch, config, tmp_path / "out")
    assert result.resumed_items == len(finished)
    assert computed == count_computed(items, finished)
    assert tree_bytes(result.out) == uninterrupted


def test_interrupted_again_and_again(tmp_path, monkeypatch, config, uninterrupted, items):
    out = tmp_path / "out"
    computed = 0
    for attempt in range(40):
        with monkeypatch.context() as patch:
            calls = fail_at(patch, execute, "run_item", 2)
            try:
                result = merge_checkpoints(config, out, resume=attempt > 0)
            except PowerCut:
                assert not out.exists()
            else:
                break
            finally:
                computed += min(len(calls), 2)
    assert attempt == (count_computed(items) - 1) // 2
    assert computed == count_computed(items)
    assert tree_bytes(result.out) == uninterrupted


def test_resume_with_nothing_to_resume_begins(tmp_path, monkeypatch, config, uninterrupted, items):
    result, computed = resume(monkeypatch, config, tmp_path / "out")
    assert (result.resumed_items, computed) == (0, count_computed(items))
    assert tree_bytes(result.out) == uninterrupted


def test_progress_of_a_resumed_merge_ends_at_the_total(tmp_path, monkeypatch, config):
    interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 6)
    done = []
    result = merge_checkpoints(config, tmp_path / "out", resume=True, progress=lambda *event: done.append(event))
    assert sum(event[1] for event in done if event[0] == "merge") == result.bytes_in + result.bytes_out


DAMAGE = {
    "torn": lambda text: text[: text.rstrip(b"\n").rfind(b"\n") + 20],
    "without its line end": lambda text: text[:-1],
    "zeros behind": lambda text: text + bytes(4096),
    "zeros inside": lambda text: text[: len(text) // 2] + bytes(64) + text[len(text) // 2 + 64 :],
    "first line lost": lambda text: bytes(100) + text[100:],
    "empty": lambda text: b"",
    "other data": lambda text: text + b'["no entry"]\n{"neither": 1}\n',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_costs_work_and_nothing_else(tmp_path, monkeypatch, config, uninterrupted, items, damage):
    finished = interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 8)
    path = tmp_path / "out.incomplete/journal.jsonl"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    result, computed = resume(monkeypatch, config, tmp_path / "out")
    kept = len(finished) if damage in ("zeros behind", "other data") else result.resumed_items
    assert result.resumed_items == kept <= len(finished)
    assert damage != "torn" or kept == len(finished) - 1
    assert damage not in ("empty", "first line lost") or kept == 0
    assert count_computed(items) - kept <= computed <= count_computed(items)
    assert tree_bytes(result.out) == uninterrupted


@pytest.mark.parametrize("which", [0, 5, 9])
def test_an_item_whose_data_changed_is_done_again(tmp_path, monkeypatch, config, uninterrupted, items, which):
    finished = interrupt(monkeypatch, config, tmp_path / "out")
    assert sorted(finished) == list(range(len(items)))
    piece = next(p for p in items[which].pieces if p.size)
    weights = tmp_path / "out.incomplete/model/model.safetensors"
    header = json.loads(weights.read_bytes()[8:][: int.from_bytes(weights.read_bytes()[:8], "little")])
    begin = 8 + int.from_bytes(weights.read_bytes()[:8], "little") + header[piece.name]["data_offsets"][0]
    itemsize = items[which].group.out_dtype.itemsize
    data = bytearray(weights.read_bytes())
    data[begin + piece.start * itemsize + piece.size * itemsize - 1] ^= 1
    weights.write_bytes(data)
    result, computed = resume(monkeypatch, config, tmp_path / "out")
    assert result.resumed_items == len(items) - 1
    assert computed == (items[which].group.action != "copy")
    assert tree_bytes(result.out) == uninterrupted


def test_lost_weight_files_are_made_again(tmp_path, monkeypatch, config, uninterrupted, items):
    interrupt(monkeypatch, config, tmp_path / "out")
    (tmp_path / "out.incomplete/model/model.safetensors").unlink()
    result, _ = resume(monkeypatch, config, tmp_path / "out")
    assert result.resumed_items < len(items)
    assert tree_bytes(result.out) == uninterrupted


CHANGES = {
    "a hyperparameter": {"hyperparameters": {"strength": 0.75}},
    "an override": {"overrides": (Override(pattern="*query*", hyperparameters={"strength": 1}),)},
    "the method": {"method": "average"},
    "the dtype": {"dtype": "bfloat16"},
    "a pattern": {"exclude": ("stem.*",)},
    "the seed": {"seed": 1},
    "the shards": {"max_shard_size": 4000},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_are_refused_and_the_work_is_kept(tmp_path, monkeypatch, config, uninterrupted, change):
    interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 5)
    workshop = tmp_path / "out.incomplete"
    before = tree_bytes(workshop)
    with pytest.raises(RefusedError, match=f"{workshop} was begun with other settings or other model files"):
        merge_checkpoints(config.model_copy(update=CHANGES[change]), tmp_path / "out", resume=True)
    assert tree_bytes(workshop) == before
    result, _ = resume(monkeypatch, config, tmp_path / "out")
    assert tree_bytes(result.out) == uninterrupted


def test_another_order_of_the_models_is_refused(tmp_path, monkeypatch, config):
    interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 5)
    turned = config.model_copy(update={"models": config.models[::-1]})
    with pytest.raises(RefusedError, match="was begun with other settings"):
        merge_checkpoints(turned, tmp_path / "out", resume=True)


@pytest.mark.parametrize("how", ["touched", "rewritten"])
def test_changed_model_files_are_refused(tmp_path, monkeypatch, how):
    family = toy_family(2)
    models = write_family(tmp_path, family)
    config = MergeConfig(models=models, method="average")
    interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 1)
    if how == "touched":
        os.utime(tmp_path / "b/model.safetensors")
    else:
        write_model(tmp_path / "b", {**family[1], "logit_scale": np.float32(9.0)[()].reshape(())})
    with pytest.raises(RefusedError, match=r"out\.incomplete was begun with other settings or other model files"):
        merge_checkpoints(config, tmp_path / "out", resume=True)
    assert journal_lines(tmp_path / "out.incomplete")


def test_an_unfinished_merge_is_not_begun_anew_unasked(tmp_path, monkeypatch, config):
    interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 5)
    before = tree_bytes(tmp_path / "out.incomplete")
    with pytest.raises(RefusedError) as refusal:
        merge_checkpoints(config, tmp_path / "out")
    assert len(refusal.value.problems) == 1
    assert str(tmp_path / "out.incomplete") in refusal.value.problems[0] and "--resume" in refusal.value.problems[0]
    assert tree_bytes(tmp_path / "out.incomplete") == before


def test_a_workshop_in_use_is_left_alone(tmp_path, monkeypatch, config):
    interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 5)
    before = tree_bytes(tmp_path / "out.incomplete")
    with (
        merge.lock(tmp_path / "out.incomplete"),
        pytest.raises(RefusedError, match="is being written by another process"),
    ):
        merge_checkpoints(config, tmp_path / "out", resume=True)
    assert tree_bytes(tmp_path / "out.incomplete") == before


def test_killed_between_publishing_and_clearing_up(tmp_path, monkeypatch, config, uninterrupted):
    """The output has its name already; what is left beside it goes at the next call, which says so."""
    with monkeypatch.context() as patch:
        fail_at(patch, merge.shutil, "rmtree", 0)
        with pytest.raises(PowerCut):
            merge_checkpoints(config, tmp_path / "out")
    assert (tmp_path / "out.incomplete").exists()
    with pytest.raises(RefusedError, match=f"{tmp_path / 'out'} is complete"):
        merge_checkpoints(config, tmp_path / "out", resume=True)
    assert not (tmp_path / "out.incomplete").exists()
    assert tree_bytes(tmp_path / "out") == uninterrupted


def test_a_failed_merge_leaves_no_descriptor_open(tmp_path, monkeypatch, config):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    interrupt(monkeypatch, config, tmp_path / "out", execute, "run_item", 2)
    before = descriptors()
    for _ in range(3):
        with monkeypatch.context() as patch:
            fail_at(patch, Checkpoint, "read_into", 5)
            with pytest.raises(PowerCut):
                merge_checkpoints(config, tmp_path / "out", resume=True)
    assert descriptors() == before
