"""The Vision Transformer: patches, positions, blocks, head. Dense, or with MLPs that hold experts and a router.

B batch · T tokens · D width · L layers · C classes · c colour channels
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.config import ModelConfig
from jvitmoe.models.layers import (
    Attention,
    ConvStem,
    Head,
    LayerNorm,
    Linear,
    SequencePool,
    Site,
    TwoPassLayerNorm,
    drop_path,
    dropout,
    fold_in,
    in_patches,
    linear,
    sincos2d,
)
from jvitmoe.models.mlp import Mlp, RoutedMlp
from jvitmoe.models.routers import RouterSettings, Statistics

ORIGINAL_ROWS = 300  # of positions in the original: more than there are patches
BLOCK = "block"  # followed by a position in the pattern: the key of a layer's parameters
POSITION = re.compile(rf"{BLOCK}(\d+)")


class Block(nn.Module):
    """One transformer layer, called as `nn.scan` calls it: (carry, index of the layer, same inputs for all layers) ->
    (carry, None)."""

    config: ModelConfig
    dtype: Any
    attention: str = "xla"
    router: RouterSettings | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        index: jax.Array,
        key_B: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        config, rate = self.config, self.config.dropout
        key_B = None if key_B is None else fold_in(key_B, index)
        norm1 = LayerNorm(config.norm_epsilon, dtype=self.dtype, name="norm1")
        norm2 = LayerNorm(config.norm_epsilon, dtype=self.dtype, name="norm2")
        settings: dict[str, Any] = {
            "hidden": config.hidden,
            "dropout": rate,
            "dtype": self.dtype,
            "lora": config.lora,
            "adapter": config.adapter,
            "name": "mlp",
        }

        def attention(x_BTD: jax.Array) -> jax.Array:
            module = Attention(
                heads=config.heads,
                dropout=rate,
                dtype=self.dtype,
                implementation=self.attention,
                qk_norm=config.qk_norm,
                epsilon=config.norm_epsilon,
                name="attention",
            )
            y_BTD = dropout(module(x_BTD, key_B), key_B, Site.ATTENTION, rate)
            return finish(y_BTD, "layer_scale1", Site.ATTENTION_PATH)

        def mlp(x_BTD: jax.Array) -> jax.Array:
            if self.router is None:
                y_BTD = Mlp(**settings)(x_BTD, key_B)
            else:
                sizes = {"hidden": config.expert_hidden or config.hidden, "shared": config.shared_hidden}
                y_BTD = RoutedMlp(**settings | sizes, settings=self.router)(x_BTD, key_B)
            return finish(dropout(y_BTD, key_B, Site.MLP, rate), "layer_scale2", Site.MLP_PATH)

        def finish(y_BTD: jax.Array, scale: str, site: Site) -> jax.Array:
            if config.layer_scale:
                init = nn.initializers.constant(config.layer_scale)
                scale_D = self.param(scale, init, (config.width,))
                y_BTD = y_BTD * jnp.broadcast_to(scale_D, y_BTD.shape).astype(self.dtype)  # as `add_bias`
            if config.drop_path:
                share = jnp.float32(index) / max(config.depth - 1, 1)
                y_BTD = drop_path(y_BTD, key_B, site, config.drop_path * share)
            return y_BTD

        x_BTD = x_BTD + attention(norm1(x_BTD))
        return x_BTD + mlp(norm2(x_BTD)), None


class LayerGroup(Block):
    """The layers of one repetition of the pattern, "block0", "block1", …, called as `Block` is."""

    pattern: tuple[str, ...] = ("experts",)

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        indices: jax.Array,
        key_B: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        for position, kind in enumerate(self.pattern):
            router = self.router if kind == "experts" else None
            block = Block(self.config, self.dtype, self.attention, router, name=f"{BLOCK}{position}")
            x_BTD, _ = block(x_BTD, indices[position], key_B)
        return x_BTD, None


def in_layers(blocks: Any) -> Any:
    """Returns the tree of the blocks with leaves [L, ...]. With a pattern, each position has a tree of its own: their
    leaves are interleaved. Positions without leaves (None in their place) are left out."""
    if not (names := positions(blocks)):
        return blocks
    trees = [blocks[name] for name in names if jax.tree.leaves(blocks[name])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *trees)


def positions(blocks: Any) -> list[str]:
    """Returns the keys of the positions of a pattern, in order; [] without a pattern."""
    return sorted(filter(POSITION.fullmatch, blocks), key=lambda name: int(name.removeprefix(BLOCK)))


def position_in_group(path: Sequence[Any]) -> int | None:
    """Returns the position in the pattern of a leaf of parameters or optimiser state, by its key path; None if the path
    has none, as without a pattern."""
    matches = (POSITION.fullmatch(str(getattr(entry, "key", ""))) for entry in path)
    return next((int(match[1]) for match in matches if match), None)


def of_group(path: Sequence[Any], x_L: Any, groups: int) -> Any:
    """Returns the layers of x_L that a leaf of the blocks has; with a pattern, those of its position in each group."""
    return x_L[position_in_group(path) or 0 :: x_L.shape[0] // groups]


def fill(drawn: Any, dense: Any) -> Any:
    """Returns the drawn parameters with those of a dense tree wherever it has them: routers, LoRA and adapters keep
    their draw (sparse upcycling, arXiv 2212.05055)."""

    def choose(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        found = dense
        for key in (entry.key for entry in path if not POSITION.fullmatch(entry.key)):
            if key not in found:
                return leaf
            found = found[key]
        return of_group(path, found, len(leaf)) if path[0].key == "blocks" else found

    return jax.tree.map_with_path(choose, drawn)


class ViT(nn.Module):
    """The ViT with the options of `ModelConfig`; block parameters have a leading L axis.

    Without a router this is the dense model, which random routing runs too (`routing`). With one, MLP parameters are
    stacked [L, E, ...], and the router selects the experts of each token.

    A pattern of n > 1 layers repeats L / n times; "experts" marks the layers that have experts. Each position of the
    pattern has its own parameter tree with leaves [L / n, ...], which `in_layers` interleaves.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    router: RouterSettings | None = None
    pattern: tuple[str, ...] = ("experts",)
    attention: str = "xla"  # xla | cudnn
    loops: bool = True  # scan over depth; False writes out the layers of a dense model
    unroll: int = 1  # layers per iteration of the scan

    @nn.compact
    def __call__(
        self,
        images_BHWc: jax.Array,
        key_B: jax.Array | None = None,
        head: bool = True,
    ) -> jax.Array:
        """Returns float32 logits_BC; without `head` float32 features_BD, its input.

        Args:
            images_BHWc: normalised images, image_size x image_size x channels.
            key_B: one dropout key per image; None is deterministic.
        """
        x_BTD, patches = self._embed(images_BHWc)
        x_BTD = self._scanned(x_BTD, key_B) if self.loops else self._unrolled(x_BTD)
        pooled_BD = self._pooled(x_BTD, patches)
        if not head:
            return pooled_BD.astype(jnp.float32)
        config = self.config
        return Head(config.classes, config.head_hidden, self.dtype, name="head")(pooled_BD).astype(jnp.float32)

    def _embed(self, images_BHWc: jax.Array) -> tuple[jax.Array, int]:
        """Returns (x_BTD, number of patches): CLS, registers, and patches with their positions."""
        config = self.config
        p = config.patch
        if config.stem == "patch":
            weights = Linear((p, p, config.channels), (config.width,), name="patches")()
            x_BTD = linear(in_patches(images_BHWc, p), weights, self.dtype)
        else:
            x_BTD = ConvStem(p, config.width, self.dtype, config.stem == "strided", name="patches")(images_BHWc)
        b, patches, d = x_BTD.shape
        if config.positions == "learned":
            rows = max(patches, ORIGINAL_ROWS) if config.init == "original" else patches
            positions_TD = self.param("positions", nn.initializers.zeros, (rows, d))[:patches]
        else:
            positions_TD = jnp.asarray(sincos2d(config.image_size // config.patch, d))
        x_BTD = x_BTD + positions_TD[None].astype(self.dtype)
        prefix = []  # joins after the positions are added: the original's CLS has no position
        if config.has_cls:
            cls_D = self.param("cls", nn.initializers.normal(1.0), (d,)).astype(self.dtype)
            if config.cls_position:
                cls_D = cls_D + self.param("cls_position", nn.initializers.zeros, (d,)).astype(self.dtype)
            prefix.append(cls_D[None])
        if config.registers:
            registers_RD = self.param("registers", nn.initializers.normal(0.02), (config.registers, d))
            prefix.append(registers_RD.astype(self.dtype))
        if prefix:
            tokens_TD = jnp.concatenate(prefix)
            x_BTD = jnp.concatenate([jnp.broadcast_to(tokens_TD, (b, *tokens_TD.shape)), x_BTD], axis=1)
        return x_BTD, patches

    def _pooled(self, x_BTD: jax.Array, patches: int) -> jax.Array:
        """Returns the features [B, D] that the head sees."""
        norm = TwoPassLayerNorm(self.config.norm_epsilon, dtype=self.dtype, name="norm")
        patches_BTD = x_BTD[:, -patches:]
        if self.config.pool == "seq":
            return SequencePool(self.dtype, name="pool")(norm(patches_BTD))
        return norm(x_BTD[:, 0] if self.config.pool == "cls" else patches_BTD.mean(axis=1))

    def _scanned(self, x_BTD: jax.Array, key_B: jax.Array | None) -> jax.Array:
        settings: tuple[Any, ...] = (self.config, self.dtype, self.attention, self.router)
        body: type[nn.Module] = Block
        indices = jnp.arange(self.config.depth)
        if len(self.pattern) > 1:
            indices = indices.reshape(-1, len(self.pattern))
            settings, body = (*settings, self.pattern), LayerGroup
        groups = self.config.depth // len(self.pattern)
        blocks = nn.scan(
            body,
            variable_axes={"params": 0, "statistics": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=groups,
            unroll=min(self.unroll, groups),
        )(*settings, name="blocks")
        return blocks(x_BTD, indices, key_B)[0]

    def _unrolled(self, x_BTD: jax.Array) -> jax.Array:
        block = Block(self.config, self.dtype, parent=None)
        params: Any = self.get_variable("params", "blocks")
        for index in range(self.config.depth):
            layer = jax.tree.map(lambda leaf: leaf[index], params)  # noqa: B023
            x_BTD, _ = block.apply({"params": layer}, x_BTD, index, None)
        return x_BTD

    def plain(self) -> "ViT":
        """Returns the dense ViT whose parameters merging returns."""
        return self.clone(config=self.config.plain(), router=None, pattern=("experts",))


def build(
    config: ModelConfig,
    platform: str = "cpu",
    pattern: tuple[str, ...] = ("experts",),
    fused: bool = False,
) -> ViT:
    """Returns the model in its compute dtype; "auto" is bfloat16 on a GPU or TPU and float32 on a CPU.

    Attention is cuDNN's if the platform has it (`fused`), the dtype is bfloat16 and the shapes fit
    (`ModelConfig.fits_cudnn`), else XLA's.
    """
    name = config.dtype if config.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    attention = "cudnn" if fused and name == "bfloat16" and config.fits_cudnn else "xla"
    return ViT(config, jnp.dtype(name), None, pattern, attention)


def logits(model: ViT, params: Any, images_BHWc: jax.Array, key_B: jax.Array | None = None) -> jax.Array:
    """Returns float32 logits_BC of the model with these parameters; arguments as `ViT.__call__`."""
    return cast(jax.Array, model.apply({"params": params}, images_BHWc, key_B))


def features(model: ViT, params: Any, images_BHWc: jax.Array) -> jax.Array:
    """Returns float32 features_BD of a dense model, the input of its head: pooled, after the last norm."""
    return cast(jax.Array, model.apply({"params": params}, images_BHWc, head=False))


def logits_and_statistics(
    model: ViT, params: Any, images_BHWc: jax.Array, key_B: jax.Array | None = None
) -> tuple[jax.Array, Statistics]:
    """Returns (logits_BC, Statistics) of a model with a router; leaves [X, ...] over the layers with experts."""
    logits_BC, sown = model.apply({"params": params}, images_BHWc, key_B, mutable=["statistics"])
    return cast(jax.Array, logits_BC), in_layers(sown["statistics"]["blocks"])["mlp"]["routing"]


def token_weights(model: ViT, params: Any, images_BHWc: jax.Array) -> jax.Array:
    """Returns weight_XBTE of a model with a router, in evaluation: what multiplies the output of each expert for each
    token; 0 where it is in no slot of the expert. Leading axis: the layers with experts."""
    _, sown = model.apply({"params": params}, images_BHWc, mutable=["intermediates"])
    return cast(jax.Array, _part(sown["intermediates"]["blocks"], "mlp")["weight_BTE"])


def _part(blocks: Any, name: str) -> Any:
    """Returns what a part of the layers has sown, with leaves [layers that did, ...]."""
    if not (places := positions(blocks)):
        return blocks[name]
    return in_layers({place: blocks[place][name] for place in places if name in blocks[place]})


def rollout(model: ViT, params: Any, images_BHWc: jax.Array) -> jax.Array:
    """Returns share_BP of a dense model: how much of what the head sees came from each patch, by attention alone, as
    the product over layers of (mean over heads + identity) / 2 (Abnar and Zuidema, arXiv 2005.00928); sums to 1."""
    model = model.clone(attention="xla")
    _, sown = model.apply({"params": params}, images_BHWc, mutable=["intermediates"])
    weights_LBTT = _part(sown["intermediates"]["blocks"], "attention")["weights_BGTT"].astype(jnp.float32).mean(2)
    mixed_BTT = jnp.eye(weights_LBTT.shape[-1])[None]
    for layer_BTT in weights_LBTT:
        mixed_BTT = (layer_BTT @ mixed_BTT + mixed_BTT) / 2
    patches = model.config.patches
    seen_BT = mixed_BTT[:, 0] if model.config.pool == "cls" else mixed_BTT[:, -patches:].mean(1)
    share_BP = seen_BT[:, -patches:]
    return share_BP / share_BP.sum(1, keepdims=True)


def init(model: ViT, key: jax.Array) -> dict[str, Any]:
    """Returns the parameter tree, float32, nested plain dicts.

    With `init="original"` all layers start as copies of the first, as in the original, which deep-copies one layer;
    with a pattern, all layers at the same position are copies of each other.
    """
    params = model.init(key, _image(model.config))["params"]
    if model.config.init == "original":
        params["blocks"] = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params["blocks"])
    return params


def _image(config: ModelConfig) -> jax.Array:
    return jnp.zeros((1, config.image_size, config.image_size, config.channels))


def as_nnx(model: ViT, params: Any) -> Any:
    """Returns the model with these parameters as a module of Flax NNX, which is called as `ViT.__call__`."""
    from flax import nnx  # not above: Linen does not import it, and no command needs it

    key = jax.random.key(0)  # of shapes only
    module = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model).lazy_init(_image(model.config), rngs=key))
    nnx.update(module, params)
    return module


def shapes(model: ViT) -> dict[str, Any]:
    """Returns the parameter tree as `jax.ShapeDtypeStruct`; nothing is allocated."""
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))
