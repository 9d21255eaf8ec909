"""What alignment recovers of vision transformers whose channels, heads and units stand in another order.

    python experiments/permuted_vits.py

Hardware: 2 CPU cores, 4 GB. Runtime: about 5 minutes on cores that others use too. Nothing is downloaded.

The vision transformers of digit_training.py (four layers, four heads, 64 wide, trained on the ten digits), brought to a
form without what the function does not see: scales and biases of the norms folded into what reads from them, the mean
over the channels out of everything that writes to or reads from the residual stream, biases of keys out, of values and
patches into the next sum. A `twin` has its residual channels, its heads and its MLP units shuffled and every head
rotated within, a `noisy twin` normal noise of .1 of each tensor's standard deviation besides; models `trained apart`
share the data alone.

Alignments choose permutations of channels, heads and units, from tensors that what lies within a head does not change
(a head is its `W_Q' W_K` and its `W_O W_V`); heads are rotated within afterwards, by the polar factor, for every
alignment but `none`. Their names are those of permuted_twins.py, `fused without geometry` being at the settings of
`GW, fused`; couplings are rounded to permutations, since a norm over averaged channels is no norm of their average.
`uniform coupling`, not rounded, knows nothing. The mean of the two is measured as there.

Results go to experiments/results/permuted_vits.md and .json. Expected: twins are recovered wholly by every alignment,
noisy ones by all but layers alone (.984 of the neurons). Trained apart, nothing works: .17 to .29 by all alignments
with loss barriers near 2, .12 without one, and .74 by the control, which is the first model at half its size.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digit_tasks import DigitTask, load_parts
from digit_training import ANCESTOR_EPOCHS, ANCESTOR_RATE, Classifier, Training, answer, draw_head, fit, make_shape
from flax import nnx
from jaxtyping import Array, Int
from tables import RESULTS, compare, describe_command, estimate, table, write_results

from rgsp_jax.linalg import polar_factor
from rgsp_jax.merging import carry_neurons, couple_neurons, match_weights, permute, round_coupling, transport_neurons
from rgsp_jax.models import Vit, extract_parameters

TRAINING = Training(width=64, learning_rate=ANCESTOR_RATE, epochs=ANCESTOR_EPOCHS)
CONFIG = TRAINING.configure()
LAYERS, HEADS = CONFIG.num_hidden_layers, CONFIG.num_attention_heads
NOISE = 0.1
"""Of a noisy twin, in each tensor's own standard deviation."""
KINDS = ("twin", "noisy twin", "trained apart")
CONTROL = "uniform coupling"
APART = 1000

Model = Mapping[str, Array]
Orders = Mapping[str, Int[Array, "n"]]


def name_axes(layer: int) -> dict[str, tuple[str | None, ...]]:
    """Return tensor -> axes of one layer; every tensor is [outputs, inputs]."""
    heads, mlp = f"heads_{layer}", f"mlp_{layer}"
    return {
        f"{layer}.query": (heads, None, "stream"),
        f"{layer}.query_bias": (heads, None),
        f"{layer}.key": (heads, None, "stream"),
        f"{layer}.value": (heads, None, "stream"),
        f"{layer}.output": ("stream", heads, None),
        f"{layer}.output_bias": ("stream",),
        f"{layer}.up": (mlp, "stream"),
        f"{layer}.up_bias": (mlp,),
        f"{layer}.down": ("stream", mlp),
        f"{layer}.down_bias": ("stream",),
    }


ENDS: dict[str, tuple[str | None, ...]] = {
    "patch": ("stream", None),
    "position": ("stream", None),
    "head": (None, "stream"),
    "head_bias": (None,),
}
SPEC = {**ENDS, **{name: axes for layer in range(LAYERS) for name, axes in name_axes(layer).items()}}
"""Of the models as they are merged."""
WITHIN = ("query", "query_bias", "key", "value", "output")
"""What depends on the coordinates within a head."""
MATCHED = {
    **{name: axes for name, axes in SPEC.items() if name.split(".")[-1] not in WITHIN},
    **{f"{layer}.{pair}": (f"heads_{layer}", "stream", "stream") for layer in range(LAYERS) for pair in ("qk", "ov")},
}
"""Of what is matched."""


def fold(classifier: Classifier) -> dict[str, Array]:
    """Return a classifier in the form that is merged: the same function."""
    tree, width = classifier.encoder, CONFIG.hidden_size

    def centre(x: Array, axis: int) -> Array:
        return x - jnp.mean(x, axis=axis, keepdims=True)

    def read(norm: Any, kernel: Array, bias: Array) -> tuple[Array, Array]:
        """A linear map [inputs, outputs] behind a norm, as [outputs, inputs] behind one that only normalises."""
        return centre((norm["scale"][:, None] * kernel).T, 1), bias + jnp.matmul(norm["bias"], kernel)

    position = tree["position_embeddings"][0]
    start = jnp.concatenate([tree["cls_token"][0], jnp.broadcast_to(tree["patch"]["bias"], position[1:].shape)])
    patch = tree["patch"]["kernel"].reshape(-1, width).T
    model = {"patch": centre(patch, 0), "position": centre((position + start).T, 0)}
    for i, layer in tree["layers"].items():
        attention, norm = layer["attention"], layer["attention_norm"]
        parts = {part: read(norm, **attention[part]) for part in ("query", "key", "value")}
        for part, (weight, _) in parts.items():
            model[f"{i}.{part}"] = weight.reshape(HEADS, -1, width)
        model[f"{i}.query_bias"] = parts["query"][1].reshape(HEADS, -1)
        output = attention["output"]
        model[f"{i}.output"] = centre(output["kernel"].T, 0).reshape(width, HEADS, -1)
        # Attention sums to one: a bias of the values is one of the output. One of the keys moves all logits alike.
        bias = output["bias"] + jnp.matmul(parts["value"][1], output["kernel"])
        model[f"{i}.output_bias"] = centre(bias, 0)
        mlp = layer["mlp"]
        model[f"{i}.up"], model[f"{i}.up_bias"] = read(layer["mlp_norm"], **mlp["up"])
        model[f"{i}.down"] = centre(mlp["down"]["kernel"].T, 0)
        model[f"{i}.down_bias"] = centre(mlp["down"]["bias"], 0)
    model["head"], model["head_bias"] = read(tree["final_norm"], classifier.weight, classifier.bias)
    return model


def unfold(model: Model) -> Classifier:
    """Return the classifier that computes what a folded model says."""
    width = CONFIG.hidden_size
    plain = {"scale": jnp.ones(width, jnp.float32), "bias": jnp.zeros(width, jnp.float32)}

    def linear(weight: Array, bias: Array | None = None) -> dict[str, Array]:
        return {"kernel": weight.T, "bias": jnp.zeros(weight.shape[0], weight.dtype) if bias is None else bias}

    layers = {}
    for i in range(LAYERS):
        flat = {part: model[f"{i}.{part}"].reshape(-1, width) for part in ("query", "key", "value")}
        layers[i] = {
            "attention_norm": plain,
            "attention": {
                "query": linear(flat["query"], model[f"{i}.query_bias"].reshape(-1)),
                "key": linear(flat["key"]),
                "value": linear(flat["value"]),
                "output": linear(model[f"{i}.output"].reshape(width, -1), model[f"{i}.output_bias"]),
            },
            "mlp_norm": plain,
            "mlp": {
                "up": linear(model[f"{i}.up"], model[f"{i}.up_bias"]),
                "down": linear(model[f"{i}.down"], model[f"{i}.down_bias"]),
            },
        }
    size = CONFIG.patch_size
    encoder = {
        "patch": {"kernel": model["patch"].T.reshape(size, size, 1, width), "bias": plain["bias"]},
        "cls_token": jnp.zeros((1, 1, width), jnp.float32),
        "position_embeddings": model["position"].T[None],
        "layers": layers,
        "final_norm": plain,
    }
    like: Any = jax.tree.structure(extract_parameters(make_shape(CONFIG)))
    if jax.tree.structure(encoder) != like:
        raise ValueError(f"the encoder's parameters are named otherwise: {like}")
    return Classifier(encoder, model["head"].T, model["head_bias"])


def describe_heads(model: Model) -> dict[str, Array]:
    """Return what is matched: heads as the products that no rotation within them changes."""
    described = {name: model[name] for name in MATCHED if name in model}
    for i in range(LAYERS):
        described[f"{i}.qk"] = jnp.einsum("hds,hdt->hst", model[f"{i}.query"], model[f"{i}.key"])
        described[f"{i}.ov"] = jnp.einsum("shd,hdt->hst", model[f"{i}.output"], model[f"{i}.value"])
    return described


@jax.jit
def rotate_heads(a: Model, b: Model) -> dict[str, Array]:
    """Return b with every head rotated within, to be nearest to a's."""
    rotated = dict(b)
    for i in range(LAYERS):
        names = {part: f"{i}.{part}" for part in WITHIN}
        inner = sum(
            jnp.einsum("hds,hes->hde", x[..., None] if x.ndim == 2 else x, y[..., None] if y.ndim == 2 else y)
            for x, y in ((a[names[part]], b[names[part]]) for part in ("query", "query_bias", "key"))
        )
        logits = jax.vmap(polar_factor)(jnp.asarray(inner))
        inner = jnp.einsum("hds,hes->hde", a[names["value"]], b[names["value"]])
        inner += jnp.einsum("shd,she->hde", a[names["output"]], b[names["output"]])
        values = jax.vmap(polar_factor)(inner)
        for part in ("query", "key"):
            rotated[names[part]] = jnp.einsum("hde,hes->hds", logits, b[names[part]])
        rotated[names["query_bias"]] = jnp.einsum("hde,he->hd", logits, b[names["query_bias"]])
        rotated[names["value"]] = jnp.einsum("hde,hes->hds", values, b[names["value"]])
        rotated[names["output"]] = jnp.einsum("hde,she->shd", values, b[names["output"]])
    return rotated


@functools.cache
def compile_matching() -> Any:
    """Return weight matching, compiled once."""
    return jax.jit(lambda a, b: match_weights(a, b, MATCHED).permutations)


@functools.cache
def compile_transport() -> Any:
    """Return OTFusion's exact couplings as permutations, compiled once."""
    return jax.jit(
        lambda a, b: {
            layer: jnp.argmax(coupling.plan, axis=1)
            for layer, coupling in transport_neurons(a, b, MATCHED).couplings.items()
        }
    )


def couple(**settings: Any) -> Callable[[Model, Model], Orders]:
    """Return the permutations of `couple_neurons` with these settings."""

    def align(a: Model, b: Model) -> Orders:
        return {
            layer: jax.jit(round_coupling)(found.plan)
            for layer, found in couple_neurons(a, b, MATCHED, **settings).items()
        }

    return align


def refine(first: Callable[[Model, Model], Orders]) -> Callable[[Model, Model], Orders]:
    """Return weight matching that starts from another alignment's permutations."""

    def align(a: Model, b: Model) -> Orders:
        orders = first(a, b)
        further = compile_matching()(a, permute(b, MATCHED, orders))
        return {layer: order[further[layer]] for layer, order in orders.items()}

    return align


FUSED, LINEAR = couple(), couple(geometry=False)
ALIGNMENTS: Mapping[str, Callable[[Model, Model], Orders]] = {
    "weight matching": lambda a, b: compile_matching()(a, b),
    "OTFusion, exact": lambda a, b: compile_transport()(a, b),
    "GW, layers alone": couple(common_ends=False, fused_penalty=0.0, sweeps=1),
    "GW, ends unknown": couple(common_ends=False, fused_penalty=4.0),
    "GW, fused": FUSED,
    "GW, fused, then matching": refine(FUSED),
    "fused without geometry": LINEAR,
}


@functools.cache
def train_model(seed: int, draw: int) -> dict[str, Array]:
    """Return a folded classifier of the ten digits; `draw` decides initial weights and the order of the rows."""
    keys = jax.random.split(jax.random.key(draw))
    encoder = extract_parameters(Vit(CONFIG, rngs=nnx.Rngs(keys[0])))
    return fold(fit(TRAINING, Classifier(encoder, *draw_head(TRAINING, keys[1])), DigitTask("digits"), seed, draw))


def make_pair(kind: str, seed: int) -> tuple[Model, Model, Orders | None]:
    """Return two models and, of twins, layer -> for every place of the first the neuron of the second."""
    a = train_model(seed, seed)
    if kind == "trained apart":
        return a, train_model(seed, seed + APART), None
    rng = np.random.default_rng(seed)
    b = dict(a)
    if kind == "noisy twin":
        b = {n: x + jnp.asarray(rng.normal(scale=NOISE * float(x.std()), size=x.shape), x.dtype) for n, x in b.items()}
    sizes = {axis: n for name, axes in SPEC.items() for axis, n in zip(axes, a[name].shape, strict=True) if axis}
    orders = {layer: jnp.asarray(rng.permutation(size)) for layer, size in sizes.items()}
    b = permute(b, SPEC, orders)
    wide = CONFIG.hidden_size // HEADS
    turns = [jnp.asarray(np.linalg.qr(rng.normal(size=(2, HEADS, wide, wide)))[0], jnp.float32) for _ in range(LAYERS)]
    for i, (logits, values) in enumerate(turns):
        for part, turn in (("query", logits), ("key", logits), ("value", values)):
            b[f"{i}.{part}"] = jnp.einsum("hde,hes->hds", turn, b[f"{i}.{part}"])
        b[f"{i}.query_bias"] = jnp.einsum("hde,he->hd", logits, b[f"{i}.query_bias"])
        b[f"{i}.output"] = jnp.einsum("hde,she->shd", values, b[f"{i}.output"])
    return a, b, {layer: jnp.argsort(order) for layer, order in orders.items()}


@jax.jit
def measure(model: Model, images: Array, digits: Array) -> tuple[Array, Array]:
    """Return accuracy and cross-entropy."""
    logits = answer(CONFIG, unfold(model), jnp.ones(logits_size(model), bool), images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()
    return (logits.argmax(-1).astype(digits.dtype) == digits).mean(), loss


def logits_size(model: Model) -> int:
    """Return how many classes there are."""
    return model["head_bias"].shape[0]


@dataclass(frozen=True)
class Row:
    """One alignment of one pair; see permuted_twins.Row."""

    kind: str
    seed: int
    alignment: str
    recovered: float | None
    accuracy: float
    own: float
    loss_barrier: float
    seconds: float


def run_pair(kind: str, seed: int) -> Iterator[Row]:
    """Yield a row for every alignment of one pair."""
    a, b, truth = make_pair(kind, seed)
    part = load_parts(seed)["test"]
    rows = jnp.asarray(part.images), jnp.asarray(part.digits)
    own, losses = zip(*(map(float, measure(model, *rows)) for model in (a, b)), strict=True)
    described = describe_heads(a), describe_heads(b)
    for name in ("none", CONTROL, *ALIGNMENTS):
        started, recovered = time.monotonic(), None
        if name == "none":
            aligned: Model = b
        elif name == CONTROL:
            plans = {
                layer: jnp.ones((n, n), jnp.float32)
                for layer, n in ((x, len(y)) for x, y in (truth or sizes_of(a)).items())
            }
            aligned = carry_neurons(b, SPEC, plans)
        else:
            with jax.numpy_dtype_promotion("standard"):
                orders = ALIGNMENTS[name](*described)
            aligned = rotate_heads(a, permute(b, SPEC, orders))
            if truth is not None:
                hits = [np.asarray(orders[layer]) == np.asarray(truth[layer]) for layer in truth]
                recovered = float(np.concatenate(hits).mean())
        middle = {key: (a[key] + aligned[key]) / 2 for key in a}
        accuracy, loss = map(float, measure(middle, *rows))
        seconds = time.monotonic() - started
        yield Row(kind, seed, name, recovered, accuracy, float(np.mean(own)), loss - float(np.mean(losses)), seconds)


def sizes_of(model: Model) -> Orders:
    """Return layer -> its neurons as they are."""
    return {
        axis: jnp.arange(n)
        for name, axes in SPEC.items()
        for axis, n in zip(axes, model[name].shape, strict=True)
        if axis
    }


def tabulate(rows: Sequence[Row]) -> list[str]:
    """Return Markdown."""
    text = []
    for kind in dict.fromkeys(row.kind for row in rows):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.kind == kind:
                groups.setdefault(row.alignment, []).append(row)
        head = ["alignment", "recovered", "accuracy of the mean", "over weight matching", "loss barrier"]
        lines = [["the two by themselves", "", str(estimate([row.own for row in groups["none"]])), "", ""]]
        for name, group in groups.items():
            shares = [row.recovered for row in group if row.recovered is not None]
            recovered = f"{np.mean(shares):.3f} ({sum(x == 1 for x in shares)} of {len(shares)})" if shares else ""
            pair = ({r.seed: r.accuracy for r in x} for x in (group, groups["weight matching"]))
            gain = compare(*pair)
            accuracy, barrier = (estimate([getattr(r, field) for r in group]) for field in ("accuracy", "loss_barrier"))
            told = "" if gain is None or name == "weight matching" else gain.signed
            lines.append([name, recovered, str(accuracy), told, barrier.signed])
        text += ["", f"## {kind}", "", table(head, lines)]
    return text


def find_headline(rows: Sequence[Row]) -> str:
    """Return one sentence."""
    parts = []
    for kind in ("twin", "noisy twin"):
        exact = {
            name: [row.recovered for row in rows if (row.kind, row.alignment) == (kind, name)] for name in ALIGNMENTS
        }
        told = [f"{name} {sum(x == 1 for x in found)} of {len(found)}" for name, found in exact.items() if found]
        parts += [f"{kind}s of a vision transformer recovered wholly: {', '.join(told)}"] if told else []
    apart = [row for row in rows if row.kind == "trained apart"]
    if apart:
        means = {
            name: np.mean([r.accuracy for r in apart if r.alignment == name]) for name in ("none", CONTROL, *ALIGNMENTS)
        }
        parts.append(f"mean of two trained apart: {', '.join(f'{name} {x:.3f}' for name, x in means.items())}")
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "permuted_vits")
    options = parser.parse_args(arguments)
    rows = []
    for kind, seed in itertools.product(options.kinds, options.seeds):
        for row in run_pair(kind, seed):
            rows.append(row)
            found = "" if row.recovered is None else f"  recovered {row.recovered:.3f}"
            shown = f"{kind} seed {seed}: {row.alignment:26s} {row.accuracy:.3f} {row.loss_barrier:+.3f}{found}"
            print(f"{shown}  ({row.seconds:.1f} s)", flush=True)
    settings = {name: getattr(options, name) for name in ("kinds", "seeds")}
    record = {"settings": settings, "rows": [asdict(row) for row in rows]}
    command = describe_command("permuted_vits", settings)
    write_results(options.out, command, find_headline(rows), record, tabulate(rows))
    return rows


if __name__ == "__main__":
    main()
