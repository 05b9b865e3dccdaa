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


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x [..., N] + bias [N].

    Its gradient is the sum over all leading axes as a product with ones, added up in float32: XLA's own reduction of
    tall arrays is several times slower on a CPU, and adds bfloat16 up in bfloat16.
    """
    return x + jnp.broadcast_to(bias, x.shape)


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return x + jnp.broadcast_to(bias, x.shape), None


def _add_bias_backward(_: None, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = dy.reshape(-1, dy.shape[-1])
    ones = jnp.ones(rows.shape[:1], rows.dtype)
    return dy, jnp.matmul(ones, rows, preferred_element_type=jnp.float32).astype(dy.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def two_layers(x_BTD: jax.Array, key_B: jax.Array | None, weights: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """Returns down(dropout(gelu(up(x)))), [B, T, D]: what one expert, or the dense model, computes."""
    up_DF, up_bias_F, down_FD, down_bias_D = weights
    h_BTF = dropout(gelu(add_bias(x_BTD @ up_DF, up_bias_F)), key_B, site=0, rate=rate)
    return add_bias(h_BTF @ down_FD, down_bias_D)


class Mlp(nn.Module):
    """The MLP of a block. With experts > 1 every parameter gains a leading E axis, but for the layer that is shared.

    Parameters: up [E,] D F · up_bias [E,] F · down [E,] F D · down_bias [E,] D.
    """

    hidden: int  # F
    experts: int = 1  # E
    expert_init: str = "independent"  # independent | shared
    shared_layer: str = "none"  # none | up | down: one for all experts
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, route: jax.Array | None, key_B: jax.Array | None) -> jax.Array:
        """Returns y_BTD in the compute dtype.

        Args:
            x_BTD: input tokens. For a route over slots, images are sorted by slot: B is E times B/E.
            route: the expert that runs; ignored when there is one expert.
                scalar: one for the whole batch.
                None: slot e of images runs expert e.
                [E]: of each slot of images, a permutation; one batched product, each slot with its own expert.
                [T, E]: of each slot at each place in the image, a permutation; tokens travel between the images that
                    share a place in their slots, so this also costs two gathers of the activations.
            key_B: one dropout key per image; None is deterministic.
        """
        weights, stacked = self._weights(x_BTD.shape[-1])
        x_BTD = x_BTD.astype(self.dtype)
        if self.experts == 1:
            return two_layers(x_BTD, key_B, weights, self.dropout)
        if route is not None and route.ndim < 2:  # pick weights, never move activations
            weights = tuple(w[route] if e else w for w, e in zip(weights, stacked, strict=True))
            if route.ndim == 0:
                return two_layers(x_BTD, key_B, weights, self.dropout)
        x_EBTD = x_BTD.reshape(self.experts, -1, *x_BTD.shape[1:])
        if route is not None and route.ndim == 2:
            x_EBTD = _exchange(x_EBTD, jnp.argsort(route, axis=1))
        key_EB = None if key_B is None else key_B.reshape(self.experts, -1)
        axes = (0, None if key_B is None else 0, tuple(0 if e else None for e in stacked), None)
        y_EBTD = jax.vmap(two_layers, axes)(x_EBTD, key_EB, weights, self.dropout)
        if route is not None and route.ndim == 2:
            y_EBTD = _exchange(y_EBTD, route)
        return y_EBTD.reshape(x_BTD.shape)

    def _weights(self, width: int) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
        """Returns (up, up_bias, down, down_bias) in the compute dtype, and which of them have an E axis."""
        weights = (
            self._param("up", (width, self.hidden), width),
            self._param("up_bias", (self.hidden,), width),
            self._param("down", (self.hidden, width), self.hidden),
            self._param("down_bias", (width,), self.hidden),
        )
        return weights, tuple(self.experts > 1 and name != self.shared_layer for name in ("up", "up", "down", "down"))

    def _param(self, name: str, shape: tuple[int, ...], fan_in: int) -> jax.Array:
        draw = torch_uniform(fan_in)
        if self.experts == 1 or name.removesuffix("_bias") == self.shared_layer:
            return self.param(name, draw, shape).astype(self.dtype)

        def draw_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            if self.expert_init != "independent":  # the very draw of the dense model, repeated
                return jnp.broadcast_to(draw(key, shape, jnp.float32), (self.experts, *shape))
            return jax.vmap(lambda k: draw(k, shape, jnp.float32))(jax.random.split(key, self.experts))

        return self.param(name, draw_stack, shape).astype(self.dtype)


def _exchange(x_EBTD: jax.Array, source_TE: jax.Array) -> jax.Array:
    """Returns y with y[e, b, t] = x[source[t, e], b, t]."""
    return jnp.take_along_axis(x_EBTD, source_TE.T[:, None, :, None], axis=0)
