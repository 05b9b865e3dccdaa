"""V-MoE: noisy top-K with batch priority routing."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.layers import Site, fold_in
from jvitmoe.models.routers.dispatch import Router, Slots, Statistics, fill_slots, statistics


class TopK(Router):
    """A token goes to its K experts of highest probability p and gets the sum of p f(x), not renormalised. In training
    N(0, 1/E^2) is added to logits. An expert takes at most Q tokens: first choices before second ones, and among these
    the tokens of the image with the highest p (batch priority routing, which the paper's default training leaves off).
    Source: V-MoE, arXiv 2106.05974."""

    uses_top_k = True
    uses_bias = True

    @nn.compact
    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots, Statistics]:
        tokens, experts, top_k = x_BTD.shape[1], self.experts, self.settings.top_k
        logits_BTE = noisy_BTE = self.logits(x_BTD)
        if key_B is not None:
            draw = jax.vmap(lambda key: jax.random.normal(key, (tokens, experts)))
            noisy_BTE = logits_BTE + draw(fold_in(key_B, Site.ROUTER_NOISE)) / experts
        top_BTK, choice_BTK = jax.lax.top_k(noisy_BTE, top_k)
        probability_BTE = jax.nn.softmax(noisy_BTE)
        if self.settings.has_bias:
            choice_BTK = jax.lax.top_k(self.preference(probability_BTE), top_k)[1]
        weight_BTK = jnp.take_along_axis(probability_BTE, choice_BTK, axis=-1)
        count = self.capacity(tokens, key_B, top_k)
        slots, load_E, dropped = fill_slots(choice_BTK, weight_BTK, experts, count, weight_BTK[..., 0])
        smooth_load_E = upper_tail((top_BTK[..., -1:] - logits_BTE) * experts).mean((0, 1))
        return slots, statistics(logits_BTE, load_E, dropped, smooth_load_E)

    @staticmethod
    def loss(statistics: Statistics) -> jax.Array:
        """Returns the mean of two CV^2, of probability (importance) and of smooth load, averaged over layers; 0 when
        balanced (app. A, which takes them per group of images; here over the global batch)."""
        assert statistics.smooth_load_E is not None
        return (_cv_squared(statistics.probability_E) + _cv_squared(statistics.smooth_load_E)).mean() / 2

    @staticmethod
    def most_experts(top_k: int, experts: int) -> int:
        return top_k


@jax.custom_jvp
def upper_tail(x: jax.Array) -> jax.Array:
    """Returns 1 - Phi(x), the probability of a standard normal draw above x, of any shape."""
    return 0.5 * jax.lax.erfc(x * 0.5**0.5)


@upper_tail.defjvp
def _upper_tail_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Written out for the reason in layers.py, _gelu_jvp.
    (x,), (dx,) = primals, tangents
    return upper_tail(x), -dx * jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5


def _cv_squared(x_LE: jax.Array) -> jax.Array:
    return x_LE.var(-1) / jnp.square(x_LE.mean(-1))
