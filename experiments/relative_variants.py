"""`relative` with its parts exchanged: other ancestors, ranks, scales and blocks, and every ingredient of RGSP-TEFM.

A library of `relative_suite.py`. `relative_variant` at its defaults is `relative` (a test holds them together); every
keyword but `rank` is traced, so that one compilation serves them all. SPEC.md sections 1 to 3 name what is exchanged.

The ingredients M, GW, psi, TFI, TOS and lambda compare two models, so departure k is compared with every other
departure l, as the source compares B with A, and what they say of direction i of k is averaged over l:

- `chain`: the source's change of the spectrum, `s_k + mean_l lambda_kl M pi (s_l - s_k)`, in place of s_k;
- `weight`: what is said of a direction, divided by its mean over all directions, times s_k;
- `coupling`: what makes models' directions fit together, in place of the polar factors.

Each ingredient is in, out (the identity, the uniform plan, ones) or randomised (its entries permuted).
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import polar_factor
from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import Hyperparameter, Method, Rank
from rgsp_jax.rgsp import PairTrace, pair_svds, prepare_relative, solve_pair
from rgsp_jax.rgsp.alignment import decompose
from rgsp_jax.rgsp.encoding import adjust_coupling
from rgsp_jax.rgsp.relative import (
    DECORRELATED,
    count_directions,
    frobenius_norm,
    join_directions,
    multiply,
    nuclear_median,
    overlap_deviation,
    trust_correction,
)
from rgsp_jax.types import MergeOutput, TruncatedSVD

ANCESTORS = ("nuclear median", "mean", "elementwise median", "median turned at random")
RANKS = ("all", "energy .9", "random-matrix edge", "no direction that others have")
WEIGHTS = ("none", "TFI", "psi", "TOS gate", "lambda of the model")
COUPLINGS = ("half polar factors", "polar factors", "none", "GW barycentre", "M barycentre")
TRUSTS = ("rho and discord", "rho")
SCALES = ("constant", "energy", "overlap", "condition")
IN, OUT, RANDOM = range(3)
EDGE = 2.858
"""Of the median singular value: the best hard threshold for a square matrix in noise of unknown size.

Gavish & Donoho, The optimal hard threshold for singular values is 4/sqrt(3), IEEE Trans. Inf. Theory 60 (2014).
"""

Choice = Annotated[Any, Hyperparameter("which of the module's alternatives", low=0)]
State = Annotated[Any, Hyperparameter("0 in, 1 out, 2 randomised", low=0, high=2)]
Scale = Annotated[Any, Hyperparameter("of the departure", low=0)]
Reach = Annotated[Any, Hyperparameter("as in `relative`", low=0, exclusive_low=True)]
Epsilon = Annotated[Any, Hyperparameter("entropy of the plans, as in `rgsp`", low=0, exclusive_low=True)]
Fused = Annotated[Any, Hyperparameter("weight of the directions' overlaps in the plans, as in `rgsp`", low=0)]


class Comparison(NamedTuple):
    """What each departure [k] is told by comparison with each [l]; the diagonal is of a departure with itself."""

    trace: PairTrace
    shuffled: PairTrace
    """With M, plan, code and importance permuted."""


def relative_variant(
    stack: Float[Array, "k m n"],
    rank: Rank = 32,
    ancestor: Choice = 0,
    ranks: Choice = 0,
    weight: Choice = 0,
    weight_random: State = 0,
    coupling: Choice = 0,
    coupling_random: State = 0,
    chain: State = OUT,
    m: State = IN,
    gw: State = IN,
    tos: State = IN,
    lam: State = IN,
    scales: Choice = 0,
    trusts: Choice = 0,
    scale: Scale = 1.2,
    reach: Reach = 0.0018,
    epsilon: Epsilon = 0.05,
    fused_penalty: Fused = 0.0,
) -> MergeOutput:
    """`relative` of at least three models with the named parts exchanged."""
    parts = prepare_relative(stack, rank)
    cores, r = parts.cores, parts.svds.s.shape[1]
    size = jnp.sqrt(jnp.mean(frobenius_norm(cores) ** 2) + jnp.finfo(cores.dtype).tiny)
    median = nuclear_median(cores / size, count_directions(parts.left, parts.right)) * size
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (median.shape[0],) * 2, median.dtype))[0]
    found = [median, jnp.zeros_like(median), jnp.median(cores, axis=0), multiply(turn, median)]
    every = [decompose(cores - one[None], min(r, *cores.shape[1:]), None) for one in found]
    ancestors = jnp.stack(found)
    all_values = jnp.stack([jnp.linalg.svd(cores - one[None], compute_uv=False) for one in found])

    number = jnp.asarray(ancestor).astype(jnp.int32)
    svds = jax.tree.map(lambda *x: jnp.stack(x)[number], *every)
    compared = compare(every[0], epsilon, fused_penalty)
    s = svds.s * keep(svds, all_values[number], ranks)
    s = jnp.where(jnp.asarray(chain) == OUT, s, s + transport(compared, svds.s, m, gw, tos, lam))
    s = s * weigh(compared, svds, weight, weight_random)
    departure = couple(svds, s, compared, coupling, coupling_random)
    strength = jnp.asarray(scale, stack.dtype) * find_scale(svds, s, departure, scales)
    discord = overlap_deviation(cores - median[None])
    discord = jnp.where(jnp.asarray(trusts) == 0, discord, 1.0)
    core = trust_correction(parts.rho, discord, reach) * (ancestors[number] + strength * departure)
    merged = stack_mean(stack) + multiply(multiply(parts.left, core), parts.right.T)
    return MergeOutput(merged, {"rho": parts.rho})


def compare(svds: TruncatedSVD, epsilon: Any, fused_penalty: Any) -> Comparison:
    """Every departure against every other by the six steps, at the defaults of `rgsp` but what is named."""
    count, r = svds.s.shape
    first, second = jnp.divmod(jnp.arange(count * count), count)

    def one(pair: tuple[Array, Array]) -> PairTrace:
        a, b = (jax.tree.map(lambda x, i=i: x[i], svds) for i in pair)
        return solve_pair(pair_svds(a, b), epsilon=epsilon, fused_penalty=fused_penalty)

    trace = map_batch(one, (first, second))
    trace = jax.tree.map(lambda x: x.reshape(count, count, *x.shape[1:]), trace)
    order = jax.random.permutation(jax.random.key(1), r)
    mixed = jnp.roll(trace.lam.reshape(-1), 1).reshape(trace.lam.shape)
    return Comparison(trace, trace._replace(m=trace.m[..., order], tfi=trace.tfi[..., order], lam=mixed))


def others(x: Float[Array, "k k ..."]) -> Float[Array, "k ..."]:
    """The mean over the other models."""
    count = x.shape[0]
    off = (~jnp.eye(count, dtype=bool)).reshape(count, count, *(1,) * (x.ndim - 2))
    return jnp.sum(jnp.where(off, x, 0), axis=1) / (count - 1)


def choose(state: Any, inside: Array, outside: Array, random: Array) -> Array:
    """One of three by the state."""
    return jnp.where(jnp.asarray(state) == IN, inside, jnp.where(jnp.asarray(state) == OUT, outside, random))


def permuted(x: Float[Array, "... r"]) -> Float[Array, "... r"]:
    """The last axis in an order drawn once."""
    return x[..., jax.random.permutation(jax.random.key(2), x.shape[-1])]


def transport(compared: Comparison, s: Float[Array, "k r"], m: Any, gw: Any, tos: Any, lam: Any) -> Array:
    """`mean_l lambda_kl M pi (s_l - s_k)` of steps 2 to 6."""
    trace, r = compared.trace, s.shape[1]
    eye, flat = jnp.broadcast_to(jnp.eye(r, dtype=s.dtype), trace.m.shape), jnp.full_like(trace.m, 1 / r**2)
    mapping = choose(m, trace.m, eye, compared.shuffled.m)
    plan = choose(gw, trace.coupling.plan, flat, permuted(trace.coupling.plan))
    score = choose(tos, trace.tos, jnp.ones_like(trace.tos), permuted(trace.tos))
    active = jnp.ones(r, bool)
    adjusted = jax.vmap(jax.vmap(lambda p, t: adjust_coupling(p, t, active)))(plan, score)
    strength = choose(lam, trace.lam, jnp.ones_like(trace.lam), compared.shuffled.lam)
    change = s[None, :, :] - s[:, None, :]
    moved = jnp.einsum("klij,kljp,klp->kli", mapping, adjusted, change, precision="highest")
    return others(strength[..., None] * moved)


def weigh(compared: Comparison, svds: TruncatedSVD, weight: Any, random: Any) -> Float[Array, "k r"]:
    """What the named ingredient says of every direction, of mean 1."""
    trace = compared.trace
    code = jnp.sqrt(jnp.sum(trace.code.psi**2, axis=-1) + jnp.finfo(svds.s.dtype).tiny)
    # A direction's own code in its comparison with l against the codes of l's directions in the comparison with it.
    theirs = jnp.swapaxes(trace.code.psi, 0, 1)
    unit = [x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-30) for x in (trace.code.psi, theirs)]
    score = jnp.einsum("klic,kljc->klij", *unit, precision="highest") * jnp.exp(-trace.code.d_bar)[..., None, None]
    gate = 1 - jnp.sum(jnp.maximum(score, 0) * trace.coupling.plan, axis=-1) / jnp.maximum(
        trace.coupling.plan.sum(-1), jnp.finfo(svds.s.dtype).tiny
    )
    of_model = jnp.broadcast_to(others(jnp.abs(trace.lam))[:, None], svds.s.shape)
    said = jnp.stack([jnp.ones_like(svds.s), others(jnp.abs(trace.tfi)), others(code), others(gate), of_model])
    said = said[jnp.asarray(weight).astype(jnp.int32)]
    shuffled = jax.random.permutation(jax.random.key(3), said.reshape(-1)).reshape(said.shape)
    said = choose(random, said, jnp.ones_like(said), shuffled)
    return said / (said.mean() + jnp.finfo(said.dtype).tiny)


def keep(svds: TruncatedSVD, values: Float[Array, "k q"], rule: Any) -> Float[Array, "k r"]:
    """1 for the directions that a rule of the rank keeps."""
    square = svds.s**2
    before = jnp.cumsum(square, axis=1) - square
    energy = before < 0.9 * jnp.sum(values**2, axis=1, keepdims=True)
    edge = svds.s > EDGE * jnp.median(values, axis=1, keepdims=True)
    left, right = (jnp.abs(jnp.einsum("kmi,lmj->klij", x, x, precision="highest")) for x in (svds.u, svds.v))
    shared = jnp.max(left * right, axis=-1)
    off = ~jnp.eye(len(svds.s), dtype=bool)[..., None]
    alone = jnp.max(jnp.where(off, shared, 0), axis=1) < 0.5
    kept = jnp.stack([jnp.ones_like(alone), energy, edge, alone])[jnp.asarray(rule).astype(jnp.int32)]
    return kept.astype(svds.s.dtype)


def couple(svds: TruncatedSVD, s: Float[Array, "k r"], compared: Comparison, coupling: Any, random: Any) -> Array:
    """All departures together, the directions of each with values s made to fit those of the others."""
    number = jnp.asarray(coupling).astype(jnp.int32)
    trace, count = compared.trace, len(svds.s)
    turned = jnp.sign(trace.mixing) + (trace.mixing == 0)
    plans = [trace.coupling.plan * svds.s.shape[1] * turned, trace.mixing]
    sides = []
    for x in (svds.u, svds.v):
        flat = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
        if sides:
            flat, sides[0] = lax.optimization_barrier((flat, sides[0]))  # see rgsp_jax.linalg.spectral
        polar = jnp.moveaxis(polar_factor(flat).reshape(x.shape[1], count, -1), 1, 0)
        near = []
        for plan in plans:
            used = choose(random, plan, plan, permuted(plan))
            carried = jnp.einsum("klij,lmj->klmi", used, x, precision="highest")
            near.append((x + (count - 1) * others(carried)) / count)
        sides.append([polar, x, *near])
    departures = [join_directions(u * s[:, None, :], v) for u, v in zip(*sides, strict=True)]
    half = DECORRELATED * departures[0] + (1 - DECORRELATED) * departures[1]
    return jnp.stack([half, *departures])[number]


def find_scale(svds: TruncatedSVD, s: Array, departure: Array, rule: Any) -> Array:
    """1, or what a rule makes of the departures: what their sum keeps of their energy, how they overlap."""
    energy = jnp.sqrt(jnp.sum(s**2)) / (frobenius_norm(departure) + jnp.finfo(s.dtype).tiny)
    grams = [jnp.einsum("kmi,lmj->klij", x, x, precision="highest") for x in (svds.u, svds.v)]
    count, r = svds.s.shape
    off = ~jnp.eye(count, dtype=bool)[..., None, None]
    shared = sum(jnp.sum(jnp.where(off, g**2, 0)) for g in grams) / (2 * count * (count - 1) * r)
    values = [jnp.linalg.eigvalsh(jnp.moveaxis(g, 2, 1).reshape(count * r, count * r)) for g in grams[:1]]
    condition = jnp.mean(jnp.sqrt(jnp.maximum(values[0], 0)))  # 1 where no directions are shared
    rules = [jnp.ones_like(energy), energy, 1 - shared, condition]
    return jnp.stack(rules)[jnp.asarray(rule).astype(jnp.int32)]


VARIANT = Method("relative_variant", relative_variant, "`relative` with its parts exchanged.", models=(3, None))
