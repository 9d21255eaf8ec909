"""`rgsp learn` from checkpoints to a checkpoint: resumed exactly, exported as a plain merge, refused clearly."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from activations import tiny_models as tiny
from pipeline.toy_models import tree_bytes
from rgsp_jax import learning
from rgsp_jax.activations.flax_runner import RUNNABLE
from rgsp_jax.checkpoint import open_checkpoint, write_safetensors
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import FAMILIES, load_weights, recompute_layers
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, read_config_file
from rgsp_jax.pipeline.config import parse_config
from rgsp_jax.training import LearnSettings, run_learning
from rgsp_jax.training.learn import HISTORY, STATE
from rgsp_jax.training.objectives import OBJECTIVES, Answer, Batch, measure_spread

FAR = {"rank": 2, "reach": 1e9}
"""Random siblings are far apart: the correction is taken whole, so that there is something to learn."""
QUICK = dict(steps=6, batch_size=4, save_every=2, learning_rate=0.02)


def save_family(directory, make, count=3):
    """Siblings on disk: one random model, moved a little in a direction of its own each."""
    torch.manual_seed(0)
    model, tokenizer = make(), tiny.make_tokenizer()
    base = {name: x.clone() for name, x in model.state_dict().items()}
    tiny.save_model(directory / "base", model, tokenizer)
    for k in range(count):
        torch.manual_seed(k + 1)
        model.load_state_dict(
            {n: x + (0.2 * torch.randn_like(x) if x.is_floating_point() else 0) for n, x in base.items()}
        )
        tiny.save_model(directory / f"expert-{k}", model, tokenizer)
        texts = tiny.draw_texts(6, seed=k)
        rows = [json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(texts)]
        (directory / f"{k}.jsonl").write_text("".join(rows))
    return directory


def save_heads(directory, count=3, width=tiny.WIDTH):
    rng = np.random.default_rng(0)
    for k in range(count):
        classes = 2 + k
        head = {"weight": rng.normal(size=(classes, width)), "bias": rng.normal(size=classes)}
        write_safetensors(directory / f"head-{k}.safetensors", {n: x.astype(np.float32) for n, x in head.items()})


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    place = save_family(tmp_path_factory.mktemp("encoders"), tiny.make_bert)
    save_heads(place)
    return place


def configure(place, count=3, **fields):
    return MergeConfig(models=tuple(str(place / f"expert-{k}") for k in range(count)), **fields)


def settle(place, count=3, heads=False, **settings):
    given = {"heads": tuple(str(place / f"head-{k}.safetensors") for k in range(count))} if heads else {}
    return LearnSettings(data=tuple(str(place / f"{k}.jsonl") for k in range(count)), **given, **{**QUICK, **settings})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_reads_what_it_says_of_the_parent(name):
    """What it does not name is let go of, and what it names decides."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    tokens = name == "next-token"
    merged, teacher, other = (Answer(draw(4, 3), draw(4, 6, 3), draw(*((4, 6) if tokens else (4,)), 5)) for _ in "abc")
    ids = rng.integers(0, 5, (4, 6))
    inputs = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones((4, 6), bool)}
    batch = Batch(inputs, jnp.asarray([True, True, True, False]), jnp.asarray([0, 1, 2, 0]))
    objective = OBJECTIVES[name]

    def measure(teacher):
        spread = measure_spread(teacher, batch, objective.reads)
        return float(objective.loss(merged, teacher, batch, 1.0, spread))

    whole = measure(teacher)
    assert np.isfinite(whole)
    assert measure(teacher._replace(**dict.fromkeys(set(Answer._fields) - objective.reads))) == whole
    for field in objective.reads:
        assert measure(teacher._replace(**{field: getattr(other, field)})) != whole


class StoppedError(Exception):
    """The process is killed."""


def test_a_run_that_is_interrupted_ends_as_one_that_is_not_and_its_config_needs_no_data(encoders, tmp_path):
    config = configure(encoders, hyperparameters=FAR, exclude=("pooler.*",))
    settings = settle(encoders, heads=True, per="direction")
    whole = run_learning(config, settings, tmp_path / "whole")
    assert whole.loss_after < whole.loss_before and whole.steps == 6 and whole.resumed_steps == 0
    assert 0 <= whole.agreement_before <= 1
    assert not (tmp_path / "whole.learning" / STATE).exists()

    def stop(record, total):
        if record.step == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_learning(config, settings, tmp_path / "parts", on_step=stop)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(RefusedError, match="left from an earlier run: finish it with --resume"):
        run_learning(config, settings, tmp_path / "parts")
    with pytest.raises(RefusedError, match="is of another run"):
        run_learning(config, settle(encoders, heads=True, per="direction", seed=1), tmp_path / "parts", resume=True)
    parts = run_learning(config, settings, tmp_path / "parts", resume=True)
    assert parts.resumed_steps == 4
    for name in (HISTORY, "merge.yaml", "before.json"):
        ours, theirs = ((tmp_path / f"{run}.learning" / name).read_text() for run in ("whole", "parts"))
        assert ours == theirs, name
    weights = [tree_bytes(tmp_path / run)["model.safetensors"] for run in ("whole", "parts")]
    assert weights[0] == weights[1]

    fields = read_config_file(tmp_path / "whole.learning" / "merge.yaml")
    merge_checkpoints(parse_config(fields, "merge.yaml"), tmp_path / "again")
    assert tree_bytes(tmp_path / "again")["model.safetensors"] == weights[0]


def read_losses(out):
    return [
        json.loads(line)["loss"] for line in (out.parent / f"{out.name}.learning" / HISTORY).read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def on_one_device(encoders, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    return run_learning(*share_work(encoders), out, devices=1)


def share_work(place):
    """Batches of three rows, that four devices fill up.

    Plain gradient descent: Adam makes whole steps of the rounding where a gradient is zero, as of a key's bias.
    """
    config = configure(place, 2, hyperparameters=FAR, exclude=("pooler.*",))
    return config, settle(place, 2, heads=True, batch_size=3, pull=0.01, steps=4, optimiser="sgd")


def stop_behind(record, total):
    if record.step == 3:
        raise StoppedError


@pytest.mark.slow
@pytest.mark.parametrize("then", [4, 1])
def test_devices_share_the_work_and_finish_each_others(encoders, tmp_path, on_one_device, then):
    """Steps are one device's to rounding; resumed on as many devices they are the same to the bit."""
    job = share_work(encoders)
    whole = run_learning(*job, tmp_path / "whole", devices=4)
    expected = read_losses(on_one_device.merge.out)  # differences of logarithms of the order of 1
    np.testing.assert_allclose(read_losses(whole.merge.out), expected, rtol=1e-5, atol=2e-6)
    assert whole.agreement_before == on_one_device.agreement_before
    with pytest.raises(StoppedError):
        run_learning(*job, tmp_path / "parts", devices=4, on_step=stop_behind)
    parts = run_learning(*job, tmp_path / "parts", devices=then, resume=True)
    assert parts.resumed_steps == 2
    if then == 4:
        for name in (HISTORY, "merge.yaml", "before.json"):
            ours, theirs = ((tmp_path / f"{run}.learning" / name).read_text() for run in ("whole", "parts"))
            assert ours == theirs, name
    np.testing.assert_allclose(read_losses(parts.merge.out), expected, rtol=1e-5, atol=2e-6)
    with open_checkpoint(parts.merge.out) as found, open_checkpoint(on_one_device.merge.out) as one:
        for name in one.specs:
            np.testing.assert_allclose(found.read(name), one.read(name), atol=2e-5, err_msg=name)


def test_more_devices_than_there_are_are_refused(encoders, tmp_path):
    with pytest.raises(RefusedError, match="--devices 9: this process has 8 cpu devices"):
        run_learning(*share_work(encoders), tmp_path / "out", devices=9)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_is_the_model_that_was_learned(encoders, tmp_path):
    """What the last loss was measured on is what the pipeline writes."""
    config = configure(encoders, hyperparameters=FAR)
    result = run_learning(config, settle(encoders, loss="tokens"), tmp_path / "out")
    trees = []
    for path in config.models:
        with open_checkpoint(path) as checkpoint:
            trees.append({name: checkpoint.read(name) for name in checkpoint.specs})
    family = learning.prepare_family(trees, **FAR, layout="pytorch", model_type="bert")
    start = learning.compose_tree(family, {})
    with open_checkpoint(tmp_path / "out") as merged:
        moved = {name: np.abs(merged.read(name) - np.asarray(start[name])).max() for name in start}
    assert all(
        change > 1e-4 for name, change in moved.items() if name.endswith("dense.weight") and "pooler" not in name
    )
    assert moved["pooler.dense.weight"] < 1e-6
    zero = run_learning(
        MergeConfig.model_validate(config.model_dump()), settle(encoders, loss="tokens", steps=0), tmp_path / "zero"
    )
    assert zero.loss_after == zero.loss_before == pytest.approx(result.loss_before)
    merge_checkpoints(config.model_copy(update={"method": "relative"}), tmp_path / "untuned")
    zero, untuned = (tree_bytes(tmp_path / name)["model.safetensors"] for name in ("zero", "untuned"))
    assert zero == untuned


@pytest.mark.parametrize(
    "loss", ["features", "entropy", pytest.param("weighted-entropy", marks=pytest.mark.slow), "cross-entropy"]
)
def test_losses_go_down(encoders, tmp_path, loss):
    heads, labels = loss != "features", "label" if loss == "cross-entropy" else None
    settings = settle(encoders, heads=heads, loss=loss, label_field=labels, pull=1e-3, steps=12)
    config = configure(encoders, method="task_arithmetic", base=str(encoders / "base"))
    result = run_learning(config, settings, tmp_path / "out")
    assert result.loss_after < result.loss_before
    assert (result.agreement_after is None) == (loss == "features")


def test_a_pair_of_language_models_learns_the_settings_of_rgsp(tmp_path):
    place = save_family(tmp_path, tiny.make_llama, count=2)
    names = ("beta", "epsilon", "temperature", "fused_penalty", "w_q")
    one_of_a_shape = (r"re:layers\.0\.self_attn\.q_proj", r"re:layers\.1\.mlp\.up_proj")  # the rest only compiles
    config = configure(place, 2, method="rgsp", hyperparameters={"rank": 3}, include=one_of_a_shape)
    settings = settle(place, 2, learn=names, steps=2, recompute=True)
    result = run_learning(config, settings, tmp_path / "out")
    learned = read_config_file(result.config)
    first = learned["overrides"][0]["hyperparameters"]
    assert set(first) == set(names) and first["epsilon"] > 0 and first["epsilon"] != 0.05
    assert np.shape(first["w_q"]) == (3, 3)
    assert np.isfinite([result.loss_before, result.loss_after]).all()


def test_everything_wrong_is_said_at_once(encoders, tmp_path):
    with pytest.raises(RefusedError) as caught:
        LearnSettings(data=(), loss="magic", steps=-1, optimiser="newton", heads=("a",))
    assert len(caught.value.problems) == 5
    with pytest.raises(RefusedError) as caught:
        run_learning(configure(encoders), settle(encoders, learn=("rank",)), tmp_path / "out")
    known = "scale, reach, directions, rest, tensors"
    assert f"'rank' of 'relative' cannot be learned; there is {known}" in str(caught.value)
    with pytest.raises(RefusedError) as caught:
        run_learning(configure(encoders), settle(encoders, 2, loss="entropy"), tmp_path / "out")
    assert list(caught.value.problems) == ["2 data for 3 models: give one --data for each, in order"]
    with pytest.raises(RefusedError) as caught:
        run_learning(configure(encoders), settle(encoders, loss="entropy"), tmp_path / "out")
    assert len(caught.value.problems) == 3 and "has no head" in caught.value.problems[0]
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_run_is_told_which_can(encoders, tmp_path):
    for k in range(2):
        place = tmp_path / f"expert-{k}"
        shutil.copytree(encoders / place.name, place)
        facts = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(facts | {"model_type": "clip"}))
        shutil.copy(encoders / f"{k}.jsonl", tmp_path)
    with pytest.raises(RefusedError) as caught:
        run_learning(configure(tmp_path, 2), settle(tmp_path, 2), tmp_path / "out")
    listed = caught.value.problems[0].split("the families are ")[1].split(", ")
    assert len(caught.value.problems) == 2 and set(listed) == set(RUNNABLE)
    assert not {"clip", "qwen2_vl", "t5"} & set(listed)


def test_layers_that_are_recomputed_keep_less_and_give_the_same():
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    )
    model = transformers.LlamaModel(config)
    weights = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    shapes = {name: x.shape for name, x in weights.items()}
    ids = np.random.default_rng(0).integers(0, 20, (4, 64)).astype(np.int32)

    def make(wrap):
        ours = load_weights(FAMILIES["llama"].build(config.to_dict(), shapes), weights)
        graph, state = nnx.split(ours)

        def loss(state):
            model = nnx.merge(graph, state)
            return (wrap(model)(ids) ** 2).mean()

        return loss, state

    (plain, state), (thrifty, _) = make(lambda model: model), make(recompute_layers)

    def count_kept(f):
        """Numbers that the forward pass leaves for the backward pass."""
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda state: jax.vjp(f, state)[1], state)))

    assert count_kept(thrifty) < 0.5 * count_kept(plain)
    ours, theirs = (jax.jit(jax.grad(f))(state) for f in (plain, thrifty))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
