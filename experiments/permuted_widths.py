"""What couplings merge that no permutation can: networks of different widths.

    python experiments/permuted_widths.py

Hardware: 2 CPU cores, 2 GB. Runtime: about 5 minutes on cores that others use too. Nothing is downloaded.

The multilayer perceptrons of permuted_twins.py, a small one and a large one. A `split twin` is the small network with
every hidden neuron twice, at half its outgoing weights, in random order: the same function. Models `trained apart`
share the data alone. Couplings [small, large] of the hidden neurons carry the large model to the small one's places,
and, transposed, the small one to the large one's; there the two are averaged. Both merges are compared with the two
models by themselves, above all the small merge with the small model, since it costs the same to run.

`GW, layers alone` and `GW, fused` are those of permuted_twins.py, `fused without geometry` is the linear term alone at
the same settings. `weight matching, padded` is what permutations can do: the small model is filled up with neurons of
zeros, and the small merge keeps those of the large model's neurons that came to real ones. `uniform coupling` knows
nothing.

Results go to experiments/results/permuted_widths.md and .json. Expected: every coupling joins split twins again (6 of 6
recovered wholly, losses as before). Trained apart, fused GW gives .867 and .907 at widths 32 and 64 beside a model of
192, weight matching .751 and .853, the linear term alone .834 and .908, layers alone by their geometry .29 and .31; but
no merge reaches the small model by itself (.963, .975), nor the large one.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from permuted_twins import APART, LAYERS, SPEC, Model, compile_matching, flatten_rows, measure, train_model
from tables import RESULTS, compare, describe_command, estimate, table, write_results

from rgsp_jax.merging.neuron_geometry import carry_neurons, couple_neurons

KINDS = ("split twin", "trained apart")
CONTROL = "uniform coupling"


@dataclass(frozen=True)
class Carried:
    """Each model in the other's shape."""

    small: Model
    """The large model at the small one's places."""
    large: Model
    """The small model at the large one's places."""
    places: Mapping[str, Array] | None
    """Layer -> plan [small, large]; None where it is no coupling of all neurons."""


def carry_both(small: Model, large: Model, plans: Mapping[str, Array]) -> Carried:
    """Return what couplings [small, large] make of the two."""
    turned = {layer: plan.T for layer, plan in plans.items()}
    return Carried(carry_neurons(large, SPEC, plans), carry_neurons(small, SPEC, turned), plans)


def couple(**settings: Any) -> Callable[[Model, Model], Carried]:
    """Return the alignment by `couple_neurons` with these settings."""
    jitted = jax.jit(lambda a, b: couple_neurons(a, b, SPEC, **settings))

    def align(small: Model, large: Model) -> Carried:
        found = jitted(dict(small), dict(large))
        return carry_both(small, large, {layer: coupling.plan for layer, coupling in found.items()})

    return align


def spread_evenly(small: Model, large: Model) -> Carried:
    """The control that knows nothing."""
    sizes = [[model[f"{name}.bias"].shape[0] for name in ("first", "second")] for model in (small, large)]
    return carry_both(
        small,
        large,
        {layer: jnp.full((m, n), 1 / (m * n), jnp.float32) for layer, m, n in zip(LAYERS, *sizes, strict=True)},
    )


def match_padded(small: Model, large: Model) -> Carried:
    """Weight matching of the small model filled up with neurons of zeros."""
    padded = {
        name: jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, large[name].shape, strict=True)])
        for name, x in small.items()
    }
    # In the order of the small model's neurons: for each of them a neuron of the large one, then the rest.
    orders = compile_matching()(padded, dict(large)).permutations
    kept = {
        layer: orders[layer][: small[f"{name}.bias"].shape[0]]
        for layer, name in zip(LAYERS, ("first", "second"), strict=True)
    }
    back = {layer: jnp.argsort(order) for layer, order in orders.items()}
    return Carried(take(large, kept), take(padded, back), None)


def take(model: Model, orders: Mapping[str, Array]) -> Model:
    """Return the model with these neurons alone."""
    taken = dict(model)
    for name, axes in SPEC.items():
        for axis, layer in enumerate(axes):
            if layer is not None:
                taken[name] = jnp.take(taken[name], orders[layer], axis=axis)
    return taken


ALIGNMENTS: Mapping[str, Callable[[Model, Model], Carried]] = {
    CONTROL: spread_evenly,
    "weight matching, padded": match_padded,
    "GW, layers alone": couple(common_ends=False, fused_penalty=0.0, sweeps=1),
    "GW, fused": couple(),
    "fused without geometry": couple(geometry=False),
}


@dataclass(frozen=True)
class Row:
    """One alignment of one pair; accuracies on test rows, losses are cross-entropies there."""

    kind: str
    small: int
    large: int
    seed: int
    alignment: str
    recovered: float | None
    """Share of the large model's neurons most of which goes to the neuron they are halves of."""
    own: tuple[float, float]
    """Accuracies of the small and the large model by themselves."""
    merged: tuple[float, float]
    """Of the merges of small and large shape."""
    own_losses: tuple[float, float]
    losses: tuple[float, float]


def split(model: Model, seed: int) -> tuple[Model, dict[str, np.ndarray]]:
    """Return the same function with every hidden neuron twice, and layer -> whose half each neuron is."""
    rng = np.random.default_rng(seed)
    width = model["first.bias"].shape[0]
    halves = {layer: np.repeat(np.arange(width), 2)[rng.permutation(2 * width)] for layer in LAYERS}
    wide = take(model, {layer: jnp.asarray(found) for layer, found in halves.items()})
    return {**wide, "second.weight": wide["second.weight"] / 2, "last.weight": wide["last.weight"] / 2}, halves


def run_pair(kind: str, widths: tuple[int, int], seed: int) -> Iterator[Row]:
    """Yield a row for every alignment."""
    small, truth = train_model(widths[0], seed, seed), None
    if kind == "split twin":
        large, truth = split(small, seed)
    else:
        large = train_model(widths[1], seed, seed + APART)
    rows = flatten_rows(seed, "test")
    own, own_losses = zip(*(measure(model, *rows) for model in (small, large)), strict=True)
    for name, align in ALIGNMENTS.items():
        with jax.numpy_dtype_promotion("standard"):
            carried = align(small, large)
        pairs = ((small, carried.small), (large, carried.large))
        merges = [{key: (x[key] + y[key]) / 2 for key in x} for x, y in pairs]
        merged, losses = zip(*(measure(model, *rows) for model in merges), strict=True)
        recovered = None
        if truth is not None and carried.places is not None:
            hits = [np.asarray(plan).argmax(0) == truth[layer] for layer, plan in carried.places.items()]
            recovered = float(np.concatenate(hits).mean())
        large_width = large["first.bias"].shape[0]
        yield Row(kind, widths[0], large_width, seed, name, recovered, own, merged, own_losses, losses)


def tabulate(rows: Sequence[Row]) -> list[str]:
    """Return Markdown."""
    cells: dict[tuple[str, int, int], dict[str, list[Row]]] = {}
    for row in rows:
        cells.setdefault((row.kind, row.small, row.large), {}).setdefault(row.alignment, []).append(row)
    text = []
    for (kind, small, large), found in cells.items():
        any_row = next(iter(found.values()))
        own = [str(estimate([row.own[i] for row in any_row])) for i in (0, 1)]
        head = ["alignment", f"at width {small}", "over the small alone", "its loss", f"at width {large}", "its loss"]
        lines = [["the two by themselves", own[0], "", mean_loss(any_row, "own_losses", 0), own[1]]]
        lines[0].append(mean_loss(any_row, "own_losses", 1))
        for name, group in found.items():
            gain = compare({r.seed: r.merged[0] for r in group}, {r.seed: r.own[0] for r in group})
            merged = [str(estimate([row.merged[i] for row in group])) for i in (0, 1)]
            losses = [mean_loss(group, "losses", i) for i in (0, 1)]
            lines.append([name, merged[0], "" if gain is None else gain.signed, losses[0], merged[1], losses[1]])
        if kind == "split twin":
            head.append("recovered")
            shares = {
                name: [row.recovered for row in group if row.recovered is not None] for name, group in found.items()
            }
            told = [f"{np.mean(s):.3f} ({sum(x == 1 for x in s)} of {len(s)})" if s else "" for s in shares.values()]
            lines = [[*line, cell] for line, cell in zip(lines, ["", *told], strict=True)]
        text += ["", f"## {kind}, {small} and {large} wide", "", table(head, lines)]
    return text


def mean_loss(rows: Sequence[Row], field: str, which: int) -> str:
    """Return one cell."""
    return f"{np.mean([getattr(row, field)[which] for row in rows]):.3f}"


def find_headline(rows: Sequence[Row]) -> str:
    """Return one sentence."""
    apart = [row for row in rows if row.kind == "trained apart"]
    parts = []
    for name in ALIGNMENTS:
        group = [row for row in apart if row.alignment == name]
        if group:
            parts.append(f"{name} {np.mean([row.merged[0] for row in group]):.3f}")
    if not parts:
        return "Split twins alone."
    return (
        f"Trained apart at different widths, merged at the smaller: {', '.join(parts)}; "
        f"the smaller alone {np.mean([row.own[0] for row in apart]):.3f}."
    )


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--small", nargs="+", type=int, default=[32, 64], help="default: 32 64")
    parser.add_argument("--large", type=int, default=192, help="of models trained apart; default: 192")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "permuted_widths")
    options = parser.parse_args(arguments)
    rows = []
    for kind, small, seed in itertools.product(options.kinds, options.small, options.seeds):
        for row in run_pair(kind, (small, options.large), seed):
            rows.append(row)
            shown = " / ".join(f"{x:.3f}" for x in row.merged)
            print(f"{kind} {row.small} and {row.large} seed {seed}: {row.alignment:26s} {shown}", flush=True)
    settings = {name: getattr(options, name) for name in ("kinds", "small", "large", "seeds")}
    record = {"settings": settings, "rows": [asdict(row) for row in rows]}
    command = describe_command("permuted_widths", settings)
    write_results(options.out, command, find_headline(rows), record, tabulate(rows))
    return rows


if __name__ == "__main__":
    main()
