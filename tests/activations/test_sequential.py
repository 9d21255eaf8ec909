"""Sequential grafts of tiny random models: what is refitted in memory is what the pipeline writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from activations import tiny_models as tiny
from rgsp_jax.activations import CannotStepError, CovarianceSettings, Dataset, Example
from rgsp_jax.activations import sequential as module
from rgsp_jax.activations.sequential import collect_sequentially
from rgsp_jax.checkpoint import open_checkpoint, open_covariances
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

OWN, THEIRS = "how many cats sat on", "who saw them there and the mat"


def dataset(*texts):
    return Dataset("texts", "0" * 32, [Example(text) for text in texts])


def save_pair(directory, make, parts=("",), spread=0.1, **options):
    """A model and a fine-tune of it in the parameters whose names end so."""
    torch.manual_seed(0)
    model = make()
    recipient = tiny.save_model(directory / "recipient", model, tiny.make_tokenizer(), **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(tuple(parts)):
                tensor.add_(spread * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    model.save_pretrained(directory / "donor")
    tiny.make_tokenizer().save_pretrained(directory / "donor")
    return recipient, directory / "donor"


def graft(pair, own, tmp_path, name="graft", settings=None, **options):
    """Collect and merge; returns the output directory and the two files."""
    files = [tmp_path / f"{name}.{i}.safetensors" for i in range(len(pair))]
    collect_sequentially(pair[0], pair[1:], own, files, settings, **options)
    given = {key: value for key, value in options.items() if key in ("share", "pull")}
    config = MergeConfig(
        models=tuple(map(str, pair)),
        method="sequential_graft",
        hyperparameters=given,
        covariances=tuple(map(str, files)),
    )
    return merge_checkpoints(config, tmp_path / name).out, files


def hidden(directory, *texts):
    """Last hidden states of every token."""
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        states = [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].numpy() for t in texts]
    return np.concatenate(states)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("bert"), tiny.make_bert)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(tiny.make_bert, "float32"), (tiny.make_gpt2, "bfloat16"), (tiny.make_llama, "float32")],
)
def test_the_pipeline_writes_the_model_that_was_refitted_in_memory(tmp_path, monkeypatch, make, dtype):
    pair = save_pair(tmp_path, make, dtype=getattr(torch, dtype))
    refitted = {}
    refit = module.MergedModel.refit

    def keep(self, weight, view, checkpoints, sides):
        refit(self, weight, view, checkpoints, sides)
        place = self.runner.weights.places[weight]
        flat = self.runner.floating()[place.parameter].reshape(-1)[place.start : place.start + place.size]
        refitted[weight] = flat.clone().numpy()

    monkeypatch.setattr(module.MergedModel, "refit", keep)
    out, files = graft(pair, dataset(*tiny.draw_texts(12)), tmp_path)
    assert len(refitted) >= 8
    with open_checkpoint(out) as merged, open_checkpoint(pair[0]) as recipient:
        for name, values in refitted.items():
            written = np.asarray(merged.read(name), np.float32).reshape(-1)
            step = 2**-7 if dtype == "bfloat16" else 1e-5  # an ulp of what is written
            np.testing.assert_allclose(written, values, rtol=step, atol=1e-5, err_msg=name)
            assert np.abs(values - np.asarray(recipient.read(name), np.float32).reshape(-1)).max() > 1e-3
    with open_covariances(files[1]) as theirs:
        assert "pseudo-inputs" in theirs.data[0].name
        assert {site.kind for site in theirs.sites.values()} == {"moments"}


def test_both_models_answers_are_kept_where_the_layers_have_room(tmp_path):
    """Fewer tokens than inputs of a layer, biases and norms shared: the outputs of both, each on its own text."""
    pair = save_pair(tmp_path, tiny.make_bert, parts=("dense.weight", "query.weight", "key.weight", "value.weight"))
    own, theirs = dataset(OWN, OWN), dataset(THEIRS)
    out, _ = graft(pair, own, tmp_path, settings=CovarianceSettings(held_back=0), share=0.0, pull=0.0, others=[theirs])
    apart = np.abs(hidden(pair[1], OWN) - hidden(pair[0], OWN)).max()
    assert apart > 0.1
    np.testing.assert_allclose(hidden(out, OWN), hidden(pair[0], OWN), atol=0.02 * apart)
    np.testing.assert_allclose(hidden(out, THEIRS), hidden(pair[1], THEIRS), atol=0.02 * apart)


def test_three_models_answers_are_kept_where_the_layers_have_room(tmp_path):
    """Two donors, each on its own text, and the order of the donors does not matter."""
    linear = ("dense.weight", "query.weight", "key.weight", "value.weight")
    recipient, first = save_pair(tmp_path / "one", tiny.make_bert, parts=linear)
    second = save_pair(tmp_path / "two", tiny.make_bert, parts=linear, spread=-0.08)[1]
    texts = ("cats and them", "who saw the mat", "how many there")
    given = {"settings": CovarianceSettings(held_back=0), "share": 0.0, "pull": 0.0}
    models = (recipient, first, second)
    out, _ = graft(models, dataset(texts[0]), tmp_path, others=list(map(dataset, texts[1:])), **given)
    for model, text in zip(models, texts, strict=True):
        apart = np.abs(hidden(recipient, text) - hidden(first, text)).max()
        np.testing.assert_allclose(hidden(out, text), hidden(model, text), atol=0.02 * apart)
    turned, _ = graft(
        models[:1] + models[:0:-1],
        dataset(texts[0]),
        tmp_path,
        "turned",
        others=list(map(dataset, texts[:0:-1])),
        **given,
    )
    np.testing.assert_allclose(hidden(turned, *texts), hidden(out, *texts), atol=1e-3)


def test_the_share_trades_the_recipients_answers_for_the_donors(tmp_path, bert):
    texts = tiny.draw_texts(30)
    errors = []
    for share in (0.0, 0.3, 3.0):
        out, _ = graft(bert, dataset(*texts), tmp_path, f"share{share}", share=share)
        errors.append([np.square(hidden(out, *texts) - hidden(model, *texts)).mean() for model in bert])
    kept, given = np.array(errors).T
    assert np.all(np.diff(kept) > 0)
    assert np.all(np.diff(given) < 0)


def test_equal_models_return_the_model(tmp_path, bert):
    out, _ = graft((bert[0], bert[0]), dataset(OWN, THEIRS), tmp_path, share=0.7, others=[dataset(THEIRS)])
    with open_checkpoint(out) as merged, open_checkpoint(bert[0]) as recipient:
        for name in recipient.specs:
            np.testing.assert_array_equal(merged.read(name), recipient.read(name), err_msg=name)


def read_all(file):
    with open_covariances(file) as opened:
        return {(site, part): opened.read(site, part) for site in opened.sites for part in ("covariance", "drift")}


def test_batches_and_padding_do_not_matter(tmp_path, bert):
    own = dataset(*tiny.draw_texts(9))
    found = []
    for size in (1, 4, 32):
        files = tmp_path / f"{size}.own.safetensors", tmp_path / f"{size}.others.safetensors"
        collect_sequentially(bert[0], bert[1:], own, files, CovarianceSettings(batch_size=size, held_back=0))
        found.append({(i, *key): x for i, file in enumerate(files) for key, x in read_all(file).items()})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, x in found[0].items():
            np.testing.assert_allclose(other[key], x, atol=2e-4 * max(1e-3, np.abs(x).max()), err_msg=str(key))


def test_shares_are_weighted_by_trace(tmp_path, bert):
    files = tmp_path / "own.safetensors", tmp_path / "others.safetensors"
    result = collect_sequentially(bert[0], bert[1:], dataset(*tiny.draw_texts(9)), files, share=0.5)
    assert (result.examples, result.held_back, result.files) == ((7, 7), 2, files)
    assert result.nbytes == sum(file.stat().st_size for file in files)
    for file, trace in zip(files, (1.0, 1.5), strict=True):
        with open_covariances(file) as opened:
            for site in opened.sites.values():
                assert np.trace(opened.read(site.name, "covariance")) == pytest.approx(trace, rel=1e-5)
    with open_covariances(files[0]) as ours:
        assert {ours.shape(site, "held_back")[0] > 0 for site in ours.sites} == {True}


def make_albert():
    config = transformers.AlbertConfig(vocab_size=len(tiny.VOCABULARY), embedding_size=8, **tiny.LAYERS)
    return transformers.AlbertModel(config)


@pytest.mark.parametrize(
    ("make", "parts", "message"),
    [
        (tiny.make_bert, ("dense.weight",), "share their embeddings"),
        (make_albert, ("",), "more than once in a pass"),
    ],
)
def test_models_that_allow_none_are_told_apart(tmp_path, make, parts, message):
    pair = save_pair(tmp_path, make, parts)
    before = sorted(p.name for p in tmp_path.iterdir())
    files = tmp_path / "own.safetensors", tmp_path / "others.safetensors"
    with pytest.raises(CannotStepError, match=message):
        collect_sequentially(pair[0], pair[1:], dataset(*tiny.draw_texts(9)), files)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_images_alone_allow_none(tmp_path):
    pair = save_pair(tmp_path, tiny.make_vit)
    images = np.random.default_rng(0).normal(size=(6, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=images)
    files = tmp_path / "own.safetensors", tmp_path / "others.safetensors"
    with pytest.raises(CannotStepError, match="embeddings of texts only"):
        collect_sequentially(pair[0], pair[1:], tmp_path / "images.npz", files)


def test_experts_are_left_as_they_are_interpolated(tmp_path):
    """Tokens take other ways through the merged model: they cannot be paired."""
    pair = save_pair(tmp_path, tiny.make_mixtral)
    out, files = graft(pair, dataset(*tiny.draw_texts(6)), tmp_path, share=1.0)
    with open_covariances(files[0]) as ours:
        assert not any("experts" in name for name in ours.site_of)
        assert any("q_proj" in name for name in ours.site_of)
    with open_checkpoint(out) as merged, open_checkpoint(pair[0]) as a, open_checkpoint(pair[1]) as b:
        name = next(name for name in merged.specs if "experts" in name)
        np.testing.assert_allclose(merged.read(name), (a.read(name) + b.read(name)) / 2, rtol=1e-6)


def test_other_uses_of_the_files_are_refused(tmp_path, bert):
    _, files = graft(bert, dataset(*tiny.draw_texts(9)), tmp_path)
    models, paths = tuple(map(str, bert)), tuple(map(str, files))
    with pytest.raises(RefusedError, match="was made with another model"):
        config = MergeConfig(models=models[::-1], method="sequential_graft", covariances=paths)
        merge_checkpoints(config, tmp_path / "swapped")
    with pytest.raises(RefusedError, match="takes covariances collected by `rgsp covariances`"):
        merge_checkpoints(MergeConfig(models=models, method="graft", covariances=paths[:1]), tmp_path / "ridge")
    assert not Path(tmp_path / "swapped").exists()
    with pytest.raises(RefusedError, match="is already there"):
        collect_sequentially(bert[0], bert[1:], dataset(OWN), files)
