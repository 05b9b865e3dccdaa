"""The Vision Transformer: patches, positions, blocks, head. Dense, or with expert-stacked MLPs that a route selects.

B batch · T tokens · D width · H heads · K head width · L layers · C classes · P patch side · c channels
"""

import math
import re
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.config import ModelConfig
from jvitmoe.models.mlp import Mlp, add_bias, dropout, gelu, recomputed, torch_uniform
from jvitmoe.models.moe import RoutedMlp, RouterSettings, Statistics

TURN = "block"  # in a pattern of several layers, the key of one is this and its position


class Linear(nn.Module):
    """The weights of a linear layer: kernel [*taken, *given] and bias [*given], with PyTorch's default initialisation,
    returned as matrix [I, O] and vector [O]."""

    taken: tuple[int, ...]  # I is their product
    given: tuple[int, ...]  # and O of these

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        fan_in, fan_out = math.prod(self.taken), math.prod(self.given)
        init = torch_uniform(fan_in)
        kernel, bias = self.param("kernel", init, (*self.taken, *self.given)), self.param("bias", init, self.given)
        return kernel.reshape(fan_in, fan_out), bias.reshape(fan_out)


def linear(x: jax.Array, weights: tuple[jax.Array, jax.Array], dtype: Any) -> jax.Array:
    """Returns x [..., I] through the weights of a `Linear`, [..., O] in `dtype`."""
    kernel_IO, bias_O = weights
    return add_bias(x.astype(dtype) @ kernel_IO.astype(dtype), bias_O)


def sincos2d(grid: int, width: int) -> np.ndarray:
    """Returns fixed positions_TD for a grid x grid image of patches: a quarter of D each for sin and cos of row and
    column, frequencies 10000^(-i / (D/4 - 1)) (Beyer et al., arXiv 2205.01580)."""
    omega = 10000.0 ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    row_T, column_T = np.indices((grid, grid)).reshape(2, -1)
    angles = [np.outer(place_T, omega) for place_T in (column_T, row_T)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


class PatchEmbedding(nn.Module):
    """images_BHWc -> tokens_BTD: a P x P convolution of stride P, written as the matrix product it is."""

    patch: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, images_BHWc: jax.Array) -> jax.Array:
        b, side, _, c = images_BHWc.shape
        p, grid = self.patch, side // self.patch
        init = torch_uniform(p * p * c)
        kernel_PPcD = self.param("kernel", init, (p, p, c, self.width))
        bias_D = self.param("bias", init, (self.width,))
        patches = images_BHWc.reshape(b, grid, p, grid, p, c).transpose(0, 1, 3, 2, 4, 5)
        kernel_ID = kernel_PPcD.reshape(p * p * c, self.width)
        return linear(patches.reshape(b, grid * grid, p * p * c), (kernel_ID, bias_D), self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with biases; kernels query, key, value [D, H, K] and out [H, K, D].

    cuDNN's fused attention has no dropout after the weights: with dropout, training takes XLA's.
    """

    heads: int
    dropout: float
    dtype: Any
    implementation: str = "xla"  # xla | cudnn

    @nn.compact
    def __call__(self, x_BTD: jax.Array, key_B: jax.Array | None) -> jax.Array:
        b, t, width = x_BTD.shape
        heads = self.heads, width // self.heads
        three = [Linear((width,), heads, name=name)() for name in ("query", "key", "value")]
        kernel_DO, bias_O = (jnp.concatenate(parts, axis=-1) for parts in zip(*three, strict=True))
        parts = jnp.split(linear(x_BTD, (kernel_DO, bias_O), self.dtype), 3, axis=-1)  # one product instead of three
        query_BTHK, key_BTHK, value_BTHK = (part.reshape(b, t, *heads) for part in parts)
        if self.implementation == "cudnn" and (key_B is None or self.dropout == 0):
            mixed_BTHK = jax.nn.dot_product_attention(query_BTHK, key_BTHK, value_BTHK, implementation="cudnn")
        else:
            scores_BHTT = jnp.einsum("bqhk,bthk->bhqt", query_BTHK * heads[1] ** -0.5, key_BTHK)
            weights_BHTT = dropout(_softmax(scores_BHTT), key_B, site=1, rate=self.dropout)
            mixed_BTHK = jnp.einsum("bhqt,bthk->bqhk", weights_BHTT, value_BTHK)
        return linear(mixed_BTHK.reshape(b, t, width), Linear(heads, (width,), name="out")(), self.dtype)


@recomputed
def _softmax(scores_BHTT: jax.Array) -> jax.Array:
    # In float32: bfloat16 has too few bits for sums of exponentials.
    return jax.nn.softmax(scores_BHTT.astype(jnp.float32)).astype(scores_BHTT.dtype)


LayerNorm = nn.remat(nn.LayerNorm, prevent_cse=False)  # as `recomputed`


class Block(nn.Module):
    """One transformer layer, in the shape `nn.scan` wants: (carry, per-layer inputs, broadcast) -> (carry, None)."""

    config: ModelConfig
    experts: int
    expert_init: str
    shared_layer: str
    dtype: Any
    attention: str = "xla"
    router: RouterSettings | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layer: tuple[jax.Array, jax.Array | None], key_B: jax.Array | None
    ) -> tuple[jax.Array, None]:
        index, route = layer
        if key_B is not None:
            key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, index)
        config, rate = self.config, self.config.dropout
        norm1 = LayerNorm(config.norm_epsilon, dtype=self.dtype, name="norm1")
        norm2 = LayerNorm(config.norm_epsilon, dtype=self.dtype, name="norm2")
        attention = Attention(config.heads, rate, self.dtype, self.attention, name="attention")
        mlp_settings = (
            *(config.hidden, self.experts, self.expert_init, self.shared_layer, rate, self.dtype),
            *(config.lora, config.adapter),
        )

        def mlp(x_BTD: jax.Array) -> jax.Array:
            if self.router is None:
                return Mlp(*mlp_settings, name="mlp")(x_BTD, route, key_B)
            return RoutedMlp(*mlp_settings, self.router, name="mlp")(x_BTD, key_B)

        if config.norm == "pre":
            x_BTD = x_BTD + dropout(attention(norm1(x_BTD), key_B), key_B, site=2, rate=rate)
            x_BTD = x_BTD + dropout(mlp(norm2(x_BTD)), key_B, site=3, rate=rate)
        else:
            x_BTD = norm1(x_BTD + dropout(attention(x_BTD, key_B), key_B, site=2, rate=rate))
            x_BTD = norm2(x_BTD + dropout(mlp(x_BTD), key_B, site=3, rate=rate))
        return x_BTD, None


class Turn(nn.Module):
    """One turn of a pattern of layers, for `nn.scan` as `Block` is: "block0", "block1", … with experts or without."""

    config: ModelConfig
    experts: int
    expert_init: str
    shared_layer: str
    dtype: Any
    attention: str
    router: RouterSettings | None
    pattern: tuple[str, ...]

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layers: tuple[jax.Array, jax.Array | None], key_B: jax.Array | None
    ) -> tuple[jax.Array, None]:
        for place, kind in enumerate(self.pattern):
            experts, router = (self.experts, self.router) if kind == "experts" else (1, None)
            settings = self.config, experts, self.expert_init, self.shared_layer, self.dtype, self.attention, router
            block = Block(*settings, name=f"{TURN}{place}")
            x_BTD, _ = block(x_BTD, jax.tree.map(lambda x: x[place], layers), key_B)  # noqa: B023
        return x_BTD, None


def in_layers(blocks: Any) -> Any:
    """Returns the blocks' tree with leaves [L, ...]: those of a pattern interleaved, any other as it is.

    Positions of the pattern without a leaf (what is None) are left out.
    """
    places = sorted((_place(name), name) for name in blocks if _place(name) is not None)
    if not places:
        return blocks
    turns = [blocks[name] for _, name in places if jax.tree.leaves(blocks[name])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *turns)


def place_in_turn(path: Sequence[Any]) -> int:
    """Returns the position in the pattern of a leaf of a model's tree, or of its optimiser's, by its key path; 0 where
    there is no pattern."""
    places = (_place(str(getattr(entry, "key", ""))) for entry in path)
    return next((place for place in places if place is not None), 0)


def _place(name: str) -> int | None:
    match = re.fullmatch(rf"{TURN}(\d+)", name)
    return int(match[1]) if match else None


class Head(nn.Module):
    """x_BD -> logits_BC: one linear layer, or two with an exact GELU between."""

    classes: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        if self.hidden:
            x_BD = gelu(linear(x_BD, Linear(x_BD.shape[-1:], (self.hidden,), name="hidden")(), self.dtype))
        return linear(x_BD, Linear(x_BD.shape[-1:], (self.classes,), name="logits")(), self.dtype)


class ViT(nn.Module):
    """The original's ViT and its options (`ModelConfig`); block parameters carry a leading L axis.

    With experts = 1 this is the dense model. With more, MLP parameters are stacked [L, E, ...] and `route` says which
    expert runs where (`routing.draw_route`), or with `router` the model sends its tokens itself.

    A pattern of n > 1 layers repeats L / n times; "experts" marks those that have experts. The parameters of each of
    its positions are a tree of their own with leaves [L / n, ...], which `in_layers` interleaves.
    """

    config: ModelConfig
    experts: int = 1
    expert_init: str = "independent"
    shared_layer: str = "none"
    dtype: Any = jnp.float32
    router: RouterSettings | None = None
    pattern: tuple[str, ...] = ("experts",)
    attention: str = "xla"  # xla | cudnn: what computes it
    loops: bool = True  # over depth; without, the layers of a dense model stand one after the other

    @nn.compact
    def __call__(
        self, images_BHWc: jax.Array, route: jax.Array | None = None, key_B: jax.Array | None = None
    ) -> jax.Array:
        """Returns float32 logits_BC.

        Args:
            images_BHWc: normalised images, image_size x image_size x channels; sorted by slot for a route over slots.
            route: integer experts, [L], [L, E] or [L, T, E], or None (`Mlp`). A layer without experts
                ignores its part.
            key_B: one dropout key per image; None is deterministic.
        """
        config = self.config
        x_BTD = PatchEmbedding(config.patch, config.width, self.dtype, name="patches")(images_BHWc)
        b, t, d = x_BTD.shape
        if config.positions == "learned":
            table_RD = self.param("positions", nn.initializers.zeros, (config.position_rows or t, d))
            positions_TD = table_RD[:t]
        else:
            positions_TD = jnp.asarray(sincos2d(config.image_size // config.patch, d))
        x_BTD = x_BTD + positions_TD[None].astype(self.dtype)
        if config.pool == "cls":  # prepended after the positions, as in the original: it has none
            cls_D = self.param("cls", nn.initializers.normal(1.0), (d,)).astype(self.dtype)
            if config.cls_position:
                cls_D = cls_D + self.param("cls_position", nn.initializers.zeros, (d,)).astype(self.dtype)
            x_BTD = jnp.concatenate([jnp.broadcast_to(cls_D, (b, 1, d)), x_BTD], axis=1)
        x_BTD = self._in_loop(x_BTD, route, key_B) if self.loops else self._written_out(x_BTD)
        pooled_BD = x_BTD[:, 0] if config.pool == "cls" else x_BTD.mean(axis=1)
        pooled_BD = nn.LayerNorm(config.norm_epsilon, dtype=self.dtype, name="norm")(pooled_BD)
        return Head(config.classes, config.head_hidden, self.dtype, name="head")(pooled_BD).astype(jnp.float32)

    def _in_loop(self, x_BTD: jax.Array, route: jax.Array | None, key_B: jax.Array | None) -> jax.Array:
        experts = self.experts, self.expert_init, self.shared_layer
        settings: tuple[Any, ...] = (self.config, *experts, self.dtype, self.attention, self.router)
        body: type[nn.Module] = Block
        layers = jnp.arange(self.config.depth), route
        if len(self.pattern) > 1:
            layers = jax.tree.map(lambda x: x.reshape(-1, len(self.pattern), *x.shape[1:]), layers)
            settings, body = (*settings, self.pattern), Turn
        turns = self.config.depth // len(self.pattern)
        blocks = nn.scan(
            body,
            variable_axes={"params": 0, "statistics": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=turns,
            unroll=min(self.config.unroll, turns),
        )(*settings, name="blocks")
        return blocks(x_BTD, layers, key_B)[0]

    def _written_out(self, x_BTD: jax.Array) -> jax.Array:
        block = Block(self.config, self.experts, self.expert_init, self.shared_layer, self.dtype, parent=None)
        params: Any = self.get_variable("params", "blocks")
        for index in range(self.config.depth):
            layer = jax.tree.map(lambda leaf: leaf[index], params)  # noqa: B023
            x_BTD, _ = block.apply({"params": layer}, x_BTD, (index, None), None)
        return x_BTD

    def plain(self) -> "ViT":
        """Returns the dense ViT that merging gives parameters for."""
        return self.clone(config=self.config.plain(), experts=1, router=None, pattern=("experts",))


def build(
    config: ModelConfig,
    experts: int = 1,
    expert_init: str = "independent",
    shared_layer: str = "none",
    router: RouterSettings | None = None,
    platform: str = "cpu",
    pattern: tuple[str, ...] = ("experts",),
    fused: bool = False,
) -> ViT:
    """Returns the model in its compute dtype; "auto" is bfloat16 on a GPU or TPU and float32 on a CPU.

    Attention is cuDNN's where the config says so, or leaves it open, the platform has it (`fused`), and it takes the
    shapes: bfloat16, and `ModelConfig.fits_cudnn`.
    """
    name = config.dtype if config.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    takes_cudnn = fused and name == "bfloat16" and config.fits_cudnn
    attention = config.attention if config.attention != "auto" else "cudnn" if takes_cudnn else "xla"
    return ViT(config, experts, expert_init, shared_layer, jnp.dtype(name), router, pattern, attention)


def logits(
    model: ViT,
    params: Any,
    images_BHWc: jax.Array,
    route: jax.Array | None = None,
    key_B: jax.Array | None = None,
) -> jax.Array:
    """Returns float32 logits_BC of the model with these parameters; arguments as `ViT.__call__`."""
    return cast(jax.Array, model.apply({"params": params}, images_BHWc, route, key_B))


def logits_and_statistics(
    model: ViT, params: Any, images_BHWc: jax.Array, key_B: jax.Array | None = None
) -> tuple[jax.Array, Statistics]:
    """Returns (logits_BC, Statistics) of a model with a router; leaves [L, ...] over the layers with experts."""
    logits_BC, sown = model.apply({"params": params}, images_BHWc, None, key_B, mutable=["statistics"])
    return cast(jax.Array, logits_BC), in_layers(sown["statistics"]["blocks"])["mlp"]["routing"]


def init(model: ViT, key: jax.Array) -> dict[str, Any]:
    """Returns the parameter tree, float32, nested plain dicts.

    With `init_layers="shared"` all layers start as copies of the first, as in the original, which deep-copies one
    layer; in a pattern, all layers at the same position of it.
    """
    config = model.config
    image = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    route_L = jnp.zeros((config.depth,), jnp.int32)
    params = model.init(key, image, route_L)["params"]
    if config.init_layers == "shared":
        params["blocks"] = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params["blocks"])
    return params
