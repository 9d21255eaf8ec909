"""Training of a classifier in one compiled call: epochs and steps are scans, so nothing returns to Python between."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rgsp_jax.models import VitClassifier


class Schedule(NamedTuple):
    """How long and how hard to train: AdamW under a cosine that rises over a tenth of the steps and falls to zero."""

    epochs: int
    learning_rate: float
    batch: int = 64
    weight_decay: float = 1e-4


def train_classifier(
    model: VitClassifier,
    images: Float[np.ndarray, "rows height width channels"],
    labels: Int[np.ndarray, "rows"],
    schedule: Schedule,
    key: Key[Array, ""],
) -> tuple[VitClassifier, Float[Array, "epochs"]]:
    """Return the trained model and the mean cross-entropy of every epoch; `model` itself is left as it is.

    `key` draws the order of the rows, anew for every epoch; rows that fill no batch are left out of that epoch.
    Raises ValueError where there are fewer rows than a batch holds.
    """
    if len(images) < schedule.batch:
        raise ValueError(f"{len(images)} rows do not fill a batch of {schedule.batch}")
    graphdef, state = nnx.split(model)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        state, losses = _train(graphdef, state, images, labels, schedule, key)
    return nnx.merge(graphdef, state), losses


@partial(jax.jit, static_argnames=("graphdef", "schedule"))
def _train(graphdef, state, images, labels, schedule, key):
    rows = images.shape[0]
    steps = rows // schedule.batch
    total = schedule.epochs * steps
    warm_up = optax.warmup_cosine_decay_schedule(0.0, schedule.learning_rate, max(1, total // 10), max(2, total))
    optimizer = optax.adamw(warm_up, weight_decay=schedule.weight_decay)

    def loss(state, chosen):
        logits = nnx.merge(graphdef, state)(images[chosen])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

    def step(carry, chosen):
        state, moments = carry
        value, gradient = jax.value_and_grad(loss)(state, chosen)
        updates, moments = optimizer.update(gradient, moments, state)
        return (optax.apply_updates(state, updates), moments), value

    def epoch(carry, key):
        order = jax.random.permutation(key, rows)[: steps * schedule.batch].reshape(steps, schedule.batch)
        carry, values = jax.lax.scan(step, carry, order)
        return carry, values.mean()

    keys = jax.random.split(key, schedule.epochs)
    (state, _), losses = jax.lax.scan(epoch, (state, optimizer.init(state)), keys)
    return state, losses
