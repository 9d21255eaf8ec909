"""Processes that merge into a store, killed and resumed: what was uploaded stays, nothing half-done is a model."""

import json

import pytest

from distributed.team import Special, finish, start, start_team
from pipeline.toy_models import read_model, same_bits, toy_family, write_family
from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.errors import RefusedError

OUT = "toy://b/out"


@pytest.fixture
def models(store):
    write_family(store / "b/models", toy_family(2))
    return ["toy://b/models/a", "toy://b/models/b"]


def settings(models, out, room):
    return [*models, "-m", "average", "--max-shard-size", "2kB", "--json", "-o", out, "--scratch", room]


def uploaded(store):
    return sorted(path.name for path in (store / "b/out").glob("*.safetensors"))


def same_model(left, right):
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


@pytest.fixture
def expected(models, tmp_path):
    from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

    return read_model(merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "alone").out)


@pytest.fixture
def room(tmp_path):
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def test_a_killed_process_leaves_whole_parts(store, models, expected, room):
    merge = settings(models, OUT, room)
    ((code, _, _),) = finish([start(merge, Special(["--die", "upload:3"]))])
    assert code == -9
    there = uploaded(store)
    times = {name: (store / "b/out" / name).stat().st_mtime_ns for name in there}
    assert len(there) == 2 == len(list((store / "b/out.incomplete").glob("part-*.json")))
    with pytest.raises(RefusedError):
        open_checkpoint(OUT)
    ((code, _, errors),) = finish([start(merge)])
    assert code == 2 and "finish it with --resume" in errors[0]
    ((code, printed, errors),) = finish([start([*merge, "--resume"])])
    assert (code, errors) == (0, [])
    result = json.loads(printed)
    assert result["resumed_items"] >= 2 and result["processes"]["parts"] == len(uploaded(store))
    assert times == {name: (store / "b/out" / name).stat().st_mtime_ns for name in there}
    assert same_model(read_model(OUT), expected) and not (store / "b/out.incomplete").exists()


@pytest.mark.slow
def test_several_processes_upload_their_own(store, models, expected, room):
    """Two, one of them killed; three resume, one of them sees another store; then these three, then all is there."""
    merge = settings(models, OUT, room)
    outcomes = finish(start_team(merge, 2, {1: Special(["--die", "upload:2"])}))
    assert [code for code, _, _ in outcomes] == [2, -9]
    (sentence,) = outcomes[0][2]
    assert "process 1 of 2 was lost" in sentence and f"what is done is kept in {OUT}.incomplete" in sentence
    done = uploaded(store)
    assert done
    (store.parent / "other").mkdir()
    write_family(store.parent / "other/b/models", toy_family(2))
    elsewhere = Special(variables={"TOY_STORE": str(store.parent / "other")})
    outcomes = finish(start_team([*merge, "--resume"], 3, {2: elsewhere}))
    assert [code for code, _, _ in outcomes] == [2] * 3
    assert uploaded(store) == done
    outcomes = finish(start_team([*merge, "--resume"], 3))
    assert [code for code, _, _ in outcomes] == [0] * 3, outcomes
    work = json.loads(outcomes[0][1])["processes"]
    assert work["processes"] == 3 and sum(bytes_read > 0 for bytes_read in work["bytes_read"]) > 1
    assert same_model(read_model(OUT), expected) and not (store / "b/out.incomplete").exists()
    assert not list(store.rglob("*.partial"))
