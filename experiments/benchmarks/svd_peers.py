"""The peers' side of `svd`: runs in their environment, without jax, and decomposes what it is told to.

A line of JSON on standard input names the contender, the matrix's file, the rank, and where the factors go, if
anywhere; a line with the seconds of processor time is the answer.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Factors = tuple[Any, Any, Any]


def decompose_by_torch(w: np.ndarray, rank: int, iterations: int) -> Factors:
    import torch

    u, s, v = torch.svd_lowrank(torch.from_numpy(w), q=min(2 * rank, *w.shape), niter=iterations)
    return u[:, :rank], s[:rank], v[:, :rank]


def decompose_by_sklearn(w: np.ndarray, rank: int) -> Factors:
    from sklearn.utils.extmath import randomized_svd

    u, s, vt = randomized_svd(w, rank, random_state=0)
    return u, s, vt.T


def decompose_by_scipy(w: np.ndarray, rank: int) -> Factors:
    from scipy.sparse.linalg import svds

    u, s, vt = svds(w, k=rank, rng=0)
    return u[:, ::-1], s[::-1], vt[::-1].T


CONTENDERS: dict[str, Callable[[np.ndarray, int], Factors]] = {
    "torch svd_lowrank 2": lambda w, rank: decompose_by_torch(w, rank, 2),
    "torch svd_lowrank 4": lambda w, rank: decompose_by_torch(w, rank, 4),
    "torch svd_lowrank 8": lambda w, rank: decompose_by_torch(w, rank, 8),
    "sklearn randomized_svd": decompose_by_sklearn,
    "scipy svds": decompose_by_scipy,
}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    matrices: dict[str, np.ndarray] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["matrix"] not in matrices or order.get("factors"):
            matrices = {order["matrix"]: np.load(order["matrix"])}
        decompose = CONTENDERS[order["contender"]]
        start = time.process_time()
        factors = decompose(matrices[order["matrix"]], order["rank"])
        seconds = time.process_time() - start
        if order.get("factors"):
            u, s, v = map(np.asarray, factors)
            np.savez(order["factors"], u=u, s=s, v=v)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
