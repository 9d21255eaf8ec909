"""transformers loads what was merged, and computes what it computes from weights merged by hand."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

import references
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

pytestmark = pytest.mark.usefixtures("plain_report")

HIDDEN, WORDS, RANK = 16, 40, 3
TOKENS = torch.arange(2 * 9).reshape(2, 9) % WORDS
COMMON = dict(vocab_size=WORDS, attn_implementation="eager")


def make_bert():
    config = transformers.BertConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=HIDDEN,
        **COMMON,
    )
    return transformers.BertForSequenceClassification(config)


def make_llama():
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        **COMMON,
    )
    return transformers.LlamaForCausalLM(config)


def make_gpt2():
    config = transformers.GPT2Config(n_embd=HIDDEN, n_inner=HIDDEN, n_layer=2, n_head=4, n_positions=16, **COMMON)
    return transformers.GPT2LMHeadModel(config)


MAKE = {"bert": make_bert, "llama": make_llama, "gpt2": make_gpt2}
MATRICES = {
    "bert": lambda name: "layer." in name or name in ("bert.pooler.dense.weight", "classifier.weight"),
    "llama": lambda name: ".layers." in name,
    "gpt2": lambda name: ".h." in name,
}
"""Which tensors of rank 2 are multiplied by activations, not looked up."""


def make_siblings(family, dtype, count=3):
    """Random models around a random ancestor, far enough apart that merging shows."""
    torch.manual_seed(0)
    ancestor = MAKE[family]().eval()
    siblings = []
    for _ in range(count):
        model = copy.deepcopy(ancestor)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        siblings.append(model.to(dtype))
    return siblings


def merge_by_hand(family, siblings, method):
    """A model whose state dict was merged tensor by tensor in NumPy."""
    states = [model.state_dict() for model in siblings]
    result = copy.deepcopy(siblings[0])
    merged = {}
    for name, tensor in states[0].items():
        if not tensor.is_floating_point():
            continue
        stack = np.stack([state[name].double().numpy() for state in states])
        if method == "relative" and tensor.ndim == 2 and MATRICES[family](name):
            stack = stack.transpose(0, 2, 1) if family == "gpt2" else stack
            value = references.relative(stack, RANK)
            value = value.T if family == "gpt2" else value
        else:
            value = stack.mean(0)
        merged[name] = torch.from_numpy(value.copy()).to(tensor.dtype)
    result.load_state_dict(merged, strict=False)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models of one family and dtype with the directories they were saved in."""
    made = {}

    def save(family, dtype):
        if (family, dtype) not in made:
            place = tmp_path_factory.mktemp(f"{family}")
            siblings = make_siblings(family, dtype)
            paths = [str(place / f"model{k}") for k in range(len(siblings))]
            for path, model in zip(paths, siblings, strict=True):
                model.save_pretrained(path)
            made[family, dtype] = siblings, paths
        return made[family, dtype]

    return save


@pytest.mark.parametrize(
    ("family", "precision", "method"),
    [
        ("bert", "float32", "average"),
        ("bert", "float32", "relative"),
        ("bert", "bfloat16", "relative"),
        ("llama", "float32", "relative"),
        ("llama", "bfloat16", "average"),
        ("gpt2", "float32", "relative"),
        ("gpt2", "bfloat16", "average"),
    ],
)
def test_a_merged_model_loads_and_computes_as_one_merged_by_hand(tmp_path, saved, family, precision, method):
    dtype = getattr(torch, precision)
    siblings, paths = saved(family, dtype)
    settings = {"hyperparameters": {"rank": RANK}} if method == "relative" else {}
    result = merge_checkpoints(MergeConfig(models=paths, method=method, **settings), tmp_path / "out")
    loaded, info = type(siblings[0]).from_pretrained(
        result.out, output_loading_info=True, dtype="auto", attn_implementation="eager"
    )
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert loaded.dtype == dtype
    expected = merge_by_hand(family, siblings, method)
    with torch.no_grad():
        ours, theirs, first = (m.float().eval()(TOKENS).logits for m in (loaded, expected, copy.deepcopy(siblings[0])))
    tolerance = 2e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    assert (ours - first).abs().max() > 10 * (ours - theirs).abs().max()  # the test would see a merge that is none
    if family != "bert":
        embeddings, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
        assert embeddings.data_ptr() == head.data_ptr()


def test_config_and_generation_config_survive(tmp_path, saved):
    _, paths = saved("llama", torch.bfloat16)
    out = merge_checkpoints(MergeConfig(models=paths, method="average", dtype="float32"), tmp_path / "out").out
    before, after = (json.loads((path / "config.json").read_text()) for path in (tmp_path / paths[0], out))
    assert before.pop("dtype") == "bfloat16" and after.pop("dtype") == "float32"
    assert before == after
    assert (out / "generation_config.json").read_bytes() == (
        tmp_path / paths[0] / "generation_config.json"
    ).read_bytes()
    assert transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32


def test_shards_load(tmp_path, saved):
    siblings, paths = saved("gpt2", torch.float32)
    config = MergeConfig(models=paths, method="average", max_shard_size=8000)
    out = merge_checkpoints(config, tmp_path / "out").out
    assert len(list(out.glob("model-*.safetensors"))) > 2
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    expected = merge_by_hand("gpt2", siblings, "average").state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_heads_of_different_tasks_stay_apart(tmp_path, saved):
    """The encoder is merged, the first model's head stays, as the report of a user who excludes it expects."""
    siblings, paths = saved("bert", torch.float32)
    out = merge_checkpoints(
        MergeConfig(models=paths, method="average", exclude=("classifier.*",)), tmp_path / "out"
    ).out
    loaded = transformers.BertForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(loaded.classifier.weight, siblings[0].classifier.weight, rtol=0, atol=0)
    pooler = torch.stack([m.bert.pooler.dense.weight for m in siblings]).mean(0)
    torch.testing.assert_close(loaded.bert.pooler.dense.weight, pooler, rtol=0, atol=1e-6)
