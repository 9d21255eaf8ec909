"""Sequential graft: every layer is refitted, in the order in which the model runs, on what the merged model feeds it.

A is the recipient, B the donor, `own` a few hundred unlabelled inputs of the recipient, `others` inputs for the donor:
its own if there are any, else `draw_pseudo_inputs`. For a linear layer with inputs k (a 1 is appended for the bias)

    W* = argmin  E_own |W k - A k_A|^2 / c  +  others_weight E_others |W k - B k_B|^2 / c'
                 +  own_share E_own |W k - B k_B|^2 / c  +  pull |W - W_t|^2 / n,
    W_t = A + t (B - A),  t = own_share / (1 + own_share),

where k is the input in the merged model, whose earlier layers are refitted already, k_A and k_B the inputs of A and B
on the same rows, and c = E_own |k|^2, c' = E_others |k|^2. Norms and embeddings are those of W_t. `own_share` is the
knob: 0 asks for the recipient's answers on the recipient's inputs, large values for the donor's on all. Where the
donor's inputs are the recipient's, this is close to interpolation.
One forward pass over all rows does it: the batches meet before each layer, its weight is solved for, and they go on
with it.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float, Int

MOVED = 0.2
"""A table's row has moved where the two models differ by this share of what the most moved rows differ by."""
SHORTEST = 8
BUCKET = 8
COMMON = 5
"""Offset in the Zipf law of pseudo-inputs: the first token of the vocabulary is not drawn all the time."""


class Rows(NamedTuple):
    """Token sequences, padded at the end."""

    ids: Int[np.ndarray, "rows time"]
    mask: Int[np.ndarray, "rows time"]


def batch(sequences: Sequence[Sequence[int]]) -> list[Rows]:
    """Return sequences in batches of similar length, each padded to a multiple of BUCKET."""
    lengths = np.array([-(-len(sequence) // BUCKET) * BUCKET for sequence in sequences])
    return [pad([sequences[i] for i in np.flatnonzero(lengths == n)], int(n)) for n in np.unique(lengths)]


def pad(sequences: Sequence[Sequence[int]], length: int) -> Rows:
    """Return sequences as one array, padded with 0 under a mask of 0."""
    ids = np.zeros((len(sequences), length), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    return Rows(ids, mask)


def find_moved(
    recipient: Float[np.ndarray, "rows width"], donor: Float[np.ndarray, "rows width"]
) -> Float[np.ndarray, "rows"]:
    """Return how far each row of a table moved between two fine-tunes of one ancestor; 0 where it did not.

    A row that neither of them looked up has only been decayed: rows that moved are the vocabulary of their data.
    """
    distance = np.linalg.norm(donor.astype(np.float64) - recipient, axis=1)
    return np.where(distance > MOVED * np.quantile(distance, 0.99), distance, 0)


def find_frame(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return the token that every sequence begins with and the one that every one ends with, where there are such."""
    first, last = {sequence[0] for sequence in sequences}, {sequence[-1] for sequence in sequences}
    return list(first) if len(first) == 1 else [], list(last) if len(last) == 1 else []


def draw_pseudo_inputs(
    token_moves: Float[np.ndarray, "vocabulary"],
    position_moves: Float[np.ndarray, "positions"],
    own: Sequence[Sequence[int]],
    count: int,
    longest: int,
    seed: int,
) -> list[list[int]]:
    """Return `count` random sequences of the tokens that moved, framed as the recipient's `own` inputs are.

    Tokens are drawn independently: in proportion to how far they moved, over their place in the vocabulary (which is in
    order of frequency, roughly; up to the framing tokens it is special tokens, left out). Lengths are uniform up to the
    last position that moved, or `longest`.

    Raises:
        ValueError: too few tokens moved: the models share their embeddings.
    """
    before, after = find_frame(own)
    weights = token_moves.astype(np.float64)
    weights[: max([-1, *before, *after]) + 1] = 0
    if np.count_nonzero(weights) < SHORTEST:
        raise ValueError("the two models share their embeddings: what the donor was trained on is not to be seen there")
    weights /= np.maximum(np.arange(len(weights)) - np.flatnonzero(weights)[0], 0) + COMMON
    weights /= weights.sum()
    moved = np.flatnonzero(position_moves)
    limit = max(SHORTEST, min(longest, int(moved[-1]) + 1 if len(moved) else longest))
    rng = np.random.default_rng(seed)
    inside = rng.integers(SHORTEST, limit + 1, size=count) - len(before) - len(after)
    return [[*before, *rng.choice(len(weights), size=n, p=weights).tolist(), *after] for n in inside]


@contextmanager
def hooked(model: torch.nn.Module, receive: Callable[[str, torch.nn.Linear, torch.Tensor], None]) -> Iterator[None]:
    """Hand every linear layer's input [rows, time, n] to `receive` before the layer runs."""

    def make(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def before(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].ndim == 3:  # a pooler sees one vector a row, and no task here uses it
                receive(name, layer, inputs[0])

        return before

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    handles = [layer.register_forward_pre_hook(make(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: torch.nn.Module, rows: Rows) -> None:
    """Run a model for its hooks."""
    with torch.no_grad():
        model(torch.from_numpy(rows.ids), torch.from_numpy(rows.mask))


def keep_inputs(model: torch.nn.Module, batches: Sequence[Rows]) -> dict[str, Float[np.ndarray, "tokens n"]]:
    """Return every linear layer's inputs at the tokens that the masks keep, batch by batch."""
    kept: dict[str, list[np.ndarray]] = {}
    for rows in batches:
        mask = rows.mask.astype(bool)
        with hooked(model, lambda name, _, x, mask=mask: kept.setdefault(name, []).append(x.numpy()[mask])):
            run(model, rows)
    return {name: np.concatenate(pieces) for name, pieces in kept.items()}


def run_in_step(
    model: torch.nn.Module,
    batches: Sequence[Rows],
    refit: Callable[[str, torch.nn.Linear, list[Float[np.ndarray, "tokens n"]]], None],
) -> None:
    """Run a model on several batches, a thread each, that meet before every linear layer.

    There, `refit(name, layer, inputs)` sees the inputs of all batches and may change the layer, before any goes on.
    """
    here = threading.local()
    inputs: list[Any] = [None] * len(batches)
    layers: dict[str, Any] = {}
    barrier = threading.Barrier(len(batches), action=lambda: refit(layers["name"], layers["layer"], list(inputs)))

    def meet(name: str, layer: torch.nn.Linear, x: torch.Tensor) -> None:
        inputs[here.index] = x.numpy()[batches[here.index].mask.astype(bool)]
        layers.update(name=name, layer=layer)
        barrier.wait()

    def work(index: int) -> None:
        here.index = index
        try:
            run(model, batches[index])
        except BaseException:
            barrier.abort()  # the others must not wait for this one
            raise

    with hooked(model, meet), ThreadPoolExecutor(len(batches)) as pool:
        futures = [pool.submit(work, index) for index in range(len(batches))]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error


@jax.jit
def augment(inputs: Float[Array, "tokens n"]) -> Float[Array, "tokens n+1"]:
    """Append the 1 that multiplies the bias."""
    return jnp.concatenate([inputs, jnp.ones((inputs.shape[0], 1), inputs.dtype)], axis=1)


@jax.jit
def fit_layer(
    start: Float[Array, "m n"],
    inputs: Sequence[Float[Array, "tokens n"]],
    targets: Sequence[Float[Array, "tokens m"]],
    weights: Float[Array, "terms"],
    pull: Float[Array, ""],
) -> Float[Array, "m n"]:
    """Return `argmin_W sum_i w_i E |W k_i - y_i|^2 / E |k_i|^2 + pull |W - start|^2 / n` by one Cholesky factor.

    Args:
        start: [W b], where `pull` pulls to.
        inputs, targets: k_i [tokens, n] and y_i [tokens, m] of every term.
        weights: w_i, of any scale.
        pull: 0 or more; no less than rounding is used.
    """
    n = start.shape[1]
    least = 10 * n * jnp.finfo(start.dtype).eps * jnp.sum(weights)  # what rounding of the other terms amounts to
    system = jnp.maximum(pull, least) / n * jnp.eye(n, dtype=start.dtype)
    right = jnp.zeros_like(start)
    for weight, k, y in zip(weights, inputs, targets, strict=True):
        scale = weight / jnp.sum(k * k)
        system += scale * jnp.matmul(k.T, k, precision="highest")
        missing = y - jnp.matmul(k, start.T, precision="highest")
        right += scale * jnp.matmul(missing.T, k, precision="highest")
    return start + jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system), right.T).T


def read_layer(layer: torch.nn.Linear) -> Float[Array, "m n"]:
    """Return [W b], or W where there is no b."""
    columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
    return jnp.asarray(torch.cat(columns, 1).detach().numpy())


def write_layer(layer: torch.nn.Linear, weight: Float[np.ndarray, "m n"]) -> None:
    """Set [W b], as `read_layer` gives it."""
    width = layer.in_features
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight[:, :width]))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(weight[:, width]))


def interpolate(recipient: torch.nn.Module, donor: torch.nn.Module, t: float) -> torch.nn.Module:
    """Return a third model, `A + t (B - A)` in every tensor of floats."""
    merged = copy.deepcopy(recipient)
    theirs = donor.state_dict()
    with torch.no_grad():
        for name, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(theirs[name] - tensor, alpha=t)
    return merged


def graft_sequentially(
    recipient: torch.nn.Module,
    donor: torch.nn.Module,
    own: Sequence[Rows],
    others: Sequence[Rows],
    *,
    own_share: float = 0.25,
    others_weight: float = 1.0,
    pull: float = 0.02,
) -> torch.nn.Module:
    """Return the graft of this module's docstring.

    Args:
        recipient, donor: models of one architecture, called with token ids and mask.
        own: the recipient's inputs, in batches.
        others: the donor's, or pseudo-inputs.
        own_share: the knob, 0 or more.
        others_weight: of the donor's answers on `others` against the recipient's on `own`.
        pull: to the interpolation, where no input says anything.
    """
    merged = interpolate(recipient, donor, own_share / (1 + own_share))
    mine, theirs = slice(0, len(own)), slice(len(own), None)
    terms = [(recipient, own, mine, 1.0), (donor, others, theirs, others_weight), (donor, own, mine, own_share)]
    terms = [term for term in terms if term[3] > 0]
    seen = [keep_inputs(model, batches) for model, batches, _, _ in terms]
    layers = [dict(model.named_modules()) for model, _, _, _ in terms]
    weights = jnp.asarray([weight for _, _, _, weight in terms], jnp.float32)

    def refit(name: str, layer: torch.nn.Linear, by_batch: list[Float[np.ndarray, "tokens n"]]) -> None:
        extend = jnp.asarray if layer.bias is None else augment
        inputs = [extend(np.concatenate(by_batch[part])) for _, _, part, _ in terms]
        targets = [
            jnp.matmul(extend(kept[name]), read_layer(model[name]).T, precision="highest")
            for kept, model in zip(seen, layers, strict=True)
        ]
        write_layer(layer, np.array(fit_layer(read_layer(layer), inputs, targets, weights, jnp.float32(pull))))

    run_in_step(merged, [*own, *others], refit)
    return merged
