"""What a layer's inputs span, and projectors on the rest: hard by energy or cutoff, soft by a ridge (SPEC.md, 4)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rgsp_jax.linalg.dense import matmul, scale_columns, widen


class Spectrum(NamedTuple):
    """Eigenvalues, descending and not negative, and eigenvectors of a covariance C [n, n] of a layer's inputs.

    A sketch knows the leading k < n of them; what it does not know is spread evenly over the other directions.
    """

    values: Float[Array, "k"]
    basis: Float[Array, "n k"]
    rest: Float[Array, ""]
    """Eigenvalue of the n - k directions outside the basis; 0 where k = n."""

    @property
    def trace(self) -> Float[Array, ""]:
        n, k = self.basis.shape
        return jnp.sum(self.values) + (n - k) * self.rest

    @property
    def mean(self) -> Float[Array, ""]:
        """mu, the mean eigenvalue: the unit of the ridge."""
        return self.trace / self.basis.shape[0]


class NullSpaceProjector(NamedTuple):
    """`P = outside I + basis diag(gains - outside) basis^T`: what each direction of the inputs lets through.

    Never formed: `project(x)` is two thin products where few directions are protected or few are kept (`compact`).
    """

    basis: Float[Array, "n k"]
    gains: Float[Array, "k"]
    """1 lets the donor's change through, 0 protects."""
    outside: Float[Array, ""]
    """Gain of the directions outside the basis."""

    def project(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """`x P`."""
        kept = scale_columns(matmul(x, self.basis), self.gains - self.outside)
        return self.outside * x + matmul(kept, self.basis.T)

    def matrix(self) -> Float[Array, "n n"]:
        """P itself."""
        return self.project(jnp.eye(self.basis.shape[0], dtype=self.basis.dtype))

    def compact(self) -> "NullSpaceProjector":
        """The same projector on its thinner side: columns without effect dropped. Not under jit."""
        full = self.basis.shape[0] == self.basis.shape[1]
        count = self.gains.shape[0]
        ones, zeros = int(jnp.sum(self.gains == 1)), int(jnp.sum(self.gains == 0))
        outside = self.outside if not full else jnp.where(ones > zeros, 1, 0).astype(self.gains.dtype)
        effective = jnp.flatnonzero(self.gains != outside)
        if effective.shape[0] == count:
            return self
        return NullSpaceProjector(self.basis[:, effective], self.gains[effective], outside)


def decompose_covariance(covariance: Float[Array, "n n"]) -> Spectrum:
    """Spectrum of a whole covariance; its rounding asymmetry is averaged out, its rounding below zero cut.

    Raises:
      ValueError: not a square matrix of floats.
    """
    covariance = jnp.asarray(covariance)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance is a square matrix, got {list(covariance.shape)}")
    values, basis = jnp.linalg.eigh(widen(covariance))
    return Spectrum(jnp.maximum(values[::-1], 0), basis[:, ::-1], jnp.zeros((), values.dtype))


def decompose_sketch(sketch: Float[Array, "l n"], trace: Float[Array, ""]) -> Spectrum:
    """Spectrum of `sketch^T sketch`, with what it lacks of the exact trace spread over the directions outside.

    Raises:
      ValueError: the sketch is not a matrix with fewer rows than columns.
    """
    sketch = widen(jnp.asarray(sketch))
    if sketch.ndim != 2 or sketch.shape[0] >= sketch.shape[1]:
        raise ValueError(f"a sketch has fewer rows than columns, got {list(sketch.shape)}")
    rows, n = sketch.shape
    _, s, vt = jnp.linalg.svd(sketch, full_matrices=False)
    values = s**2
    rest = jnp.maximum(jnp.asarray(trace, values.dtype) - jnp.sum(values), 0) / (n - rows)
    return Spectrum(values, vt.T, rest)


def energy_gains(spectrum: Spectrum, energy: float | Float[Array, ""]) -> Float[Array, "k"]:
    """Hard: 0 on the fewest leading directions that hold at least the share `energy` of the trace, 1 on the others.

    `energy=1` protects every direction whose eigenvalue stands out of rounding, so that `(W* - A) K = 0` for the
    inputs K that C was made of.
    """
    values = spectrum.values
    n = spectrum.basis.shape[0]
    trace = spectrum.trace
    tail = jnp.cumsum(values[::-1])[::-1] + (trace - jnp.sum(values))
    floor = n * float(jnp.finfo(values.dtype).eps)
    lost = tail / jnp.where(trace > 0, trace, 1)
    protected = (lost > 1 - energy) & (lost > floor) & (values > floor * values[0])
    return jnp.where(protected, 0, 1).astype(values.dtype)


def threshold_gains(spectrum: Spectrum, threshold: float | Float[Array, ""]) -> Float[Array, "k"]:
    """Hard: 0 where the eigenvalue exceeds an absolute cutoff, as AlphaEdit does (Fang et al., 2025; 2e-2 there)."""
    return jnp.where(spectrum.values > threshold, 0, 1).astype(spectrum.values.dtype)


def ridge_gains(spectrum: Spectrum, ridge: float | Float[Array, ""]) -> Float[Array, "k"]:
    """Soft: `rho mu / (lambda + rho mu)`; 1 everywhere where C is zero."""
    return _ridge_gain(spectrum.values, jnp.asarray(ridge, spectrum.values.dtype) * spectrum.mean)


def _ridge_gain(values: Array, shift: Array) -> Array:
    total = values + shift
    return jnp.where(total > 0, shift / jnp.where(total > 0, total, 1), 1)


def null_space_projector(
    covariance: Float[Array, "n n"] | Spectrum,
    *,
    energy: float | Float[Array, ""] | None = None,
    ridge: float | Float[Array, ""] | None = None,
    threshold: float | Float[Array, ""] | None = None,
) -> NullSpaceProjector:
    """Projector on what a layer's inputs leave free: `W* = A + (B - A) P` (SPEC.md section 4).

    Args:
      covariance: `C = mean k k^T` of the recipient's inputs of the layer, or its `Spectrum`: one eigendecomposition
        serves every energy, ridge and threshold.
      energy: hard; protect the leading directions with this share of the trace, 0..1.
      ridge: soft; `P = rho mu (C + rho mu I)^-1` with mu the mean eigenvalue, dimensionless, above 0.
      threshold: hard; protect eigenvalues above this, in units of C.

    Exactly one of the three. Differentiable in the ridge; the spectrum counts as constant (`ridge_graft` is
    differentiable in C too).

    Raises:
      ValueError: none or several of energy, ridge and threshold.
    """
    settings = {"energy": energy, "ridge": ridge, "threshold": threshold}
    given = {name: value for name, value in settings.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of energy, ridge and threshold, got {', '.join(given) or 'none'}")
    spectrum = covariance if isinstance(covariance, Spectrum) else decompose_covariance(covariance)
    spectrum = lax.stop_gradient(spectrum)
    rules = {"energy": energy_gains, "ridge": ridge_gains, "threshold": threshold_gains}
    ((name, value),) = given.items()
    outside = jnp.ones((), spectrum.values.dtype)
    if name == "ridge":
        outside = _ridge_gain(spectrum.rest, jnp.asarray(value, spectrum.values.dtype) * spectrum.mean)
    return NullSpaceProjector(spectrum.basis, rules[name](spectrum, value), outside)


def numerical_rank(spectrum: Spectrum) -> Float[Array, ""]:
    """Directions whose eigenvalue stands out of rounding; all of them where a sketch leaves something over."""
    n = spectrum.basis.shape[0]
    floor = n * float(jnp.finfo(spectrum.values.dtype).eps) * spectrum.values[0]
    seen: Bool[Array, k] = spectrum.values > floor
    return jnp.where(spectrum.rest > floor, n, jnp.sum(seen)).astype(spectrum.values.dtype)


def effective_rank(projector: NullSpaceProjector) -> Float[Array, ""]:
    """Dimension of what is protected, `trace(I - P)`: a count for a hard projector."""
    n, k = projector.basis.shape
    return jnp.sum(1 - projector.gains) + (n - k) * (1 - projector.outside)
