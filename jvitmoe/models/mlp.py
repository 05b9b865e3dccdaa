"""The two-layer MLP of a block, dense or stacked over experts.

B batch · T tokens · D width · F hidden width · E experts
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer


def torch_uniform(fan_in: int) -> Initializer:
    """Returns an initializer drawing from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for Linear and bias."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def dropout(x_B: jax.Array, key_B: jax.Array | None, site: int, rate: float) -> jax.Array:
    """Returns x with a share `rate` of its entries zeroed and the rest scaled by 1 / (1 - rate); x itself without keys.

    Each image draws from its own key, so the mask depends on the image's place in the global batch and not on the
    number of devices. Sixteen random bits decide an entry: half the cost of a float draw, and the rate is exact
    to 1/65536.
    """
    if key_B is None or rate == 0.0:
        return x_B
    bits_B = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, site), x_B.shape[1:], jnp.uint16))(key_B)
    threshold = min(round(rate * 65536), 65535)  # a sixteen-bit number, also for rates next to 1
    return jnp.where(bits_B >= threshold, x_B * (1.0 / (1.0 - rate)), 0.0).astype(x_B.dtype)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Returns x Phi(x), the exact GELU (Hendrycks and Gimpel, arXiv 1606.08415), of any shape."""
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The derivative is written out because JAX 0.12's own, in float32, is refused under shard_map's check_vma.
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * jax.lax.erfc(-x * 0.5**0.5)
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return x * cdf, dx * (cdf + x * density)


class Mlp(nn.Module):
    """x -> down(dropout(gelu(up(x)))), exact GELU. With experts > 1 every parameter gains a leading E axis.

    Parameters: up [E,] D F · up_bias [E,] F · down [E,] F D · down_bias [E,] D.
    """

    hidden: int  # F
    experts: int = 1  # E
    expert_init: str = "independent"  # independent | shared
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, route: jax.Array | None, key_B: jax.Array | None) -> jax.Array:
        """Returns y_BTD in the compute dtype.

        Args:
            x_BTD: input tokens.
            route: scalar integer, the expert that runs; ignored when there is one expert.
            key_B: one dropout key per image; None is deterministic.
        """
        width = x_BTD.shape[-1]
        up_DF = self._expert("up", (width, self.hidden), width, route)
        up_bias_F = self._expert("up_bias", (self.hidden,), width, route)
        down_FD = self._expert("down", (self.hidden, width), self.hidden, route)
        down_bias_D = self._expert("down_bias", (width,), self.hidden, route)
        h_BTF = gelu(x_BTD.astype(self.dtype) @ up_DF + up_bias_F[None, None])
        h_BTF = dropout(h_BTF, key_B, site=0, rate=self.dropout)
        return h_BTF @ down_FD + down_bias_D[None, None]

    def _expert(self, name: str, shape: tuple[int, ...], fan_in: int, route: jax.Array | None) -> jax.Array:
        draw = torch_uniform(fan_in)
        if self.experts == 1:
            return self.param(name, draw, shape).astype(self.dtype)

        def draw_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            if self.expert_init == "shared":  # the very draw of the dense model, repeated
                return jnp.broadcast_to(draw(key, shape, jnp.float32), (self.experts, *shape))
            return jax.vmap(lambda k: draw(k, shape, jnp.float32))(jax.random.split(key, self.experts))

        return self.param(name, draw_stack, shape)[route].astype(self.dtype)
