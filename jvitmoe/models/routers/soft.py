"""Soft MoE: slots hold means of tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.routers.dispatch import Mixtures, Router, Statistics, statistics


class Soft(Router):
    """Each of Q = ceil(T/E) slots of an expert is a mean of tokens, weighted by the softmax over T; a token gets the
    mean of f over all E Q slots, weighted by the softmax over them. Logits are the cosine of token and slot times a
    learned scale. Parameters: kernel [D, E, Q] and scale []. Source: Soft MoE, arXiv 2308.00951, sec. 2.3."""

    @nn.compact
    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Mixtures, Statistics]:
        _, tokens, width = x_BTD.shape
        init = nn.initializers.normal(width**-0.5)
        kernel_DEQ = self.param("kernel", init, (width, self.experts, -(-tokens // self.experts)))
        scale = self.param("scale", nn.initializers.ones, ())
        logits_BTEQ = jnp.einsum("btd,deq->bteq", _unit(x_BTD, -1), scale * _unit(kernel_DEQ, 0), precision="highest")
        mixtures = Mixtures(jax.nn.softmax(logits_BTEQ, axis=1), jax.nn.softmax(logits_BTEQ, axis=(2, 3)))
        load_E = jnp.full((self.experts,), 1.0 / self.experts)
        # The softmax of these is an expert's share of the softmax over slots.
        logits_BTE = jax.nn.logsumexp(logits_BTEQ, axis=3)
        return mixtures, statistics(logits_BTE, load_E, jnp.zeros(()))


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-6)
