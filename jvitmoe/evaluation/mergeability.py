"""Why averaging the experts of a run works or fails: their spread, their layer gap, and the loss on the way between.

B batch · T tokens · L layers · E, f experts · S shares of the way to the mean
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.data import augment
from jvitmoe.data.batches import Batches, Images
from jvitmoe.data.splits import S
from jvitmoe.experts import merge, slices
from jvitmoe.models import layers, mlp, vit

SHARES = tuple(i / 8 for i in range(9))
IMAGES = 1000  # at most: what the layer gap and the losses are measured on
TINY = 1e-30


def subset(split: S) -> S:
    """Returns at most 1,000 images, evenly spaced over the split: always the same."""
    return split.select(np.linspace(0, len(split) - 1, min(len(split), IMAGES)).astype(int))


def weight_geometry(params: Any) -> dict[str, list[float]]:
    """Returns, per layer with experts, over all stacked weights of its MLP as one vector w_e per expert, m their mean:

    spread: ||w_e - m|| / ||m||, averaged over experts.
    cosine: of w_e and w_f, averaged over pairs.
    difference_cosine: of w_e - m and w_f - m, the largest of the pairs. Differences sum to zero, so their average is
        about -1 / (E - 1) for any experts; a pair far above it has gone its own way together. 0 for equal experts.
    """

    def gram(experts: Any) -> jax.Array:
        flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(experts)]
        return jnp.stack([jnp.einsum("lep,lfp->lef", leaf, leaf) for leaf in flat]).sum(0)

    @jax.jit
    def grams(experts: Any) -> tuple[jax.Array, jax.Array]:
        apart = jax.tree.map(lambda leaf: leaf - leaf.mean(slices.EXPERT_AXIS, keepdims=True), experts)
        return gram(experts), gram(apart)

    with jax.default_matmul_precision("highest"):
        whole_LEE, apart_LEE = (np.asarray(x, float) for x in jax.device_get(grams(merge.expert_layers(params))))
    mean_norm_L = np.sqrt(whole_LEE.mean((1, 2)))
    spread_L = _norms(apart_LEE).mean(1) / mean_norm_L
    return {
        "spread": spread_L.tolist(),
        "cosine": _cosines(whole_LEE).mean(1).tolist(),
        "difference_cosine": _cosines(apart_LEE).max(1).tolist(),
    }


def _norms(gram_LEE: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diagonal(gram_LEE, axis1=1, axis2=2))


def _cosines(gram_LEE: np.ndarray) -> np.ndarray:
    """Returns [L, pairs] of different experts."""
    norm_LE = _norms(gram_LEE)
    cosine_LEE = gram_LEE / np.maximum(norm_LE[:, :, None] * norm_LE[:, None], TINY)
    return cosine_LEE[:, *np.triu_indices(gram_LEE.shape[1], 1)]


def layer_gap(
    model: vit.ViT, params: Any, split: Images, batches: Batches, expert_layers: Sequence[int]
) -> list[float]:
    """Returns, per layer with experts, the mean of ||mean_e f_e(x) - f_mean(x)|| over the mean of ||mean_e f_e(x)||,
    both over all tokens; f_e is the layer's MLP with expert e, x its input in the merged model on these images.

    How far averaging weights is from averaging outputs. In float32 throughout.
    """
    dense, depth = model.plain().clone(dtype=jnp.dtype("float32")), model.config.depth

    @jax.jit
    def batch_sums(params: Any, index_B: jax.Array, mask_B: jax.Array) -> jax.Array:
        merged = merge.average_experts(params)
        images = augment.normalize(split.images_NHWc[index_B])
        sums, inputs = [], mlp_inputs(dense, merged, images)
        for layer in expert_layers:
            x_BTD = inputs[layer]
            outputs = [_mlp(merge.take_path(params, jnp.full((depth,), e)), layer, x_BTD) for e in range(model.experts)]
            wanted_BTD = sum(outputs) / len(outputs)
            for y_BTD in (wanted_BTD - _mlp(merged, layer, x_BTD), wanted_BTD):
                sums.append(jnp.where(mask_B[:, None], jnp.linalg.norm(y_BTD, axis=-1), 0.0).sum())
        return jnp.stack(sums).reshape(-1, 2)

    with jax.default_matmul_precision("highest"):
        parts = [np.asarray(batch_sums(params, *batch), float) for batch in zip(*batches, strict=True)]
    sums_L2 = np.sum(parts, axis=0)
    return (sums_L2[:, 0] / np.maximum(sums_L2[:, 1], TINY)).tolist()


def mlp_inputs(dense: vit.ViT, params: Any, images_BHWc: jax.Array) -> list[jax.Array]:
    """Returns x_BTD that the MLP of each layer of a dense model is given: the output of the norm before it."""
    config = dense.config
    kept: Any
    _, kept = dense.apply(
        {"params": params}, images_BHWc, capture_intermediates=_named("patches"), mutable=["intermediates"]
    )
    (x_BTD,) = kept["intermediates"]["patches"]["__call__"]
    tokens = x_BTD.shape[1]
    positions_TD = (
        params["positions"][:tokens]
        if config.positions == "learned"
        else jnp.asarray(layers.sincos2d(config.image_size // config.patch, config.width))
    )
    x_BTD = x_BTD + positions_TD[None]
    if config.pool == "cls":
        cls_D = params["cls"] + params["cls_position"] if config.cls_position else params["cls"]
        x_BTD = jnp.concatenate([jnp.broadcast_to(cls_D, (len(x_BTD), 1, config.width)), x_BTD], axis=1)
    block = vit.Block(config, dense.experts, dense.expert_init, dense.shared_layer, dense.dtype)
    norm, inputs = "norm2" if config.norm == "pre" else "norm1", []
    for layer in range(config.depth):
        (x_BTD, _), kept = block.apply(
            {"params": jax.tree.map(lambda leaf: leaf[layer], params["blocks"])},  # noqa: B023
            x_BTD,
            (jnp.int32(layer), None),
            None,
            capture_intermediates=_named(norm),
            mutable=["intermediates"],
        )
        inputs.append(kept["intermediates"][norm]["__call__"][0])
    return inputs


def _named(name: str) -> Callable[[Any, str], bool]:
    return lambda module, _: module.name == name


def _mlp(params: Any, layer: int, x_BTD: jax.Array) -> jax.Array:
    weights = tuple(params["blocks"]["mlp"][name][layer] for name in ("up", "up_bias", "down", "down_bias"))
    return mlp.two_layers(x_BTD, None, weights, 0.0)


def barrier(params: Any, losses: Callable[[Any], Sequence[float]]) -> dict[str, Any]:
    """Returns the loss along the straight lines from every expert to the mean of experts.

    Args:
        params: the stacked tree.
        losses: stacked tree -> loss of each of its expert paths.

    Returns:
        share: of the way to the mean, from 0 (the expert) to 1 (the merged model).
        losses: [E][S], nats.
        height: the most by which a line rises above its expert's own loss, averaged over experts; 0 is no barrier
            (Frankle et al., arXiv 1912.05671, but through the mean).
    """
    pull = jax.jit(merge.pull)
    losses_ES = np.asarray([losses(pull(params, share)) for share in SHARES]).T
    height = (losses_ES.max(1) - losses_ES[:, 0]).mean()
    return {"share": list(SHARES), "losses": losses_ES.tolist(), "height": float(height)}
