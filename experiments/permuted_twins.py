"""What alignment recovers of models whose neurons stand in another order, or that were trained apart.

    python experiments/permuted_twins.py --kinds twin 'noisy twin' 'rotated twin'
    python experiments/permuted_twins.py --kinds 'trained apart' --widths 64 128 256 512 \\
        --out experiments/results/permuted_apart

Hardware: 2 CPU cores, 2 GB. Runtime: about 15 and 10 minutes on cores that others use too. Nothing is downloaded.

Multilayer perceptrons with two hidden layers on scikit-learn's digits. A `twin` is the first model with its hidden
neurons shuffled, a `noisy twin` has normal noise of .3 of each tensor's standard deviation besides, a `rotated twin` is
a noisy one whose inputs and outputs are in other coordinates as well (random rotations, undone before the models are
averaged), and models `trained apart` share the data and nothing else: initial weights and the order of the rows are
others. The second model is aligned to the first, then the two are averaged:

- `weight matching`: Git Re-Basin's. `OTFusion`: exact, Sinkhorn, Gromov-Wasserstein, at their defaults: layers in turn.
- `GW, layers alone`: each layer by its own geometry, at an epsilon in units of the critical one (`couple_neurons`
  without a linear term). `GW, ends unknown`: two sweeps of fused GW whose linear term knows the layers coupled before,
  but takes inputs and outputs to be unknown. `GW, fused`: the same with inputs and outputs in common.
  `GW, fused, then matching`: rounded to permutations, and weight matching from there.
- `fused without geometry`: the ablation, the same sweeps with the linear term alone at the settings of `GW, fused`.
- `uniform coupling`, a control that knows nothing: every place gets the mean of the second model's neurons, which
  leaves the first model at half its size. A wide network answers well with that, so accuracies count as far as they
  are above it; the loss barrier (cross-entropy of the mean minus the mean of theirs) shows it too.

`recovered` is the share of places to which most of what comes is the neuron that belongs there. Settings of the GW rows
were chosen on seeds 10 to 15, at widths 32 to 128, and are `couple_neurons`' defaults, except the weight of the linear
term where the ends are unknown.

Results go to experiments/results/permuted_twins.md and permuted_apart.md, .json and .png. Expected: every alignment but
OTFusion's Gromov-Wasserstein recovers all twins wholly at widths 64 to 512. That one works at an epsilon of 1e-3 for
costs divided by their maximum, and at width 512 the second layer's critical epsilon is 1.9e-4. Noisy twins, too, are
recovered wholly by all others but `GW, layers alone` (.79 to 1.00 of the neurons). Rotated twins are recovered by
`GW, ends unknown` alone, 12 of 12, and in part by `GW, layers alone`; by none of those that compare weights. Trained
apart, the mean of both has .92 / .95 / .96 / .95 at widths 64 to 512 by `GW, fused` (loss barriers .15 / .10 / .08 /
.08), .84 / .90 / .94 / .96 by weight matching (.38 / .25 / .18 / .12), .78 / .87 / .93 / .97 by the control: at width
512 nothing is ahead of it but in loss. Most of the gain is the annealed linear term's, not the geometry's: without
geometry .91 / .95 / .94 / .97 (.21 / .11 / .11 / .07). The geometry alone is worse than the control; rounding and
weight matching from there undo a part up to width 256.
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
from digit_tasks import CLASSES, load_parts
from jaxtyping import Array, Float, Int
from tables import RESULTS, Estimate, compare, describe_command, estimate, make_figure, table, write_results

from rgsp_jax.merging.neuron_geometry import carry_neurons, couple_neurons, round_coupling
from rgsp_jax.merging.otfusion import carry, transport_neurons
from rgsp_jax.merging.permutation import match_weights, permute, unfold
from rgsp_jax.transport import critical_epsilon, normalize_jointly, squared_distances

PIXELS = 64
SPEC = {
    "first.weight": ("h1", None),
    "first.bias": ("h1",),
    "second.weight": ("h2", "h1"),
    "second.bias": ("h2",),
    "last.weight": (None, "h2"),
    "last.bias": (None,),
}
"""Two hidden layers, weights [outputs, inputs]."""
LAYERS = ("h1", "h2")
EPOCHS, BATCH, LEARNING_RATE = 30, 50, 1e-3
APART = 1000
"""Added to a seed for the second of two models trained apart."""
NOISE = 0.3
"""Of a noisy twin, in each tensor's own standard deviation."""
CONTROL = "uniform coupling"
KINDS = ("twin", "noisy twin", "rotated twin", "trained apart")

Model = Mapping[str, Float[Array, "..."]]


@dataclass(frozen=True)
class Aligned:
    """The second model carried onto the first."""

    model: Model
    places: Mapping[str, Float[Array, "n n"]]
    """Layer -> who goes where: rows are places, columns neurons of the second model."""
    converged: bool


def find_biases(model: Model) -> dict[str, Float[Array, "n"]]:
    """Return layer -> its biases."""
    return {axes[0]: model[name] for name, axes in SPEC.items() if axes[0] is not None and len(axes) == 1}


def keep_order(a: Model, b: Model) -> Aligned:
    """Nothing is moved."""
    return Aligned(b, {layer: jnp.eye(x.shape[0]) for layer, x in find_biases(b).items()}, True)


def rebasin(a: Model, b: Model) -> Aligned:
    """Git Re-Basin's weight matching."""
    found = compile_matching()(dict(a), dict(b))
    places = {layer: jax.nn.one_hot(p, p.shape[0]) for layer, p in found.permutations.items()}
    return Aligned(permute(b, SPEC, found.permutations), places, bool(found.converged))


@functools.cache
def compile_matching() -> Any:
    """Return the matching, compiled once for a width."""
    return jax.jit(lambda a, b: match_weights(a, b, SPEC))


def transport(coupling: str) -> Callable[[Model, Model], Aligned]:
    """Return OTFusion with one of its couplings."""
    jitted = jax.jit(lambda a, b: transport_neurons(a, b, SPEC, coupling))

    def align(a: Model, b: Model) -> Aligned:
        found = jitted(dict(a), dict(b))
        places = {layer: coupling.plan for layer, coupling in found.couplings.items()}
        return Aligned(found.params, places, all(bool(c.converged) for c in found.couplings.values()))

    return align


def couple(**settings: Any) -> Callable[[Model, Model], Aligned]:
    """Return the alignment by neurons' geometry, with these settings of `couple_neurons`."""
    jitted = jax.jit(lambda a, b: couple_neurons(a, b, SPEC, **settings))

    last: list[tuple[Model, Model, Aligned]] = []  # of the pair at hand, for what refines it

    def align(a: Model, b: Model) -> Aligned:
        if not (last and last[0][0] is a and last[0][1] is b):
            last[:] = [(a, b, solve(a, b))]
        return last[0][2]

    def solve(a: Model, b: Model) -> Aligned:
        found = jitted(dict(a), dict(b))
        places = {layer: coupling.plan for layer, coupling in found.items()}
        return Aligned(carry_neurons(b, SPEC, places), places, all(bool(c.converged) for c in found.values()))

    return align


def refine(first: Callable[[Model, Model], Aligned]) -> Callable[[Model, Model], Aligned]:
    """Return weight matching that starts from what another alignment found, rounded to permutations."""

    round_all = jax.jit(lambda plans: {layer: round_coupling(plan) for layer, plan in plans.items()})

    def align(a: Model, b: Model) -> Aligned:
        rough = first(a, b)
        orders = round_all(dict(rough.places))
        found = rebasin(a, permute(b, SPEC, orders))
        places = {layer: found.places[layer] @ jax.nn.one_hot(p, p.shape[0]) for layer, p in orders.items()}
        return Aligned(found.model, places, rough.converged and found.converged)

    return align


def spread_evenly(a: Model, b: Model) -> Aligned:
    """The control that knows nothing: every place gets the mean of all neurons."""
    places = {layer: jnp.full((x.shape[0],) * 2, 1 / x.shape[0], x.dtype) for layer, x in find_biases(b).items()}
    for layer, weights in places.items():
        b = carry(b, SPEC, layer, weights)
    return Aligned(b, places, True)


FUSED = couple()
ALIGNMENTS: Mapping[str, Callable[[Model, Model], Aligned]] = {
    "none": keep_order,
    CONTROL: spread_evenly,
    "weight matching": rebasin,
    "OTFusion, exact": transport("exact"),
    "OTFusion, Sinkhorn": transport("sinkhorn"),
    "OTFusion, Gromov-Wasserstein": transport("gromov_wasserstein"),
    "GW, layers alone": couple(common_ends=False, fused_penalty=0.0, sweeps=1),
    "GW, ends unknown": couple(common_ends=False, fused_penalty=4.0),
    "GW, fused": FUSED,
    "GW, fused, then matching": refine(FUSED),
    "fused without geometry": couple(geometry=False),
}


@dataclass(frozen=True)
class Row:
    """One alignment of one pair."""

    kind: str
    width: int
    seed: int
    alignment: str
    recovered: float | None
    """Share of the neurons that come to their twins' places; None where there are no twins."""
    accuracy: float
    """Of the mean of the two, on test rows."""
    own: float
    """Mean of the two models' own accuracies."""
    loss_barrier: float
    """Test cross-entropy of the mean of the two minus the mean of theirs."""
    converged: bool
    seconds: float


def predict(model: Model, images: Float[Array, "rows pixels"]) -> Float[Array, "rows classes"]:
    """Return the logits."""
    x = images
    for name in ("first", "second"):
        x = jax.nn.relu(jnp.matmul(x, model[f"{name}.weight"].T) + model[f"{name}.bias"][None])
    return jnp.matmul(x, model["last.weight"].T) + model["last.bias"][None]


def measure(model: Model, images: Array, digits: Array) -> tuple[float, float]:
    """Return accuracy and cross-entropy."""
    logits = predict(model, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()
    return float((logits.argmax(-1).astype(digits.dtype) == digits).mean()), float(loss)


def draw_model(key: Array, width: int) -> dict[str, Array]:
    """Return a network as He et al. initialise it."""
    sizes = {"first": (width, PIXELS), "second": (width, width), "last": (CLASSES, width)}
    keys = jax.random.split(key, len(sizes))
    model = {}
    for (name, shape), k in zip(sizes.items(), keys, strict=True):
        spread = jnp.float32(np.sqrt(2 / shape[1]))
        model[f"{name}.weight"] = jax.random.normal(k, shape, jnp.float32) * spread
        model[f"{name}.bias"] = jnp.zeros(shape[0], jnp.float32)
    return model


@jax.jit
def train(start: dict[str, Array], images: Array, digits: Array, order: Int[Array, "steps batch"]) -> dict[str, Array]:
    """Return the network after Adam's steps on the rows of `order`."""
    optimizer = optax.adam(LEARNING_RATE)

    def loss(model: Model, rows: Array) -> Array:
        logits = predict(model, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, digits[rows]).mean()

    def step(carry: Any, rows: Array) -> Any:
        model, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(model, rows), moments, model)
        return (optax.apply_updates(model, updates), moments), None

    return jax.lax.scan(step, (start, optimizer.init(start)), order)[0][0]


@functools.lru_cache(maxsize=64)
def train_model(width: int, seed: int, draw: int) -> dict[str, Array]:
    """Return a network trained on the seed's rows; `draw` decides initial weights and the order of the rows."""
    images, digits = flatten_rows(seed, "train")
    rng = np.random.default_rng(draw)
    rows = len(digits) // BATCH * BATCH
    order = np.stack([rng.permutation(len(digits))[:rows].reshape(-1, BATCH) for _ in range(EPOCHS)])
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        steps = jnp.asarray(order.reshape(-1, BATCH), jnp.int32)
        return train(draw_model(jax.random.key(draw), width), images, digits, steps)


def flatten_rows(seed: int, part: str) -> tuple[Array, Array]:
    """Return images as vectors, and digits."""
    rows = load_parts(seed)[part]
    return jnp.asarray(rows.images.reshape(len(rows.digits), -1)), jnp.asarray(rows.digits)


@dataclass(frozen=True)
class Pair:
    """Two models to be aligned and averaged."""

    a: Model
    b: Model
    truth: Mapping[str, Array] | None
    """Of twins: layer -> for every place of the first the neuron of the second."""
    undo: Callable[[Model], Model] = dict
    """Takes the second model's ends back into the first one's coordinates."""


def make_pair(kind: str, width: int, seed: int) -> Pair:
    """Return two models of one kind."""
    a = train_model(width, seed, seed)
    if kind == "trained apart":
        return Pair(a, train_model(width, seed, seed + APART), None)
    rng = np.random.default_rng((seed, width))
    orders = {layer: jnp.asarray(rng.permutation(width)) for layer in LAYERS}
    b = permute(a, SPEC, orders)
    truth = {layer: jnp.argsort(order) for layer, order in orders.items()}
    if kind == "twin":
        return Pair(a, b, truth)
    noise = {name: rng.normal(scale=NOISE * float(x.std()), size=x.shape) for name, x in b.items()}
    b = {name: x + jnp.asarray(noise[name], x.dtype) for name, x in b.items()}
    if kind == "noisy twin":
        return Pair(a, b, truth)
    first, last = (
        jnp.asarray(np.linalg.qr(rng.normal(size=(n, n)))[0], a["last.bias"].dtype) for n in (PIXELS, CLASSES)
    )
    return Pair(a, rotate(b, first, last), truth, lambda model: rotate(model, first.T, last.T))


def rotate(model: Model, first: Array, last: Array) -> Model:
    """Return the model with inputs and outputs in other coordinates."""
    return {
        **model,
        "first.weight": jnp.matmul(model["first.weight"], first.T),
        "last.weight": jnp.matmul(last, model["last.weight"]),
        "last.bias": jnp.matmul(last, model["last.bias"]),
    }


def count_recovered(places: Mapping[str, Array], truth: Mapping[str, Array]) -> float:
    """Return the share of places to which most of what comes is the neuron that belongs there."""
    hits = [np.asarray(places[layer]).argmax(1) == np.asarray(truth[layer]) for layer in truth]
    return float(np.concatenate(hits).mean())


def run_pair(kind: str, width: int, seed: int) -> Iterator[Row]:
    """Yield a row for every alignment of one pair."""
    pair = make_pair(kind, width, seed)
    a, truth = pair.a, pair.truth
    rows = flatten_rows(seed, "test")
    own, losses = zip(*(measure(model, *rows) for model in (a, pair.undo(pair.b))), strict=True)
    for name, align in ALIGNMENTS.items():
        started = time.monotonic()
        with jax.numpy_dtype_promotion("standard"):  # optax's assignment mixes float sizes where 64 bits are enabled
            aligned = align(a, pair.b)
        jax.block_until_ready(aligned.model)
        seconds = time.monotonic() - started
        carried = pair.undo(aligned.model)
        middle = {key: (a[key] + carried[key]) / 2 for key in a}
        accuracy, loss = measure(middle, *rows)
        recovered = None if truth is None else count_recovered(aligned.places, truth)
        yield Row(
            kind=kind,
            width=width,
            seed=seed,
            alignment=name,
            recovered=recovered,
            accuracy=accuracy,
            own=float(np.mean(own)),
            loss_barrier=loss - float(np.mean(losses)),
            converged=aligned.converged,
            seconds=seconds,
        )


def find_critical_epsilons(widths: Sequence[int], seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return width -> layer -> mean critical epsilon of a twin's costs as OTFusion takes them, divided by maximum."""
    found: dict[str, dict[str, float]] = {}
    for width, (layer, name) in itertools.product(widths, zip(LAYERS, ("first", "second"), strict=True)):
        values = []
        for seed in seeds:
            model = train_model(width, seed, seed)
            parts = [unfold(model[f"{name}.{part}"], 0) for part in ("weight", "bias")]
            cost = squared_distances(jnp.concatenate(parts, axis=1).T)
            values.append(float(critical_epsilon(*normalize_jointly(cost, cost))))
        found.setdefault(str(width), {})[layer] = float(np.mean(values))
    return found


def tell_critical(critical: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return Markdown."""
    lines = [[layer, *(f"{found[layer]:.1e}" for found in critical.values())] for layer in LAYERS]
    return [
        "",
        "## Critical epsilon",
        "",
        "Of costs divided by their maximum, below which Gromov-Wasserstein tells neurons apart by more than their mean",
        "distance from the others; OTFusion's epsilon is 1e-3 at every width.",
        "",
        table(["layer", *(f"width {width}" for width in critical)], lines),
    ]


def tabulate(rows: Sequence[Row]) -> list[str]:
    """Return Markdown: neurons recovered, then accuracies of the mean, their differences and barriers."""
    widths = list(dict.fromkeys(row.width for row in rows))
    cells: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.kind, row.width, row.alignment), []).append(row)
    head = ["alignment", *(f"width {width}" for width in widths)]
    text = []
    for kind in dict.fromkeys(row.kind for row in rows):
        text += ["", f"## {kind}", ""]
        if kind != "trained apart":
            text += ["Share of the neurons recovered; in brackets how many of the pairs wholly:", ""]
            known = [name for name in ALIGNMENTS if name != CONTROL]
            text.append(table(head, [[a, *(tell_recovered(cells[kind, w, a]) for w in widths)] for a in known]))
            text.append("")
        text += [
            "Test accuracy of the mean of both (standard error); loss barrier; \\* where a solver stopped early:",
            "",
        ]
        own = [str(estimate([row.own for row in cells[kind, w, "none"]])) for w in widths]
        lines = [[a, *(tell_accuracy(cells[kind, w, a]) for w in widths)] for a in ALIGNMENTS]
        text.append(table(head, [["the two by themselves", *own], *lines]))
        text += ["", "Accuracy over that of no alignment / of the uniform coupling, paired by seed:", ""]
        lines = []
        for a in [name for name in ALIGNMENTS if name not in ("none", CONTROL)]:
            gains = [
                [tell_gain(cells[kind, w, a], cells[kind, w, other]) for other in ("none", CONTROL)] for w in widths
            ]
            lines.append([a, *(" / ".join(pair) for pair in gains)])
        text.append(table(head, lines))
    return text


def tell_recovered(rows: Sequence[Row]) -> str:
    """Return one cell."""
    shares = [row.recovered for row in rows if row.recovered is not None]
    return f"{np.mean(shares):.3f} ({sum(share == 1 for share in shares)} of {len(shares)})"


def tell_accuracy(rows: Sequence[Row]) -> str:
    """Return one cell; a star where a solver did not converge."""
    star = "" if all(row.converged for row in rows) else " \\*"
    return f"{estimate([row.accuracy for row in rows])}; {np.mean([row.loss_barrier for row in rows]):+.3f}{star}"


def tell_gain(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """Return one cell."""
    gain = compare(*({row.seed: row.accuracy for row in group} for group in (rows, others)))
    return "" if gain is None else gain.signed


def find_headline(rows: Sequence[Row]) -> str:
    """Return one sentence."""
    twins = {name: [row for row in rows if row.kind == "twin" and row.alignment == name] for name in ALIGNMENTS}
    exact = [
        f"{name} {sum(r.recovered == 1 for r in found)} of {len(found)}"
        for name, found in twins.items()
        if found and name != CONTROL
    ]
    last = [row for row in rows if row.kind == "trained apart"]
    apart = {name: [row.accuracy for row in last if row.alignment == name] for name in ALIGNMENTS}
    means = [f"{name} {np.mean(found):.3f}" for name, found in apart.items() if found]
    parts = [f"twins recovered wholly: {', '.join(exact)}"] if exact else []
    parts += [f"mean of two trained apart: {', '.join(means)}"] if means else []
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the accuracy of the mean and, where there are twins, the neurons recovered, against the width."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    fields = {"accuracy": "test accuracy of the mean"}
    if any(row.recovered is not None for row in rows):
        fields["recovered"] = "share of neurons recovered"
    figure = make_figure(max(4 * len(kinds), 10), 1.8 + 2.9 * len(fields))
    panels = figure.subplots(len(fields), len(kinds), sharex=True, sharey="row", squeeze=False)
    for name, marker, colour in zip(ALIGNMENTS, "x+^osDvP*h1", [*(f"C{i}" for i in range(10)), "black"], strict=True):
        for column, kind in enumerate(kinds):
            for axes, field in zip(panels[:, column], fields, strict=True):
                found: dict[int, list[float]] = {}
                for row in rows:
                    value = getattr(row, field)
                    if (row.kind, row.alignment) == (kind, name) and value is not None:
                        found.setdefault(row.width, []).append(value)
                points: list[Estimate] = [estimate(values) for values in found.values()]
                bars = [p.standard_error or 0 for p in points]
                means = [p.mean for p in points]
                axes.errorbar(list(found), means, bars, marker=marker, color=colour, label=name, alpha=0.8)
    for column, kind in enumerate(kinds):
        own: dict[int, list[float]] = {}
        for row in rows:
            if row.kind == kind:
                own.setdefault(row.width, []).append(row.own)
        panels[0, column].plot(list(own), [np.mean(values) for values in own.values()], "k:", label="by themselves")
        panels[0, column].set(title=kind, xscale="log")
        panels[-1, column].set(xlabel="width")
        panels[-1, column].set_xticks(list(own), [str(width) for width in own])
        panels[-1, column].minorticks_off()
        if "recovered" in fields and kind == "trained apart":
            panels[1, column].text(0.5, 0.5, "no twins", ha="center", transform=panels[1, column].transAxes)
    for axes, title in zip(panels[:, 0], fields.values(), strict=True):
        axes.set_ylabel(title)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512], help="default: 64 128 256 512")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "permuted_twins")
    options = parser.parse_args(arguments)
    rows = []
    for kind, width, seed in itertools.product(options.kinds, options.widths, options.seeds):
        for row in run_pair(kind, width, seed):
            rows.append(row)
            found = "" if row.recovered is None else f"  recovered {row.recovered:.3f}"
            shown = f"{kind} {width} seed {seed}: {row.alignment:30s} {row.accuracy:.3f}{found}"
            print(f"{shown}  ({row.seconds:.1f} s)", flush=True)
    settings = {name: getattr(options, name) for name in ("kinds", "widths", "seeds")}
    critical = find_critical_epsilons(options.widths, options.seeds)
    record = {"settings": settings, "critical_epsilon": critical, "rows": [asdict(row) for row in rows]}
    command = describe_command("permuted_twins", settings)
    if options.out.name != "permuted_twins":
        command += f" --out experiments/results/{options.out.name}"
    write_results(options.out, command, find_headline(rows), record, [*tabulate(rows), *tell_critical(critical)])
    draw(rows, options.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main()
