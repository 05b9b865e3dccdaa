"""Augmentation and normalisation of images inside the compiled step.

An augmentation is a function (draws, images_bHWc, targets_bC) -> (images_bHWc, targets_bC). It draws the random numbers
of an image from its key in `draws.key_b`, and those of the whole batch from `draws.key`. It may change the targets, as
label mixing does, and may return float32 images in [0, 255]. To add one, write the function and append a line to
AUGMENTATIONS.

b images of one device · B global batch · H, W image rows and columns · c channels · C classes
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.config import DataConfig
from jvitmoe.data import operations
from jvitmoe.data.operations import per_image

PLAIN = ("crop", "flip")  # those that go on in the last part of training, `data.plain_at_end`
THREE = ("grey", "solarize", "blur")  # of 3-Augment
RADIUS = (0.1, operations.LARGEST_RADIUS)  # of its blur
JITTER = 0.3  # largest change of brightness, contrast and saturation after it
ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_RATIO = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10


class Draws(NamedTuple):
    """The random keys of a step, and the access to images of other devices."""

    key_b: jax.Array  # of each image: a function of seed, step and its index in the global batch
    key: jax.Array  # of the batch: a function of seed and step
    partner: Callable[[Any], Any]  # arrays with a row per image here -> the rows of the images B - 1 - index
    plain: jax.Array | bool = False  # True in the last part of training, `data.plain_at_end`


def reversed_rows(rows: Any) -> Any:
    """Returns the rows of the partners if the arrays hold the whole batch in order."""
    return jax.tree.map(lambda x_B: x_B[::-1], rows)


Augmentation = Callable[[Draws, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def crop(draws: Draws, images_bHWc: jax.Array, targets_bC: jax.Array, padding: int) -> tuple[jax.Array, jax.Array]:
    """Pads each side with `padding` zero pixels and crops to the old size at a uniform offset."""

    def crop_one(key: jax.Array, image_HWc: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        padded = jnp.pad(image_HWc, ((padding, padding), (padding, padding), (0, 0)))
        return jax.lax.dynamic_slice(padded, (row, column, 0), image_HWc.shape)

    return jax.vmap(crop_one)(draws.key_b, images_bHWc), targets_bC


def flip(draws: Draws, images_bHWc: jax.Array, targets_bC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirrors each image left to right with probability 1/2."""
    flips_b = jax.vmap(jax.random.bernoulli)(draws.key_b)
    return jnp.where(per_image(flips_b), images_bHWc[:, :, ::-1], images_bHWc), targets_bC


def three_augment(draws: Draws, images_bHWc: jax.Array, targets_bC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes each image grey, solarized or blurred, then jitters its colours. Source: DeiT III, arXiv 2204.07118."""
    kind_b, radius_b, *jitter_3b = _uniform(draws.key_b, 5)
    x_bHWc = one_of_three(jnp.floor(kind_b * len(THREE)), RADIUS[0] + radius_b * (RADIUS[1] - RADIUS[0]), images_bHWc)
    x_bHWc = colour_jitter([1 + JITTER * (2 * u_b - 1) for u_b in jitter_3b], x_bHWc)
    return x_bHWc.astype(jnp.uint8), targets_bC


def one_of_three(kind_b: jax.Array, radius_b: jax.Array, images_bHWc: jax.Array) -> jax.Array:
    """Returns float32 images: grey, solarized or blurred, as kind_b, the place in THREE, says."""
    x_bHWc, kind_b111 = images_bHWc.astype(jnp.float32), per_image(kind_b)
    rest = jnp.where(kind_b111 == THREE.index("blur"), operations.blur(x_bHWc, radius_b), operations.solarize(x_bHWc))
    return jnp.where(kind_b111 == THREE.index("grey"), operations.grey(x_bHWc), rest)


def colour_jitter(factors_3b: Sequence[jax.Array], x_bHWc: jax.Array) -> jax.Array:
    """Returns images whose brightness, contrast and saturation are multiplied by the three factors, in this order.

    torchvision draws the order. The three commute but for clipping, so it is fixed here.
    """
    brightness_b, contrast_b, saturation_b = factors_3b
    x_bHWc = operations.blend(jnp.zeros_like(x_bHWc), x_bHWc, brightness_b)
    x_bHWc = operations.blend(operations.mean_grey(x_bHWc), x_bHWc, contrast_b)
    return operations.blend(operations.grey(x_bHWc), x_bHWc, saturation_b)


def erase(
    draws: Draws, images_bHWc: jax.Array, targets_bC: jax.Array, probability: float, mean: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Fills a random rectangle of each image with `data.mean`, with this probability.

    Areas, ratios and the ten tries are those of timm's RandomErasing (arXiv 1708.04896), and so is the fill in its mode
    "const". Its mode "pixel" fills with normal noise, and drawing that would cost more than all else here.
    """
    _, height, width, channels = images_bHWc.shape
    chance_b, *uniform = _uniform(draws.key_b, 1 + 4 * ERASING_TRIES)
    area_bt, ratio_bt, top_bt, left_bt = jnp.stack(uniform, -1).reshape(len(chance_b), 4, -1).swapaxes(0, 1)
    area_bt = height * width * (ERASED_AREA[0] + area_bt * (ERASED_AREA[1] - ERASED_AREA[0]))
    ratio_bt = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** ratio_bt
    rows_bt, columns_bt = jnp.round(jnp.sqrt(area_bt * ratio_bt)), jnp.round(jnp.sqrt(area_bt / ratio_bt))
    fits_bt = (rows_bt < height) & (columns_bt < width)
    top_bt = jnp.floor(top_bt * (height - rows_bt + 1))
    left_bt = jnp.floor(left_bt * (width - columns_bt + 1))
    edges_bt4 = jnp.stack([top_bt, left_bt, top_bt + rows_bt, left_bt + columns_bt], -1)
    first_b = jnp.argmax(fits_bt, 1)[:, None, None]
    edges_4b = jnp.take_along_axis(edges_bt4, first_b, axis=1)[:, 0].T
    erased_b = (chance_b < probability) & fits_bt.any(1)
    fill_c = jnp.round(255 * jnp.broadcast_to(jnp.asarray(mean), (channels,))).astype(images_bHWc.dtype)
    box_bHW1 = _box(height, width, *edges_4b) & per_image(erased_b)
    return jnp.where(box_bHW1, fill_c[None, None, None], images_bHWc), targets_bC


def mix(
    draws: Draws, images_bHWc: jax.Array, targets_bC: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes image i and its target with image B - 1 - i: all of it (mixup, arXiv 1710.09412) or a box (cutmix, arXiv
    1905.04899). Which of them, the share, drawn from Beta(alpha, alpha), and the box are those of the whole batch.

    As timm's Mixup in its mode "batch" with a probability of 1 and a switch_prob of 0.5. A partner is named by its
    index in the global batch and fetched from the device that holds it, after its own augmentation, so the result does
    not depend on the number of devices. This holds for a stream too, where a device has only its own rows. That moves
    as many bytes as a device's images have. The accuracy that training logs is still that on the image's own label.
    """
    _, height, width, _ = images_bHWc.shape
    switch_key, share_key, box_key = jax.random.split(draws.key, 3)
    cuts = jax.random.bernoulli(switch_key) if mixup and cutmix else jnp.asarray(cutmix > 0)
    alpha = jnp.where(cuts, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    centre_2 = jnp.floor(jax.random.uniform(box_key, (2,)) * jnp.asarray((height, width)))
    size_2 = jnp.floor(jnp.sqrt(1 - share) * jnp.asarray((height, width)))
    start_2 = centre_2 - size_2 // 2
    box_1HW1 = _box(height, width, *start_2[:, None], *(start_2 + size_2)[:, None])
    own_1HW1 = jnp.where(cuts, 1.0 - box_1HW1, share)
    own_share = jnp.where(cuts, own_1HW1.mean(), share)  # a box at the edge is cut off
    other_images, other_targets = draws.partner((images_bHWc, targets_bC))
    mixed_bHWc = own_1HW1 * images_bHWc + (1 - own_1HW1) * other_images
    return mixed_bHWc, own_share * targets_bC + (1 - own_share) * other_targets


def _uniform(key_b: jax.Array, count: int) -> jax.Array:
    """Returns [count, b] numbers, uniform in [0, 1)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)), out_axes=1)(key_b)


def _box(
    height: int, width: int, top_b: jax.Array, left_b: jax.Array, bottom_b: jax.Array, right_b: jax.Array
) -> jax.Array:
    """Returns bool [b, H, W, 1], True in the box from the top and left edge to before the bottom and right one."""
    row_1H, column_1W = jnp.arange(height)[None], jnp.arange(width)[None]
    rows_bH = (row_1H >= top_b[:, None]) & (row_1H < bottom_b[:, None])
    columns_bW = (column_1W >= left_b[:, None]) & (column_1W < right_b[:, None])
    return (rows_bH[:, :, None] & columns_bW[:, None])[..., None]


# Name -> function that makes the augmentation from the settings, or returns None if it is off. They run in this order.
# The key of each is derived from its position: append new ones, or the images of existing configs change.
AUGMENTATIONS: dict[str, Callable[[DataConfig], Augmentation | None]] = {
    "crop": lambda data: functools.partial(crop, padding=data.crop_padding) if data.crop_padding else None,
    "flip": lambda data: flip if data.flip else None,
    "three_augment": lambda data: three_augment if data.augment == "three" else None,
    "erase": lambda data: functools.partial(erase, probability=data.erase, mean=data.mean) if data.erase else None,
    "mix_images": lambda data: (
        functools.partial(mix, mixup=data.mixup, cutmix=data.cutmix) if data.mixup or data.cutmix else None
    ),
}
OURS = dict(AUGMENTATIONS)  # which an experiment file may not replace


def augment(
    data: DataConfig, draws: Draws, images_bHWc: jax.Array, targets_bC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (images, targets) after every augmentation that the settings turn on.

    Args:
        draws: with one key per image, so the result does not depend on the number of devices.
        images_bHWc: uint8.
        targets_bC: class probabilities.
    """
    made = [(position, name, make(data)) for position, (name, make) in enumerate(AUGMENTATIONS.items())]

    def run(plain: bool, x_bHWc: jax.Array, y_bC: jax.Array) -> tuple[jax.Array, jax.Array]:
        for position, name, apply in made:
            if apply and (name in PLAIN) == plain:
                key_b = jax.vmap(jax.random.fold_in, (0, None))(draws.key_b, position)
                keys = draws._replace(key_b=key_b, key=jax.random.fold_in(draws.key, position))
                if not plain:  # fused with the next one, what this one computes would be computed several times
                    x_bHWc = jax.lax.optimization_barrier(x_bHWc)
                x_bHWc, y_bC = apply(keys, x_bHWc, y_bC)
        return x_bHWc, y_bC

    images_bHWc, targets_bC = run(True, images_bHWc, targets_bC)

    if not data.plain_at_end:
        return run(False, images_bHWc, targets_bC)
    in_float = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    plain = in_float((images_bHWc, targets_bC))
    return jax.lax.cond(draws.plain, lambda: plain, lambda: in_float(run(False, images_bHWc, targets_bC)))


def normalize(images_bHWc: jax.Array, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)) -> jax.Array:
    """Returns float32 (pixels / 255 - mean) / std from pixels in [0, 255]; in [-1, 1], the original's scaling, by
    default. `mean` and `std` have one number, or one per channel."""
    scale_c, offset_c = 255 * np.asarray(std), np.asarray(mean) / np.asarray(std)
    return images_bHWc.astype(jnp.float32) / _over_pixels(scale_c) - _over_pixels(offset_c)


def _over_pixels(x_c: np.ndarray) -> np.ndarray:
    return x_c.astype(np.float32).reshape(() if len(x_c) == 1 else (1, 1, 1, -1))
