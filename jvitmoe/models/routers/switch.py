"""Switch: one expert per token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.routers.dispatch import Router, Slots, Statistics, fill_slots, statistics


class Switch(Router):
    """A token goes to the expert of highest softmax probability p and gets p f(x). An expert takes at most Q tokens,
    in the order of their positions in the image. Source: arXiv 2101.03961."""

    uses_bias = True

    @nn.compact
    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots, Statistics]:
        logits_BTE = self.logits(x_BTD)
        probability_BTE = jax.nn.softmax(logits_BTE)
        choice_BTK = self.preference(probability_BTE).argmax(-1, keepdims=True)
        weight_BTK = jnp.take_along_axis(probability_BTE, choice_BTK, axis=-1)
        count = self.capacity(x_BTD.shape[1], key_B)
        slots, load_E, dropped = fill_slots(choice_BTK, weight_BTK, self.experts, count)
        return slots, statistics(logits_BTE, load_E, dropped)

    @staticmethod
    def loss(statistics: Statistics) -> jax.Array:
        """Returns the mean over layers of E sum_e load_e probability_e, 1 when balanced (eq. 4; GShard)."""
        experts = statistics.load_E.shape[-1]
        return experts * (statistics.load_E * statistics.probability_E).sum(-1).mean()
