"""The public kernels of the pure side as functions of one lane of arrays, for tests that batch them in every way."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import rgsp_jax.grafting as grafting
import rgsp_jax.learning as learning
import rgsp_jax.merging as merging
import rgsp_jax.rgsp as rgsp
import rgsp_jax.similarity as similarity
import rgsp_jax.transport as transport
from linalg.matrices import with_singular_values
from mesh.problems import count_models, make_arguments, make_models, settings_of
from rgsp_jax import methods
from rgsp_jax.linalg import (
    cholesky_qr,
    drop_null_directions,
    inverse_square_root,
    polar_factor,
    principal_angles,
    solve_sylvester,
    subspace_overlap,
    truncated_svd,
)

M, N, R = 14, 10, 3
SPEC = {"in": ("h", None), "bias": ("h",), "out": (None, "h")}


@dataclass(frozen=True)
class Kernel:
    """A function of arrays, one draw of its arguments by seed, and the public names that it runs."""

    run: Callable
    draw: Callable
    covers: frozenset[str]


def matrices(*shapes):
    """Matrices of falling spectra."""

    def draw(seed):
        return tuple(
            with_singular_values(*shape, 0.8 ** np.arange(min(shape)), seed=100 * seed + i)
            for i, shape in enumerate(shapes)
        )

    return draw


def normals(*shapes):
    def draw(seed):
        rng = np.random.default_rng(seed)
        return tuple(rng.standard_normal(shape) for shape in shapes)

    return draw


def orthonormal(seed):
    return tuple(np.linalg.qr(x)[0] for x in normals((M, R), (M, R))(seed))


def compare_bases(u, v):
    return principal_angles(u, v), subspace_overlap(u, v), grafting.subspace_movement(u, v)


def svd_and_what_follows(x, y):
    a, b = truncated_svd(x, R), truncated_svd(y, R)
    shared = similarity.share_basis(a, b)
    # Bases have signs of their own; inner products in them have not.
    overlaps = [jnp.matmul(shared[0].u.T, shared[1].u), jnp.matmul(shared[0].v.T, shared[1].v)]
    return drop_null_directions(a), similarity.compare_subspaces(a, b), overlaps


def couple(points_a, points_b):
    costs = transport.normalize_jointly(
        transport.squared_distances(points_a.T), transport.squared_distances(points_b.T)
    )
    coupling = transport.gromov_wasserstein(*costs, epsilon=0.05)
    return coupling, transport.share_by_row(*costs, coupling.plan)


def anneal(points_a, points_b):
    costs = [transport.squared_distances(points.T) for points in (points_a, points_b)]
    coupling = transport.anneal_gromov_wasserstein(*costs, end=0.5, stages=2)
    return coupling.plan, coupling.cost, transport.critical_epsilon(*costs)


def pair_in_steps(stack):
    parts = rgsp.prepare_pair(stack, R)
    again = rgsp.pair_svds(parts.a, parts.b)
    trace, literal = rgsp.solve_pair(again), rgsp.solve_literal(parts)
    followed = rgsp.trace_pair(parts, rgsp.couple_pair(parts))
    return trace, literal.lam, followed.lam, rgsp.relative_task_vector(parts, trace, "two_sided")


def solve_spectral(x):
    left, right = (jnp.matmul(y, y.T) + jnp.eye(len(y), dtype=y.dtype) for y in (x, x.T))
    return inverse_square_root(left), solve_sylvester(left, right, x)


def relative_in_steps(stack):
    prepared = rgsp.prepare_weighted(stack, R)
    parts = rgsp.decorrelate(prepared)
    found = rgsp.solve_relative(rgsp.prepare_relative(stack, R))
    median = rgsp.nuclear_median(stack, R)
    solved = rgsp.solve_cores(stack, R, R)
    composed = rgsp.compose(parts, stack, jnp.ones(stack.shape[0], stack.dtype), 0.5)
    rho = rgsp.relative_distance(stack, stack[0])
    scale = rgsp.distance_scale(rho, len(stack))
    steps = (*found, median, *solved)
    return rgsp.compose(parts, stack, 0.7), composed, scale, rgsp.decompose(stack, R, None).s, *steps


def graft_by_covariance(a, b, rows, more):
    state = grafting.update_covariance(grafting.initial_covariance(N, jnp.float64), rows)
    other = grafting.update_covariance(grafting.initial_covariance(N, jnp.float64), more)
    covariance = grafting.finish_covariance(grafting.combine_covariances(state, other)).second
    spectrum = grafting.decompose_covariance(covariance)
    projectors = [
        grafting.null_space_projector(spectrum, **given)
        for given in ({"energy": 0.8}, {"ridge": 2.0}, {"threshold": 0.5})
    ]
    grafts = [grafting.graft(a, b, projector) for projector in projectors]
    grafts += [grafting.ridge_graft(a, b, covariance, 2.0)]
    stack = jnp.stack([a, b])
    refitted = grafting.refit(stack, jnp.stack([covariance] * 2), jnp.zeros((2, N, N)), (a + b) / 2)
    return grafts, refitted, grafting.output_change(a, b, grafts[0], more)


def graft_by_sketch(a, b, rows, more):
    state = grafting.update_sketch(grafting.initial_sketch(N, 4, jnp.float64), rows)
    other = grafting.update_sketch(grafting.initial_sketch(N, 4, jnp.float64), more)
    sketch = grafting.finish_sketch(grafting.combine_sketches(state, other))
    spectrum = grafting.decompose_sketch(sketch.factor, sketch.trace)
    grafted = grafting.graft(a, b, grafting.null_space_projector(spectrum, energy=0.5))
    basis = grafting.leading_subspace(jnp.matmul(rows.T, rows), 2)
    return grafted, jnp.matmul(basis, basis.T)


def align_neurons(ours, theirs):
    matching = merging.match_weights(ours, theirs, SPEC)
    moved = merging.transport_neurons(ours, theirs, SPEC, coupling="exact")
    return matching.permutations, merging.permute(theirs, SPEC, matching.permutations), moved.params


def couple_geometries(ours, theirs):
    plans = {layer: found.plan for layer, found in merging.couple_neurons(ours, theirs, SPEC, stages=2).items()}
    orders = {layer: merging.round_coupling(plan) for layer, plan in plans.items()}
    return plans, orders, merging.carry_neurons(theirs, SPEC, plans)


def draw_models(seed):
    shapes = [(6, 5), (6,), (4, 6)]
    return tuple(dict(zip(SPEC, normals(*shapes)(2 * seed + i), strict=True)) for i in range(2))


def losses(logits, teacher, labels):
    features = jnp.tanh(logits)
    return (
        learning.cross_entropy(logits, labels),
        learning.entropy(logits),
        learning.weighted_entropy(logits),
        learning.distillation(logits, teacher, 2.0),
        learning.feature_distance(features, teacher, spread=learning.feature_spread(teacher)),
        learning.squared_distance({"a": logits}, {"a": teacher}),
    )


def draw_answers(seed):
    labels = np.random.default_rng(seed).integers(0, 4, 7).astype(np.int32)
    return (*normals((7, 4), (7, 4))(seed), labels)


def compare_elements(stack, rows):
    return similarity.sum_elements(stack), similarity.compare_rows(stack[0], stack[1], rows)


def search(responses):
    return merging.search_alpha(jnp.linspace(0, 1, 5), responses)


KERNELS = {
    "truncated_svd": Kernel(
        svd_and_what_follows,
        matrices((M, N), (M, N)),
        frozenset({"truncated_svd", "drop_null_directions", "compare_subspaces", "share_basis"}),
    ),
    **{
        f"truncated_svd {algorithm}": Kernel(
            partial(truncated_svd, rank=R, algorithm=algorithm), matrices((40, 36)), frozenset()
        )
        for algorithm in ("full", "gram", "lanczos", "subspace")
    },
    "polar_factor": Kernel(polar_factor, matrices((M, N)), frozenset({"polar_factor"})),
    "cholesky_qr": Kernel(cholesky_qr, matrices((M, N)), frozenset({"cholesky_qr"})),
    "spectral": Kernel(solve_spectral, matrices((M, N)), frozenset({"inverse_square_root", "solve_sylvester"})),
    "bases": Kernel(
        compare_bases, orthonormal, frozenset({"principal_angles", "subspace_overlap", "subspace_movement"})
    ),
    "gromov_wasserstein": Kernel(
        couple,
        normals((6, 4), (6, 4)),
        frozenset({"gromov_wasserstein", "normalize_jointly", "share_by_row", "squared_distances"}),
    ),
    "annealed": Kernel(anneal, normals((6, 4), (6, 4)), frozenset({"anneal_gromov_wasserstein", "critical_epsilon"})),
    "elements": Kernel(
        compare_elements,
        lambda seed: (*normals((2, M, N))(seed), np.array([1, 5, 7])),
        frozenset({"sum_elements", "compare_rows"}),
    ),
    "graft by covariance": Kernel(
        graft_by_covariance,
        normals((M, N), (M, N), (30, N), (20, N)),
        frozenset(
            {
                *("initial_covariance", "update_covariance", "combine_covariances", "finish_covariance"),
                *("decompose_covariance", "null_space_projector", "graft", "ridge_graft", "refit", "output_change"),
            }
        ),
    ),
    "graft by sketch": Kernel(
        graft_by_sketch,
        normals((M, N), (M, N), (30, N), (20, N)),
        frozenset(
            {
                *("initial_sketch", "update_sketch", "combine_sketches", "finish_sketch"),
                *("decompose_sketch", "leading_subspace"),
            }
        ),
    ),
    "pair in steps": Kernel(
        pair_in_steps,
        lambda seed: (make_models(2, M, N, seed)[0],),
        frozenset(
            {
                *("prepare_pair", "pair_svds", "solve_pair", "solve_literal", "trace_pair", "couple_pair"),
                "relative_task_vector",
            }
        ),
    ),
    "relative in steps": Kernel(
        relative_in_steps,
        lambda seed: (make_models(3, M, N, seed)[0],),
        frozenset(
            {
                *("prepare_weighted", "decorrelate", "compose", "relative_distance"),
                *("distance_scale", "decompose", "prepare_relative", "solve_relative", "nuclear_median"),
                *("solve_cores", "decorrelate_directions"),
            }
        ),
    ),
    "neurons": Kernel(align_neurons, draw_models, frozenset({"match_weights", "transport_neurons", "permute"})),
    "geometries": Kernel(
        couple_geometries, draw_models, frozenset({"couple_neurons", "carry_neurons", "round_coupling"})
    ),
    "fisher": Kernel(
        merging.fisher,
        lambda seed: tuple(np.abs(x) for x in normals((3, M, N), (3, M, N))(seed)),
        frozenset({"fisher"}),
    ),
    "search_alpha": Kernel(search, normals((5, 6, 3)), frozenset({"search_alpha"})),
    "losses": Kernel(
        losses,
        draw_answers,
        frozenset(
            {
                *("cross_entropy", "entropy", "weighted_entropy", "distillation", "feature_distance"),
                *("feature_spread", "squared_distance"),
            }
        ),
    ),
}


def method_kernel(name):
    """A merge method with whatever it needs as arguments of one lane."""

    def draw(seed):
        count = count_models(name)
        stack, given = make_arguments(name, *make_models(count, M, N, seed), "float64")
        if "key" in given:  # keys are not numpy's: a number that makes one
            given["key"] = np.uint32(seed)
        return jax.tree.map(np.asarray, (stack, given))

    def run(stack, given):
        if "key" in given:
            given = given | {"key": jax.random.key(given["key"])}
        return methods[name](stack, **given, **settings_of(name, R))

    return Kernel(run, draw, frozenset({name, methods[name].fn.__name__}))


KERNELS |= {f"method {name}": method_kernel(name) for name in methods}
