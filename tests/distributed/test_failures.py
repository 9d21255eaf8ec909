"""Processes that are killed, disagree, see another disk or find no room: one sentence, and nothing lost."""

import json
import shutil
import time

import numpy as np
import pytest

from distributed.team import (
    HEARTBEAT,
    Special,
    count_items,
    finish,
    free_port,
    is_free,
    start,
    start_team,
    wait_for_items,
)
from pipeline.toy_models import read_model, same_bits, toy_family, tree_bytes, write_family, write_model
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.workshop import lock

pytestmark = pytest.mark.slow
SLOW = ("--delay", 0.7)
OWN = "merge_processes.json"
SOON = HEARTBEAT + 20
"""Seconds within which all must have ended, on a busy machine."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("parents"), toy_family(2))


def settings(models, out):
    """An item for every tensor, two parts for every one of four processes."""
    return [*models, "-m", "slerp", "--exclude", "*query*", "--max-shard-size", "2kB", "--json", "-o", out]


@pytest.fixture(scope="module")
def uninterrupted(models, tmp_path_factory):
    """Bytes of a merge by four processes that were left alone."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    outcomes = finish(start_team(settings(models, out), 4))
    assert [(code, errors) for code, _, errors in outcomes] == [(0, [])] * 4
    assert [bool(printed) for _, printed, _ in outcomes] == [True, False, False, False]
    assert json.loads(outcomes[0][1])["processes"]["parts"] == 8
    return without_own(out)


def without_own(out):
    return {name: data for name, data in tree_bytes(out).items() if name != OWN}


def kill(team, victim, workshop):
    """End one process as the system would; the sentence that all others end with, soon and in order."""
    team[victim].kill()
    killed = time.monotonic()
    outcomes = finish(team, SOON)
    assert time.monotonic() - killed < SOON
    assert outcomes.pop(victim)[0] == -9
    sentences = {tuple(line for line in errors if line) for _, _, errors in outcomes}
    assert [(code, printed) for code, printed, _ in outcomes] == [(2, "")] * len(outcomes)
    assert len(sentences) == 1
    ((sentence,),) = sentences
    assert sentence.startswith(f"error: process {victim} of {len(team)} was lost")
    assert str(workshop) in sentence and "--resume" in sentence
    return count_items(workshop)


def test_killed_and_resumed_by_ever_other_numbers(tmp_path, models, uninterrupted):
    """Four processes, one killed; three, their coordinator killed; two, killed at the last moment; one finishes."""
    out, workshop = tmp_path / "out", tmp_path / "out.incomplete"
    merge = settings(models, out)
    team = start_team(merge, 4, options=SLOW)
    wait_for_items(team, workshop, 2)
    with pytest.raises(RefusedError, match="is being written by another process"), lock(workshop):
        pass
    finished = [kill(team, 2, workshop)]

    team = start_team([*merge, "--resume"], 3, options=SLOW)
    wait_for_items(team, workshop, finished[0] + 2)
    finished.append(kill(team, 0, workshop))
    assert not out.exists() and 2 <= finished[0] < finished[1]

    team = start_team([*merge, "--resume"], 2, {0: Special(["--die", "publish:1"])})
    outcomes = finish(team)
    assert [code for code, _, _ in outcomes] == [-9, 2]
    finished.append(count_items(workshop))
    assert not out.exists() and finished[1] < finished[2]

    ((code, printed, errors),) = finish([start([*merge, "--resume"])])
    assert (code, errors) == (0, [])
    assert json.loads(printed)["resumed_items"] == finished[2]
    assert without_own(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_merge_begun_by_one_is_finished_by_two(tmp_path, models):
    out, workshop = tmp_path / "out", tmp_path / "out.incomplete"
    merge = settings(models, out)
    process = start(merge, Special(SLOW))
    wait_for_items([process], workshop, 2)
    process.kill()
    process.communicate()
    outcomes = finish(start_team([*merge, "--resume"], 2))
    assert [code for code, _, _ in outcomes] == [0, 0]
    assert outcomes[0][2] == ["1 of 2 processes has nothing to do: the merge is 1 part"]
    assert json.loads(outcomes[0][1])["resumed_items"] >= 2
    alone = tmp_path / "alone"
    assert finish([start(settings(models, alone))])[0][0] == 0
    expected, found = read_model(alone), read_model(out)
    assert all(same_bits(expected[name], found[name]) for name in expected)


def test_a_full_disk_in_one_process(tmp_path, models, uninterrupted):
    """All end with the same sentence; the same number finishes."""
    out, workshop = tmp_path / "out", tmp_path / "out.incomplete"
    merge = settings(models, out)
    usual = Special(SLOW)
    outcomes = finish(start_team(merge, 4, {0: usual, 1: usual, 2: Special([*SLOW, "--fail", 2]), 3: usual}))
    sentence = f"error: No space left on device (/a/full/disk); what is done so far is in {workshop}: mend it and use"
    assert [(code, printed) for code, printed, _ in outcomes] == [(2, "")] * 4
    assert {tuple(errors) for _, _, errors in outcomes} == {(f"{sentence} --resume",)}
    assert count_items(workshop) > 0
    outcomes = finish(start_team([*merge, "--resume"], 4))
    assert [code for code, _, _ in outcomes] == [0] * 4
    assert without_own(out) == uninterrupted


def refused(team):
    """The one sentence that all processes end with."""
    outcomes = finish(team)
    assert [(code, printed) for code, printed, _ in outcomes] == [(2, "")] * len(team), outcomes
    ((sentence,),) = {tuple(errors) for _, _, errors in outcomes}
    return sentence.removeprefix("error: ")


def test_other_settings_and_other_files(tmp_path, models):
    merge = settings(models, tmp_path / "out")
    team = start_team(merge, 3, {2: Special(arguments=["--seed", 1])})
    assert refused(team) == "process 2 has other settings than process 0: start all alike"

    family = toy_family(2)
    write_family(tmp_path / "here", family)
    family[1]["stem.conv.weight"] = family[1]["stem.conv.weight"] + 1
    write_family(tmp_path / "there", family)
    merge = settings(["a", "b"], tmp_path / "out")
    team = start_team(merge, 2, {i: Special(directory=tmp_path / place) for i, place in enumerate(["here", "there"])})
    assert refused(team) == "process 1 has other files of b than process 0: start all alike"

    shutil.rmtree(tmp_path / "there/b")
    team = start_team(merge, 2, {i: Special(directory=tmp_path / place) for i, place in enumerate(["here", "there"])})
    assert refused(team).startswith("process 1: b does not exist")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


def test_a_disk_that_is_not_shared(tmp_path, models):
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    specials = {i: Special(["--wait", 1], directory=place) for i, place in enumerate(places)}
    sentence = refused(start_team(settings(models, "out"), 2, specials))
    assert sentence.startswith("process 1: out.incomplete is not the directory that process 0 works in")
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_values_that_are_not_finite(tmp_path):
    family = toy_family(2)
    family[1]["encoder.layer.1.intermediate.dense.bias"][3] = np.nan
    models = write_family(tmp_path, family)
    sentence = refused(start_team(settings(models, tmp_path / "out"), 2))
    assert sentence.startswith(f"{models[1]}: tensor 'encoder.layer.1.intermediate.dense.bias' holds values")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_more_processes_than_parts(tmp_path):
    tensors = {name: np.ones((4, 4), np.float32) for name in ("a.weight", "b.weight")}
    models = [str(write_model(tmp_path / name, tensors)) for name in "ab"]
    outcomes = finish(start_team(settings(models, tmp_path / "out"), 4))
    assert [code for code, _, _ in outcomes] == [0] * 4
    assert [errors for _, _, errors in outcomes] == [
        ["2 of 4 processes have nothing to do: the merge is 2 parts"],
        [],
        [],
        [],
    ]
    work = json.loads(outcomes[0][1])["processes"]
    assert work["parts"] == 2 and sorted(map(len, work["parts_by_process"])) == [0, 0, 1, 1]
    assert read_model(tmp_path / "out").keys() == tensors.keys()


def test_processes_that_do_not_all_arrive(tmp_path, models):
    """One of two is not started."""
    flags = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process", 0]
    ((code, printed, errors),) = finish([start([*settings(models, tmp_path / "out"), *flags, "--start-timeout", 5])])
    assert (code, printed, len(errors)) == (2, "", 1)
    assert "the 2 processes did not all meet at 127.0.0.1:" in errors[0] and "within 5 s" in errors[0]
    assert list(tmp_path.iterdir()) == []


def slurm(job, process):
    """What `srun` sets, as far as JAX reads it."""
    found = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": process, "LOCALID": process}
    return {f"SLURM_{name}": str(value) for name, value in found.items()}


def open_mpi(job, process):
    """What `mpirun` sets, as far as JAX reads it."""
    found = {"SIZE": 2, "RANK": process, "LOCAL_RANK": process}
    uri = {"OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:34911"}
    return uri | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in found.items()}


@pytest.mark.parametrize("cluster", [slurm, open_mpi])
def test_the_environment_of_a_cluster(tmp_path, models, cluster):
    """No flags: JAX takes the port from the number of the job."""
    job = next(job for job in range(1000, 4000) if is_free(job % 2**12 + 65535 - 2**12 + 1))
    merge = [*settings(models, tmp_path / "out"), "--distributed"]
    outcomes = finish([start(merge, Special(variables=cluster(job, process))) for process in range(2)])
    assert [(code, errors) for code, _, errors in outcomes] == [(0, [])] * 2
    assert json.loads(outcomes[0][1])["processes"]["processes"] == 2 and not outcomes[1][1]
