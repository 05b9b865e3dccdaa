"""The two-layer MLP of a block, dense or stacked over experts, which a route or a router selects.

B batch · T tokens · D width · F hidden width · E experts · C slots of an expert for one image
R rank of LoRA, or width of an adapter
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.adapters import fold
from jvitmoe.models.layers import add_bias, dropout, gelu, torch_uniform
from jvitmoe.models.routers import RouterSettings, find

EXPERT_DROPOUT = 5  # site of its random draws; 0 to 3 are those of dropout in a block, 4 that of a router's noise


def two_layers(x_BTD: jax.Array, key_B: jax.Array | None, weights: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """Returns down(dropout(gelu(up(x)))), [B, T, D]: what one expert, or the dense model, computes."""
    up_DF, up_bias_F, down_FD, down_bias_D = weights
    h_BTF = dropout(gelu(add_bias(x_BTD @ up_DF, up_bias_F)), key_B, site=0, rate=rate)
    return add_bias(h_BTF @ down_FD, down_bias_D)


class Mlp(nn.Module):
    """The MLP of a block. With experts > 1 every parameter but those of `shared_layer` gets a leading E axis.

    Parameters: up [E,] D F · up_bias [E,] F · down [E,] F D · down_bias [E,] D.

    With LoRA or an adapter all experts share these, and each expert has its own LoRA or adapter: up_a [E,] D R ·
    up_b [E,] R F · down_a [E,] F R · down_b [E,] R D; adapter_up [E,] D R · adapter_up_bias [E,] R · adapter_down
    [E,] R D · adapter_down_bias [E,] D. The second matrix of each starts at zero, so every expert starts as the MLP.
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
                None: slot e of images runs expert e.
                [E]: the expert of each slot of images, a permutation; one batched product over slots.
                [T, E]: the expert of each slot at each token index, a permutation. Tokens move between images of the
                    same index in their slots, which costs two more gathers of the activations.
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
        """Returns the float32 parameter, with an E axis unless `alone`; it starts at zero if fan_in is None."""
        draw = torch_uniform(fan_in) if fan_in else nn.initializers.zeros
        if alone:
            return self.param(name, draw, shape)

        def draw_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            if self.expert_init != "independent":  # copies of the dense model's draw
                return jnp.broadcast_to(draw(key, shape, jnp.float32), (self.experts, *shape))
            return jax.vmap(lambda k: draw(k, shape, jnp.float32))(jax.random.split(key, self.experts))

        return self.param(name, draw_stack, shape)


class RoutedMlp(Mlp):
    """The MLP of a block with a router instead of a route. Parameters: those of `Mlp`, and the router's as "router".

    A token in no slot gets 0: the residual carries it past.

    Cost of an image against dense, 4 T D F FLOPs: experts run E C / T times as many, which is K times the capacity,
    full or not (1 for soft and hash where E divides T). The router adds 2 T D E. Tokens move to slots and back by
    index: 2 E C D numbers written and read, and no array holds T E C. Soft instead multiplies by two T x E C matrices
    made from one more: 6 T E C D FLOPs, about 6 T^2 D. Weights read are E times the dense model's.

    Router, softmax and statistics are computed in float32, all else in the compute dtype.

    Publishes `Statistics` as "routing" of the collection "statistics" where that is mutable.
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
            top_k: K of a frozen router in this step, an integer scalar of at most settings.top_k, which is the default.
        """
        weights, stacked = self._weights(x_BTD.shape[-1])
        key_EB = None
        if key_B is not None and self.dropout:
            fold_B = jax.vmap(jax.random.fold_in, (0, None))
            key_EB = jax.vmap(fold_B, (None, 0))(fold_B(key_B, EXPERT_DROPOUT), jnp.arange(self.experts))
        router = find(self.settings.kind)(self.experts, self.settings, top_k, name="router")
        slots, statistics = router.route(jnp.asarray(x_BTD, jnp.float32), key_B)
        self.sow("statistics", "routing", statistics, reduce_fn=lambda _, new: new)
        x_BTD = jnp.asarray(x_BTD, self.dtype)
        axes = (0, None if key_EB is None else 0, tuple(0 if e else None for e in stacked), None)
        y_EBCD = jax.vmap(two_layers, axes)(slots.gather(x_BTD), key_EB, weights, self.dropout)
        return slots.scatter(y_EBCD, x_BTD)


def _exchange(x_EBTD: jax.Array, source_TE: jax.Array) -> jax.Array:
    """Returns y with y[e, b, t] = x[source[t, e], b, t]."""
    return jnp.take_along_axis(x_EBTD, source_TE.T[:, None, :, None], axis=0)
