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
One forward pass over all rows does it: a hook before each layer solves for its weight, and the pass goes on with it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float, Int

MOVED = 0.2
"""A table's row has moved where the two models differ by this share of what the most moved rows differ by."""
SHORTEST = 8
COMMON = 5
"""Offset in the Zipf law of pseudo-inputs: the first token of the vocabulary is not drawn all the time."""


class Rows(NamedTuple):
    """Token sequences, padded at the end."""

    ids: Int[np.ndarray, "rows time"]
    mask: Int[np.ndarray, "rows time"]


def pad(sequences: Sequence[Sequence[int]]) -> Rows:
    """Return sequences as one array, padded with 0 under a mask of 0."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
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


def draw_pseudo_inputs(
    token_moves: Float[np.ndarray, "vocabulary"],
    position_moves: Float[np.ndarray, "positions"],
    frame: tuple[int, int],
    count: int,
    longest: int,
    seed: int,
) -> list[list[int]]:
    """Return `count` random sequences of the tokens that moved, between the first and the last token of every input.

    Tokens are drawn independently: in proportion to how far they moved, over their place in the vocabulary (which is in
    order of frequency, roughly; the special tokens before it are left out). Lengths are uniform up to the last position
    that moved, or `longest`.

    Raises:
        ValueError: too few tokens moved: the models share their embeddings.
    """
    weights = token_moves.astype(np.float64)
    weights[: max(frame) + 1] = 0
    if np.count_nonzero(weights) < SHORTEST:
        raise ValueError("the two models share their embeddings: what the donor was trained on is not to be seen there")
    weights /= np.maximum(np.arange(len(weights)) - np.flatnonzero(weights)[0], 0) + COMMON
    weights /= weights.sum()
    moved = np.flatnonzero(position_moves)
    limit = max(SHORTEST, min(longest, int(moved[-1]) + 1 if len(moved) else longest))
    rng = np.random.default_rng(seed)
    lengths = rng.integers(min(SHORTEST, limit), limit + 1, size=count)
    return [[frame[0], *rng.choice(len(weights), size=n - 2, p=weights).tolist(), frame[1]] for n in lengths]


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


def keep_inputs(model: torch.nn.Module, rows: Rows) -> dict[str, Float[np.ndarray, "tokens n"]]:
    """Return every linear layer's inputs at the tokens that the mask keeps."""
    kept: dict[str, np.ndarray] = {}
    mask = rows.mask.astype(bool)
    with hooked(model, lambda name, _, x: kept.__setitem__(name, x.numpy()[mask])):
        run(model, rows)
    return kept


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
        pull: above 0.
    """
    n = start.shape[1]
    system = pull / n * jnp.eye(n, dtype=start.dtype)
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
    own: Rows,
    others: Rows,
    *,
    own_share: float = 0.25,
    others_weight: float = 1.0,
    pull: float = 0.02,
) -> torch.nn.Module:
    """Return the graft of this module's docstring.

    Args:
        recipient, donor: models of one architecture, called with token ids and mask.
        own: the recipient's inputs.
        others: the donor's, or pseudo-inputs.
        own_share: the knob, 0 or more.
        others_weight: of the donor's answers on `others` against the recipient's on `own`.
        pull: to the interpolation, where no input says anything.
    """
    merged = interpolate(recipient, donor, own_share / (1 + own_share))
    terms = [(recipient, own, 1.0), (donor, others, others_weight), (donor, own, own_share)]
    terms = [term for term in terms if term[2] > 0]
    seen = [keep_inputs(model, rows) for model, rows, _ in terms]
    layers = [dict(model.named_modules()) for model, _, _ in terms]
    weights = jnp.asarray([weight for _, _, weight in terms], jnp.float32)
    together = join(own, others)
    masks: Mapping[int, np.ndarray] = dict(zip((id(own), id(others)), split_mask(own, others), strict=True))

    def refit(name: str, layer: torch.nn.Linear, x: torch.Tensor) -> None:
        values = x.numpy()
        extend = jnp.asarray if layer.bias is None else augment
        inputs = [extend(values[masks[id(rows)]]) for _, rows, _ in terms]
        targets = [
            jnp.matmul(extend(kept[name]), read_layer(theirs[name]).T, precision="highest")
            for kept, theirs in zip(seen, layers, strict=True)
        ]
        write_layer(layer, np.array(fit_layer(read_layer(layer), inputs, targets, weights, jnp.float32(pull))))

    with hooked(merged, refit):
        run(merged, together)
    return merged


def join(a: Rows, b: Rows) -> Rows:
    """Return the rows of both in one batch."""
    width = max(a.ids.shape[1], b.ids.shape[1])
    widened = [np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a.ids, b.ids, a.mask, b.mask)]
    return Rows(np.concatenate(widened[:2]), np.concatenate(widened[2:]))


def split_mask(a: Rows, b: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each of two sets of rows, where its tokens are in the batch of both."""
    mask = join(a, b).mask.astype(bool)
    first, second = mask.copy(), mask.copy()
    first[len(a.ids) :] = False
    second[: len(a.ids)] = False
    return first, second
