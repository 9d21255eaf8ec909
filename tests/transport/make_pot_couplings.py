"""Writes pot_couplings.json: couplings of small problems by POT (pip install pot==0.9.7), solved far past convergence.

    python tests/transport/make_pot_couplings.py

Costs and weights are rounded, so that the file holds exactly what POT was given. Not needed to run the tests.
"""

import json
import pathlib

import numpy as np
import ot

SETTINGS = {"max_iter": 20000, "tol": 1e-14, "numItermax": 100000, "stopThr": 1e-15}


def squared_distances(x):
    return ((x[:, :, None] - x[:, None, :]) ** 2).sum(0)


def make_costs(rng, kind, ra, rb):
    if kind == "random":
        costs = [rng.uniform(size=(r, r)) for r in (ra, rb)]
        costs = [(c + c.T) / 2 * (1 - np.eye(len(c))) for c in costs]
    elif kind == "spectral":  # points s_i u_i with orthonormal u_i
        costs = [
            (s[:, None] ** 2 + s[None, :] ** 2) * (1 - np.eye(len(s)))
            for s in (rng.uniform(size=ra), rng.uniform(size=rb))
        ]
    else:
        x = rng.normal(size=(3, ra))
        costs = [
            squared_distances(x),
            squared_distances((x + 0.2 * rng.normal(size=x.shape))[:, rng.permutation(ra)[:rb]]),
        ]
    scale = max(c.max() for c in costs)
    return [np.round(c / scale, 4) for c in costs]


def main():
    rng = np.random.default_rng(11)
    ra, rb = 9, 7
    cases = []
    for kind in ("points", "spectral", "random"):
        cost_a, cost_b = make_costs(rng, kind, ra, rb)
        a, b = (np.round(rng.uniform(0.2, 1, r), 3) for r in (ra, rb))
        linear_cost = np.round(rng.uniform(size=(ra, rb)), 3)
        for epsilon, fused_penalty in ((0.05, 0.0), (0.05, 0.25), (0.02, 1.5)):
            alpha = 1 / (1 + fused_penalty)
            plan = ot.gromov.entropic_fused_gromov_wasserstein(
                linear_cost, cost_a, cost_b, a / a.sum(), b / b.sum(), epsilon=alpha * epsilon, alpha=alpha, **SETTINGS
            )
            if fused_penalty == 0:
                plain = ot.gromov.entropic_gromov_wasserstein(
                    cost_a, cost_b, a / a.sum(), b / b.sum(), epsilon=epsilon, **SETTINGS
                )
                assert np.abs(plain - plan).sum() < 1e-12
            case = {
                "kind": kind,
                "epsilon": epsilon,
                "fused_penalty": fused_penalty,
                "cost_a": cost_a,
                "cost_b": cost_b,
            }
            cases.append(case | {"a": a, "b": b, "linear_cost": linear_cost, "plan": plan})
    path = pathlib.Path(__file__).with_name("pot_couplings.json")
    path.write_text(json.dumps(cases, default=lambda x: x.tolist()) + "\n")


if __name__ == "__main__":
    main()
