"""Learned fusion on tiny encoders: every row is the merge it says, differences are paired by draw."""

import json
import shutil

import jax
import pytest

from activations import tiny_models as tiny
from training.test_learn import save_family, save_heads

TASKS = ("first", "second")


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    place, root = (tmp_path_factory.mktemp(name) for name in ("family", "bench"))
    save_family(place, tiny.make_bert, len(TASKS))
    save_heads(place, len(TASKS))
    for k, name in enumerate(TASKS):
        shutil.copytree(place / f"expert-{k}", root / name / "model")
        shutil.copy(place / f"head-{k}.safetensors", root / name / "head.safetensors")
        for part in ("train", "test"):
            shutil.copy(place / f"{k}.jsonl", root / name / f"{part}.jsonl")
    return root


def test_a_small_run(script, bench, tmp_path):
    experiment = script("learned_fusion")
    options = ["--bench", bench, "--tasks", *TASKS, "--draws", 2, "--inputs", 4]
    options += ["--losses", "distillation", "--regmean", "--shares", 0.5, "--steps", 2, "--out", tmp_path / "out"]
    rows = experiment.main(list(map(str, [*options, "--work", tmp_path / "work"])))
    untuned = ["average", "relative"]
    methods = [*untuned, *["RegMean", "refitted, share 0.5", "learned, distillation"] * 2]
    assert [row.method for row in rows] == [*(f"expert of {name}" for name in TASKS), *methods]
    assert all(row.group == TASKS and set(row.accuracies) == set(TASKS) for row in rows)
    draws = [(tmp_path / "work" / "+".join(TASKS) / f"draw-{d}" / "first.jsonl").read_text() for d in (0, 1)]
    assert draws[0] != draws[1] and all(len(text.splitlines()) == 4 for text in draws)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["command"].startswith("python experiments/learned_fusion.py --bench BENCH")
    assert len(record["rows"]) == len(rows) and "learned, distillation" in record["headline"]
    (tmp_path / "out.json").write_text(json.dumps(record | {"rows": record["rows"][:-1]}))
    again = experiment.main(list(map(str, [*options, "--work", tmp_path / "again", "--resume"])))
    assert again[:-1] == rows[:-1] and again[-1].accuracies == rows[-1].accuracies  # the last alone was made again
    made = sorted(path.name for path in (tmp_path / "again" / "+".join(TASKS) / "draw-1").iterdir() if path.is_dir())
    assert made == ["distillation", "distillation.learning"]


def test_differences_are_paired_by_draw(script):
    experiment = script("learned_fusion")
    row = experiment.Row
    rows = [row(("a",), "relative", None, {"a": 0.5}, 1.0)]
    for draw, (regmean, learned) in enumerate([(0.4, 0.6), (0.6, 0.7)]):
        rows += [row(("a",), "RegMean", draw, {"a": regmean}, 2.0), row(("a",), "learned", draw, {"a": learned}, 3.0)]
    line = next(text for text in experiment.tabulate(rows)[-1].splitlines() if text.startswith("| learned"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["0.650 (0.050)", "0.6500", "+0.150 (0.050)", "+0.100", "+0.150 (0.050)", "+0.100", "3"]
