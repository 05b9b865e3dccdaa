"""The losses of a step: of the classes, of two passes, of a teacher and of a learned router.

b the images of one device · C classes · H, W rows and columns · c colour channels
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.losses import kl_divergence, kl_divergence_with_log_targets

from jvitmoe.experts import merge
from jvitmoe.experts.routes import constant_route
from jvitmoe.models import routers, vit
from jvitmoe.models.routers import Statistics
from jvitmoe.training.plan import StepPlan


def router_losses(plan: StepPlan, statistics: Statistics) -> jax.Array:
    """Returns the weighted sum of a learned router's balance loss and z-loss."""
    routed = plan.config.routing
    balance = routed.balance_loss * routers.find(routed.router).loss(statistics)
    return balance + routed.z_loss * routers.z_loss(statistics)


def classification_loss(plan: StepPlan, passes: list[jax.Array], targets_bC: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy with the targets; of two passes, the one of CONSISTENCY_LOSSES."""
    losses = [optax.softmax_cross_entropy(logits_bC, targets_bC).mean() for logits_bC in passes]
    if len(passes) == 1:
        return losses[0]
    routed = plan.config.routing
    return CONSISTENCY_LOSSES[routed.consistency_loss](losses, passes, routed.consistency)


def adamix(losses: list[jax.Array], passes: list[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of AdaMix (arXiv 2205.12410): the cross-entropy of the first pass, and the divergence."""
    return losses[0] + weight * consistency(passes[0], passes[1], stop_gradients=True)


def thor(losses: list[jax.Array], passes: list[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of THOR (arXiv 2110.04260): the cross-entropies of both passes, and the divergence. R-Drop
    (arXiv 2106.14448) has the same loss; its passes differ in dropout."""
    return losses[0] + losses[1] + weight * consistency(passes[0], passes[1], stop_gradients=False)


def cosub(losses: list[jax.Array], passes: list[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of cosub (arXiv 2212.04884) for softmax: (1 - weight) times the mean of both cross-entropies,
    and weight times that of each pass with the other's probabilities as targets."""
    return (1 - weight) * (losses[0] + losses[1]) / 2 + weight * mutual_cross_entropy(passes[0], passes[1])


def mutual_cross_entropy(logits_p_bC: jax.Array, logits_q_bC: jax.Array) -> jax.Array:
    """Returns the mean over the device's images of the cross-entropies of each pass with the other's probabilities as
    targets, which have no gradient; nats."""
    target_p_bC, target_q_bC = (jax.lax.stop_gradient(jax.nn.softmax(x)) for x in (logits_p_bC, logits_q_bC))
    first_b = optax.softmax_cross_entropy(logits_p_bC, target_q_bC)
    return 0.5 * jnp.mean(first_b + optax.softmax_cross_entropy(logits_q_bC, target_p_bC))


def divergence(plan: StepPlan, teacher: Any, images_bHWc: jax.Array, logits_bC: jax.Array) -> jax.Array:
    """Returns the mean over the images of KL(q || p), nats: p are the probabilities of these logits, q is the mean of
    those of the teacher's experts, each in all layers. Distillation of Hinton et al. (arXiv 1503.02531)."""

    def probabilities(expert: jax.Array) -> jax.Array:
        path = merge.take_path(teacher, constant_route(expert, plan.config.model.depth))
        return jax.nn.softmax(vit.logits(plan.model.plain(), path, images_bHWc))

    q_bC = jax.lax.map(probabilities, jnp.arange(plan.config.routing.experts)).mean(0)
    return kl_divergence(jax.nn.log_softmax(logits_bC), q_bC).mean()


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
CONSISTENCY_LOSSES: dict[str, Callable[[list[jax.Array], list[jax.Array], float], jax.Array]] = {
    "adamix": adamix,
    "thor": thor,
    "cosub": cosub,
}
