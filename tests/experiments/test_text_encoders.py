"""The text-encoder experiment on a bench of tiny random encoders: its scores against a plain loop, its tables."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rgsp_jax.checkpoint import write_safetensors

safetensors = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "experiments" / "text_encoders.py"
WORDS = [f"w{i}" for i in range(30)]
CONFIG = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIG |= {"intermediate_size": 24, "max_position_embeddings": 64}
LENGTHS = (1, 2, 3, 5, 8, 13, 60)  # three padded lengths: one fills two batches, one is too long to keep whole
TASKS = {"first": 3, "second": 2, "third": 2}
ROWS = 80


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("text_encoders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Three tasks: encoders of unit-sized random weights, heads, rows."""
    root, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    model = tokenizers.models.WordLevel(
        {"[UNK]": 0, "[PAD]": 1} | {word: i + 2 for i, word in enumerate(WORDS)}, "[UNK]"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for seed, (name, classes) in enumerate(TASKS.items()):
        directory = root / name / "model"
        transformers.set_seed(seed)
        transformers.BertModel(transformers.BertConfig(**CONFIG, initializer_range=0.3)).save_pretrained(directory)
        tokenizer.save(str(directory / "tokenizer.json"))
        head = {"weight": rng.normal(size=(classes, 16)), "bias": 0.1 * rng.normal(size=classes)}
        write_safetensors(root / name / "head.safetensors", {k: a.astype(np.float32) for k, a in head.items()})
        lengths = rng.choice(LENGTHS, ROWS)
        rows = [{"text": " ".join(rng.choice(WORDS, n)), "label": int(rng.integers(classes))} for n in lengths]
        (root / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@cache
def score_by_hand(bench, model, name, rows):
    """One row at a time in transformers, without padding."""
    encoder = transformers.BertModel.from_pretrained(model, local_files_only=True).eval()
    head = safetensors.load_file(bench / name / "head.safetensors")
    right = []
    for line in (bench / name / "test.jsonl").read_text().splitlines()[:rows]:
        row = json.loads(line)
        ids = torch.tensor([[WORDS.index(word) + 2 for word in row["text"].split()][:48]])
        with torch.no_grad():
            mean = encoder(ids).last_hidden_state[0].mean(dim=0).numpy()
        right.append(int(np.argmax(head["weight"] @ mean + head["bias"])) == row["label"])
    return float(np.mean(right))


@pytest.mark.parametrize("backend", ["flax", "transformers"])
def test_scores_equal_a_plain_loop(experiment, bench, backend):
    scorer = experiment.Scorer(
        [experiment.read_task(bench / name, ROWS) for name in ("first", "second")], experiment.BACKENDS[backend]
    )
    model = bench / "third" / "model"
    scores = scorer.score(model, ["first", "second"])
    assert scores == {name: score_by_hand(bench, model, name, ROWS) for name in ("first", "second")}


def test_equal_weights_are_run_once(experiment, bench, tmp_path):
    runs = []

    def encode(directory, batches):
        runs.append(directory)
        return experiment.encode_with_flax(directory, batches)

    scorer = experiment.Scorer([experiment.read_task(bench / "first", 10)], encode)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (bench / "first" / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert scorer.score(bench / "first" / "model", ["first"]) == scorer.score(copy, ["first"])
    assert len(runs) == 1
    scorer.score(bench / "second" / "model", ["first"])
    assert len(runs) == 2
    store = tmp_path / "scores.json"
    for attempt in range(2):
        kept = experiment.Scorer([experiment.read_task(bench / "first", 10)], encode, store)
        kept.score(copy, ["first"])
        assert len(runs) == 3, attempt
    other = experiment.Scorer([experiment.read_task(bench / "first", 11)], encode, store)
    other.score(copy, ["first"])  # the same weights on other rows
    assert len(runs) == 4


def test_groups_follow_what_methods_declare(experiment):
    tasks = ("a", "b", "c")
    groups = {name: list(experiment.choose_groups(name, {}, tasks)) for name in ("rgsp", "rgsp_seed", "slerp")}
    assert groups["rgsp"] == groups["slerp"] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert len(groups["rgsp_seed"]) == len(list(experiment.choose_groups("slerp", {"t": 0.3}, tasks))) == 6
    assert list(experiment.choose_groups("relative", {}, tasks))[-1] == tasks
    assert list(experiment.choose_groups("relative", {}, tasks[:2])) == [("a", "b")]
    assert experiment.parse_method("relative:rank=0.1,scale=auto") == ("relative", {"rank": 0.1, "scale": "auto"})
    with pytest.raises(SystemExit, match="no method 'mean'"):
        experiment.parse_method("mean")


def test_whole_run_writes_its_tables(experiment, bench, tmp_path):
    out = tmp_path / "results" / "table"
    arguments = ["--bench", str(bench), "--rows", "20", "--methods", "average", "--out", str(out)]
    rows = experiment.main([*arguments, "--work", str(tmp_path / "work")])
    assert [row.models for row in rows] == [
        ("first", "second", "third"),
        ("first", "second"),
        ("first", "third"),
        ("second", "third"),
        ("first", "second", "third"),
    ]
    merged = tmp_path / "work" / "average-first+second+third"
    assert rows[-1].accuracies == {name: score_by_hand(bench, merged, name, 20) for name in TASKS}
    record = json.loads(out.with_suffix(".json").read_text())
    assert [row["mean"] for row in record["rows"]] == [row.mean for row in rows]
    assert record["test_rows"] == dict.fromkeys(TASKS, 20)
    table = out.with_suffix(".md").read_text()
    assert (
        f"| first, second, third | average | {' | '.join(f'{a:.3f}' for a in rows[-1].accuracies.values())} |" in table
    )
    assert str(bench) not in table + out.with_suffix(".json").read_text()


def test_given_directories_are_scored_and_nothing_else(experiment, bench, tmp_path):
    out = tmp_path / "table"
    given = bench / "second" / "model"
    rows = experiment.main(["--bench", str(bench), "--rows", "5", "--score", str(given), "--out", str(out)])
    assert [(row.method, row.models, set(row.accuracies)) for row in rows] == [("as given", ("model",), set(TASKS))]
    assert not out.with_suffix(".md").exists()
