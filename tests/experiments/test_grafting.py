"""The grafting experiment and sequential grafts, on tiny random encoders."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax.checkpoint import write_safetensors

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
WORDS = [f"w{i}" for i in range(60)]
CONFIG = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def modules():
    """The scripts, as they are when one of them is run: their directory is on the path."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield importlib.import_module("sequential_graft"), importlib.import_module("grafting")
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def sequential(modules):
    return modules[0]


@pytest.fixture(scope="module")
def experiment(modules):
    return modules[1]


def make_encoder(seed):
    transformers.set_seed(seed)
    return transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()


def make_pair(only_layers):
    """An encoder and a fine-tune of it: other linear layers, or all else too."""
    recipient, donor = make_encoder(0), make_encoder(0)
    generator = torch.Generator().manual_seed(1)
    linear = {name for name, layer in donor.named_modules() if isinstance(layer, torch.nn.Linear)}
    with torch.no_grad():
        for name, tensor in donor.named_parameters():
            if not only_layers or name.rpartition(".")[0] in linear:
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return recipient, donor


def hidden(model, batches):
    out = []
    for rows in batches:
        with torch.no_grad():
            states = model(torch.from_numpy(rows.ids), torch.from_numpy(rows.mask)).last_hidden_state.numpy()
        out.append(states[rows.mask.astype(bool)])
    return np.concatenate(out)


def test_fit_layer_is_the_weighted_least_squares_solution(sequential):
    rng = np.random.default_rng(0)
    n, m = 7, 4
    start = rng.normal(size=(m, n))
    inputs = [rng.normal(size=(rows, n)) for rows in (5, 9, 3)]
    targets = [rng.normal(size=(rows, m)) for rows in (5, 9, 3)]
    weights, pull = np.array([1.0, 0.5, 2.0]), 0.3
    fitted = sequential.fit_layer(
        jnp.asarray(start), [*map(jnp.asarray, inputs)], [*map(jnp.asarray, targets)], jnp.asarray(weights), pull
    )
    scales = [np.sqrt(w / np.sum(k * k)) for w, k in zip(weights, inputs, strict=True)]
    rows = [s * k for s, k in zip(scales, inputs, strict=True)] + [np.sqrt(pull / n) * np.eye(n)]
    right = [s * y for s, y in zip(scales, targets, strict=True)] + [np.sqrt(pull / n) * start.T]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(right), rcond=None)[0].T
    np.testing.assert_allclose(fitted, expected, rtol=0, atol=1e-12)


def test_both_models_answers_are_kept_where_the_layers_have_room(sequential):
    """Fewer tokens than inputs of a layer: the recipient's answers on its row and the donor's on its own, at once."""
    recipient, donor = make_pair(only_layers=True)
    own, others = sequential.batch([[3, 9, 4, 20, 7]]), sequential.batch([[5, 11, 30, 2, 45, 8, 61]])
    settings = {"own_share": 0.0, "pull": 0.0}
    merged = sequential.graft_sequentially(recipient, donor, own, others, **settings)
    apart = np.abs(hidden(donor, own) - hidden(recipient, own)).max()
    assert apart > 0.05
    np.testing.assert_allclose(hidden(merged, own), hidden(recipient, own), atol=0.01 * apart)
    np.testing.assert_allclose(hidden(merged, others), hidden(donor, others), atol=0.01 * apart)
    blind = sequential.interpolate(recipient, donor, 0.5)
    assert np.abs(hidden(blind, own) - hidden(recipient, own)).max() > 0.1 * apart


def test_the_knob_trades_the_recipients_answers_for_the_donors(sequential):
    recipient, donor = make_pair(only_layers=False)
    rng = np.random.default_rng(2)
    own, others = (sequential.batch([rng.integers(1, 64, size=n).tolist() for n in (9, 4, 12) * 8]) for _ in range(2))
    errors = []
    for share in (0.0, 0.3, 3.0):
        merged = sequential.graft_sequentially(recipient, donor, own, others, own_share=share)
        errors.append([np.square(hidden(merged, own) - hidden(m, own)).mean() for m in (recipient, donor)])
    kept, given = np.array(errors).T
    assert np.all(np.diff(kept) > 0)
    assert np.all(np.diff(given) < 0)


def test_equal_models_return_the_model(sequential):
    recipient = make_encoder(0)
    own = sequential.batch([[3, 9, 4], [5, 1, 2, 8, 9]])
    merged = sequential.graft_sequentially(recipient, make_encoder(0), own, own, own_share=0.7)
    for name, tensor in merged.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), recipient.state_dict()[name].numpy(), atol=2e-4, err_msg=name)


def test_padding_does_not_count(sequential):
    recipient, donor = make_pair(only_layers=False)
    sentences = [[3, 9, 4, 7, 8], list(range(20, 32)), [5, 11]]
    own, others = sequential.batch(sentences), sequential.batch([[30, 2, 45]])
    assert [rows.ids.shape for rows in own] == [(2, 8), (1, 16)]
    wide = sequential.pad(sentences, 20)
    wide.ids[wide.mask == 0] = 17
    a = sequential.graft_sequentially(recipient, donor, own, others)
    b = sequential.graft_sequentially(recipient, donor, [wide], others)
    for name, tensor in a.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), b.state_dict()[name].numpy(), atol=1e-4, err_msg=name)


def test_a_failing_batch_ends_the_run(sequential):
    def refit(name, layer, inputs):
        raise ArithmeticError(name)

    with pytest.raises(ArithmeticError, match="attention"):
        sequential.run_in_step(make_encoder(0), sequential.batch([[3, 4], list(range(12))]), refit)


def test_pseudo_inputs_are_of_tokens_that_moved(sequential):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 8))
    other = table * (1 - 1e-5)  # decay of rows that were never looked up
    moved = np.array([101, 102, *range(200, 260)])
    other[moved] += 0.05 * rng.normal(size=(len(moved), 8))
    positions = np.zeros(64)
    positions[:20] = 1
    moves = sequential.find_moved(table, other)
    np.testing.assert_array_equal(np.flatnonzero(moves), moved)
    own = [[101, 7, 8, 102], [101, 9, 102]]
    drawn = sequential.draw_pseudo_inputs(moves, positions, own, 200, 48, seed=3)
    assert len(drawn) == 200
    assert {s[0] for s in drawn} == {101}
    assert {s[-1] for s in drawn} == {102}
    inside = np.concatenate([s[1:-1] for s in drawn])
    assert set(inside) == set(range(200, 260))
    assert np.mean(inside < 210) > 2 * np.mean(inside >= 250)
    assert {len(s) for s in drawn} == set(range(sequential.SHORTEST, 21))
    assert drawn == sequential.draw_pseudo_inputs(moves, positions, own, 200, 48, seed=3)
    assert sequential.find_frame([[1, 2], [1, 3]]) == ([1], [])
    with pytest.raises(ValueError, match="share their embeddings"):
        sequential.draw_pseudo_inputs(np.zeros(500), positions, own, 5, 48, seed=0)


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
    for name, model in zip(("first", "second"), make_pair(only_layers=False), strict=True):
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
    assert [chain["order"] for chain in record["chains"]] == [["first", "second"], ["second", "first"]]
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
