"""How much does the coupling of `rgsp` know? Its plan's information over the product plan, by epsilon.

    python experiments/coupling_information.py --bench BENCH --tasks trec subj mr

Hardware: 2 CPU cores, 2 GB. Runtime: two minutes.

BENCH holds task directories as `text_encoders.py` reads them; every pair of encoders is coupled, matrix by matrix, at
the defaults of `rgsp` but epsilon. Siblings match direction by direction, so that the right plan is close to the
identity: it carries log r nats and has all its mass on the diagonal; the product plan carries none and has 1 / r there.

Expected of TREC, SUBJ and MR: .033 of log r at the default epsilon of .05, .63 at .001; critical epsilon .0011.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tables import RESULTS, describe_command, table, write_results

from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.rgsp import couple_pair, prepare_pair
from rgsp_jax.transport import critical_epsilon

RANK = 64
EPSILONS = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


class Knowledge(NamedTuple):
    """Of one coupling."""

    critical: Float[Array, ""]
    """Epsilon above which only first moments count."""
    information: Float[Array, ""]
    """KL of the plan from the product of its marginals, in units of log r."""
    diagonal: Float[Array, ""]
    """Mass of directions matched to the other model's of the same number."""
    converged: Float[Array, ""]


@partial(jax.jit, static_argnames="rank")
def measure(stack: Float[Array, "2 m n"], epsilon: Float[Array, ""], rank: int) -> Knowledge:
    """Couple two matrices as `rgsp` does."""
    coupled = couple_pair(prepare_pair(stack, rank), epsilon=epsilon)
    plan = coupled.coupling.plan
    product = plan.sum(1)[:, None] * plan.sum(0)[None, :]
    safe = jnp.where(plan > 0, plan / product, 1.0)
    information = jnp.sum(plan * jnp.log(safe)) / float(np.log(rank))
    return Knowledge(
        critical_epsilon(coupled.cost_a, coupled.cost_b),
        information,
        jnp.trace(plan),
        coupled.coupling.converged.astype(plan.dtype),
    )


def read_stacks(directories: Sequence[Path]) -> Iterator[Float[np.ndarray, "2 m n"]]:
    """Yield the matrices of the layers of every pair of models."""
    for first, second in itertools.combinations(directories, 2):
        with open_checkpoint(first / "model") as a, open_checkpoint(second / "model") as b:
            for name, spec in a.specs.items():
                if len(spec.shape) == 2 and "layer." in name and min(spec.shape) > 1:
                    yield np.stack([np.asarray(model.read(name), np.float32) for model in (a, b)])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="directory of task directories")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--out", type=Path, default=RESULTS / "coupling_information")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[float, list[Knowledge]]:
    """Run the experiment and return what every coupling knows, by epsilon."""
    options = parse_arguments(arguments)
    found: dict[float, list[Knowledge]] = {epsilon: [] for epsilon in EPSILONS}
    for stack in read_stacks([options.bench / name for name in options.tasks]):
        rank = min(options.rank, *stack.shape[1:])
        for epsilon in EPSILONS:
            found[epsilon].append(Knowledge(*map(float, measure(jnp.asarray(stack), jnp.float32(epsilon), rank))))
    medians = {epsilon: Knowledge(*np.median(np.array(values), axis=0)) for epsilon, values in found.items()}
    lines = [
        [
            f"{epsilon:g}",
            f"{of.information:.3f}",
            f"{of.diagonal:.3f}",
            f"{np.mean([x.converged for x in found[epsilon]]):.2f}",
        ]
        for epsilon, of in medians.items()
    ]
    head = ["epsilon", "information / log r", "mass on the diagonal", "converged"]
    first = medians[EPSILONS[0]]
    headline = (
        f"At epsilon {EPSILONS[0]:g} the plan of rgsp carries {first.information:.3f} of the information of a"
        f" permutation and has {first.diagonal:.3f} of its mass where siblings match (uniform: {1 / options.rank:.3f});"
        f" the critical epsilon is {first.critical:.4f} (medians of {len(found[EPSILONS[0]])} pairs of matrices)."
    )
    settings = {"tasks": options.tasks} | ({"rank": options.rank} if options.rank != RANK else {})
    command = describe_command("coupling_information", {"bench": "BENCH", **settings})
    record = {"settings": settings, "couplings": {f"{e:g}": [x._asdict() for x in own] for e, own in found.items()}}
    write_results(options.out, command, headline, record, ["", table(head, lines)])
    return found


if __name__ == "__main__":
    main()
