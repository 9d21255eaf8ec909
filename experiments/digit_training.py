"""Vision transformers on the digits: an ancestor and an expert per task, each trained in one compiled call and kept."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digit_tasks import CLASSES, DigitTask, Regime, load_parts, view
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.models import Vit, VitConfig, extract_parameters, replace_parameters

PyTree = Any

BATCH = 50
WEIGHT_DECAY = 1e-4
ANCESTOR_EPOCHS, ANCESTOR_RATE = 20, 1e-3


@dataclass(frozen=True)
class Training:
    """What decides the experts of a seed, beside the regime."""

    width: int = 64
    learning_rate: float = 3e-4
    epochs: int = 10

    def configure(self) -> VitConfig:
        """Return the encoder: four layers, four heads, 4 x 4 patches, every matrix but the patches' square."""
        return VitConfig(
            hidden_size=self.width,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=self.width,
            layer_norm_eps=1e-6,
            image_size=8,
            patch_size=4,
            num_channels=1,
        )


class Classifier(NamedTuple):
    """An encoder's parameters, and a head on its class token."""

    encoder: PyTree
    weight: Float[Array, "width classes"]
    bias: Float[Array, "classes"]


@functools.cache
def make_shape(config: VitConfig) -> nnx.Module:
    """Return the encoder without values."""
    return nnx.eval_shape(lambda: Vit(config, rngs=nnx.Rngs(0)))


def encode(config: VitConfig, encoder: PyTree, images: Array) -> Float[Array, "rows width"]:
    """Return the class token of every image."""
    model: Any = replace_parameters(make_shape(config), encoder)
    return model(images)[:, 0]


def answer(
    config: VitConfig, classifier: Classifier, answers: Bool[Array, "classes"], images: Array
) -> Float[Array, "rows classes"]:
    """Return the logits; outputs that are no answers of the task are far below the others."""
    features = encode(config, classifier.encoder, images)
    logits = jnp.matmul(features, classifier.weight) + classifier.bias[None]
    return jnp.where(answers[None], logits, jnp.finfo(logits.dtype).min / 2)


@functools.partial(jax.jit, static_argnames=("config",))
def train(
    config: VitConfig,
    start: Classifier,
    images: Float[Array, "rows 8 8 1"],
    labels: Int[Array, "rows"],
    answers: Bool[Array, "classes"],
    order: Int[Array, "steps batch"],
    learning_rate: Float[Array, ""],
    train_head: Float[Array, ""],
) -> tuple[Classifier, Float[Array, "steps"]]:
    """Return the classifier after AdamW steps on the rows of `order`, and the cross-entropy of every step.

    The rate rises to `learning_rate` over a tenth of the steps and falls to zero as a cosine; the head's is multiplied
    by `train_head`, 0 to keep it.
    """
    steps = order.shape[0]
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps)), weight_decay=WEIGHT_DECAY
    )

    def loss(classifier: Classifier, rows: Array) -> Array:
        logits = answer(config, classifier, answers, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry: Any, rows: Array) -> Any:
        classifier, moments = carry
        value, gradient = jax.value_and_grad(loss)(classifier, rows)
        updates, moments = optimizer.update(gradient, moments, classifier)
        # The optimiser runs at peak rate 1, and its updates are linear in the rate: one compilation for every rate.
        updates = jax.tree.map(lambda u: u * learning_rate, updates)
        updates = updates._replace(weight=updates.weight * train_head, bias=updates.bias * train_head)
        return (optax.apply_updates(classifier, updates), moments), value

    (classifier, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), order)
    return classifier, losses


def fit(
    training: Training, start: Classifier, task: DigitTask, seed: int, draw: int, train_head: bool = True
) -> Classifier:
    """Return `start` trained on a task's rows of the seed's training part; `draw` numbers the order of the rows."""
    rows = load_parts(seed)["train"]
    rng = np.random.default_rng((seed, draw))
    members = np.flatnonzero(task.belongs(rows.digits))
    # Smaller tasks repeat their rows: every task takes the same steps, and the scan is compiled once.
    steps = training.epochs * len(rows.digits) // BATCH
    rounds = -(-steps * BATCH // len(members))
    order = np.concatenate([rng.permutation(members) for _ in range(rounds)])[: steps * BATCH].reshape(steps, BATCH)
    arguments = view(rows, task.domain), task.label(rows.digits), task.answers, order.astype(np.int32)
    rates = np.float32(training.learning_rate), np.float32(train_head)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        return train(training.configure(), start, *map(jnp.asarray, arguments + rates))[0]


def draw_head(training: Training, key: Array) -> tuple[Array, Array]:
    """Return weight and bias of a new head."""
    scale = training.width**-0.5
    weight = jax.random.normal(key, (training.width, CLASSES), jnp.float32) * jnp.float32(scale)
    return weight, jnp.zeros(CLASSES, jnp.float32)


class Store:
    """Trained classifiers by what decides them, in memory and in a directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.known: dict[Path, Classifier] = {}

    def get(self, training: Training, what: Mapping[str, Any], make: Callable[[], Classifier]) -> Classifier:
        """Return what was made for this before, else `make()`."""
        text = json.dumps({"training": asdict(training), "code": hash_code(), **what}, sort_keys=True)
        path = self.directory / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
        if path not in self.known:
            shape = extract_parameters(make_shape(training.configure()))
            if path.exists():
                with np.load(path) as file:
                    arrays = [jnp.asarray(file[f"{i}"]) for i in range(len(file.files))]
                structure = jax.tree.structure(Classifier(shape, jnp.zeros(()), jnp.zeros(())))
                self.known[path] = jax.tree.unflatten(structure, arrays)
            else:
                self.known[path] = make()
                self.directory.mkdir(parents=True, exist_ok=True)
                leaves = {f"{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(self.known[path]))}
                partial = path.with_suffix(".partial.npz")
                np.savez(partial, **leaves)
                partial.replace(path)
        return self.known[path]


@functools.cache
def hash_code() -> str:
    """Return a hash of what trains: experts of other code are not taken for this one's."""
    files = (Path(__file__), Path(__file__).with_name("digit_tasks.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def train_ancestor(store: Store, training: Training, regime: Regime, seed: int) -> Classifier:
    """Return the model that the experts of a seed start from."""
    long = replace(training, epochs=ANCESTOR_EPOCHS, learning_rate=ANCESTOR_RATE)

    def make() -> Classifier:
        keys = jax.random.split(jax.random.key(seed))
        encoder = extract_parameters(Vit(training.configure(), rngs=nnx.Rngs(keys[0])))
        return fit(long, Classifier(encoder, *draw_head(training, keys[1])), regime.ancestor, seed, 0)

    return store.get(long, {"seed": seed, "task": asdict(regime.ancestor)}, make)


def train_expert(store: Store, training: Training, regime: Regime, task: DigitTask, seed: int) -> Classifier:
    """Return one task's expert, with the head that answers it."""
    number = 1 + list(regime.tasks).index(task)
    ancestor = train_ancestor(store, training, regime, seed)

    def make() -> Classifier:
        start = ancestor
        if not regime.common_head:
            weight, bias = draw_head(training, jax.random.fold_in(jax.random.key(seed), number))
            start = ancestor._replace(weight=weight, bias=bias)
        return fit(training, start, task, seed, number, train_head=not regime.common_head)

    what = {"seed": seed, "task": asdict(task), "ancestor": asdict(regime.ancestor), "number": number}
    return store.get(training, what | {"common_head": regime.common_head}, make)
