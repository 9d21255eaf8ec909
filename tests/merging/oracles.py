"""float64 NumPy oracles of the comparators, written from the papers' formulas; they share no code with the package."""

import numpy as np


def svd(x, rank=None):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def polar(x):
    u, _, v = svd(x)
    return u @ v.T


def karcher(stack, coefficients=None, iterations=100):
    """Gradient descent on the sphere, on whole vectors."""
    flat = stack.reshape(len(stack), -1)
    shares = np.ones(len(flat)) if coefficients is None else np.asarray(coefficients, float)
    shares = shares / shares.sum()
    norms = np.linalg.norm(flat, axis=1)
    points = flat / norms[:, None]
    mean = shares @ points
    mean /= np.linalg.norm(mean)
    for _ in range(iterations):
        tangent = np.zeros_like(mean)
        for share, point in zip(shares, points, strict=True):
            rest = point - (point @ mean) * mean
            size = np.linalg.norm(rest)
            if size > 0:
                tangent += share * np.arctan2(size, point @ mean) * rest / size
        step = np.linalg.norm(tangent)
        if step < 1e-15:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
    return ((shares @ norms) * mean).reshape(stack.shape[1:])


def keep_largest(x, count):
    order = np.argsort(-np.abs(x).ravel(), kind="stable")[:count]
    mask = np.zeros(x.size, bool)
    mask[order] = True
    return mask.reshape(x.shape)


def trim(vectors, density):
    count = int(density * vectors[0].size + 1e-9)
    return np.stack([np.where(keep_largest(x, count), x, 0) for x in vectors])


def merge_by_sign(vectors, coefficients=None, normalize=True):
    """Entry by entry, as the paper's algorithm 1 says it."""
    coefficients = np.ones(len(vectors)) if coefficients is None else np.asarray(coefficients, float)
    merged = np.zeros(vectors.shape[1:])
    for index in np.ndindex(merged.shape):
        values = [c * x for c, x in zip(coefficients, vectors[(slice(None), *index)], strict=True)]
        sign = np.sign(sum(values))
        agreeing = [(v, c) for v, c in zip(values, coefficients, strict=True) if v != 0 and np.sign(v) == sign]
        if agreeing:
            merged[index] = sum(v for v, _ in agreeing) / (sum(c for _, c in agreeing) if normalize else 1)
    return merged


def ties(stack, base, density=0.2, scale=1.0, coefficients=None, normalize=True):
    return base + scale * merge_by_sign(trim(stack - base, density), coefficients, normalize)


def breadcrumbs(stack, base, density=0.9, gamma=0.01, scale=0.4):
    size = base.size
    left, top = int(density * size + 1e-9), int(gamma * size + 1e-9)
    bottom = size - left - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    merged = np.zeros_like(base)
    for x in stack - base:
        order = np.argsort(np.abs(x).ravel(), kind="stable")
        kept = np.zeros(size)
        kept[order[bottom : size - top]] = 1
        merged += kept.reshape(x.shape) * x
    return base + scale * merged


def model_stock(stack, base):
    vectors = (stack - base).reshape(len(stack), -1)
    count = len(vectors)
    cosines = [
        vectors[i] @ vectors[j] / (np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j]))
        for i in range(count)
        for j in range(i)
    ]
    cosine = np.mean(cosines)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * stack.mean(0) + (1 - t) * base


def tsv_m(stack, base, scale=1.0):
    rank = max(1, min(base.shape) // len(stack))
    parts = [svd(x - base, rank) for x in stack]
    u, v = (polar(np.hstack([part[i] for part in parts])) for i in (0, 2))
    return base + scale * u @ np.diag(np.concatenate([part[1] for part in parts])) @ v.T


def iso_c(stack, base, scale=1.0):
    u, s, v = svd((stack - base).sum(0))
    return base + scale * s.mean() * u @ v.T


def iso_cts(stack, base, common_share=0.8, scale=1.0):
    count, q = len(stack), min(base.shape)
    specific = round((q - int(q * common_share)) / count)
    common = q - specific * count
    u, s, v = svd((stack - base).sum(0), common)
    us, ss, vs = [u], [s], [v]
    for x in stack - base:
        own = svd(x - u @ u.T @ x, specific)
        us.append(own[0]), ss.append(own[1]), vs.append(own[2])
    return base + scale * np.concatenate(ss).mean() * polar(np.hstack(us)) @ polar(np.hstack(vs)).T


def wudi_loss(tau, vectors):
    return sum(np.linalg.norm((tau - x) @ x.T) ** 2 / np.linalg.norm(x) ** 2 for x in vectors)


def wudi(stack, base, iterations=300, learning_rate=1e-5):
    """Adam as Kingma & Ba write it, on the gradient of the loss as it stands."""
    vectors = stack - base
    tau, mean, variance = vectors.sum(0), 0.0, 0.0
    for step in range(1, iterations + 1):
        gradient = sum(2 * (tau - x) @ x.T @ x / np.linalg.norm(x) ** 2 for x in vectors)
        mean = 0.9 * mean + 0.1 * gradient
        variance = 0.999 * variance + 0.001 * gradient**2
        tau = tau - learning_rate * (mean / (1 - 0.9**step)) / (np.sqrt(variance / (1 - 0.999**step)) + 1e-8)
    return base + tau


def knots(stack, base, density=0.2, scale=1.0):
    count, n = len(stack), base.shape[1]
    u, s, v = svd(np.hstack(list(stack - base)))
    parts = np.stack([np.diag(s) @ v[i * n : (i + 1) * n].T for i in range(count)])
    return base + scale * u @ merge_by_sign(trim(parts, density))


def ace_merging(stack, base, ridge=1e-2, threshold=0.3, share=0.3):
    vectors = stack - base
    count, n = len(vectors), base.shape[1]
    traces = np.array([np.trace(x.T @ x) for x in vectors])
    logs = np.log(traces + 1e-12)
    uneven = logs.var(ddof=1) / (logs.mean() ** 2 + 1e-12) > threshold
    raws, numerator, denominator = [], np.zeros_like(base), np.zeros((n, n))
    for x in vectors:
        x = x - x.mean(0, keepdims=True)
        raw = x.T @ x
        size = np.trace(raw) + 1e-12 if uneven else 1.0
        raws.append(raw / size)
        covariance = raw / size + ridge / size * np.eye(n)
        numerator += x @ covariance
        denominator += covariance
    prior = sum(raws).mean(0, keepdims=True) / (traces.mean() + 1e-12 if uneven else 1.0)
    merged = numerator @ np.linalg.inv(denominator + prior)
    if uneven:
        residue = sum(x @ (raw - denominator / count) for x, raw in zip(vectors, raws, strict=True))
        u, s, v = svd(merged + residue, int(min(base.shape) * share))
        merged = merged + s.mean() * u @ v.T
    return base + merged, uneven


def regmean(stack, covariances, off_diagonal=0.9):
    covariances = [off_diagonal * c + (1 - off_diagonal) * np.diag(np.diag(c)) for c in covariances]
    return sum(w @ c for w, c in zip(stack, covariances, strict=True)) @ np.linalg.inv(sum(covariances))
