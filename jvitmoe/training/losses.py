"""The losses of a step: of the classes, and of two passes.

b the images of one device · C classes
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from optax.losses import kl_divergence_with_log_targets

from jvitmoe.config import RoutingConfig


def classification_loss(routed: RoutingConfig, passes: Sequence[jax.Array], targets_bC: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy with the targets; of two passes, the one of CONSISTENCY_LOSSES."""
    losses = [optax.softmax_cross_entropy(logits_bC, targets_bC).mean() for logits_bC in passes]
    if len(passes) == 1:
        return losses[0]
    return CONSISTENCY_LOSSES[routed.consistency_loss](losses, passes, routed.consistency)


def adamix(losses: Sequence[jax.Array], passes: Sequence[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of AdaMix (arXiv 2205.12410): the cross-entropy of the first pass, and the divergence."""
    return losses[0] + weight * consistency(passes[0], passes[1], stop_gradients=True)


def thor(losses: Sequence[jax.Array], passes: Sequence[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of THOR (arXiv 2110.04260): the cross-entropies of both passes, and the divergence. R-Drop
    (arXiv 2106.14448) has the same loss; its passes differ in dropout."""
    return losses[0] + losses[1] + weight * consistency(passes[0], passes[1], stop_gradients=False)


def cosub(losses: Sequence[jax.Array], passes: Sequence[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of cosub (arXiv 2212.04884) for softmax: (1 - weight) times the mean of both cross-entropies,
    and weight times that of each pass with the other's probabilities as targets."""
    return (1 - weight) * (losses[0] + losses[1]) / 2 + weight * mutual_cross_entropy(passes[0], passes[1])


def mutual_cross_entropy(logits_p_bC: jax.Array, logits_q_bC: jax.Array) -> jax.Array:
    """Returns the mean over the device's images of the cross-entropies of each pass with the other's probabilities as
    targets, which have no gradient; nats."""
    target_p_bC, target_q_bC = (jax.lax.stop_gradient(jax.nn.softmax(x)) for x in (logits_p_bC, logits_q_bC))
    first_b = optax.softmax_cross_entropy(logits_p_bC, target_q_bC)
    return 0.5 * jnp.mean(first_b + optax.softmax_cross_entropy(logits_q_bC, target_p_bC))


def consistency(logits_p_bC: jax.Array, logits_q_bC: jax.Array, stop_gradients: bool) -> jax.Array:
    """Returns the mean over the device's images of (KL(q || p) + KL(p || q)) / 2, nats; 0 for equal logits.

    With stop_gradients the targets q and p of the two terms have no gradient (AdaMix, arXiv 2205.12410); without, both
    arguments have one (THOR, arXiv 2110.04260).
    """
    p_bC, q_bC = jax.nn.log_softmax(logits_p_bC), jax.nn.log_softmax(logits_q_bC)
    target_p_bC, target_q_bC = jax.lax.stop_gradient((p_bC, q_bC)) if stop_gradients else (p_bC, q_bC)
    kl_q_p_b = kl_divergence_with_log_targets(p_bC, target_q_bC)
    kl_p_q_b = kl_divergence_with_log_targets(q_bC, target_p_bC)
    return 0.5 * jnp.mean(kl_q_p_b + kl_p_q_b)


# Name -> the loss of two passes: (their cross-entropies, their logits, routing.consistency) -> a scalar.
CONSISTENCY_LOSSES: dict[str, Callable[[Sequence[jax.Array], Sequence[jax.Array], float], jax.Array]] = {
    "adamix": adamix,
    "thor": thor,
    "cosub": cosub,
}
