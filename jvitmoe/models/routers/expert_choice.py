"""Expert choice: experts select tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.routers.dispatch import Router, RouterSettings, Slots, Statistics, slots_per_expert, statistics


class ExpertChoice(Router):
    """Each expert takes the Q tokens of the image with the highest p, the softmax over E. A token gets the sum of
    p f(x) over the experts that took it. Source: arXiv 2202.09368."""

    @nn.compact
    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots, Statistics]:
        batch, tokens, _ = x_BTD.shape
        logits_BTE = self.logits(x_BTD)
        # The same capacity in evaluation: a larger one would add terms that the model was not trained with.
        count = slots_per_expert(self.settings.capacity, tokens, self.experts)
        probability_EBT = jax.nn.softmax(logits_BTE).transpose(2, 0, 1)
        weight_EBQ, token_EBQ = jax.lax.top_k(probability_EBT, count)
        taken_BT = jnp.zeros((batch, tokens)).at[jnp.arange(batch)[None, :, None], token_EBQ].set(1.0)
        load_E = jnp.full((self.experts,), 1.0 / self.experts)
        slots = Slots(token_EBQ, weight_EBQ, once=False)
        return slots, statistics(logits_BTE, load_E, 1.0 - taken_BT.mean())

    @staticmethod
    def active_experts(settings: RouterSettings, tokens: int) -> float:
        return settings.experts * slots_per_expert(settings.capacity, tokens, settings.experts) / tokens
