"""OTFusion: neurons of one model carried onto another's by optimal transport, layer after layer."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rgsp_jax.merging.permutation import HIGHEST, Params, PermutationSpec, check_pair, unfold
from rgsp_jax.transport import gromov_wasserstein, normalize_jointly, squared_distances
from rgsp_jax.transport.scaling import scale_to_marginals

SINKHORN_TOLERANCE = 1e-4
"""L1 error of the marginals, of 1 in all."""


class NeuronCoupling(NamedTuple):
    """Who goes where, and whether the solver is done."""

    plan: Float[Array, "n n"]
    """Rows are places (neurons of the first model), columns neurons of the second; it sums to 1."""
    converged: Bool[Array, ""]


class Transported(NamedTuple):
    """The second model with its neurons carried onto the first one's."""

    params: dict[str, Array]
    couplings: dict[str, NeuronCoupling]


def couple_exactly(a: Float[Array, "n d"], b: Float[Array, "n d"], epsilon: Array | float) -> NeuronCoupling:
    """The permutation of least squared distance, which is what exact transport between equal weights is."""
    del epsilon
    rows, columns = optax.assignment.hungarian_algorithm(cross_distances(a, b))
    plan = jnp.zeros((a.shape[0],) * 2, a.dtype).at[rows, columns].set(1 / a.shape[0])
    return NeuronCoupling(plan, jnp.asarray(True))


def couple_by_sinkhorn(a: Float[Array, "n d"], b: Float[Array, "n d"], epsilon: Array | float) -> NeuronCoupling:
    """Entropic transport of squared distances over their maximum."""
    cost = cross_distances(a, b)
    largest = jnp.max(cost)
    cost = cost / jnp.where(largest > 0, largest, 1)
    share = jnp.full(a.shape[0], 1 / a.shape[0], a.dtype)
    tolerance = jnp.asarray(SINKHORN_TOLERANCE, a.dtype)
    found = scale_to_marginals(-cost / jnp.asarray(epsilon, a.dtype), jnp.zeros_like(share), share, share, tolerance)
    return NeuronCoupling(found.plan, found.error <= tolerance)


def couple_by_gromov_wasserstein(
    a: Float[Array, "n d"], b: Float[Array, "n d"], epsilon: Array | float
) -> NeuronCoupling:
    """Entropic Gromov-Wasserstein: neurons are matched by their distances to the neurons beside them.

    Needs no common inputs, and so no alignment of the layers before.
    """
    costs = normalize_jointly(squared_distances(a.T), squared_distances(b.T))
    found = gromov_wasserstein(*costs, epsilon=epsilon)
    return NeuronCoupling(found.plan, found.converged)


COUPLINGS: dict[str, Callable[[Array, Array, Array | float], NeuronCoupling]] = {
    "exact": couple_exactly,
    "sinkhorn": couple_by_sinkhorn,
    "gromov_wasserstein": couple_by_gromov_wasserstein,
}


def cross_distances(a: Float[Array, "n d"], b: Float[Array, "k d"]) -> Float[Array, "n k"]:
    """Squared distances between the rows of a and of b."""
    centre = jnp.mean(a, axis=0, keepdims=True)  # distances do not move, cancellation shrinks
    a, b = a - centre, b - centre
    inner = jnp.matmul(a, b.T, precision=HIGHEST)
    return jnp.maximum(jnp.sum(a * a, 1)[:, None] + jnp.sum(b * b, 1)[None, :] - 2 * inner, 0)


def transport_neurons(
    a: Params,
    b: Params,
    spec: PermutationSpec,
    coupling: str = "exact",
    epsilon: Array | float = 1e-3,
    output_axis: int = 0,
) -> Transported:
    """OTFusion's alignment: b with every layer's neurons carried onto a's; average the two to fuse them.

    Singh & Jaggi 2020, arXiv 1910.05653, weight-based. In the order in which the spec first names them, the neurons of
    a layer are coupled by their incoming weights (and biases), whose input side is aligned already; with T the coupling
    and n T its barycentric map, `W <- (n T) W` on the layer's side and `W <- W (n T)^T` where it is read.

    Args:
        a, b: name -> tensor, of equal shapes.
        spec: which axes belong to which layer of neurons, layers in order from the input.
        coupling: "exact" (a permutation), "sinkhorn", or "gromov_wasserstein" (the layer by itself).
        epsilon: entropic regularisation of the latter two, on costs normalised to [0, 1].
        output_axis: of the weights: 0 as PyTorch keeps them, -1 as Flax does. Weights with a layer there lead into it.

    Raises:
        ValueError: an unknown coupling; the spec does not fit, shapes differ, or a layer has no incoming weights
            because the spec names it before the layers it reads from.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}, not {coupling!r}")
    sizes = check_pair(spec, a, b)
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in (*a.values(), *b.values())) else jnp.float32
    a, b = ({name: jnp.asarray(x).astype(dtype) for name, x in model.items()} for model in (a, b))
    aligned: set[str | None] = {None}
    couplings = {}
    for layer, size in sizes.items():
        into = {name: list(axes) for name, axes in spec.items() if axes and axes[output_axis] == layer}
        for axes in into.values():
            del axes[output_axis]
        ready = [name for name, others in into.items() if aligned.issuperset(others)]
        if not any(a[name].ndim > 1 for name in ready):
            raise ValueError(f"{layer} has no incoming weights from the layers before it: name layers in their order")
        ours, theirs = (
            jnp.concatenate([unfold(model[name], output_axis % model[name].ndim) for name in ready], axis=1)
            for model in (a, b)
        )
        couplings[layer] = COUPLINGS[coupling](ours, theirs, epsilon)
        b = carry(b, spec, layer, size * couplings[layer].plan)
        aligned.add(layer)
    return Transported(b, couplings)


def carry(params: Params, spec: PermutationSpec, layer: str, weights: Float[Array, "n n"]) -> dict[str, Array]:
    """Every axis of one layer's neurons multiplied by a matrix [places, neurons]."""
    carried: Mapping[str, Array] = dict(params)
    for name, axes in spec.items():
        for axis, other in enumerate(axes):
            if other == layer:
                moved = jnp.tensordot(weights, carried[name], axes=(1, axis), precision=HIGHEST)
                carried = {**carried, name: jnp.moveaxis(moved, 0, axis)}
    return dict(carried)
