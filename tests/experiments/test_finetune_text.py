"""Fine-tuning on a toy task: it learns, repeats by seed, and gives what the text-encoder experiment reads."""

import json

import jax
import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(20)]
CONFIG = {"vocab_size": 22, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 24, "max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    """optax counts its steps in integers and multiplies by them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base and a task whose label is which of three words a text holds."""
    root, rng = tmp_path_factory.mktemp("finetune"), np.random.default_rng(0)
    vocabulary = {"[UNK]": 0, "[PAD]": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.set_seed(0)
    base = root / "base"
    transformers.BertModel(transformers.BertConfig(**CONFIG)).save_pretrained(base)
    tokenizer.save(str(base / "tokenizer.json"))
    for name, count in (("train", 192), ("test", 60)):
        rows = []
        for i in range(count):
            words = [*rng.choice(WORDS[3:], int(rng.integers(1, 14))), WORDS[i % 3]]
            rows.append({"text": " ".join(rng.permutation(words)), "label": i % 3})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(script, place, out, *options):
    arguments = [place / "base", place, "--out", out, "--learning-rate", "0.01", "--batch", "32", *options]
    return script("finetune_text").main([str(argument) for argument in arguments])


def test_it_learns_and_text_encoders_agrees(script, place, tmp_path):
    accuracy = run(script, place, tmp_path / "bench" / "words", "--epochs", "12")
    assert accuracy > 0.9
    text_encoders = script("text_encoders")
    task = text_encoders.read_task(tmp_path / "bench" / "words", 60)
    scorer = text_encoders.Scorer([task], text_encoders.BACKENDS["transformers"])
    assert scorer.score(task.model, ["words"])["words"] == accuracy
    before = safetensors.load_file(place / "base" / "model.safetensors")
    after = safetensors.load_file(tmp_path / "bench" / "words" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert "encoder.layer.0.output.dense.weight" in changed and "pooler.dense.weight" not in changed
    unseen = after["embeddings.word_embeddings.weight"][:2] == before["embeddings.word_embeddings.weight"][:2]
    assert unseen[0].all()  # [UNK]; padding is masked where it is looked up


def test_runs_repeat_by_seed_and_classes_are_numbered_anew(script, place, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(script, place, tmp_path / name, "--epochs", "1", "--seed", seed, "--classes", "2", "0", "--rows", "64")
    weights = {name: (tmp_path / name / "head.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and {row["label"] for row in rows} == {0, 1}
    assert all((WORDS[2] in row["text"].split()) == (row["label"] == 0) for row in rows)
    assert safetensors.load_file(tmp_path / "a" / "head.safetensors")["weight"].shape == (2, 16)
    with pytest.raises(SystemExit, match="already there"):
        run(script, place, tmp_path / "a")
    with pytest.raises(SystemExit, match="no rows"):
        run(script, place, tmp_path / "d", "--classes", "7")


def test_a_text_problem_is_trained_once_and_in_an_order_of_its_seed(script, place, tmp_path, monkeypatch):
    """`relative_suite.py` makes its text problems with text_tasks: here two toy tasks, one with two of the labels."""
    library = script("text_tasks")
    monkeypatch.setattr(library, "TASKS", {"words": ("words", None), "words-01": ("words", (0, 1))})
    monkeypatch.setattr(library, "REGIMES", {"tasks": (("words", "words-01"), (2,))})
    monkeypatch.setattr(library, "ROWS", 64)
    (tmp_path / "words").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "words" / name).write_bytes((place / name).read_bytes())
    suite = script("relative_suite")
    cells = list(suite.list_text("test", tmp_path, place / "base", (2, 3), tmp_path / "work"))
    half = suite.HALVES["test"]
    assert len(cells) == len(half.text_seeds) * len(half.text) == len({cell.name for cell in cells})

    def make(seed):
        return library.make_text(tmp_path, place / "base", tmp_path / "work", "tasks", (0.01, 2), seed, 2)

    problem = make(0)
    assert problem.tasks == ["words", "words-01"] and make(1).tasks == ["words-01", "words"]
    own = [problem.score(expert, "test")[i] for i, expert in enumerate(problem.experts)]
    assert own[1] > 0.5 and all(0 <= share <= 1 for share in problem.score(problem.base, "test"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    again = make(0)
    assert files == {path: path.stat().st_mtime_ns for path in files} and len(files) == 8
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, problem.experts[0], again.experts[0])))
