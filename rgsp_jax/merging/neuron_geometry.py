"""Neurons of models without common coordinates, coupled by their geometry; the widths may differ."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rgsp_jax.merging.otfusion import NeuronCoupling
from rgsp_jax.merging.permutation import HIGHEST, Params, PermutationSpec, permutation_sizes, unfold
from rgsp_jax.transport import anneal_gromov_wasserstein, squared_distances

SIDES = ("incoming", "outgoing")
TOLERANCE = 1e-5
"""L1 change of a plan, of 1 in all, at which it is done; plans near permutations cannot be held to much less."""

Layer = str
Couplings = Mapping[Layer, Float[Array, "m_a m_b"]]


def couple_neurons(
    a: Params,
    b: Params,
    spec: PermutationSpec,
    *,
    common_ends: bool = True,
    geometry: bool = True,
    fused_penalty: float | Float[Array, ""] = 16.0,
    sweeps: int = 2,
    start: float = 1.0,
    end: float = 0.2,
    stages: int = 5,
    max_iterations: int = 60,
    output_axis: int = 0,
) -> dict[Layer, NeuronCoupling]:
    """Couplings [m_A, m_B] of the neurons of two models, layer by layer, by fused Gromov-Wasserstein transport.

    The rows of U S, `W = U S V'`, are a layer's neurons up to a rotation of what they read: their squared distances
    `C(i, j) = |w_i - w_j|^2` need no common coordinates, and see neither the order of the neurons of the layer before
    nor its size. Distances of the weights into a layer and of those out of it, each in units of its own spread, add up
    to one geometry. With `fused_penalty` zero that is all that is used, every layer by itself.

    What two models do share makes the linear term: `M = -sum <a_i, b_k>` over the weights whose other axes are shared
    or belong to a layer that is coupled already, B's carried onto A's places there. Layers are taken in the order in
    which the spec names them, so that the first sweep knows those before and later sweeps know all. Without `geometry`
    the linear term is all, and a sweep is one of weight matching with entropic transport for its assignments.

    Args:
        a, b: name -> tensor; of equal shapes but for the sizes of the layers.
        spec: which axes belong to which layer of neurons.
        common_ends: whether axes that belong to no layer (inputs, outputs) have one order in both models.
        geometry: whether the quadratic term is there.
        fused_penalty: of the linear term, in which identical neurons gain about -1 a side.
        sweeps: how often every layer is coupled.
        start, end, stages, max_iterations: of the annealing, see `rgsp_jax.transport.anneal_gromov_wasserstein`; the
            unit of epsilon is the geometry's critical one, 1 without geometry.
        output_axis: of the weights: 0 as PyTorch keeps them, -1 as Flax does. Weights with a layer there lead into it,
            all other axes read from theirs.

    Returns:
        Layer -> coupling with uniform marginals. `carry_neurons` applies them, `round_coupling` makes permutations.

    Raises:
        ValueError: the spec does not fit, shapes differ elsewhere than in layers, a layer has no matrix, no sweeps.
    """
    sizes = check_layers(spec, a, b)
    if sweeps < 1:
        raise ValueError(f"sweeps wants at least 1, got {sweeps}")
    a, b = (widen(model) for model in (a, b))
    places = find_places(spec, output_axis)
    matrices = {layer for layer in sizes for side in SIDES for name, _ in places[layer][side] if a[name].ndim > 1}
    if bare := [layer for layer in sizes if layer not in matrices]:
        raise ValueError(f"no matrix leads into or out of {', '.join(bare)}")
    costs = {layer: tuple(find_geometry(model, places[layer]) for model in (a, b)) for layer in sizes}
    if not geometry:
        costs = {layer: tuple(map(jnp.zeros_like, pair)) for layer, pair in costs.items()}
    found: dict[Layer, NeuronCoupling] = {}
    for _ in range(sweeps):
        for layer in sizes:
            known = {other: coupling.plan for other, coupling in found.items()}
            linear = find_linear_cost(a, b, spec, places[layer], known, common_ends, output_axis)
            cost_a, cost_b = costs[layer]
            plan = anneal_gromov_wasserstein(
                cost_a,
                cost_b,
                linear_cost=linear,
                fused_penalty=fused_penalty,
                start=start,
                end=end,
                stages=stages,
                tolerance=TOLERANCE,
                max_iterations=max_iterations,
            )
            found[layer] = NeuronCoupling(plan.plan, plan.converged)
    return found


def widen(model: Params) -> dict[str, Array]:
    """In a dtype to compute in."""
    dtype = jnp.float64 if any(jnp.result_type(x) == jnp.float64 for x in model.values()) else jnp.float32
    return {name: jnp.asarray(x).astype(dtype) for name, x in model.items()}


def check_layers(spec: PermutationSpec, a: Params, b: Params) -> dict[Layer, tuple[int, int]]:
    """Layer -> its size in both models; ValueError where the spec does not fit or shapes differ outside of layers."""
    sizes = permutation_sizes(spec, a), permutation_sizes(spec, b)
    wrong = [
        f"{name} is {jnp.shape(a[name])} and {jnp.shape(b[name])}"
        for name, axes in spec.items()
        if any(
            ours != theirs
            for axis, ours, theirs in zip(axes, jnp.shape(a[name]), jnp.shape(b[name]), strict=True)
            if axis is None
        )
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return {layer: (sizes[0][layer], sizes[1][layer]) for layer in sizes[0]}


Places = Mapping[str, list[tuple[str, int]]]
"""Side -> tensors and the axes of them along which a layer's neurons lie."""


def find_places(spec: PermutationSpec, output_axis: int) -> dict[Layer, dict[str, list[tuple[str, int]]]]:
    """Layer -> side -> tensors and axes."""
    places: dict[Layer, dict[str, list[tuple[str, int]]]] = {}
    for name, axes in spec.items():
        for axis, layer in enumerate(axes):
            if layer is not None:
                side = SIDES[axis != output_axis % len(axes)]
                places.setdefault(layer, {side: [] for side in SIDES})[side].append((name, axis))
    return places


def find_geometry(model: Params, places: Places) -> Float[Array, "m m"]:
    """Squared distances between the neurons of one layer: a sum over the sides, each in units of its own spread.

    The spread is the root mean square of the distances about their row and column means, which is what
    Gromov-Wasserstein sees of them.
    """
    parts = []
    for side in SIDES:
        if places[side]:
            rows = jnp.concatenate([unfold(model[name], axis) for name, axis in places[side]], axis=1)
            distances = squared_distances(rows.T)
            mean = jnp.mean(distances, axis=0)
            spread = jnp.sqrt(jnp.mean((distances - mean[:, None] - mean[None, :] + jnp.mean(mean)) ** 2))
            parts.append(distances / jnp.where(spread > 0, spread, 1))
    return sum(parts[1:], start=parts[0])


def find_linear_cost(
    a: Params,
    b: Params,
    spec: PermutationSpec,
    places: Places,
    known: Couplings,
    common_ends: bool,
    output_axis: int,
) -> Float[Array, "m_a m_b"]:
    """Minus the inner products of two models' neurons over what is comparable of their weights.

    A side's are divided by the geometric mean of the two models' mean squared norms, over all of its weights: identical
    neurons have -1 a side on average where all weights are comparable, and less where fewer are.
    """
    total = []
    for side in SIDES:
        inner: list[Array] = []
        norms = [jnp.zeros((), next(iter(a.values())).dtype)] * 2
        for name, axis in places[side]:
            norms = [
                norm + jnp.sum(model[name] ** 2) / model[name].shape[axis]
                for norm, model in zip(norms, (a, b), strict=True)
            ]
            others = [x for i, x in enumerate(spec[name]) if i != axis]
            if all(common_ends if x is None else x in known for x in others):
                theirs = carry_axes(b[name], spec[name], known, output_axis, skipped=axis)
                inner.append(jnp.matmul(unfold(a[name], axis), unfold(theirs, axis).T, precision=HIGHEST))
        if inner:
            unit = jnp.sqrt(norms[0] * norms[1])
            total.append(sum(inner[1:], start=inner[0]) / jnp.where(unit > 0, unit, 1))
    if total:
        return -sum(total[1:], start=total[0])
    name, axis = next(place for side in SIDES for place in places[side])
    return jnp.zeros((a[name].shape[axis], b[name].shape[axis]), a[name].dtype)


def carry_neurons(
    params: Params, spec: PermutationSpec, couplings: Couplings, output_axis: int = 0
) -> dict[str, Float[Array, "..."]]:
    """A model's neurons carried to the places of another by couplings P [m_A, m_B]: barycentric maps of both sides.

    What leads into a layer is averaged over the neurons that come to a place, `W <- diag(P 1)^-1 P W`; what reads from
    it is shared among the places that a neuron goes to, `W <- W (P diag(P' 1)^-1)'`. A permutation is carried out
    exactly, and so is what splits neurons into equal ones or joins equal ones.

    Args:
        params: the second model, of whose neurons the columns of the couplings are.
        spec: which axes belong to which layer; layers without a coupling stay as they are.
        couplings: layer -> plan [places, neurons].
        output_axis: see `couple_neurons`.
    """
    return {name: carry_axes(x, spec[name], couplings, output_axis) for name, x in params.items()}


def carry_axes(
    x: Array, axes: Sequence[str | None], couplings: Couplings, output_axis: int, skipped: int | None = None
) -> Array:
    """Every axis of one tensor that belongs to a coupled layer, the skipped one apart."""
    for axis, layer in enumerate(axes):
        if layer is not None and layer in couplings and axis != skipped:
            plan = couplings[layer].astype(x.dtype)
            sums = jnp.sum(plan, axis=1, keepdims=True) if axis == output_axis % len(axes) else jnp.sum(plan, 0)[None]
            weights = plan / jnp.where(sums > 0, sums, 1)
            x = jnp.moveaxis(jnp.tensordot(weights, x, axes=(1, axis), precision=HIGHEST), 0, axis)
    return x


def round_coupling(plan: Float[Array, "n n"]) -> Int[Array, "n"]:
    """For every place the neuron of the permutation that the plan gives most mass to."""
    rows, columns = optax.assignment.hungarian_algorithm(-plan / jnp.max(plan))
    return jnp.zeros(plan.shape[0], jnp.int32).at[rows].set(columns.astype(jnp.int32))
