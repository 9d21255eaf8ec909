"""A merge in a process of its own, slowed down and killed where the arguments say; run by test_kill.py.

    python slow_merge.py OUT MODEL... [--resume] [--delay SECONDS] [--die POINT]

POINT is `FUNCTION:N[:after]`: the process kills itself (SIGKILL) at, or right after, the N-th call of the function.
"""

import argparse
import os
import signal
import time

from rgsp_jax.checkpoint import ShardWriter, shard_writer
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, delivery, execute, merge, merge_checkpoints, overview, plan
from rgsp_jax.pipeline.journal import Journal

POINTS = {
    "pwrite": (shard_writer.os, "pwrite"),
    "record": (Journal, "record"),
    "read_blocks": (execute, "read_blocks"),
    "audit": (merge, "audit"),
    "write_text": (overview.Path, "write_text"),
    "publish": (merge, "publish"),
    "upload": (delivery, "upload"),
    "rmtree": (merge.shutil, "rmtree"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def kill_at(function: str, number: str, when: str = "at") -> None:
    """Plant the death of this process."""
    owner, name = POINTS[function]
    original, calls = getattr(owner, name), []

    def mortal(*args, **kwargs):
        calls.append(name)
        last = len(calls) == int(number)
        if last and when == "at":
            die()
        result = original(*args, **kwargs)
        if last:
            die()
        return result

    setattr(owner, name, mortal)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--die")
    arguments = parser.parse_args()
    plan.ITEM_ELEMENTS = 160
    overview.render_report = lambda summary, records: f"<p>{len(records)}</p>"
    write = ShardWriter.write

    def slow_write(*args):
        time.sleep(arguments.delay)
        return write(*args)

    ShardWriter.write = slow_write
    if arguments.die:
        kill_at(*arguments.die.split(":"))
    config = MergeConfig(models=arguments.models, method="average", exclude=("*query*",), max_shard_size=100_000)
    try:
        result = merge_checkpoints(config, arguments.out, resume=arguments.resume)
        print(result.resumed_items)
    except RefusedError as refusal:
        print(refusal)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
