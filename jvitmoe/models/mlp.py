"""The two-layer MLP of a block, dense or stacked over experts.

B batch · T tokens · D width · F hidden width · E experts · R rank of LoRA, or width of an adapter
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer


def torch_uniform(fan_in: int) -> Initializer:
    """Returns an initializer drawing from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for Linear and bias."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, of which the backward pass keeps the arguments alone. For what is cheap to compute again
    and costs memory, and on a CPU time, to keep for every layer."""
    return jax.checkpoint(function, prevent_cse=False)  # the loop over layers keeps the two passes apart


def dropout(x_B: jax.Array, key_B: jax.Array | None, site: int, rate: float) -> jax.Array:
    """Returns x with a share `rate` of its entries zeroed and the rest scaled by 1 / (1 - rate); x itself without keys.

    Each image draws from its own key, so the mask depends on the image's place in the global batch and not on the
    number of devices. 32 random bits decide an entry.
    """
    if key_B is None or rate == 0.0:
        return x_B
    key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, site)
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    # Drawn once: XLA would fuse the drawing into all that reads the mask, and draw anew in each.
    kept_B = jax.lax.optimization_barrier(random_words(key_B, x_B.shape[1:]) >= threshold)
    return jnp.where(kept_B, x_B * (1.0 / (1.0 - rate)), 0.0).astype(x_B.dtype)


def random_words(key_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns 32 random bits for each place of each image, uint32 [B, *shape], a pure function of the image's key.

    They are the first word that Threefry-2x32 with 20 rounds (Salmon et al., SC 2011: JAX's own generator) makes of
    (place, 0), written out so that XLA fuses it into one pass over the array. On a CPU `jax.random.bits` goes over the
    array in memory many times, which took 45 % of a step.
    """
    seed_B2 = jax.vmap(lambda key: jax.random.bits(key, (2,)))(key_B)
    whole = seed_B2.shape[0], *shape
    k0, k1 = (jnp.broadcast_to(seed_B2[:, n].reshape(-1, *(1 for _ in shape)), whole) for n in (0, 1))
    keys = k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)
    x = jnp.broadcast_to(jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(1, *shape), whole) + k0
    y = k1
    for group, rotations in enumerate(THREEFRY):
        for rotation in rotations:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x


THREEFRY = (((13, 15, 26, 6), (17, 29, 16, 24)) * 3)[:5]  # bits by which the rounds rotate, four and four


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The derivative is written out because JAX 0.12's own, in float32, is refused under shard_map's check_vma.
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * jax.lax.erfc(-x * 0.5**0.5)
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return x * cdf, dx * (cdf + x * density)


@recomputed
def gelu(x: jax.Array) -> jax.Array:
    """Returns x Phi(x), the exact GELU (Hendrycks and Gimpel, arXiv 1606.08415), of any shape."""
    return _gelu(x)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x [..., N] + bias [N] in the dtype of x. With a float32 bias, its gradient is summed in float32."""
    return x + jnp.broadcast_to(bias, x.shape).astype(x.dtype)


def two_layers(x_BTD: jax.Array, key_B: jax.Array | None, weights: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """Returns down(dropout(gelu(up(x)))), [B, T, D]: what one expert, or the dense model, computes."""
    up_DF, up_bias_F, down_FD, down_bias_D = weights
    h_BTF = dropout(gelu(add_bias(x_BTD @ up_DF, up_bias_F)), key_B, site=0, rate=rate)
    return add_bias(h_BTF @ down_FD, down_bias_D)


LORA = ("up_a", "up_b", "down_a", "down_b")
ADAPTER = ("adapter_up", "adapter_up_bias", "adapter_down", "adapter_down_bias")


def fold(weights: dict[str, Any]) -> dict[str, Any]:
    """Returns {up, up_bias, down, down_bias} of the plain MLP that computes what this one does with its LoRA and its
    adapter; exact. Leading axes (L, E) may be there or not: those of `weights` broadcast to those of what is folded in.

    LoRA (arXiv 2106.09685) adds the product of its two matrices to a weight. An adapter beside the MLP (AdaptFormer,
    arXiv 2205.13535; here with the MLP's own GELU) is R hidden units more.
    """
    plain = {name: weights[name] for name in ("up", "up_bias", "down", "down_bias")}
    for name in ("up", "down"):
        if f"{name}_a" in weights:
            product = weights[f"{name}_a"] @ weights[f"{name}_b"]
            plain[name] = jnp.broadcast_to(plain[name], product.shape) + product
    if "adapter_up" in weights:
        lead = weights["adapter_up"].shape[:-2]
        wide = {
            name: jnp.broadcast_to(plain[name], (*lead, *leaf.shape[leaf.ndim - 2 + name.endswith("bias") :]))
            for name, leaf in plain.items()
        }
        plain = {
            "up": jnp.concatenate([wide["up"], weights["adapter_up"]], axis=-1),
            "up_bias": jnp.concatenate([wide["up_bias"], weights["adapter_up_bias"]], axis=-1),
            "down": jnp.concatenate([wide["down"], weights["adapter_down"]], axis=-2),
            "down_bias": wide["down_bias"] + weights["adapter_down_bias"],
        }
    return plain


class Mlp(nn.Module):
    """The MLP of a block. With experts > 1 every parameter gains a leading E axis, but for the layer that is shared.

    Parameters: up [E,] D F · up_bias [E,] F · down [E,] F D · down_bias [E,] D.

    With LoRA or an adapter these are one for all experts, and an expert is what is folded into them: up_a [E,] D R ·
    up_b [E,] R F · down_a [E,] F R · down_b [E,] R D; adapter_up [E,] D R · adapter_up_bias [E,] R · adapter_down
    [E,] R D · adapter_down_bias [E,] D. Their second halves start at zero, so every expert starts as the MLP.
    """

    hidden: int  # F
    experts: int = 1  # E
    expert_init: str = "independent"  # independent | shared
    shared_layer: str = "none"  # none | up | down: one for all experts
    dropout: float = 0.0
    dtype: Any = jnp.float32
    lora: int = 0  # rank; 0 is none
    adapter: int = 0  # width; 0 is none

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
        """Returns (up, up_bias, down, down_bias), matrices in the compute dtype, and which of them have an E axis."""
        hidden, tuned = self.hidden, self.lora > 0 or self.adapter > 0
        alone = {name: self.experts == 1 or tuned or self.shared_layer == name for name in ("up", "down")}
        weights = {
            "up": self._param("up", (width, hidden), width, alone["up"]),
            "up_bias": self._param("up_bias", (hidden,), width, alone["up"]),
            "down": self._param("down", (hidden, width), hidden, alone["down"]),
            "down_bias": self._param("down_bias", (width,), hidden, alone["down"]),
        }
        ranks = {name: weights[name].ndim for name in weights if alone[name.removesuffix("_bias")]}
        one, rank, wide = self.experts == 1, self.lora, self.adapter
        if rank:
            weights["up_a"] = self._param("up_a", (width, rank), width, one)
            weights["up_b"] = self._param("up_b", (rank, hidden), None, one)
            weights["down_a"] = self._param("down_a", (hidden, rank), hidden, one)
            weights["down_b"] = self._param("down_b", (rank, width), None, one)
        if wide:
            weights["adapter_up"] = self._param("adapter_up", (width, wide), width, one)
            weights["adapter_up_bias"] = self._param("adapter_up_bias", (wide,), width, one)
            weights["adapter_down"] = self._param("adapter_down", (wide, width), None, one)
            weights["adapter_down_bias"] = self._param("adapter_down_bias", (width,), None, one)
        plain = fold(weights) if tuned else weights
        stacked = tuple(leaf.ndim > ranks.get(name, 0) for name, leaf in plain.items())
        return tuple(w if "bias" in name else w.astype(self.dtype) for name, w in plain.items()), stacked

    def _param(self, name: str, shape: tuple[int, ...], fan_in: int | None, alone: bool) -> jax.Array:
        """Returns the float32 parameter, with an E axis unless it is alone; zeros at first where there is no fan_in."""
        draw = torch_uniform(fan_in) if fan_in else nn.initializers.zeros
        if alone:
            return self.param(name, draw, shape)

        def draw_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            if self.expert_init != "independent":  # the very draw of the dense model, repeated
                return jnp.broadcast_to(draw(key, shape, jnp.float32), (self.experts, *shape))
            return jax.vmap(lambda k: draw(k, shape, jnp.float32))(jax.random.split(key, self.experts))

        return self.param(name, draw_stack, shape)


def _exchange(x_EBTD: jax.Array, source_TE: jax.Array) -> jax.Array:
    """Returns y with y[e, b, t] = x[source[t, e], b, t]."""
    return jnp.take_along_axis(x_EBTD, source_TE.T[:, None, :, None], axis=0)
