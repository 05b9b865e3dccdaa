"""Why averaging experts works or fails: distances of their weights and outputs, and the loss between them.

B batch · T tokens · L layers · X layers that have experts · E, f experts · S points on the line to the mean
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.data import augment
from jvitmoe.data.batches import Batch, EvalBatches
from jvitmoe.evaluation.evaluator import Evaluator, path_routes
from jvitmoe.experts import merge
from jvitmoe.experts.params import MLP, Params
from jvitmoe.machine import compilation
from jvitmoe.models import mlp, vit
from jvitmoe.routing import Routing

SHARES = tuple(i / 8 for i in range(9))
IMAGES = 1000  # most images that the layer gap and the losses are measured on
TINY = 1e-30
ROUNDING = 1e-6  # relative distance below which experts are equal


def measure(routing: Routing, params: Params, evaluate: Evaluator, batches: EvalBatches) -> dict[str, Any]:
    """Returns the numbers of `weight_geometry`, `layer_gap` and `barrier`, measured on a split."""
    experts, layers, route_PX = routing.experts, routing.layers_with_experts, path_routes(routing, 0, paths=0)

    def losses(params: Any) -> list[float]:
        return [result.nll for result in evaluate.paths(params, route_PX, experts, batches)[0]]

    return {
        "images": batches.count,
        "layers": list(layers),
        **weight_geometry(params),
        "gap": layer_gap(routing.model(), experts, params, batches, layers, evaluate.normalize),
        "barrier": barrier(params, losses),
    }


def weight_geometry(params: Params) -> dict[str, list[float]]:
    """Returns three lists with one number per layer that has experts. w_e is the vector of all weights that expert e
    owns in the layer, m the mean of w_e over experts.

    spread: ||w_e - m|| / ||m||, averaged over experts.
    cosine: of w_e and w_f, averaged over pairs.
    difference_cosine: of w_e - m and w_f - m, the largest of all pairs; 0 for equal experts. Differences sum to zero,
        so their average is about -1 / (E - 1) for any experts; a pair far above that is a cluster.
    """

    @compilation.jit
    def grams(experts: Any) -> tuple[jax.Array, jax.Array]:
        differences = jax.tree.map(lambda leaf: leaf - leaf.mean(0, keepdims=True), experts)
        return _gram(experts), _gram(differences)

    with jax.default_matmul_precision("highest"):
        weights_XEE, differences_XEE = (np.array(x, float) for x in grams(params.experts.get("blocks", params.experts)))
    mean_norm_X = np.sqrt(weights_XEE.mean((1, 2)))
    # The mean of equal experts may differ from them by its rounding, the same for all of them.
    differences_XEE[_norms(differences_XEE).max(1) < ROUNDING * mean_norm_X] = 0
    return {
        "spread": (_norms(differences_XEE).mean(1) / mean_norm_X).tolist(),
        "cosine": _cosines(weights_XEE).mean(1).tolist(),
        "difference_cosine": _cosines(differences_XEE).max(1).tolist(),
    }


def _gram(experts: Any) -> jax.Array:
    """Returns [X, E, E], the inner products of the experts' vectors."""
    flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(experts)]
    return jnp.stack([jnp.einsum("exp,fxp->xef", leaf, leaf) for leaf in flat]).sum(0)


def _norms(gram_XEE: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diagonal(gram_XEE, axis1=1, axis2=2))


def _cosines(gram_XEE: np.ndarray) -> np.ndarray:
    """Returns [X, pairs] of different experts."""
    norm_XE = _norms(gram_XEE)
    cosine_XEE = gram_XEE / np.maximum(norm_XE[:, :, None] * norm_XE[:, None], TINY)
    return cosine_XEE[:, *np.triu_indices(gram_XEE.shape[1], 1)]


def layer_gap(
    model: vit.ViT,
    experts: int,
    params: Any,
    batches: EvalBatches,
    expert_layers: Sequence[int],
    normalize: Callable[[jax.Array], jax.Array] = augment.normalize,
) -> list[float]:
    """Returns, per layer with experts, how far averaging weights is from averaging outputs, in float32: the mean of
    ||mean_e f_e(x) - f_mean(x)|| over all tokens, divided by the mean of ||mean_e f_e(x)||. f_e is the layer's MLP with
    expert e, and x is its input in the merged model.
    """
    dense = model.plain().clone(dtype=jnp.dtype("float32"), attention="xla")

    @compilation.jit
    def batch_sums(params: Any, batch: Batch) -> jax.Array:
        merged = merge.average_experts(params)
        images = normalize(batch.images(dense.config))
        sums, inputs = [], mlp_inputs(dense, merged, images)
        for layer in expert_layers:
            x_BTD = inputs[layer]
            outputs = [_mlp(merge.take_path(params, jnp.array([e])), layer, x_BTD) for e in range(experts)]
            wanted_BTD = sum(outputs) / len(outputs)
            for y_BTD in (wanted_BTD - _mlp(merged, layer, x_BTD), wanted_BTD):
                sums.append(jnp.where(batch.labels_B[:, None] >= 0, jnp.linalg.norm(y_BTD, axis=-1), 0.0).sum())
        return jnp.stack(sums).reshape(-1, 2)

    with jax.default_matmul_precision("highest"):
        sums_X2 = np.sum([np.asarray(batch_sums(params, batch), float) for batch in batches], 0)
    return (sums_X2[:, 0] / np.maximum(sums_X2[:, 1], TINY)).tolist()


def mlp_inputs(dense: vit.ViT, params: Any, images_BHWc: jax.Array) -> jax.Array:
    """Returns x_LBTD, the input of each layer's MLP in a dense model: the output of the norm before it."""
    norm = "norm2"
    _, captured = dense.apply(
        {"params": params},
        images_BHWc,
        capture_intermediates=lambda module, _: module.name == norm,
        mutable=["intermediates"],
    )
    return captured["intermediates"]["blocks"][norm]["__call__"][0]


def _mlp(params: Any, layer: int, x_BTD: jax.Array) -> jax.Array:
    weights = tuple(params["blocks"]["mlp"][name][layer] for name in MLP)
    return mlp.two_layers(x_BTD, None, weights, 0.0)


def barrier(params: Params, losses: Callable[[Params], Sequence[float]]) -> dict[str, Any]:
    """Returns the loss on the straight line from each expert to the mean of experts.

    Args:
        params: of a run with experts.
        losses: such parameters -> loss of each of their expert paths.

    Returns:
        share: [S], distance from the expert relative to the whole line: 0 is the expert, 1 the merged model.
        losses: [E][S], nats.
        height: highest loss on a line minus the loss of its expert, averaged over experts; 0 is no barrier
            (Frankle et al., arXiv 1912.05671, go to another model and subtract the mean of both ends).
    """
    pull = jax.jit(merge.pull)
    losses_ES = np.asarray([losses(pull(params, share)) for share in SHARES]).T
    height = (losses_ES.max(1) - losses_ES[:, 0]).mean()
    return {"share": list(SHARES), "losses": losses_ES.tolist(), "height": float(height)}
