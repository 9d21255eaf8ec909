"""The grafting experiment, on tiny random encoders."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.checkpoint import write_safetensors
from rgsp_jax.grafting import output_change, ridge_graft

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(60)]
CONFIG = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def experiment(script):
    return script("grafting")


def make_encoder(seed):
    transformers.set_seed(seed)
    return transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()


def make_pair():
    """An encoder and a fine-tune of it."""
    recipient, donor = make_encoder(0), make_encoder(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in donor.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return recipient, donor


def test_draws_are_listed_where_all_were_run(experiment):
    def point(knob, seed, retention):
        return experiment.Point("graft", knob, "a", "b", seed, retention, 0.5)

    points = [point(1, 0, 0.8), point(2, 0, 0.7), point(1, 1, 0.6)]
    (found,) = experiment.list_draws(points, [("a", "b")], [0, 1])
    assert found == ("graft", 1, ["0.700 (0.141) / 0.500 (0.000)"])


def test_comparison_at_equal_retention(experiment):
    def point(series, knob, retention, acquisition):
        return experiment.Point(series, knob, "a", "b", 0, retention, acquisition)

    line = [point("interpolation", *row) for row in ((0, 0.9, 0.5), (0.5, 0.88, 0.7), (1, 0.4, 0.9))]
    assert experiment.envelope(line, 0.89) == pytest.approx(0.6)
    assert experiment.envelope(line, 0.95) == pytest.approx(0.5)
    # A dent in the line is no trade anyone would take: the best at that retention or above counts.
    dent = [*line, point("interpolation", 0.3, 0.85, 0.6)]
    assert experiment.envelope(dent, 0.85) == pytest.approx(0.7)
    graft = [point("graft", 1, 0.89, 0.8), point("graft", 2, 0.9, 0.6), point("graft", 3, 0.7, 0.0)]
    assert experiment.compare(graft, line) == pytest.approx((0.2 + 0.1) / 2)
    assert experiment.compare(graft[2:], line) is None
    (row,) = experiment.summarise([*line, *graft])
    assert row["gains"] == {"a <- b": [pytest.approx(0.15)]}
    assert row["mean"] == pytest.approx(0.15)
    assert row["standard_error"] is None
    assert [p.knob for p in experiment.find_pareto([*line, *graft])] == [1, 1, 2]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two tasks: an encoder and a fine-tune of it, heads, rows to train and to test on."""
    root, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    for name, model in zip(("first", "second"), make_pair(), strict=True):
        directory = root / name / "model"
        model.half().save_pretrained(directory)
        tokenizer.save(str(directory / "tokenizer.json"))
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[UNK]")
        wrapped.save_pretrained(directory)
        head = {"weight": rng.normal(size=(2, 32)).astype(np.float32), "bias": np.zeros(2, np.float32)}
        write_safetensors(root / name / "head.safetensors", head)
        for part in ("train", "test"):
            rows = [
                {"text": " ".join(rng.choice(WORDS, rng.integers(4, 9))), "label": int(rng.integers(2))}
                for _ in range(40)
            ]
            (root / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.slow
def test_whole_run_writes_its_results_and_resumes(experiment, bench, tmp_path):
    out, work = tmp_path / "results" / "grafting", tmp_path / "work"
    arguments = ["--bench", str(bench), "--rows", "30", "--inputs", "20", "--work", str(work), "--out", str(out)]
    arguments += ["--series", "sequential", "soft ridge, pseudo-input metric", "--chains"]
    points = experiment.main(arguments)
    knobs = {series.name: len(series.knobs) for series in experiment.SERIES}
    assert len(points) == 2 * (knobs["interpolation"] + knobs["sequential"] + knobs["soft ridge, pseudo-input metric"])
    ends = {(p.recipient, p.knob): p for p in points if p.series == "interpolation" and p.knob in (0, 1)}
    assert ends["first", 0].retention == ends["second", 1].acquisition  # the same model, scored by the same head
    record = json.loads(out.with_suffix(".json").read_text())
    assert len(record["points"]) == len(points)
    assert [chain["name"] for chain in record["chains"]] == ["first <- second", "second <- first"]
    first = next(p for p in points if p.series == "sequential")
    # With two tasks, grafting in turn is one sequential graft.
    assert record["chains"][0]["accuracies"].keys() == {"first", "second"}
    table = out.with_suffix(".md").read_text()
    assert f"{first.retention:.3f} / {first.acquisition:.3f}" in table
    assert str(bench) not in table + out.with_suffix(".json").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
    before = (work / "points.jsonl").read_text()
    assert experiment.main(arguments[:-1]) == points
    assert (work / "points.jsonl").read_text() == before


def test_the_discrepancy_rule_leaves_the_share_that_was_asked_for(experiment):
    rng = np.random.default_rng(0)
    a, b, k = rng.normal(size=(4, 7)), rng.normal(size=(4, 7)), rng.normal(size=(40, 7)) * np.geomspace(1, 0.05, 7)
    covariance = k.T @ k / len(k)
    values, basis = np.linalg.eigh(covariance)
    for share in (0.1, 0.5, 0.9):
        ridge = experiment.find_ridge(values, np.sum(((b - a) @ basis) ** 2, axis=0), share)
        merged = ridge_graft(jnp.asarray(a), jnp.asarray(b), jnp.asarray(covariance), ridge)
        assert float(output_change(jnp.asarray(a), jnp.asarray(b), merged, jnp.asarray(k))) == pytest.approx(share)
