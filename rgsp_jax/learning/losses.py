"""What a merged model is asked for: losses of its outputs, pure, means over the leading axes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, ""]:
    """`-mean log p(label)`, for a few labelled rows."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -chosen.mean()


def entropy(logits: Float[Array, "*batch classes"]) -> Float[Array, ""]:
    """Mean entropy of the answers, in nats, for unlabelled rows (AdaMerging, Yang et al., 2024, arXiv 2310.02575)."""
    return entropies(logits).mean()


def entropies(logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """`-sum p log p` of every row, in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def weighted_entropy(logits: Float[Array, "*batch classes"]) -> Float[Array, ""]:
    """Entropies weighted by each row's own confidence `1 - entropy / log classes`, which is no part of the gradient.

    Rows that the model is sure of already count; those it has no idea of do not pull it somewhere. 0 where it is sure
    of none.
    """
    each = entropies(logits)
    rounding = 8 * jnp.finfo(each.dtype).eps  # a uniform answer must weigh nothing, not what rounding leaves of it
    confidence = jax.lax.stop_gradient(jnp.maximum(1 - each / jnp.log(logits.shape[-1]) - rounding, 0))
    total = confidence.sum()
    return jnp.sum(confidence * each) / jnp.where(total > 0, total, 1.0)


def distillation(
    logits: Float[Array, "*batch classes"], teacher: Float[Array, "*batch classes"], temperature: float = 1.0
) -> Float[Array, ""]:
    """`temperature^2 KL(teacher || model)` at a temperature, mean over rows (Hinton et al., 2015)."""
    log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (teacher, logits))
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean()


def feature_distance(features: Float[Array, "*batch width"], teacher: Float[Array, "*batch width"]) -> Float[Array, ""]:
    """`sum |f - f_t|^2 / sum |f_t - mean f_t|^2`: 0 at the teacher's features, 1 for the best constant answer."""
    axes = tuple(range(teacher.ndim - 1))
    spread = jnp.sum((teacher - teacher.mean(axes, keepdims=True)) ** 2)
    return jnp.sum((features - teacher) ** 2) / jnp.where(spread > 0, spread, 1.0)


def squared_distance(coefficients: object, start: object) -> Float[Array, ""]:
    """`sum |c - c_0|^2` over a pytree: an L2 pull to where learning starts."""
    squares = jax.tree.map(lambda c, c0: jnp.sum((c - c0) ** 2), coefficients, start)
    return jnp.sum(jnp.stack(jax.tree.leaves(squares)))
