"""One of two processes that divide the rows of matrices between them: `member.py PORT INDEX OUT`."""

import os
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mesh.problems import RANK, make_models
from rgsp_jax import methods
from rgsp_jax.linalg import ROWS, truncated_svd

PROCESSES, DEVICES = 2, 2
TALL, WIDE = (96, 64), (64, 96)


def run(function):
    """What is asked of the mesh, and of one device."""
    return {
        "tall": function(*make_models(3, *TALL)),
        "wide": function(*make_models(3, *WIDE)),
    }


def compute(stack, ancestor):
    svd = truncated_svd(ancestor, RANK)
    return {"merged": methods["relative"](stack, rank=RANK).merged, "u": svd.u, "s": svd.s, "v": svd.v}


def main(port: str, index: str, out: str) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"  # read when the devices are looked up
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(index))
    mesh = Mesh(np.array(jax.devices()), (ROWS,))
    assert mesh.size == PROCESSES * DEVICES

    def place(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    def on_mesh(stack, ancestor):
        with jax.set_mesh(mesh):
            placed = place(stack, P(None, ROWS)), place(ancestor, P(ROWS))
            assert sum(shard.data.size for shard in placed[0].addressable_shards) == stack.size // PROCESSES
            return jax.jit(compute, out_shardings=NamedSharding(mesh, P()))(*placed)

    found = {f"{shape}_{name}": np.asarray(x) for shape, results in run(on_mesh).items() for name, x in results.items()}
    np.savez(out, **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
