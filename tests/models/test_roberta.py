"""RoBERTa and BERT's further heads against transformers' own models, on tiny random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.huggingface import build_loaded, randomise, save_and_read
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import (
    FAMILIES,
    Bert,
    BertConfig,
    BertMaskedLm,
    BertTokenClassifier,
    Roberta,
    RobertaClassifier,
    RobertaConfig,
    RobertaMaskedLm,
    RobertaTokenClassifier,
    export_weights,
    extract_parameters,
    load_weights,
    replace_parameters,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24},
    **{"layer_norm_eps": 1e-7, "vocab_size": 37, "max_position_embeddings": 14, "num_labels": 3},
}
ROBERTA = {**SIZES, "type_vocab_size": 1, "pad_token_id": 3}
BERT = {**SIZES, "type_vocab_size": 2}


def token_batch(padding=3):
    """Ids with a padding id among the tokens too, and a mask that also leaves out what is no padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 37, (3, 9))
    mask = np.arange(9)[None] < np.array([[9], [5], [2]])
    ids[mask == 0] = padding
    ids[0, 4] = padding
    ids[1, 7] = 5
    return ids.astype(np.int32), mask.astype(np.int32)


def read_family(theirs, directory):
    """Our model of what transformers saves."""
    weights, config = save_and_read(randomise(theirs), directory)
    return build_loaded(config, weights)


@torch.no_grad()
def call(model, ids, mask, **options):
    return model(torch.tensor(ids.astype(np.int64)), torch.tensor(mask.astype(np.int64)), **options)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("RobertaForSequenceClassification", RobertaClassifier),
        ("XLMRobertaForTokenClassification", RobertaTokenClassifier),
        ("CamembertForMaskedLM", RobertaMaskedLm),
        ("BertForTokenClassification", BertTokenClassifier),
        ("BertForMaskedLM", BertMaskedLm),
    ],
)
def test_heads_equal_transformers(theirs, ours, tmp_path):
    theirs = getattr(transformers, theirs)
    sizes = BERT if theirs.__name__.startswith("Bert") else ROBERTA
    theirs = theirs(theirs.config_class(**sizes, hidden_act="gelu_new"))
    model = read_family(theirs, tmp_path)
    assert type(model) is ours
    ids, mask = token_batch()
    logits = nnx.jit(lambda m, *batch: m(*batch))(model, ids, mask)
    np.testing.assert_allclose(logits, call(theirs, ids, mask).logits.numpy(), rtol=0, atol=1e-5)


def test_encoder_with_pooler_equals_transformers(tmp_path):
    theirs = transformers.RobertaModel(transformers.RobertaConfig(**ROBERTA | {"type_vocab_size": 2}))
    model = read_family(theirs, tmp_path)
    assert type(model) is Roberta
    ids, mask = token_batch()
    types = np.random.default_rng(1).integers(0, 2, ids.shape).astype(np.int32)
    expected = call(theirs, ids, mask, token_type_ids=torch.tensor(types.astype(np.int64)))
    hidden = model(ids, mask, types)
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.pool(hidden), expected.pooler_output.numpy(), rtol=0, atol=1e-5)
    batch = {"input_ids": ids, "attention_mask": mask}
    np.testing.assert_array_equal(FAMILIES["roberta"].run(model, batch), model.pool(model(ids, mask)))
    longest = np.arange(10)[None] + 4
    np.testing.assert_allclose(
        model(longest), call(theirs, longest, np.ones_like(longest)).last_hidden_state.numpy(), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="for 10 only"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 11), np.int32))


def test_pretrained_bert_has_both_heads(tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**BERT))
    model = read_family(theirs, tmp_path)
    ids, mask = token_batch()
    expected = call(theirs, ids, mask)
    words, relation = FAMILIES["bert"].run(model, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(words, expected.prediction_logits.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(relation, expected.seq_relationship_logits.numpy(), rtol=0, atol=1e-5)
    alone = BertMaskedLm(BertConfig(37, 16, 1, 4, 24), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="next sentences"):
        alone.relate(np.zeros((1, 2, 16), np.float32))


def test_gradients_reach_a_tied_head_and_half_precision_loads():
    model = RobertaMaskedLm(RobertaConfig(37, 16, 1, 4, 24, max_position_embeddings=14, pooler=False), rngs=nnx.Rngs(0))
    ids, mask = token_batch(padding=1)

    def loss(parameters):
        logits = replace_parameters(model, parameters)(ids, mask)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0, 7])

    gradient = jax.jit(jax.grad(loss))(extract_parameters(model))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert (np.abs(gradient["encoder"]["word"]["embedding"]).max(axis=1) > 0).all()  # ids that no text holds, too
    halves = {name: array.astype(jnp.bfloat16) for name, array in export_weights(model).items()}
    loaded = export_weights(load_weights(model, halves))
    assert all((array == halves[name].astype(np.float32)).all() for name, array in loaded.items())


def test_configs_refuse_what_the_family_is_not():
    with pytest.raises(RefusedError) as refused:
        RobertaConfig.from_huggingface({"model_type": "bert", "position_embedding_type": "relative_key"})
    assert len(refused.value.problems) == 2
    assert "'roberta' or 'xlm-roberta' or 'camembert'" in refused.value.problems[0]
    for padding in (None, -1, 511):
        with pytest.raises(RefusedError, match="pad_token_id"):
            RobertaConfig.from_huggingface({"model_type": "roberta", "pad_token_id": padding})
    for name, key in (("bert", "cls.predictions.bias"), ("roberta", "lm_head.bias")):
        with pytest.raises(RefusedError, match="tied only"):
            FAMILIES[name].build({"model_type": name, "tie_word_embeddings": False}, {key: (37,)})
    assert type(FAMILIES["bert"].build({"model_type": "bert"}, {"bert.pooler.dense.weight": (768, 768)})) is Bert
