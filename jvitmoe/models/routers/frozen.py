"""SMoE-Dropout: a router that is not trained, with a growing number of experts per token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.models.routers.dispatch import Router, Slots, Statistics, fill_slots, statistics


class Frozen(Router):
    """A token goes to its K experts of highest logit and gets the sum of p f(x), p the softmax over these K. K grows to
    E in training (`top_k_at`) and is E in evaluation. An expert takes at most Q tokens, first choices before second
    ones; the paper drops none. Shapes are fixed, so every training step has the Q slots of K = E; with a smaller K some
    stay empty. Source: SMoE-Dropout, arXiv 2303.01610."""

    uses_top_k = True
    is_trained = False

    @nn.compact
    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots, Statistics]:
        logits_BTE, ranks = self.logits(x_BTD), self.settings.top_k
        top_BTK, choice_BTK = jax.lax.top_k(logits_BTE, ranks)
        count_K = np.array([self.capacity(x_BTD.shape[1], key_B, k) for k in range(1, ranks + 1)], np.int32)
        weight_BTK, limit = jax.nn.softmax(top_BTK), None
        if self.top_k is not None:  # ranks from K on have weight 0 and choose E, which is no expert
            chosen_K = (jnp.arange(ranks) < self.top_k)[None, None]
            weight_BTK = jax.nn.softmax(top_BTK, where=chosen_K)
            choice_BTK = jnp.where(chosen_K, choice_BTK, self.experts)
            limit = jnp.asarray(count_K)[self.top_k - 1]
        slots, load_E, dropped = fill_slots(
            choice_BTK, weight_BTK, self.experts, int(count_K[-1]), limit=limit, chosen=self.top_k
        )
        return slots, statistics(logits_BTE, load_E, dropped)

    @staticmethod
    def most_experts(top_k: int, experts: int) -> int:
        return experts

    @staticmethod
    def top_k_at(step: jax.Array, total: int, top_k: int, experts: int) -> jax.Array:
        """Returns K at a step of `total`: each K from `top_k` to E for an equal part of training (sec. 3.2: linear in
        the step). Integers, because a quotient in float32 can be late by a step."""
        values = experts - top_k + 1
        grows_at = np.array([-(-n * total // values) for n in range(1, values)], np.int32)
        return top_k + (step >= grows_at).sum(dtype=jnp.int32)
