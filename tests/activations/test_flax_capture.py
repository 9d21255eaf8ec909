"""The Flax families see what torch sees."""

import json

import numpy as np
import pytest

from activations import tiny_models as tiny
from rgsp_jax.activations import CovarianceSettings, collect_covariances
from rgsp_jax.checkpoint import open_covariances
from rgsp_jax.errors import RefusedError


def collect_both(model, data, tmp_path, **options):
    files = []
    for backend in ("torch", "flax"):
        out = tmp_path / f"{backend}.safetensors"
        settings = CovarianceSettings(backend=backend, held_back=3, batch_size=4, **options)
        result = collect_covariances(model, data, out, settings)
        assert result.backend == backend and result.not_covered == {}
        files.append(open_covariances(out))
    return files


def check_agreement(left, right):
    assert set(left.site_of) == set(right.site_of)
    for name, site in left.site_of.items():
        other = right.site_of[name]
        assert (site.name, site.kind, site.width, site.rows) == (other.name, other.kind, other.width, other.rows)
        assert dict(site.weights) == dict(other.weights)
        for part in ("counts", "held_back_counts") if site.kind == "counts" else ("covariance", "mean"):
            x, y = left.read(site.name, part), right.read(other.name, part)
            assert np.abs(x - y).max() <= 3e-6 * np.abs(x).max(), (name, part)


@pytest.mark.parametrize("classes", [None, 3])
def test_bert(tmp_path, classes):
    model = tiny.save_model(tmp_path / "model", tiny.make_bert(classes), tiny.make_tokenizer())
    left, right = collect_both(model, tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(15)), tmp_path)
    with left, right:
        check_agreement(left, right)
        assert left.site_of["bert.pooler.dense.weight" if classes else "pooler.dense.weight"].rows == 12


def test_pairs_of_texts(tmp_path):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = tiny.make_tokenizer(model_input_names=names)
    model = tiny.save_model(tmp_path / "model", tiny.make_bert(), tokenizer)
    firsts, seconds = tiny.draw_texts(10), tiny.draw_texts(10, seed=1)
    lines = [json.dumps({"text": a, "answer": b}) + "\n" for a, b in zip(firsts, seconds, strict=True)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    left, right = collect_both(model, tmp_path / "data.jsonl", tmp_path, pair_field="answer")
    with left, right:
        check_agreement(left, right)
        counts = sum(left.read("embeddings.word_embeddings", part) for part in ("counts", "held_back_counts"))
        words = [word for text in (*firsts, *seconds) for word in text.split()]
        assert np.array_equal(counts, np.bincount([tiny.VOCABULARY[w] for w in words], minlength=len(counts)))


@pytest.mark.parametrize("kind", ["RobertaForSequenceClassification", "BertForPreTraining"])
def test_heads_and_position_limits(tmp_path, kind):
    kind = getattr(tiny.transformers, kind)
    config = kind.config_class(
        vocab_size=len(tiny.VOCABULARY), max_position_embeddings=7, type_vocab_size=1, pad_token_id=0, **tiny.LAYERS
    )
    model = tiny.save_model(tmp_path / "model", kind(config), tiny.make_tokenizer())
    texts = tiny.draw_texts(15)
    left, right = collect_both(model, tiny.write_texts(tmp_path / "data.jsonl", texts), tmp_path)
    with left, right:
        check_agreement(left, right)
        limit = 6 if "Roberta" in kind.__name__ else 7
        words = [min(limit, len(text.split())) for text in texts]
        assert max(map(len, map(str.split, texts))) == 8
        name = next(name for name in left.site_of if name.endswith("layer.0.attention.self.query.weight"))
        counted = next(site for site in left.site_of.values() if site.kind == "counts")
        counts = sum(left.read(counted.name, part).sum() for part in ("counts", "held_back_counts"))
        assert counts == sum(words) and left.site_of[name].rows < sum(words)


def test_vit(tmp_path):
    model = tiny.save_model(tmp_path / "model", tiny.make_vit(3))
    pixels = np.random.default_rng(0).standard_normal((11, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=pixels)
    left, right = collect_both(model, tmp_path / "images.npz", tmp_path)
    with left, right:
        check_agreement(left, right)
        assert left.site_of["vit.embeddings.patch_embeddings.projection.weight"].rows == 4 * 8


def make_clip_text():
    config = tiny.transformers.CLIPTextConfig(
        vocab_size=len(tiny.VOCABULARY), max_position_embeddings=12, eos_token_id=tiny.VOCABULARY["mat"], **tiny.LAYERS
    )
    return tiny.transformers.CLIPTextModelWithProjection(config)


@pytest.mark.parametrize("make", [make_clip_text, tiny.make_llama, tiny.make_gpt2])
def test_causal_families(tmp_path, make):
    model = tiny.save_model(tmp_path / "model", make(), tiny.make_tokenizer())
    left, right = collect_both(model, tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(15)), tmp_path)
    with left, right:
        check_agreement(left, right)


def test_clip_vision(tmp_path):
    config = tiny.transformers.CLIPVisionConfig(image_size=8, patch_size=4, num_channels=1, **tiny.LAYERS)
    model = tiny.save_model(tmp_path / "model", tiny.transformers.CLIPVisionModelWithProjection(config))
    pixels = np.random.default_rng(0).standard_normal((11, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=pixels)
    left, right = collect_both(model, tmp_path / "images.npz", tmp_path)
    with left, right:
        check_agreement(left, right)


def test_what_the_flax_families_cannot_do_is_refused(tmp_path):
    settings = CovarianceSettings(backend="flax")
    data = tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(3))
    out = tmp_path / "c.safetensors"
    mixtral = tiny.save_model(tmp_path / "mixtral", tiny.make_mixtral(), tiny.make_tokenizer())
    with pytest.raises(RefusedError, match="'mixtral'; the Flax families here are bert, ") as caught:
        collect_covariances(mixtral, data, out, settings)
    listed = str(caught.value).split(" are ")[1].split(":")[0].split(", ")
    assert not {"clip", "qwen2_vl", "t5"} & set(listed) and {"gpt2", "clip_vision_model", "vit"} <= set(listed)
    vit = tiny.save_model(tmp_path / "vit", tiny.make_vit())
    with pytest.raises(RefusedError, match="takes images alone"):
        collect_covariances(vit, data, out, settings)
    np.savez(tmp_path / "bytes.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(RefusedError, match="pixel_values as floats"):
        collect_covariances(vit, tmp_path / "bytes.npz", out, settings)
    bert = tiny.save_model(tmp_path / "bert", tiny.make_bert())
    with pytest.raises(RefusedError, match=r"no tokenizer\.json"):
        collect_covariances(bert, data, out, settings)
    with pytest.raises(RefusedError, match="compute in float32"):
        collect_covariances(bert, data, out, CovarianceSettings(backend="flax", dtype="bfloat16"))
