"""Augmentation and normalisation of uint8 images, inside the compiled step.

B batch · H, W image rows and columns · C channels
"""

import jax
import jax.numpy as jnp


def normalize(images_BHWC: jax.Array) -> jax.Array:
    """Returns float32 images in [-1, 1] from uint8 in [0, 255], the original's scaling."""
    return images_BHWC.astype(jnp.float32) / 127.5 - 1.0


def augment(key_B: jax.Array, images_BHWC: jax.Array, crop_padding: int, flip: bool) -> jax.Array:
    """Returns uint8 images of the same shape, each cropped and flipped by its own key.

    Args:
        key_B: one key per image, so an image's fate does not depend on the number of devices.
        images_BHWC: uint8.
        crop_padding: zero pixels added on each side before a crop of the old size at a uniform offset; 0 is off.
        flip: whether to mirror left and right with probability 1/2.
    """

    def one(key: jax.Array, image_HWC: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        if crop_padding:
            p = crop_padding
            row, column = jax.random.randint(crop_key, (2,), 0, 2 * p + 1)
            padded = jnp.pad(image_HWC, ((p, p), (p, p), (0, 0)))
            image_HWC = jax.lax.dynamic_slice(padded, (row, column, 0), image_HWC.shape)
        if flip:
            image_HWC = jnp.where(jax.random.bernoulli(flip_key), image_HWC[:, ::-1], image_HWC)
        return image_HWC

    return jax.vmap(one)(key_B, images_BHWC) if crop_padding or flip else images_BHWC
