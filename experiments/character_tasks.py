"""Small decoders on strings: an ancestor that has begun to rewrite them in eight ways, and an expert for each.

A library of `relative_suite.py`. A sequence is a tag, LENGTH letters, a bar, and the letters rewritten; the tag names
the task. The ancestor is stopped early in training on all tasks; an expert goes on with its own. The score is the share
of the rewritten letters that the decoder predicts, the true ones before it given. Everything is drawn from the seed;
nothing is downloaded.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contenders import Problem, PyTree
from flax import nnx
from jaxtyping import Array, Float, Int

from rgsp_jax.models import DecoderConfig, DecoderLm, extract_parameters, replace_parameters
from rgsp_jax.models.rotary import Rotary

LETTERS, LENGTH = 16, 8
BATCH, STEPS, ANCESTOR_STEPS, ANCESTOR_RATE = 64, 300, 350, 1e-3
ROWS = {"validation": 200, "test": 500}

Words = Int[np.ndarray, "rows length"]
TASKS: Mapping[str, Callable[[Words], Words]] = {
    "reverse": lambda x: x[:, ::-1],
    "next_letter": lambda x: (x + 1) % LETTERS,
    "rotate": lambda x: np.roll(x, -1, axis=1),
    "swap_neighbours": lambda x: x.reshape(len(x), -1, 2)[:, :, ::-1].reshape(x.shape),
    "complement": lambda x: LETTERS - 1 - x,
    "swap_halves": lambda x: np.roll(x, LENGTH // 2, axis=1),
    "odd_even_letters": lambda x: x ^ 1,
    "mirror": lambda x: np.concatenate([x[:, : LENGTH // 2], x[:, : LENGTH // 2][:, ::-1]], axis=1),
}
"""Name -> what becomes of the letters, half of them by position and half by value. A task's tag is its number."""
BAR = LETTERS
VOCABULARY = LETTERS + 1 + len(TASKS)


def write(name: str | None, words: Words, rng: np.random.Generator) -> Int[np.ndarray, "rows time"]:
    """Return the sequences of a task; None is a task drawn for each row."""
    numbers = (
        rng.integers(len(TASKS), size=len(words)) if name is None else np.full(len(words), list(TASKS).index(name))
    )
    rewritten = np.stack([rewrite(words) for rewrite in TASKS.values()])[numbers, np.arange(len(words))]
    bar = np.full((len(words), 1), BAR)
    return np.concatenate([LETTERS + 1 + numbers[:, None], words, bar, rewritten], axis=1).astype(np.int32)


def draw_words(rng: np.random.Generator, rows: int) -> Words:
    return rng.integers(LETTERS, size=(rows, LENGTH))


@functools.cache
def make_shape(width: int) -> DecoderLm:
    """Return the decoder without values: three layers, four heads, gated MLPs of twice the width."""
    config = DecoderConfig(VOCABULARY, width, 2 * width, 3, 4, 4, width // 4, Rotary(10_000.0))
    return nnx.eval_shape(lambda: DecoderLm(config, rngs=nnx.Rngs(0)))


def answer(width: int, tree: PyTree, tokens: Int[Array, "rows time"]) -> Float[Array, "rows length vocabulary"]:
    """Return the logits of the rewritten letters."""
    model: Any = replace_parameters(make_shape(width), tree)
    return model(tokens[:, :-1])[:, -LENGTH:]


@functools.partial(jax.jit, static_argnames=("width",))
def fit(width: int, start: PyTree, tokens: Int[Array, "steps batch time"], rate: Float[Array, ""]) -> PyTree:
    """Return `start` after a step of AdamW on every batch; the rate rises over a tenth of them and falls to zero."""
    steps = tokens.shape[0]
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps)), weight_decay=1e-4
    )

    def loss(tree: PyTree, batch: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(answer(width, tree, batch), batch[:, -LENGTH:]).mean()

    def step(carry: Any, batch: Array) -> Any:
        tree, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(tree, batch), moments, tree)
        return (optax.apply_updates(tree, jax.tree.map(lambda u: u * rate, updates)), moments), None

    return jax.lax.scan(step, (start, optimizer.init(start)), tokens)[0][0]


@functools.partial(jax.jit, static_argnames=("width",))
def count_right(width: int, tree: PyTree, tokens: Int[Array, "rows time"]) -> Float[Array, ""]:
    """Return the share of the rewritten letters that are predicted."""
    return jnp.mean((answer(width, tree, tokens).argmax(-1).astype(tokens.dtype) == tokens[:, -LENGTH:]).astype(float))


def make_batches(name: str | None, rng: np.random.Generator, steps: int) -> Int[Array, "steps batch time"]:
    tokens = write(name, draw_words(rng, steps * BATCH), rng)
    return jnp.asarray(tokens.reshape(steps, BATCH, -1))


@functools.lru_cache(maxsize=16)
def train_ancestor(width: int, seed: int) -> PyTree:
    """Return the model that has begun with every task."""
    config = make_shape(width).decoder.config
    start = extract_parameters(DecoderLm(config, rngs=nnx.Rngs(seed)))
    tokens = make_batches(None, np.random.default_rng((seed, 0)), ANCESTOR_STEPS)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        return fit(width, start, tokens, jnp.float32(ANCESTOR_RATE))


@functools.lru_cache(maxsize=64)
def train_expert(name: str, width: int, learning_rate: float, seed: int) -> PyTree:
    """Return the ancestor fine-tuned on one task."""
    tokens = make_batches(name, np.random.default_rng((seed, 1 + list(TASKS).index(name))), STEPS)
    with jax.numpy_dtype_promotion("standard"):
        return fit(width, train_ancestor(width, seed), tokens, jnp.float32(learning_rate))


def choose_tasks(seed: int, experts: int) -> Sequence[str]:
    """Return the seed's first tasks; more experts keep those that fewer had."""
    return [list(TASKS)[i] for i in np.random.default_rng((seed, len(TASKS))).permutation(len(TASKS))[:experts]]


def make_problem(width: int, learning_rate: float, seed: int, experts: int) -> Problem:
    """Return experts, their ancestor, and the share of letters that they predict."""
    names = choose_tasks(seed, experts)
    rng = np.random.default_rng((seed, 100))
    words = {part: draw_words(rng, rows) for part, rows in ROWS.items()}
    rows = {part: [jnp.asarray(write(name, x, rng)) for name in names] for part, x in words.items()}
    return Problem(
        experts=[train_expert(name, width, learning_rate, seed) for name in names],
        tasks=list(names),
        score=lambda tree, part: [float(count_right(width, tree, tokens)) for tokens in rows[part]],
        seed=seed,
        group={},
        base=train_ancestor(width, seed),
    )
