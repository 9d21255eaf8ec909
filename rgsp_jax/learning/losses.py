"""What a merged model is asked for: losses of its outputs, pure, means over the leading axes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mean_where(each: Float[Array, "*batch"], where: Bool[Array, "*batch"] | None) -> Float[Array, ""]:
    """Mean over the rows that count, 0 where none does; all of them where `where` is None."""
    if where is None:
        return each.mean()
    kept = where.astype(each.dtype)
    return jnp.sum(jnp.where(where, each, 0)) / jnp.maximum(kept.sum(), 1)


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """`-mean log p(label)`, for a few labelled rows; `where` says which count."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return mean_where(-chosen[..., 0], where)


def entropy(logits: Float[Array, "*batch classes"], where: Bool[Array, "*batch"] | None = None) -> Float[Array, ""]:
    """Mean entropy of the answers, in nats, for unlabelled rows (AdaMerging, Yang et al., 2024, arXiv 2310.02575)."""
    return mean_where(entropies(logits), where)


def entropies(logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """`-sum p log p` of every row, in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def weighted_entropy(
    logits: Float[Array, "*batch classes"], where: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    """Entropies weighted by each row's own confidence `1 - entropy / log classes`, which is no part of the gradient.

    Rows that the model is sure of already count; those it has no idea of do not pull it somewhere. 0 where it is sure
    of none.
    """
    each = entropies(logits)
    rounding = 8 * jnp.finfo(each.dtype).eps  # a uniform answer must weigh nothing, not what rounding leaves of it
    confidence = jax.lax.stop_gradient(jnp.maximum(1 - each / jnp.log(logits.shape[-1]) - rounding, 0))
    if where is not None:
        confidence = jnp.where(where, confidence, 0)
    total = confidence.sum()
    return jnp.sum(confidence * each) / jnp.where(total > 0, total, 1.0)


def distillation(
    logits: Float[Array, "*batch classes"],
    teacher: Float[Array, "*batch classes"],
    temperature: float = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """`temperature^2 KL(teacher || model)` at a temperature, mean over rows (Hinton et al., 2015)."""
    log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (teacher, logits))
    return temperature**2 * mean_where(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), where)


def feature_distance(
    features: Float[Array, "*batch width"],
    teacher: Float[Array, "*batch width"],
    where: Bool[Array, "*batch"] | None = None,
    spread: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
    """`mean |f - f_t|^2 / mean |f_t - mean f_t|^2`: 0 at the teacher's features, 1 for the best constant answer.

    `spread` is the denominator, where these rows are a part of those that it is known of.
    """
    if spread is None:
        spread = feature_spread(teacher, where)
    return mean_where(jnp.sum((features - teacher) ** 2, axis=-1), where) / jnp.where(spread > 0, spread, 1.0)


def feature_spread(
    features: Float[Array, "*batch width"], where: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    """`mean |f - mean f|^2` over rows."""
    rows = features.reshape(-1, features.shape[-1])
    kept = jnp.ones(rows.shape[0], bool) if where is None else where.reshape(-1)
    count = jnp.maximum(kept.sum(), 1).astype(rows.dtype)
    mean = jnp.sum(jnp.where(kept[:, None], rows, 0), axis=0) / count
    return mean_where(jnp.sum((rows - mean[None]) ** 2, axis=-1), kept)


def squared_distance(coefficients: object, start: object) -> Float[Array, ""]:
    """`sum |c - c_0|^2` over a pytree: an L2 pull to where learning starts."""
    squares = jax.tree.map(lambda c, c0: jnp.sum((c - c0) ** 2), coefficients, start)
    return jnp.sum(jnp.stack(jax.tree.leaves(squares)))
