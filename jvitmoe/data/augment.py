"""Augmentation and normalisation of images inside the compiled step.

An augmentation is a function (key_B, images_BHWC, targets_BC) -> (images_BHWC, targets_BC) of a device's images, which
draws for each image from its own key. It may change the targets, as label mixing does, and may return float32 images in
[0, 255]. To add one, write the function and append a line to AUGMENTATIONS.

B images of one device · H, W image rows and columns · C image channels, or classes in targets
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jvitmoe.config import DataConfig

Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def crop(key_B: jax.Array, images_BHWC: jax.Array, targets_BC: jax.Array, padding: int) -> tuple[jax.Array, jax.Array]:
    """Pads each side with `padding` zero pixels and crops to the old size at a uniform offset."""

    def one(key: jax.Array, image_HWC: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        padded = jnp.pad(image_HWC, ((padding, padding), (padding, padding), (0, 0)))
        return jax.lax.dynamic_slice(padded, (row, column, 0), image_HWC.shape)

    return jax.vmap(one)(key_B, images_BHWC), targets_BC


def flip(key_B: jax.Array, images_BHWC: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirrors each image left to right with probability 1/2."""
    flips_B = jax.vmap(jax.random.bernoulli)(key_B)
    return jnp.where(flips_B[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC), targets_BC


# Name -> what the settings make of it; None if it is off. They run in this order, and the key of each is derived from
# its place: append new ones, or the images of existing configs change.
AUGMENTATIONS: dict[str, Callable[[DataConfig], Augmentation | None]] = {
    "crop": lambda data: functools.partial(crop, padding=data.crop_padding) if data.crop_padding else None,
    "flip": lambda data: flip if data.flip else None,
}


def augment(
    data: DataConfig, key_B: jax.Array, images_BHWC: jax.Array, targets_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (images, targets) after every augmentation that the settings turn on.

    Args:
        key_B: one key per image, so the result does not depend on the number of devices.
        images_BHWC: uint8.
        targets_BC: class probabilities.
    """
    for place, make in enumerate(AUGMENTATIONS.values()):
        if apply := make(data):
            keys = jax.vmap(jax.random.fold_in, (0, None))(key_B, place)
            images_BHWC, targets_BC = apply(keys, images_BHWC, targets_BC)
    return images_BHWC, targets_BC


def normalize(images_BHWC: jax.Array) -> jax.Array:
    """Returns float32 images in [-1, 1] from uint8 in [0, 255], the original's scaling."""
    return images_BHWC.astype(jnp.float32) / 127.5 - 1.0
