"""The images that a dense model gets most wrong, and where it looked.

B images of a batch · K images kept · P patches · C classes
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jvitmoe.data.batches import EvalBatches
from jvitmoe.experts.params import Tree
from jvitmoe.machine import compilation
from jvitmoe.models import vit


class Mistakes(NamedTuple):
    """What `measure` found, the image of the highest loss first."""

    images_KHWc: np.ndarray  # uint8
    labels_K: np.ndarray
    share_KC: np.ndarray  # probabilities
    rollout_KP: np.ndarray  # `vit.rollout`


def measure(
    model: vit.ViT, params: Tree, batches: EvalBatches, normalize: Callable[[jax.Array], jax.Array], count: int
) -> Mistakes:
    """Returns the `count` images of a split with the highest loss."""
    run = compilation.jit(lambda params, images: vit.logits(model, params, normalize(images)))
    look = compilation.jit(lambda params, images: vit.rollout(model, params, normalize(images)))
    kept: list[tuple[float, int, np.ndarray, np.ndarray]] = []
    for batch in batches:
        images = batch.images(model.config)
        log_BC, images_BHWc, labels_B = jax.device_get(
            (jax.nn.log_softmax(run(params, images)), images, batch.labels_B)
        )
        loss_B = np.where(labels_B < 0, -np.inf, -log_BC[np.arange(len(labels_B)), labels_B])  # rows without an image
        for b in np.argsort(-loss_B, kind="stable")[: min(count, (labels_B >= 0).sum())]:
            # Copied: a view would keep the batch in memory.
            kept.append((float(loss_B[b]), int(labels_B[b]), images_BHWc[b].copy(), np.exp(log_BC[b])))
        kept = sorted(kept, key=lambda one: -one[0])[:count]
    _, labels, images, shares = zip(*kept, strict=True)
    images_KHWc = np.stack(images)
    return Mistakes(images_KHWc, np.array(labels), np.stack(shares), np.asarray(look(params, images_KHWc)))
