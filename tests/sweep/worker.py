"""A worker of a study, as a process of its own: `worker.py PLACE OUT TRIALS [die]`."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from pipeline.toy_models import read_model
from rgsp_jax.pipeline import overview
from rgsp_jax.sweep import parse_sweep, run_study

AXES = {"t": {"low": 0.05, "high": 0.95}}


def study_config(place):
    return parse_sweep(
        {"models": [f"{place}/a", f"{place}/b"], "method": "slerp", "include": ["logit_scale"], "axes": AXES},
        study=True,
    )


def main(place: str, out: str, trials: str, die: str = "") -> None:
    """Score merges by their one merged number; die in the middle of a trial where asked to."""

    def evaluate(path: Path) -> float:
        with (Path(out).parent / "calls").open("a") as calls:
            calls.write(f"{os.getpid()} {path.name}\n")
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        return -abs(float(np.ravel(read_model(path)["logit_scale"])[0]) - 0.5)

    overview.render_report = lambda summary, records: ""
    results = run_study(study_config(place), Path(out), evaluate, int(trials), heartbeat=1)
    print(len(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
