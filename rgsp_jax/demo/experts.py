"""Experts: one ancestor trained on the ten digits, fine-tuned for each task, written as Hugging Face directories."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from rgsp_jax.checkpoint import open_checkpoint, write_safetensors
from rgsp_jax.demo.tasks import TASKS, Task, load_split
from rgsp_jax.demo.training import Schedule, train_classifier
from rgsp_jax.models import Vit, VitClassifier, VitConfig, export_weights, load_weights

VIT = VitConfig(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    layer_norm_eps=1e-6,
    image_size=8,
    patch_size=4,
    num_channels=1,
)
"""Every matrix but the patches' is 64 x 64: a merge compiles once per shape, and half its time here is compilation."""
ANCESTOR_SCHEDULE = Schedule(epochs=20, learning_rate=1e-3)
EXPERT_SCHEDULE = Schedule(epochs=8, learning_rate=1e-4)


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's numbers.

    The experts are tuned lightly on purpose: there merging is a problem, as the average loses much of what they know,
    and a method can show what it is worth. Tuned longer and harder (`expert=Schedule(15, 1e-3)`) their average is
    close to them, and `relative` loses to it. How far methods differ also depends on the seed.
    """

    seed: int = 0
    ancestor: Schedule = ANCESTOR_SCHEDULE
    expert: Schedule = EXPERT_SCHEDULE
    model: VitConfig = VIT
    tasks: tuple[Task, ...] = TASKS


@dataclass(frozen=True)
class Expert:
    """A fine-tuned encoder on disk, with the head of its task kept apart: heads are never merged."""

    task: Task
    model: Path
    """Hugging Face directory of the encoder: config.json and model.safetensors, PyTorch layout."""
    head: Path
    """Safetensors file: `weight [2, width]` and `bias [2]`, applied to the class token."""


def make_experts(directory: Path | str, settings: DemoSettings | None = None) -> list[Expert]:
    """Train the ancestor and one expert per task; write `directory/<task>/{model/, head.safetensors}`.

    Deterministic for given settings on one machine. Raises OSError where `directory` cannot be written.
    """
    settings = settings or DemoSettings()
    split = load_split()
    keys = jax.random.split(jax.random.key(settings.seed), 1 + len(settings.tasks))
    # Ten classes and two: the ancestor's head is dropped, every expert starts from its encoder and a new head.
    start = VitClassifier(settings.model, 10, rngs=nnx.Rngs(settings.seed))
    ancestor, _ = train_classifier(start, split.train_images, split.train_digits, settings.ancestor, keys[0])
    encoder = export_weights(ancestor.encoder)
    experts = []
    for task, key in zip(settings.tasks, keys[1:], strict=True):
        head_key, order_key = jax.random.split(key)
        model = VitClassifier(settings.model, 2, rngs=nnx.Rngs(head_key))
        model.encoder = load_weights(model.encoder, encoder)
        labels = task.label(split.train_digits)
        model, _ = train_classifier(model, split.train_images, labels, settings.expert, order_key)
        experts.append(_write_expert(Path(directory) / task.name, task, model))
    return experts


def evaluate(model: Path | str, experts: Sequence[Expert]) -> dict[str, float]:
    """Return the test accuracy by task of the encoder in directory `model` under each expert's own head.

    Raises RefusedError where the directory holds no such encoder.
    """
    config = VitConfig.from_huggingface(json.loads((Path(model) / "config.json").read_text()))
    encoder = load_weights(nnx.eval_shape(lambda: Vit(config, rngs=nnx.Rngs(0))), _read_weights(Path(model)))
    split = load_split()
    features = np.asarray(_encode(encoder, jnp.asarray(split.test_images)))
    accuracies = {}
    for expert in experts:
        head = _read_weights(expert.head)
        answers = (features @ head["weight"].T + head["bias"]).argmax(axis=-1)
        accuracies[expert.task.name] = float((answers == expert.task.label(split.test_digits)).mean())
    return accuracies


@nnx.jit
def _encode(encoder: Vit, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch width"]:
    return encoder(images)[:, 0]


def _write_expert(directory: Path, task: Task, model: VitClassifier) -> Expert:
    expert = Expert(task, directory / "model", directory / "head.safetensors")
    expert.model.mkdir(parents=True)
    config = model.encoder.config.to_huggingface()
    (expert.model / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    write_safetensors(expert.model / "model.safetensors", export_weights(model.encoder))
    weights = export_weights(model)
    write_safetensors(expert.head, {name: weights[f"classifier.{name}"] for name in ("weight", "bias")})
    return expert


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}
