"""AdaMMS' search by the command: every candidate is the merge it says, and the one kept is where answers settle."""

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.toy_models import read_model, same_bits, toy_family, write_family
from rgsp_jax.cli import cli
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints
from rgsp_jax.sweep.alpha import run_alpha_search

pytestmark = pytest.mark.usefixtures("plain_report")
SCRIPT = """
import json, struct, sys
from pathlib import Path
place = Path(__file__).parent
raw = (Path(sys.argv[1]) / "model.safetensors").read_bytes()
length = struct.unpack("<Q", raw[:8])[0]
start, _ = json.loads(raw[8 : 8 + length])["logit_scale"]["data_offsets"]
scale = struct.unpack("<f", raw[8 + length + start :][:4])[0]
with (place / "calls").open("a") as calls:
    calls.write(f"{scale:.4f}\\n")
for threshold in (0.42, 0.55, 0.58, 0.95):
    print("Yes" if scale > threshold else "no")
"""
ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CHANGES = [None, 3.0, 2.0, 0.0, 0.0, 1.0, None]
"""Of the answers to four inputs, which turn where alpha passes a threshold."""


@pytest.fixture
def place(tmp_path):
    family = toy_family(2)
    for model, value in zip(family, (1.0, 0.0), strict=True):  # the merge at alpha holds alpha
        model["logit_scale"] = np.float32(value).reshape(())
    write_family(tmp_path, family)
    (tmp_path / "answer.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def answer(place):
    return f"{sys.executable} {place}/answer.py {{model}}"


def config(place):
    return MergeConfig(models=[str(place / "a"), str(place / "b")])


def test_the_merge_whose_answers_settle_is_kept(place, answer):
    arguments = [
        "search",
        str(place / "a"),
        str(place / "b"),
        "--answer",
        answer,
        "--out",
        str(place / "out"),
        "--json",
    ]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    found = json.loads(done.output)
    assert (found["alpha"], found["tied"], found["changes"]) == (0.7, [0.7, 0.8], CHANGES)
    assert found == json.loads((place / "out" / "search.json").read_text())
    asked = [float(x) for x in (place / "calls").read_text().split()]
    np.testing.assert_allclose(asked, ALPHAS, atol=1e-4)
    expected = MergeConfig(
        models=config(place).models, method="average", hyperparameters={"coefficients": [0.7, 1 - 0.7]}
    )
    wanted = read_model(merge_checkpoints(expected, place / "expected").out)
    kept = read_model(place / "out" / "model")
    assert all(same_bits(kept[name], wanted[name]) for name in wanted)
    assert {p.name for p in (place / "out").iterdir()} == {"model", "search.json", "answers.jsonl"}


def test_a_search_goes_on_behind_its_answers(place, answer):
    calls = place / "calls"
    with pytest.raises(RefusedError, match=r"failed with exit code 3 at alpha 0\.6: worn out"):
        tired = f"if [ $(cat {calls} | wc -l) = 2 ]; then echo worn out >&2; exit 3; fi; {answer}"
        calls.touch()
        run_alpha_search(config(place), tired, place / "out", ALPHAS)
    assert calls.read_text().count("\n") == 2 and not (place / "out" / "model").exists()
    calls.write_text(calls.read_text() + "\n")
    found = run_alpha_search(config(place), tired, place / "out", ALPHAS, smoothing=1)
    assert calls.read_text().split() == [f"{alpha:.4f}" for alpha in ALPHAS]  # no candidate was asked twice
    assert found.alpha == 0.8 and found.changes[2:5] == pytest.approx((5 / 3, 2 / 3, 1 / 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "true"}, r"has no \{model\}"),
        ({"alphas": (0.2, 0.4)}, "three different numbers"),
        ({"alphas": (0.2, 0.4, 1.5)}, "between 0 and 1"),
        ({"models": ("a",)}, "between two models, not 1"),
        ({"models": ("a", "absent")}, "does not exist"),
        ({"answer": "cat {model}/config.json > /dev/null"}, "must print one line for every input"),
    ],
)
def test_what_cannot_be_searched(place, change, message):
    models = [str(place / name) for name in change.get("models", "ab")]
    answer, alphas = change.get("answer", "echo {model}"), change.get("alphas", (0.1, 0.5, 0.9))
    with pytest.raises(RefusedError, match=message):
        run_alpha_search(MergeConfig(models=models), answer, place / "out", alphas)
