"""The text suite on tiny encoders: its accuracies are those of the text-encoder experiment."""

import json

import jax
import numpy as np
import pytest

from rgsp_jax.checkpoint import write_safetensors
from rgsp_jax.pipeline import merge_checkpoints, parse_config

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(20)]
CONFIG = {"vocab_size": 22, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 24, "max_position_embeddings": 64}
TASKS = {"first": 3, "second": 2}


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    """float32 models under a process that allows float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """Two benches of two tasks each: random encoders around one base, and the base."""
    root, rng = tmp_path_factory.mktemp("suite"), np.random.default_rng(0)
    vocabulary = {"[UNK]": 0, "[PAD]": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()

    def save(directory, seed):
        transformers.set_seed(seed)
        transformers.BertModel(transformers.BertConfig(**CONFIG, initializer_range=0.3)).save_pretrained(directory)
        tokenizer.save(str(directory / "tokenizer.json"))

    save(root / "base", 9)
    for bench in range(2):
        for i, (name, classes) in enumerate(TASKS.items()):
            place = root / f"bench{bench}" / name
            save(place / "model", 10 * bench + i)
            head = {"weight": rng.normal(size=(classes, 16)), "bias": np.zeros(classes)}
            write_safetensors(place / "head.safetensors", {k: x.astype(np.float32) for k, x in head.items()})
            for part, count in (("train", 40), ("test", 70)):
                rows = [
                    {"text": " ".join(rng.choice(WORDS, 9)), "label": int(rng.integers(classes))} for _ in range(count)
                ]
                (place / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_accuracies_are_those_of_merged_checkpoints(script, benches, tmp_path):
    arguments = ["--bench", benches / "bench0", benches / "bench1", "--base", benches / "base", "--rows", "64"]
    arguments += ["--validation", "20", "--methods", "average", "task_arithmetic", "--out", tmp_path / "suite"]
    outcomes = script("text_suite").main([str(argument) for argument in arguments])
    found = {(o.method, o.seed, o.column): o.test for o in outcomes}
    text_encoders = script("text_encoders")
    for seed in range(2):
        bench = benches / f"bench{seed}"
        tasks = [text_encoders.read_task(bench / name, 64) for name in TASKS]
        scorer = text_encoders.Scorer(tasks, text_encoders.BACKENDS["flax"])
        merged = tmp_path / f"merged{seed}"
        models = tuple(str(task.model) for task in tasks)
        merge_checkpoints(parse_config({"models": models, "method": "average"}, "test"), merged)
        assert found["average", seed, "untuned"] == pytest.approx(scorer.score(merged, list(TASKS)))
        own = {task.name: scorer.score(task.model, [task.name])[task.name] for task in tasks}
        assert found["individual", seed, "untuned"] == pytest.approx(own)
        base = scorer.score(benches / "base", list(TASKS))
        assert found["zero-shot base", seed, "untuned"] == pytest.approx(base)
        assert ("task_arithmetic", seed, "tuned") in found
    record = json.loads((tmp_path / "suite.json").read_text())
    assert record["command"].startswith("python experiments/text_suite.py --bench BENCH-0 BENCH-1 --base BASE")
    assert (tmp_path / "suite.png").exists() and "task_arithmetic" in (tmp_path / "suite.md").read_text()


def test_benches_that_lack_a_task_are_named(script, benches, tmp_path):
    (tmp_path / "other" / "first").mkdir(parents=True)
    (tmp_path / "other" / "first" / "head.safetensors").write_bytes(b"")
    suite = script("text_suite")
    with pytest.raises(SystemExit, match="other: not all of first, second are there"):
        suite.main(["--bench", str(benches / "bench0"), str(tmp_path / "other"), "--tasks", "first", "second"])
    with pytest.raises(SystemExit, match="share 1 tasks"):
        suite.main(["--bench", str(benches / "bench0"), str(tmp_path / "other")])
