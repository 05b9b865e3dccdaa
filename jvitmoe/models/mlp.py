"""The two-layer MLP of a block: dense, or a stack of experts that a route or a router selects from.

B batch · T tokens · D width · F hidden width · E experts · Q slots of an expert for one image
R rank of LoRA, or hidden units of an adapter
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.adapters import fold
from jvitmoe.models.layers import Site, add_bias, dropout, fold_in, gelu, torch_uniform
from jvitmoe.models.routers import RouterSettings, find

START_AT_ZERO = ("up_b", "down_b", "adapter_down", "adapter_down_bias")  # so every expert starts as the MLP


def two_layers(x_BTD: jax.Array, key_B: jax.Array | None, weights: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """Returns down(dropout(gelu(up(x)))), [B, T, D], of one expert or of the dense model."""
    up_DF, up_bias_F, down_FD, down_bias_D = weights
    h_BTF = dropout(gelu(add_bias(x_BTD @ up_DF, up_bias_F)), key_B, Site.HIDDEN, rate)
    return add_bias(h_BTF @ down_FD, down_bias_D)


class Mlp(nn.Module):
    """The MLP of a block. With experts > 1 every parameter gets a leading E axis, except those of `shared_layer`.

    Parameters: up [E,] D F · up_bias [E,] F · down [E,] F D · down_bias [E,] D.

    With LoRA or an adapter all experts share these, and each expert has its own up_a [E,] D R · up_b [E,] R F ·
    down_a [E,] F R · down_b [E,] R D; adapter_up [E,] D R · adapter_up_bias [E,] R · adapter_down [E,] R D ·
    adapter_down_bias [E,] D.
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
                scalar: one expert for the whole batch.
                None: expert e runs slot e of the images.
                [E]: the expert of each slot of images, a permutation; one batched product over slots.
                [T, E]: the expert of each slot at each token index, a permutation. Tokens move between images of the
                    same index in their slots, which costs two gathers of the activations.
            key_B: one dropout key per image; None is deterministic.
        """
        weights, stacked = self._weights(x_BTD.shape[-1])
        x_BTD = x_BTD.astype(self.dtype)
        if self.experts == 1:
            return two_layers(x_BTD, key_B, weights, self.dropout)
        if route is not None and route.ndim < 2:  # index the weights: cheaper than moving activations
            weights = tuple(w[route] if e else w for w, e in zip(weights, stacked, strict=True))
            if route.ndim == 0:
                return two_layers(x_BTD, key_B, weights, self.dropout)
        x_EBTD = x_BTD.reshape(self.experts, -1, *x_BTD.shape[1:])
        key_EB = None if key_B is None else key_B.reshape(self.experts, -1)
        if route is None or route.ndim < 2:
            return self._every_expert(x_EBTD, key_EB, weights, stacked).reshape(x_BTD.shape)
        y_EBTD = self._every_expert(_exchange(x_EBTD, jnp.argsort(route, axis=1)), key_EB, weights, stacked)
        return _exchange(y_EBTD, route).reshape(x_BTD.shape)

    def _every_expert(
        self, x_EBTD: jax.Array, key_EB: jax.Array | None, weights: tuple[jax.Array, ...], stacked: tuple[bool, ...]
    ) -> jax.Array:
        """Returns y_EBTD: each expert on its part of the input."""
        axes = (0, None if key_EB is None else 0, tuple(0 if e else None for e in stacked), None)
        return jax.vmap(two_layers, axes)(x_EBTD, key_EB, weights, self.dropout)

    def _weights(self, width: int) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
        """Returns (up, up_bias, down, down_bias), matrices in the compute dtype, and which of them have an E axis."""
        hidden, rank, units = self.hidden, self.lora, self.adapter
        shapes = {"up": (width, hidden), "up_bias": (hidden,), "down": (hidden, width), "down_bias": (width,)}
        dense = set(shapes)
        if rank:
            shapes |= {"up_a": (width, rank), "up_b": (rank, hidden), "down_a": (hidden, rank), "down_b": (rank, width)}
        if units:
            shapes |= {"adapter_up": (width, units), "adapter_up_bias": (units,)}
            shapes |= {"adapter_down": (units, width), "adapter_down_bias": (width,)}
        weights, tuned = {}, len(shapes) > len(dense)
        for name, shape in shapes.items():
            fan_in = 0 if name in START_AT_ZERO else hidden if name.startswith("down") else width
            shared = name in dense and (tuned or name.startswith(self.shared_layer))
            weights[name] = self._param(name, shape, fan_in, shared)
        plain = fold(weights)
        stacked = tuple(leaf.ndim > len(shapes[name]) for name, leaf in plain.items())
        return tuple(w if "bias" in name else w.astype(self.dtype) for name, w in plain.items()), stacked

    def _param(self, name: str, shape: tuple[int, ...], fan_in: int, shared: bool) -> jax.Array:
        """Returns the float32 parameter, with an E axis unless it is `shared`; zeros at first if fan_in is 0."""
        draw = torch_uniform(fan_in) if fan_in else nn.initializers.zeros
        if shared or self.experts == 1:
            return self.param(name, draw, shape)

        def draw_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            if self.expert_init != "independent":  # copies of the dense model's draw
                return jnp.broadcast_to(draw(key, shape, jnp.float32), (self.experts, *shape))
            return jax.vmap(lambda k: draw(k, shape, jnp.float32))(jax.random.split(key, self.experts))

        return self.param(name, draw_stack, shape)


class RoutedMlp(Mlp):
    """The MLP of a block with a router instead of a route. Parameters: those of `Mlp`, and the router's as "router".
    Sows `Statistics` as "routing" in the collection "statistics". A token in no slot gets 0.

    Cost per image (dense: 4 T D F FLOPs): the experts compute E Q / T times the dense FLOPs, about K times the
    capacity, full or not (1 for soft and hash if E divides T). The router adds 2 T D E. Tokens move to slots and back
    by index: 2 E Q D numbers written and read, and no array has T E Q entries. Soft instead multiplies by T x E Q
    matrices: 6 T E Q D FLOPs, about 6 T^2 D. The weights read are E times the dense model's.

    Router, softmax and statistics are computed in float32, all else in the compute dtype.
    """

    settings: RouterSettings = RouterSettings()

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x_BTD: jax.Array, key_B: jax.Array | None, top_k: jax.Array | None = None
    ) -> jax.Array:
        """Returns y_BTD in the compute dtype.

        Args:
            x_BTD: input tokens.
            key_B: one key per image, for noise and dropout. None is evaluation: deterministic, with eval_capacity.
            top_k: K of a frozen router in this step, an integer scalar, at most settings.top_k; None is settings.top_k.
        """
        weights, stacked = self._weights(x_BTD.shape[-1])
        key_EB = None
        if key_B is not None and self.dropout:
            key_EB = jax.vmap(fold_in, (None, 0))(fold_in(key_B, Site.EXPERTS), jnp.arange(self.experts))
        router = find(self.settings.kind)(self.experts, self.settings, top_k, name="router")
        slots, statistics = router.route(jnp.asarray(x_BTD, jnp.float32), key_B)
        self.sow("statistics", "routing", statistics, reduce_fn=lambda _, new: new)
        x_BTD = jnp.asarray(x_BTD, self.dtype)
        return slots.scatter(self._every_expert(slots.gather(x_BTD), key_EB, weights, stacked), x_BTD)


def _exchange(x_EBTD: jax.Array, source_TE: jax.Array) -> jax.Array:
    """Returns y with y[e, b, t] = x[source[t, e], b, t]."""
    return jnp.take_along_axis(x_EBTD, source_TE.T[:, None, :, None], axis=0)
