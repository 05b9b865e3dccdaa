"""What a learned router does: which expert takes which patch, how evenly, and whether classes have their own experts.

B batch · T tokens · P patches · E experts · X layers that have experts · C classes
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.experts.params import Params, join_all
from jvitmoe.machine import compilation
from jvitmoe.models import vit

BATCH = 100


class Routes(NamedTuple):
    """What `measure` found."""

    expert_XBP: np.ndarray  # the expert with the largest weight in a patch; -1 for a patch that no expert took
    load_XE: np.ndarray  # share of all weights of tokens that each expert has
    gate_X: np.ndarray  # sum of a token's weights, the mean over tokens: what scales the experts' outputs
    of_class_XCE: np.ndarray  # share of the weights in the patches of a class that each expert has; 0 without images


def measure(
    model: vit.ViT,
    params: Params,
    images_BHWc: np.ndarray,
    labels_B: np.ndarray,
    normalize: Callable[[jax.Array], jax.Array],
) -> Routes:
    """Returns the routes of uint8 images, in evaluation."""
    run = compilation.jit(lambda params, images: vit.token_weights(model, join_all(params), normalize(images)))
    parts = range(0, len(images_BHWc), BATCH)
    found = [jax.device_get(run(params, jnp.asarray(images_BHWc[at : at + BATCH]))) for at in parts]
    weight_XBTE = np.concatenate(found, 1)
    patch_XBPE = weight_XBTE[:, :, -model.config.patches :]
    total_XE = weight_XBTE.sum((1, 2))
    sums = [patch_XBPE[:, labels_B == c].sum((1, 2)) for c in range(model.config.classes)]
    of_class_XCE = np.stack(sums, 1)
    return Routes(
        np.where(patch_XBPE.max(-1) > 0, patch_XBPE.argmax(-1), -1),
        total_XE / total_XE.sum(-1, keepdims=True),
        weight_XBTE.sum(-1).mean((1, 2)),
        of_class_XCE / np.maximum(of_class_XCE.sum(-1, keepdims=True), 1e-30),
    )
