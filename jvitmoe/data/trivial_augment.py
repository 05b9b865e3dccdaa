"""TrivialAugment: one operation of random strength per image. Source: arXiv 2103.10158, the wide space, with the ranges
of torchvision.

b images · H, W rows and columns · c colour channels
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jvitmoe.data import operations
from jvitmoe.data.operations import per_image

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation"),
    *("contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
LEVELS = 31  # strengths, from none to the largest


def apply(kind_b: jax.Array, strength_b: jax.Array, images_bHWc: jax.Array) -> jax.Array:
    """Returns uint8 images, each after the operation kind_b, its place in OPERATIONS, of a strength in [-1, 1].

    All images pass one affine map and one chain of colour operations, with parameters that change nothing unless the
    operation is theirs: a switch under vmap would run all operations on all images.
    """
    x_bHWc, size_b = images_bHWc.astype(jnp.float32), jnp.abs(strength_b)

    def if_is(name: str, value: Any, otherwise: Any) -> jax.Array:
        return jnp.where(kind_b == OPERATIONS.index(name), value, otherwise)

    x_bHWc = operations.affine(x_bHWc, _geometry(if_is, strength_b, x_bHWc.shape[1]))
    factor_b = 1 + 0.99 * strength_b
    blends_b = if_is("brightness", factor_b, if_is("saturation", factor_b, if_is("contrast", factor_b, 1.0)))
    from_ = jnp.where(per_image(if_is("saturation", True, False)), operations.grey(x_bHWc), 0.0)
    from_ = jnp.where(per_image(if_is("contrast", True, False)), operations.mean_grey(x_bHWc), from_)
    x_bHWc = operations.blend(from_, x_bHWc, blends_b)
    x_bHWc = operations.posterize(x_bHWc, if_is("posterize", 8 - jnp.round(6 * size_b), 8.0))
    x_bHWc = operations.solarize(x_bHWc, if_is("solarize", 255 * (1 - size_b), 256.0))
    stretched = operations.autocontrast(x_bHWc)
    x_bHWc = jnp.where(per_image(if_is("autocontrast", True, False)), stretched, x_bHWc)

    def sharpen(x_HWc: jax.Array, index: jax.Array) -> jax.Array:
        return operations.blend(operations.smooth(x_HWc)[None], x_HWc[None], factor_b[index][None])[0]

    x_bHWc = operations.only(if_is("sharpness", True, False), sharpen, x_bHWc)
    x_bHWc = operations.only(if_is("equalize", True, False), lambda x_HWc, _: operations.equalize(x_HWc), x_bHWc)
    return x_bHWc.astype(jnp.uint8)


def _geometry(if_is: Callable[[str, Any, Any], jax.Array], strength_b: jax.Array, side: int) -> jax.Array:
    """Returns the matrices of `operations.affine`: shears about the origin, up to 0.99; shifts, up to 32 pixels;
    rotations about the centre, up to 135 degrees counterclockwise."""
    angle_b = if_is("rotate", strength_b * math.radians(135), 0.0)
    cos_b, sin_b, centre = jnp.cos(angle_b), jnp.sin(angle_b), side / 2
    shift_b = jnp.trunc(32 * strength_b)
    row_x = cos_b, if_is("shear_x", 0.99 * strength_b, -sin_b), centre * (1 - cos_b + sin_b)
    row_y = if_is("shear_y", 0.99 * strength_b, sin_b), cos_b, centre * (1 - cos_b - sin_b)
    matrix_b23 = jnp.stack([jnp.stack(row_x, -1), jnp.stack(row_y, -1)], 1)
    shifts_b2 = jnp.stack([if_is("translate_x", shift_b, 0.0), if_is("translate_y", shift_b, 0.0)], -1)
    return matrix_b23.at[:, :, 2].add(-shifts_b2)
