"""float64 NumPy oracles, written from SPEC.md, that share no code with the package."""

import numpy as np


def signed_svd(w, rank):
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    signs = np.where(u[np.abs(u).argmax(0), np.arange(rank)] < 0, -1.0, 1.0)
    return u * signs, s, v * signs


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def orthonormal(x):
    """Basis of the columns' span."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-9 * max(s[0], 1e-300)]


def apply_symmetric(function, h):
    values, q = np.linalg.eigh(h)
    return (q * function(values)) @ q.T


def sylvester(a, b, right):
    """x of `a x + x b = right`, by the Kronecker product."""
    system = np.kron(a, np.eye(len(b))) + np.kron(np.eye(len(a)), b.T)
    return np.linalg.solve(system, right.ravel()).reshape(right.shape)


def nuclear_median(cores, steps=5, floor=1e-2):
    """argmin_C sum_k |c_k - C|_* by reweighted least squares."""
    size = np.sqrt(np.mean([np.sum(c**2) for c in cores]))
    cores = cores / size
    median, e = cores.mean(0), floor / min(cores.shape[1:])
    root = lambda h: apply_symmetric(lambda x: x**-0.5, h + e * np.eye(len(h)))  # noqa: E731
    for _ in range(steps):
        left = [root((c - median) @ (c - median).T) for c in cores]
        right = [root((c - median).T @ (c - median)) for c in cores]
        pulled = sum(w @ c + c @ v for w, v, c in zip(left, right, cores, strict=True))
        median = sylvester(sum(left), sum(right), pulled)
    return median * size


def relative(stack, rank, scale=1.2, directions=1.0, rest=0.0, reach=0.0018):
    """`relative` by full SVDs and dense systems (three or more models that differ)."""
    stack = np.asarray(stack, np.float64)
    count, m, n = stack.shape
    rank = min(rank, max(min(m, n) // count, 1))
    mean = stack.mean(0)
    if count == 2 or not np.any(stack - mean):
        return mean
    sides = [np.linalg.svd(d, full_matrices=False) for d in stack - mean]
    left = orthonormal(np.concatenate([u[:, :rank] * (s[:rank] > 1e-9 * s[0]) for u, s, _ in sides], axis=1))
    right = orthonormal(np.concatenate([vt[:rank].T * (s[:rank] > 1e-9 * s[0]) for _, s, vt in sides], axis=1))
    cores = np.stack([left.T @ d @ right for d in stack - mean])
    ancestor = nuclear_median(cores)
    sides = [np.linalg.svd(c - ancestor, full_matrices=False) for c in cores]
    u = np.concatenate([u[:, :rank] for u, _, _ in sides], axis=1)
    v = np.concatenate([vt[:rank].T for _, _, vt in sides], axis=1)
    s = np.concatenate([s[:rank] for _, s, _ in sides])
    a = np.broadcast_to(np.reshape(directions, (-1, 1)) if np.ndim(directions) == 1 else directions, (count, rank))
    rho = np.linalg.norm(stack - mean, axis=(1, 2)).mean() / np.linalg.norm(mean)
    departures = [c - ancestor for c in cores]
    energy = np.mean([np.sum(d**2) for d in departures])
    overlaps = [np.sum(departures[i] * departures[j]) / energy for j in range(count) for i in range(j)]
    trust = 1 / (1 + (rho * np.std(overlaps) / reach) ** 2)
    sa = s * a.ravel()
    departure = ((u * sa) @ v.T + (polar(u) * sa) @ polar(v).T) / 2
    merged = mean + trust * left @ (ancestor + scale * departure) @ right.T
    for b, d, core in zip(np.broadcast_to(rest, count), stack - mean, cores, strict=True):
        merged = merged + b * (d - left @ core @ right.T)
    return merged


def relative_weighted(stack, rank, scale="auto"):
    stack = np.asarray(stack, np.float64)
    mean = stack.mean(0)
    if scale == "auto":
        rho = np.mean([np.linalg.norm(w - mean) for w in stack]) / np.linalg.norm(mean)
        scale = 2 / (1 + 20 * rho)
    parts = [signed_svd(w - mean, rank) for w in stack]
    u, v = (polar(np.hstack([part[i] for part in parts])) for i in (0, 2))
    return mean + scale * (u * np.concatenate([part[1] for part in parts])) @ v.T


def slerp(a, b, t, threshold=0.9995):
    cosine = (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > threshold:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def directional_derivative(f, x, direction, step=1e-5):
    """Central difference of fourth order."""
    near = f(x + step * direction) - f(x - step * direction)
    far = f(x + 2 * step * direction) - f(x - 2 * step * direction)
    return (8 * near - far) / (12 * step)
