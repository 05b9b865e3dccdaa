"""Random tokens: every image's tokens are dealt to the experts at random."""

import jax
import jax.numpy as jnp

from jvitmoe.models.layers import Site, fold_in
from jvitmoe.models.routers.dispatch import Router, Slots, Statistics


class RandomTokens(Router):
    """Each expert takes T/E tokens of the image, rounded up or down, a new random partition in every layer and step. A
    token gets f(x). There are no parameters, and no capacity: nothing is dropped. In evaluation the merged model is
    used. Source: the random uniform partition of EWA, arXiv 2308.06093."""

    is_tested = False

    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots, Statistics]:
        batch, tokens, _ = x_BTD.shape
        order_BT = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
        if key_B is not None:
            order_BT = jax.vmap(jax.random.permutation)(fold_in(key_B, Site.ROUTER_NOISE), order_BT)
        count = -(-tokens // self.experts)
        empty_B = jnp.broadcast_to(jnp.arange(tokens, count * self.experts), (batch, count * self.experts - tokens))
        token_BQE = jnp.concatenate([order_BT, empty_B], axis=1).reshape(batch, count, self.experts)
        token_EBQ = token_BQE.transpose(2, 0, 1)
        load_E = (token_EBQ[:, 0] < tokens).sum(-1) / tokens
        zero = jnp.zeros(())
        return Slots(token_EBQ, jnp.ones(token_EBQ.shape), once=True), Statistics(load_E, load_E, zero, zero)
