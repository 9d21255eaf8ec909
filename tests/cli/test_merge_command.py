"""`rgsp merge` as a user meets it: what it prints, where, and with which exit code."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import yaml

from pipeline.toy_models import read_model, same_bits, toy_family, tree_bytes, write_family, write_model
from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.cli import merge as merge_command
from rgsp_jax.pipeline import MergeConfig, execute, merge_checkpoints


@pytest.fixture
def models(tmp_path):
    return write_family(tmp_path, toy_family(2))


def test_a_merge_says_where_it_is(tmp_path, rgsp, models):
    outcome = rgsp("merge", *models, "--method", "average", "--out", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    for expected in ("merged 20 tensors by average", "1 embedding: average", f"model  {tmp_path}/out", "report.html"):
        assert expected in outcome.out
    assert "warning" not in outcome.out and "\x1b" not in outcome.out


def test_json_is_all_there_is_on_stdout(tmp_path, rgsp, models):
    (tmp_path / "b/tokenizer.json").write_text("other")
    outcome = rgsp("merge", *models, "-m", "average", "-o", tmp_path / "out", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert found["out"] == str(tmp_path / "out") and found["method"] == "average" and found["tensors"] == 20
    assert len(found["warnings"]) == 1 and found["files"].keys() == {"model.safetensors"}
    assert (found["resumed_items"], found["flag_counts"]) == (0, {})
    assert found["bytes_in"] > found["bytes_out"] > 0


def test_warnings_are_shown(tmp_path, rgsp):
    family = toy_family(2)
    for k, model in enumerate(family):
        model["bn.num_batches_tracked"] = np.asarray(k)
    models = write_family(tmp_path, family)
    (tmp_path / "b/tokenizer.json").write_text("other")
    outcome = rgsp("merge", *models, "-m", "average", "-o", tmp_path / "out")
    assert f"warning: tokenizer.json of {models[1]} differs" in outcome.out
    assert "warning: buffer_differs on 1 tensor(s)" in outcome.out


def test_paths_with_brackets_and_colours_are_printed_as_they_are(tmp_path, rgsp):
    place = tmp_path / "[red] runs[/]"
    models = write_family(place, toy_family(2))
    (place / "b/tokenizer.json").write_text("other")
    outcome = rgsp("merge", *models, "-m", "average", "-o", place / "[bold]out")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"model  {place}/[bold]out" in outcome.out and f"of {models[1]} differs" in outcome.out
    assert models[0] in rgsp("merge", *models, "-m", "average", "--plan").out


def test_paths_that_are_no_text_are_no_problem(tmp_path, rgsp):
    place = tmp_path / os.fsdecode(b"caf\xe9")
    models = write_family(place, toy_family(2))
    outcome = rgsp("merge", *models, "-m", "average", "-o", place / "out", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["out"] == str(place / "out")
    assert rgsp("merge", *models, "-m", "average", "-o", place / "other").code == 0


def test_progress_is_for_terminals(tmp_path, rgsp, models, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    outcome = rgsp("merge", *models, "-m", "average", "-o", tmp_path / "out", "--json")
    assert outcome.code == 0
    assert "merging" in outcome.err and "checking" in outcome.err and "20 tensors" in outcome.err
    json.loads(outcome.out)


def test_every_flag_reaches_the_merge(tmp_path, rgsp, models, monkeypatch):
    seen = {}

    def capture(config, out, *, resume, devices, **_):
        seen.update(config=config, out=out, resume=resume, devices=devices)
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_command, "merge_checkpoints", capture)
    flags = [
        "--rank",
        "0.25",
        "--beta",
        "2",
        "--epsilon",
        "1e-2",
        "--set",
        "geometry=orthonormal",
        "--set",
        "symmetric=false",
    ]
    flags += [
        "--include",
        "a.*",
        "--include",
        "b.*",
        "--exclude",
        "re:c",
        "--dtype",
        "bfloat16",
        "--max-shard-size",
        "2GB",
    ]
    flags += ["--memory", "1.5GiB", "--seed", "3", "--resume", "--method", "rgsp"]
    flags += ["--override", "*.q.* rank=4 beta=.5", "--override", "'odd name.*' method=average"]
    outcome = rgsp("merge", *models, "--out", tmp_path / "out", *flags)
    assert outcome.code == 130
    assert seen["config"] == MergeConfig(
        models=tuple(models),
        method="rgsp",
        hyperparameters={"rank": 0.25, "beta": 2, "epsilon": 0.01, "geometry": "orthonormal", "symmetric": False},
        include=("a.*", "b.*"),
        exclude=("re:c",),
        overrides=(
            {"pattern": "*.q.*", "hyperparameters": {"rank": 4, "beta": 0.5}},
            {"pattern": "odd name.*", "method": "average"},
        ),
        dtype="bfloat16",
        max_shard_size=2_000_000_000,
        memory=3 * 2**29,
        seed=3,
    )
    assert (seen["out"], seen["resume"]) == (tmp_path / "out", True)


def test_flags_stand_over_the_config_file(tmp_path, rgsp, models):
    config = tmp_path / "merge.yaml"
    fields = {"models": models, "method": "average", "hyperparameters": {"coefficients": [1, 3]}, "dtype": "float16"}
    fields["overrides"] = [{"pattern": "stem.*", "hyperparameters": {"coefficients": [0, 1]}}]
    config.write_text(yaml.safe_dump(fields))
    override = "moe.* coefficients=[1,0]"
    outcome = rgsp("merge", "-c", config, "-o", tmp_path / "out", "--dtype", "float32", "--override", override)
    assert (outcome.code, outcome.err) == (0, "")
    result, (a, b) = read_model(tmp_path / "out"), map(read_model, models)
    assert result["logit_scale"].dtype == np.float32
    np.testing.assert_allclose(result["logit_scale"], a["logit_scale"] / 4 + 3 * b["logit_scale"] / 4, rtol=1e-6)
    np.testing.assert_allclose(result["stem.conv.weight"], b["stem.conv.weight"], atol=1e-6)
    assert same_bits(result["moe.experts.down_proj"], a["moe.experts.down_proj"])
    swapped = rgsp("merge", *models[::-1], "-c", config, "-o", tmp_path / "swapped", "--set", "coefficients=[3,1]")
    assert swapped.code == 0
    result = read_model(tmp_path / "swapped")
    expected = b["logit_scale"] * 0.75 + a["logit_scale"] * 0.25
    np.testing.assert_allclose(result["logit_scale"], expected, rtol=2e-3)


def test_a_mergekit_file(tmp_path, rgsp, models):
    config = tmp_path / "mergekit.yaml"
    sources = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, (1, 3), strict=True)]
    config.write_text(yaml.safe_dump({"merge_method": "linear", "models": sources, "dtype": "float32"}))
    assert rgsp("merge", "--config", config, "--out", tmp_path / "out").code == 0
    direct = MergeConfig(models=models, method="average", hyperparameters={"coefficients": [1.0, 3.0]})
    merge_checkpoints(direct, tmp_path / "direct")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "direct/model.safetensors").read_bytes()


# Refusals


REFUSALS = {
    "nothing": ([], "name the models to merge"),
    "no out": (["A", "B"], "say where to write with --out"),
    "method": (["A", "B", "-o", "O", "-m", "tied"], "no method 'tied'; there are average"),
    "hyperparameter": (["A", "B", "-o", "O", "-m", "average", "--rank", "3"], "no hyperparameter 'rank'"),
    "rank": (["A", "B", "-o", "O", "--rank", "many"], "rank of method 'rgsp' must be"),
    "scale": (["A", "B", "-o", "O", "-m", "relative", "--scale", "-1"], "scale of method 'relative' must be"),
    "set": (["A", "B", "-o", "O", "--set", "rank"], "--set: 'rank' must be NAME=VALUE"),
    "set value": (["A", "B", "-o", "O", "--set", "rank=["], "the value in 'rank=[' is not valid YAML"),
    "set date": (["A", "B", "-o", "O", "--set", "beta=2024-01-01"], "beta must be one number or word"),
    "override": (["A", "B", "-o", "O", "--override", "*"], "changes nothing: add method=NAME or NAME=VALUE"),
    "empty override": (["A", "B", "-o", "O", "--override", ""], "give PATTERN and NAME=VALUE settings"),
    "open quote": (["A", "B", "-o", "O", "--override", "'*"], "give PATTERN and NAME=VALUE settings"),
    "override method": (["A", "B", "-o", "O", "--override", "* method=3"], "overrides.0.method"),
    "dtype": (["A", "B", "-o", "O", "--dtype", "fp16"], "dtype must be one of"),
    "memory": (["A", "B", "-o", "O", "--memory", "lots"], "memory: must be a size such as"),
    "little memory": (["A", "B", "-o", "O", "-m", "average", "--memory", "1kB"], "--memory 1 kB is too little"),
    "shards": (["A", "B", "-o", "O", "--max-shard-size", "0"], "max_shard_size: must be a size such as"),
    "pattern": (["A", "B", "-o", "O", "--exclude", "re:["], "is no regular expression"),
    "base": (["A", "B", "-o", "O", "--base", "A"], "uses no base model"),
    "config": (["A", "B", "-o", "O", "--config", "none.yaml"], "cannot read the config"),
    "count": (["A", "B", "A", "-o", "O", "-m", "slerp"], "takes 2 models, not 3"),
    "one": (["A", "-o", "O", "-m", "rgsp"], "takes 2 models, not 1"),
    "model": (["A", "nowhere", "-o", "O"], "does not exist"),
    "near": (["A", "P/aa", "-o", "O"], "did you mean"),
    "out exists": (["A", "B", "-o", "A"], "already there"),
    "out inside": (["A", "B", "-o", "A/out"], "lies inside the input"),
    "out nowhere": (["A", "B", "-o", "P/no/out"], "does not exist: create it first"),
    "out nameless": (["A", "B", "-o", "."], ""),
    "out empty": (["A", "B", "-o", ""], ""),
    "out too long": (["A", "B", "-o", "P/" + "x" * 300], "File name too long"),
    "model too long": (["A", "y" * 300, "-o", "O"], ""),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_mistakes_are_one_sentence_each_and_exit_code_2(tmp_path, rgsp, models, monkeypatch, case):
    arguments, expected = REFUSALS[case]
    place = {"A": models[0], "B": models[1], "O": str(tmp_path / "out")}
    arguments = [place.get(a, a.replace("P/", f"{tmp_path}/").replace("A/", f"{models[0]}/")) for a in arguments]
    before = tree_bytes(tmp_path)
    monkeypatch.chdir(tmp_path)
    outcome = rgsp("merge", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert outcome.problems and len(outcome.problems) == len(outcome.err.splitlines())
    assert any(expected in problem for problem in outcome.problems), outcome.err
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", "x"], "--seed"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--rank"], "--rank"),
    ],
)
def test_mistakes_click_finds_exit_with_2_too(tmp_path, rgsp, models, arguments, expected):
    outcome = rgsp("merge", *models, "-o", tmp_path / "out", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert expected in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "text",
    [
        "models: 3\n",
        "models: [a, b]\nhyperparameters: 3\n",
        "models: [a, b]\noverrides: 3\n",
        "models: [a, b]\n1: 2\n",
        "merge_method: [slerp]\n",
        "merge_method: slerp\nslices: [3]\n",
        "merge_method: slerp\nmodels: [{model: a}, 3]\n",
        "merge_method: linear\nmodels: {a: b}\nparameters: 7\n",
        "models: [a, b]\nseed: -4\n",
    ],
)
def test_odd_config_files_are_refused_with_their_name(tmp_path, rgsp, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    flags = ["--rank", "3", "--override", "* rank=2"] if "merge_method" not in text else []
    outcome = rgsp("merge", "-c", path, "-o", tmp_path / "out", *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.problems and all(problem.startswith(f"{path}: ") for problem in outcome.problems)


def test_all_mismatches_are_listed_at_once(tmp_path, rgsp):
    family = toy_family(2)
    family[1]["stem.conv.weight"] = np.zeros((6, 2, 5, 5), np.float32)
    family[1]["surplus.weight"] = np.zeros((2, 2), np.float32)
    del family[1]["logit_scale"]
    models = write_family(tmp_path, family)
    write_model(tmp_path / "b", family[1], {"model_type": "other"})
    for extra in (["--plan"], ["-o", tmp_path / "out"], ["-o", tmp_path / "out", "--json"]):
        outcome = rgsp("merge", *models, "-m", "average", *extra)
        assert (outcome.code, outcome.out) == (2, "")
        for expected in ("stem.conv.weight", "surplus.weight", "logit_scale", "model_type other"):
            assert sum(expected in problem for problem in outcome.problems) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# Plans


def test_plan_prints_and_writes_nothing(tmp_path, rgsp, models, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read_into", lambda *args: pytest.fail("weights were read"))
    before = tree_bytes(tmp_path)
    outcome = rgsp("merge", *models, "--rank", "2", "--plan")
    assert (outcome.code, outcome.err) == (0, "")
    for expected in ("rgsp of", models[1], "Tensors by rule", "Groups of equal work", "20x8", "peak memory", "roughly"):
        assert expected in outcome.out
    outcome = rgsp("merge", *models, "--plan", "--json", "-m", "average", "-o", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert found["method"] == "average" and found["models"] == models and found["shards"] == 1
    assert tree_bytes(tmp_path) == before


def test_plan_says_what_would_stop_the_merge(tmp_path, rgsp, models, monkeypatch):
    plan = ["merge", *models, "-m", "average", "--plan", "-o", tmp_path / "out"]
    (tmp_path / "out.incomplete").mkdir()
    outcome = rgsp(*plan)
    assert (outcome.code, outcome.out) == (2, "") and "is left from an earlier merge" in outcome.err
    assert rgsp(*plan, "--resume").code == 0
    (tmp_path / "out.incomplete").rmdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    outcome = rgsp(*plan)
    assert (outcome.code, outcome.out) == (2, "") and "1 kB free" in outcome.err
    assert rgsp(*plan[:-2]).code == 0  # without a place there is no disk to ask


# Interruptions


def test_interrupted_and_resumed(tmp_path, rgsp, models, monkeypatch):
    monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", 160)
    arguments = ["merge", *models, "-m", "average", "-o", tmp_path / "out"]
    original, calls = execute.run_item, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(execute, "run_item", interrupt)
        outcome = rgsp(*arguments)
    assert (outcome.code, outcome.out) == (130, "")
    assert f"--resume ({tmp_path}/out.incomplete keeps what is done)" in outcome.err and "interrupted" in outcome.err
    outcome = rgsp(*arguments)
    assert outcome.code == 2 and "finish it with --resume" in outcome.err
    outcome = rgsp(*arguments, "--resume", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["resumed_items"] > 0


def test_interrupted_before_anything_was_done(tmp_path, rgsp, models, monkeypatch):
    """No hint to resume what is not there."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rgsp_jax.pipeline.merge.prepare", interrupt)
    outcome = rgsp("merge", *models, "-m", "average", "-o", tmp_path / "out")
    assert outcome.code == 130 and "--resume" not in outcome.err


def test_errors_of_the_system_are_one_sentence(tmp_path, rgsp, models, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/some/file")

    monkeypatch.setattr("rgsp_jax.pipeline.merge.check_buffers", fail)
    outcome = rgsp("merge", *models, "-m", "average", "-o", tmp_path / "out")
    assert (outcome.code, outcome.problems) == (2, ["Input/output error: /some/file"])


def test_plans_for_devices_that_are_not_here(rgsp, models):
    plan = ["merge", *models, "--rank", "2", "--plan", "--device-kind"]
    outcome = rgsp(*plan, "tpu-v5e", "--devices", "16")
    assert (outcome.code, outcome.err) == (0, "")
    for expected in (
        "4 processes with 4 tpu-v5e devices each: a prediction", "(bottleneck)", "assumed", "published", "derived",
        "devices idle", "rows divided over the devices of a process: no matrix", "on 4 tpu devices", "Left out:",
    ):  # fmt: skip
        assert expected in outcome.out
    found = json.loads(rgsp(*plan, "h100", "--devices", "2", "--json").out)
    assert (found["devices"], found["platform"], "processes" in found) == (2, "gpu", False)
    prediction = found["prediction"]
    assert prediction["kind"]["name"] == "h100" and "share" in prediction["assumed"]
    assert prediction["kind"]["figures"]["matmul"]["origin"] == "published"
    assert prediction["seconds"] == found["seconds"] >= max(prediction["stages"].values())
    several = json.loads(
        rgsp(*plan, "tpu-v5e", "--devices", "8", "--distributed", "--processes", "2", "--json").out
    )  # fmt: skip
    assert len(several["processes"]) == several["prediction"]["processes"] == 2
    assert several["prediction"]["devices_per_process"] == 8


def test_kinds_of_devices_that_cannot_be_planned_for(tmp_path, rgsp, models):
    merge = ["merge", *models, "-m", "average"]
    outcome = rgsp(*merge, "--plan", "--device-kind", "abacus")
    assert outcome.problems == ["--device-kind abacus: not known; there are cpu, h100, h200, tpu-v5e, tpu-v5p"]
    outcome = rgsp(*merge, "-o", tmp_path / "out", "--device-kind", "h100")
    assert outcome.problems == ["--device-kind goes with --plan: a merge takes the devices that are there"]
    outcome = rgsp(*merge, "--plan", "--device-kind", "h100", "--devices", "9")
    assert outcome.code == 2 and "hosts of h100 have 8 devices each" in outcome.problems[0]
