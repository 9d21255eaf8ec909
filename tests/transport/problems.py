"""Problems and float64 NumPy oracles that the transport tests share."""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
ARRAYS = ("cost_a", "cost_b", "a", "b", "linear_cost", "plan", "coupling")


def load_cases(name):
    def to_arrays(case):
        return {key: np.array(value) if key in ARRAYS else value for key, value in case.items()}

    cases = json.loads((FOLDER / name).read_text())
    return (
        [to_arrays(case) for case in cases] if isinstance(cases, list) else {k: to_arrays(v) for k, v in cases.items()}
    )


def make_problem(seed, ra=9, rb=7):
    """Costs of two noisy views of one point cloud, uneven weights, a linear cost."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, ra))
    y = (x + 0.2 * rng.normal(size=x.shape))[:, rng.permutation(ra)[:rb]]
    cost_a, cost_b = (((p[:, :, None] - p[:, None, :]) ** 2).sum(0) for p in (x, y))
    scale = max(cost_a.max(), cost_b.max())
    a, b = rng.uniform(0.2, 1, ra), rng.uniform(0.2, 1, rb)
    return cost_a / scale, cost_b / scale, a, b, rng.uniform(size=(ra, rb))


def local_costs(cost_a, cost_b, plan):
    """G_ik = sum_jl |C_A(i,j) - C_B(k,l)|^2 P_jl, from the four-index tensor."""
    tensor = (cost_a[:, None, :, None] - cost_b[None, :, None, :]) ** 2
    return np.einsum("ikjl,jl->ik", tensor, plan)


def fixed_point_residual(cost_a, cost_b, plan, epsilon, linear=0.0):
    """How far log P + (2 G(P) + T) / epsilon is from a sum of a row and a column potential, weighted by the plan."""
    potential = np.log(plan) + (2 * local_costs(cost_a, cost_b, plan) + linear) / epsilon
    rows, columns = plan.sum(1), plan.sum(0)
    weights = plan / plan.sum()
    # Least squares over all potentials alpha_i + beta_k.
    ra, rb = plan.shape
    design = np.concatenate([np.repeat(np.eye(ra), rb, axis=0), np.tile(np.eye(rb), (ra, 1))], axis=1)
    root = np.sqrt(weights.ravel())
    solution = np.linalg.lstsq(design * root[:, None], potential.ravel() * root, rcond=None)[0]
    assert rows.min() > 0 and columns.min() > 0
    return np.abs((design @ solution - potential.ravel()) * weights.ravel()).sum()
