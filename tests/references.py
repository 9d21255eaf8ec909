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


def relative(stack, rank, scale="auto"):
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
