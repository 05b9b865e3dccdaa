"""Hash: the position of a token fixes its expert."""

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.models.routers.dispatch import Router, Slots, Statistics


class Hash(Router):
    """The position in the image fixes the expert, the same in all layers; an expert has T/E positions, rounded up or
    down. A token gets f(x). There are no parameters. Source: arXiv 2106.04426."""

    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots, Statistics]:
        batch, tokens, _ = x_BTD.shape
        # Multiplication by an odd number permutes 32-bit numbers; in the new order, positions go to experts in turn.
        hash_T = np.arange(tokens, dtype=np.uint32) * np.uint32(2654435761)
        count = -(-tokens // self.experts)
        token_QE = np.append(np.argsort(hash_T), np.arange(tokens, count * self.experts)).reshape(count, -1)
        token_EBQ = jnp.broadcast_to(jnp.asarray(token_QE.T, jnp.int32)[:, None], (self.experts, batch, count))
        load_E = jnp.asarray((token_QE < tokens).sum(0) / tokens, jnp.float32)
        slots, zero = Slots(token_EBQ, jnp.ones(token_EBQ.shape), once=True), jnp.zeros(())
        return slots, Statistics(load_E, load_E, zero, zero)
