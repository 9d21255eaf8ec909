"""`rgsp covariances` as a user meets it."""

import json

import pytest

from activations import tiny_models as tiny
from rgsp_jax.checkpoint import open_covariances


@pytest.fixture
def model(tmp_path):
    return tiny.save_model(tmp_path / "model", tiny.make_bert(), tiny.make_tokenizer())


@pytest.fixture
def data(tmp_path):
    return tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(30), field="question")


def test_a_collection_says_what_it_saw(tmp_path, rgsp, model, data):
    out = tmp_path / "c.safetensors"
    outcome = rgsp("covariances", model, "--data", data, "--field", "question", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    for expected in (
        "covariances of 12 sites (3 counts, 9 full) from 24 examples, 6 more held back, by torch",
        "leading subspaces moved by",
        f"file {out}",
    ):
        assert expected in outcome.out
    assert "\x1b" not in outcome.out
    with open_covariances(out) as file:
        assert file.model == "model" and file.data[0].name == "data.jsonl"


def test_json_and_options(tmp_path, rgsp, model, data):
    out = tmp_path / "c.safetensors"
    flags = (
        "--field",
        "question",
        "--max-rows",
        20,
        "--held-back",
        2,
        "--memory",
        "174kB",
        "--sketch-size",
        4,
        "--json",
    )
    outcome = rgsp("covariances", model, "-d", data, "-o", out, *flags)
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert found["sites"] == {"counts": 3, "sketch": 9} and len(found["sketches"]) == 9
    assert (found["examples"], found["held_back"], found["stopped_early"]) == (18, 2, False)
    assert found["nbytes"] == out.stat().st_size


def test_parts_are_combined(tmp_path, rgsp, model, data):
    files = [tmp_path / f"{part}.safetensors" for part in (1, 2)]
    for part, file in enumerate(files, 1):
        flags = ("--field", "question", "--part", f"{part}/2", "--backend", "torch")
        assert rgsp("covariances", model, "-d", data, "-o", file, *flags).code == 0
    outcome = rgsp("covariances", "--combine", *files, "--out", tmp_path / "both.safetensors")
    assert (outcome.code, outcome.err) == (0, "") and "12 sites of both files" in outcome.out
    outcome = rgsp("covariances", "--combine", files[0], files[0], "--out", tmp_path / "twice.safetensors")
    assert outcome.code == 2 and "both have inputs from data.jsonl" in outcome.problems[0]


def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, rgsp, model, data):
    out = tmp_path / "c.safetensors"
    for arguments, expected in (
        ((model, "-d", data), ["say where to write"]),
        (("-o", out), ["name the MODEL", "give its inputs"]),
        ((model, "-d", data, "-o", out), ["line 1: no field 'text'; there is 'question'"]),
        ((model, "-d", tmp_path / "no.jsonl", "-o", tmp_path), ["already there", "does not exist"]),
        ((model, "-d", data, "-o", out, "--memory", "lots"), ["--memory must be a size"]),
        ((model, "-d", data, "-o", out, "--part", "2"), ["--part must be I/K"]),
        ((model, "-d", data, "-o", out, "--until", 3, "--batch-size", 0), ["batch_size is 0", "until is 3.0"]),
        (("--combine", "a", "b", model, "-o", out), ["give no MODEL"]),
    ):
        outcome = rgsp("covariances", *arguments)
        assert outcome.code == 2 and outcome.out == ""
        for problem in expected:
            assert any(problem in found for found in outcome.problems), (arguments, outcome.problems)
        assert not out.exists()


def test_what_is_not_covered_is_shown(tmp_path, rgsp):
    model = tiny.save_qwen2_vl(tmp_path / "[bold]model")
    data = tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(4))
    outcome = rgsp("covariances", model, "-d", data, "-o", tmp_path / "[red]c.safetensors")
    assert outcome.code == 0 and f"file {tmp_path}/[red]c.safetensors" in outcome.out
    assert "not covered: visual." in outcome.out and "and 2 more: these data never reached it" in outcome.out
    assert "warning: " in outcome.out and "fewer inputs than they have entries" in outcome.out
