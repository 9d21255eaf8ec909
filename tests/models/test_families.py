"""Each family against transformers' own model of it, on tiny random weights."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from models.huggingface import as_torch, randomise, save_and_read
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import (
    Bert,
    BertClassifier,
    BertConfig,
    Vit,
    VitClassifier,
    VitConfig,
    export_weights,
    load_weights,
)

safetensors = pytest.importorskip("safetensors.numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
BERT = {**SIZES, "layer_norm_eps": 1e-7, "vocab_size": 37, "max_position_embeddings": 12, "type_vocab_size": 2}
VIT = {**SIZES, "layer_norm_eps": 1e-7, "image_size": 8, "patch_size": 2, "num_channels": 3}


def token_batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 37, (3, 9))
    mask = np.arange(9)[None] < np.array([[9], [4], [1]])
    return ids.astype(np.int32), mask.astype(np.int32), rng.integers(0, 2, (3, 9)).astype(np.int32)


def test_bert_equals_transformers(tmp_path):
    theirs = randomise(transformers.BertModel(transformers.BertConfig(**BERT, attn_implementation="eager")))
    weights, config = save_and_read(theirs, tmp_path)
    ours = load_weights(nnx.eval_shape(lambda: Bert(BertConfig.from_huggingface(config), rngs=nnx.Rngs(0))), weights)
    ids, mask, types = token_batch()
    with torch.no_grad():
        expected = theirs(*as_torch(ids, mask, types))
    hidden = nnx.jit(lambda model, *batch: model(*batch))(ours, ids, mask, types)
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.pool(hidden), expected.pooler_output.numpy(), rtol=0, atol=1e-5)
    with torch.no_grad():
        bare = theirs(*as_torch(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours(ids), bare, rtol=0, atol=1e-5)


def test_bert_classifier_equals_transformers(tmp_path):
    theirs = randomise(transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3)))
    weights, config = save_and_read(theirs, tmp_path)
    ours = load_weights(BertClassifier(BertConfig.from_huggingface(config), 3, rngs=nnx.Rngs(0)), weights)
    ids, mask, types = token_batch()
    with torch.no_grad():
        expected = theirs(*as_torch(ids, mask, types)).logits.numpy()
    np.testing.assert_allclose(ours(ids, mask, types), expected, rtol=0, atol=1e-5)


def test_vit_equals_transformers(tmp_path):
    theirs = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=5)))
    weights, config = save_and_read(theirs, tmp_path)
    ours = load_weights(VitClassifier(VitConfig.from_huggingface(config), 5, rngs=nnx.Rngs(0)), weights)
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(ours(images), expected, rtol=0, atol=1e-5)


def test_exported_vit_directory_loads_in_transformers(tmp_path):
    config = VitConfig(**VIT)
    ours = Vit(config, rngs=nnx.Rngs(1))
    safetensors.save_file(export_weights(ours), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config.to_huggingface()))
    theirs, info = transformers.ViTModel.from_pretrained(
        tmp_path, add_pooling_layer=False, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    np.testing.assert_allclose(ours(images), expected, rtol=0, atol=1e-5)
    assert VitConfig.from_huggingface(config.to_huggingface()) == config


def test_configs_refuse_what_the_family_is_not():
    with pytest.raises(RefusedError) as refused:
        BertConfig.from_huggingface({"model_type": "roberta", "position_embedding_type": "relative_key"})
    assert len(refused.value.problems) == 2
    with pytest.raises(RefusedError, match="mish"):
        BertConfig(hidden_act="mish")
    with pytest.raises(RefusedError, match="not a multiple"):
        BertConfig(hidden_size=10, num_attention_heads=4)
    with pytest.raises(RefusedError) as refused:
        VitConfig(hidden_size=10, num_attention_heads=4, image_size=9, patch_size=2)
    assert len(refused.value.problems) == 2
    with pytest.raises(RefusedError, match="one integer"):
        VitConfig.from_huggingface({"image_size": [8, 16]})


def test_bert_says_what_it_cannot_do():
    config = BertConfig(**BERT, pooler=False)
    model = Bert(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="position embeddings"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 13), np.int32))
    with pytest.raises(ValueError, match="without a pooler"):
        model.pool(np.zeros((1, 2, 16), np.float32))
