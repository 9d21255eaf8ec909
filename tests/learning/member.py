"""One of two processes that learn and sweep on a mesh of all their devices: `member.py PORT INDEX OUT`."""

import os
import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from learning.test_mesh import RANK, loss, make_batch, make_trees
from rgsp_jax import learning
from rgsp_jax.sweep import sweep_merge

PROCESSES, DEVICES, ROWS = 2, 2, 8
POINTS = [{"method": "relative", "rank": 2, "scale": s} for s in (0.3, 0.5)]


def describe(trees, state, value):
    """All numbers by name."""
    found = {f"{number}{jax.tree_util.keystr(path)}": x for number, tree in trees for path, x in leaves_of(tree)}
    found |= {f"state{jax.tree_util.keystr(path)}": x for path, x in leaves_of(state)}
    return {name: np.asarray(x) for name, x in (found | {"loss": value}).items()}


def leaves_of(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def work(mesh=None):
    """A sweep and a step of learning, on a mesh or on one device."""
    trees, batch = make_trees(), make_batch(ROWS)
    merged = [(point.index, tree) for point, tree in sweep_merge(trees, POINTS, mesh=mesh)]
    optimiser = optax.sgd(0.1)
    if mesh is None:
        family = learning.prepare_family(trees, rank=RANK)
    else:
        flat = Mesh(mesh.devices.reshape(-1), ("data",))
        family = learning.prepare_family(trees, rank=RANK, mesh=flat, axis="data")
        own = slice(jax.process_index() * ROWS // PROCESSES, (jax.process_index() + 1) * ROWS // PROCESSES)
        rows = NamedSharding(flat, PartitionSpec("data"))
        batch = {name: jax.make_array_from_process_local_data(rows, x[own]) for name, x in batch.items()}
    state = learning.start_learning(learning.start_coefficients(family), optimiser)
    if mesh is not None:
        state = jax.device_put(jax.tree.map(np.asarray, state), NamedSharding(flat, PartitionSpec()))
    state, value = learning.make_step(loss, optimiser)(state, family, batch)
    return describe(merged, state, value)


def main(port: str, index: str, out: str) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(index))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("points", "layers"))
    np.savez(out, **work(mesh))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
