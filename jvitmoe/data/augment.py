"""Augmentation and normalisation of images inside the compiled step.

An augmentation is a function (key_b, images_bHWc, targets_bC) -> (images_bHWc, targets_bC). It draws the random numbers
of an image from the key of that image. It may change the targets, as label mixing does, and may return float32 images
in [0, 255]. To add one, write the function and append a line to AUGMENTATIONS.

b images of one device · H, W image rows and columns · c channels · C classes
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jvitmoe.config import DataConfig

Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def crop(key_b: jax.Array, images_bHWc: jax.Array, targets_bC: jax.Array, padding: int) -> tuple[jax.Array, jax.Array]:
    """Pads each side with `padding` zero pixels and crops to the old size at a uniform offset."""

    def crop_one(key: jax.Array, image_HWc: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        padded = jnp.pad(image_HWc, ((padding, padding), (padding, padding), (0, 0)))
        return jax.lax.dynamic_slice(padded, (row, column, 0), image_HWc.shape)

    return jax.vmap(crop_one)(key_b, images_bHWc), targets_bC


def flip(key_b: jax.Array, images_bHWc: jax.Array, targets_bC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirrors each image left to right with probability 1/2."""
    flips_b = jax.vmap(jax.random.bernoulli)(key_b)
    return jnp.where(flips_b[:, None, None, None], images_bHWc[:, :, ::-1], images_bHWc), targets_bC


# Name -> function that makes the augmentation from the settings, or returns None if it is off. They run in this order.
# The key of each is derived from its position: append new ones, or the images of existing configs change.
AUGMENTATIONS: dict[str, Callable[[DataConfig], Augmentation | None]] = {
    "crop": lambda data: functools.partial(crop, padding=data.crop_padding) if data.crop_padding else None,
    "flip": lambda data: flip if data.flip else None,
}


def augment(
    data: DataConfig, key_b: jax.Array, images_bHWc: jax.Array, targets_bC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (images, targets) after every augmentation that the settings turn on.

    Args:
        key_b: one key per image, so the result does not depend on the number of devices.
        images_bHWc: uint8.
        targets_bC: class probabilities.
    """
    for position, make in enumerate(AUGMENTATIONS.values()):
        if apply := make(data):
            keys = jax.vmap(jax.random.fold_in, (0, None))(key_b, position)
            images_bHWc, targets_bC = apply(keys, images_bHWc, targets_bC)
    return images_bHWc, targets_bC


def normalize(images_bHWc: jax.Array) -> jax.Array:
    """Returns float32 images in [-1, 1] from uint8 in [0, 255], the original's scaling."""
    return images_bHWc.astype(jnp.float32) / 127.5 - 1.0
