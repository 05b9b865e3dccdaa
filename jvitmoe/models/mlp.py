"""The two-layer MLP of a block: dense, or a stack of experts that a router selects from.

B batch · T tokens · D width · F hidden width · E experts · Q slots of an expert for one image
R rank of LoRA, or hidden units of an adapter
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.layers import Site, add_bias, dropout, fold_in, gelu, torch_uniform
from jvitmoe.models.routers import RouterSettings, find

LORA = ("up_a", "up_b", "down_a", "down_b")
SHARED = ("shared_up", "shared_up_bias", "shared_down", "shared_down_bias")
ADAPTER = ("adapter_up", "adapter_up_bias", "adapter_down", "adapter_down_bias")
START_AT_ZERO = ("up_b", "down_b", "adapter_down", "adapter_down_bias")  # so every expert starts as the MLP


def two_layers(x_BTD: jax.Array, key_B: jax.Array | None, weights: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """Returns down(dropout(gelu(up(x)))), [B, T, D]."""
    up_DF, up_bias_F, down_FD, down_bias_D = weights
    h_BTF = dropout(gelu(add_bias(x_BTD @ up_DF, up_bias_F)), key_B, Site.HIDDEN, rate)
    return add_bias(h_BTF @ down_FD, down_bias_D)


class Mlp(nn.Module):
    """The MLP of a block.

    Parameters: up D F · up_bias F · down F D · down_bias D; with LoRA also up_a D R · up_b R F · down_a F R ·
    down_b R D; with an adapter adapter_up D R · adapter_up_bias R · adapter_down R D · adapter_down_bias D.
    """

    hidden: int  # F
    dropout: float = 0.0
    dtype: Any = jnp.float32
    lora: int = 0  # rank; 0 is none
    adapter: int = 0  # width; 0 is none

    @nn.compact
    def __call__(self, x_BTD: jax.Array, key_B: jax.Array | None) -> jax.Array:
        """Returns y_BTD in the compute dtype. `key_B` is one dropout key per image; None is deterministic."""
        return two_layers(x_BTD.astype(self.dtype), key_B, self._weights(x_BTD.shape[-1]), self.dropout)

    def _weights(self, width: int) -> tuple[jax.Array, ...]:
        """Returns (up, up_bias, down, down_bias), matrices in the compute dtype."""
        hidden, rank, units = self.hidden, self.lora, self.adapter
        shapes = {"up": (width, hidden), "up_bias": (hidden,), "down": (hidden, width), "down_bias": (width,)}
        if rank:
            shapes |= {"up_a": (width, rank), "up_b": (rank, hidden), "down_a": (hidden, rank), "down_b": (rank, width)}
        if units:
            shapes |= {"adapter_up": (width, units), "adapter_up_bias": (units,)}
            shapes |= {"adapter_down": (units, width), "adapter_down_bias": (width,)}
        plain = fold({name: self._param(name, shape, width) for name, shape in shapes.items()})
        return tuple(w if "bias" in name else w.astype(self.dtype) for name, w in plain.items())

    def _param(self, name: str, shape: tuple[int, ...], width: int) -> jax.Array:
        """Returns the float32 parameter."""
        return self.param(name, self._draw(name, width), shape)

    def _draw(self, name: str, width: int) -> nn.initializers.Initializer:
        if name in START_AT_ZERO:
            return nn.initializers.zeros
        return torch_uniform(self.hidden if name.startswith("down") else width)


class RoutedMlp(Mlp):
    """The MLP of a block with a router. Parameters: those of `Mlp` with a leading E axis, those of a shared expert
    without one (SHARED), and the router's as "router". Sows `Statistics` as "routing" in the collection "statistics". A
    token in no slot gets 0, and what the shared expert adds (DeepSeekMoE, arXiv 2401.06066).

    Cost per image (dense: 4 T D F FLOPs): the experts compute E Q / T times the dense FLOPs, about K times the
    capacity, full or not (1 for soft and hash if E divides T). The router adds 2 T D E. Tokens move to slots and back
    by index: 2 E Q D numbers written and read, and no array has T E Q entries. Soft instead multiplies by T x E Q
    matrices: 6 T E Q D FLOPs, about 6 T^2 D. The weights read are E times the dense model's.

    Router, softmax and statistics are computed in float32, all else in the compute dtype.
    """

    settings: RouterSettings = RouterSettings()
    shared: int = 0  # hidden units of the shared expert; 0 is none

    @nn.compact
    def __call__(self, x_BTD: jax.Array, key_B: jax.Array | None) -> jax.Array:
        """Returns y_BTD in the compute dtype.

        Args:
            x_BTD: input tokens.
            key_B: one key per image, for noise and dropout. None is evaluation: deterministic, with eval_capacity.
        """
        weights, experts = self._weights(x_BTD.shape[-1]), self.settings.experts
        key_EB = None
        if key_B is not None and self.dropout:
            key_EB = jax.vmap(fold_in, (None, 0))(fold_in(key_B, Site.EXPERTS), jnp.arange(experts))
        router = find(self.settings.kind)(self.settings, name="router")
        slots, statistics = router.route(jnp.asarray(x_BTD, jnp.float32), key_B)
        self.sow("statistics", "routing", statistics, reduce_fn=lambda _, new: new)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weight_BTE", slots.weights(x_BTD.shape[1]), reduce_fn=lambda _, new: new)
        x_BTD = jnp.asarray(x_BTD, self.dtype)
        axes = (0, None if key_EB is None else 0, 0, None)
        y_EBQD = jax.vmap(two_layers, axes)(slots.gather(x_BTD), key_EB, weights, self.dropout)
        y_BTD = slots.scatter(y_EBQD, x_BTD)
        return y_BTD + self._shared_expert(x_BTD, key_B) if self.shared else y_BTD

    def _shared_expert(self, x_BTD: jax.Array, key_B: jax.Array | None) -> jax.Array:
        width = x_BTD.shape[-1]
        shapes = dict(zip(SHARED, ((width, self.shared), (self.shared,), (self.shared, width), (width,)), strict=True))
        fans = dict.fromkeys(SHARED[:2], width) | dict.fromkeys(SHARED[2:], self.shared)
        weights = (self.param(name, torch_uniform(fans[name]), shape) for name, shape in shapes.items())
        cast = (w if w.ndim == 1 else w.astype(self.dtype) for w in weights)
        return two_layers(x_BTD, key_B, tuple(cast), self.dropout)

    def _param(self, name: str, shape: tuple[int, ...], width: int) -> jax.Array:
        """Returns the float32 parameter, one array per expert; all are equal (`Routing.init` draws others)."""
        experts = self.settings.experts

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.broadcast_to(self._draw(name, width)(key, shape, jnp.float32), (experts, *shape))

        return self.param(name, draw, shape)


def fold(weights: dict[str, Any]) -> dict[str, Any]:
    """Returns {up, up_bias, down, down_bias} of the plain MLP that computes the same function; exact. Leading axes
    (L, E) are optional: those of the MLP's weights broadcast to those of LoRA and adapter.

    LoRA (arXiv 2106.09685) adds the product of its two matrices to a weight. An adapter beside the MLP (AdaptFormer,
    arXiv 2205.13535; here with the MLP's own GELU) adds hidden units, and so does a shared expert.
    """
    plain = {name: weights[name] for name in ("up", "up_bias", "down", "down_bias")}

    def broadcast(name: str, lead: tuple[int, ...]) -> jax.Array:
        axes = 1 if name.endswith("bias") else 2
        return jnp.broadcast_to(plain[name], (*lead, *plain[name].shape[-axes:]))

    for name in ("up", "down"):
        if f"{name}_a" in weights:
            # A GPU would round the factors to TF32.
            product = jnp.matmul(weights[f"{name}_a"], weights[f"{name}_b"], precision="highest")
            plain[name] = broadcast(name, product.shape[:-2]) + product
    for beside in ("shared", "adapter"):
        if f"{beside}_up" in weights:
            lead = weights[f"{beside}_up"].shape[:-2]
            for name, axis in (("up", -1), ("up_bias", -1), ("down", -2)):
                plain[name] = jnp.concatenate([broadcast(name, lead), weights[f"{beside}_{name}"]], axis)
            plain["down_bias"] = broadcast("down_bias", lead) + weights[f"{beside}_down_bias"]
    return plain
