"""`rgsp merge` as one of several processes, made slow, mortal or different where the arguments before `--` say so.

    python member.py [--delay SECONDS] [--die POINT] [--fail CALL] [--log FILE] [--wait SECONDS] -- merge ARGUMENTS

POINT is as in tests/pipeline/slow_merge.py. CALL is the number of the call of ShardWriter.write that finds no room.
FILE takes the tensors that are read, a line of name and bytes for each read.
"""

import argparse
import errno
import importlib
import json
import os
import sys
import time

from pipeline.slow_merge import kill_at
from rgsp_jax.checkpoint import ShardWriter
from rgsp_jax.checkpoint.safetensors_source import SafetensorsCheckpoint
from rgsp_jax.cli import main
from rgsp_jax.pipeline import overview, plan, workshop


def log_reads(path: str) -> None:
    """Note every read below the counter that the product reports from."""
    fill = SafetensorsCheckpoint._fill_runs

    def fill_and_note(self, spec, rows, starts):
        with open(path, "a") as file:
            file.write(json.dumps([str(self.path), spec.name, rows.nbytes]) + "\n")
        return fill(self, spec, rows, starts)

    SafetensorsCheckpoint._fill_runs = fill_and_note


def slow_down(delay: float, fail: int) -> None:
    """Take time for every write, and let one of them fail."""
    write, calls = ShardWriter.write, []

    def slow_write(*args):
        time.sleep(delay)
        calls.append(args)
        if len(calls) == fail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/full/disk")
        return write(*args)

    ShardWriter.write = slow_write


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--die")
    parser.add_argument("--fail", type=int, default=0)
    parser.add_argument("--log")
    parser.add_argument("--wait", type=float)
    split = sys.argv.index("--")
    arguments = parser.parse_args(sys.argv[1:split])
    sys.argv[1:] = sys.argv[split + 1 :]
    return arguments


if __name__ == "__main__":
    arguments = parse()
    if "TOY_STORE" in os.environ:
        importlib.import_module("remote.toy_store")
    plan.ITEM_ELEMENTS = 160
    overview.render_report = lambda summary, records: f"<p>{len(records)}</p>"
    if arguments.log:
        log_reads(arguments.log)
    if arguments.delay or arguments.fail:
        slow_down(arguments.delay, arguments.fail)
    if arguments.die:
        kill_at(*arguments.die.split(":"))
    if arguments.wait is not None:
        workshop.LOOK_SECONDS = arguments.wait
    main()
