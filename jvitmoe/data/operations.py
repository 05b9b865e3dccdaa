"""Operations on a batch of 8-bit images, each with parameters per image, equal to Pillow's.

Pixels are float32 whole numbers in [0, 255], so that XLA fuses operations; results are rounded as Pillow rounds them.
Own functions and not dm-pix's, which computes on pixels in [0, 1] without Pillow's rounding.

b images · H, W rows and columns · c colour channels
"""

import jax
import jax.numpy as jnp

LUMA = (19595, 38470, 7471)  # of red, green and blue, in 1/65536: Pillow's conversion to grey (ITU-R 601)
LARGEST_RADIUS = 2.0  # of `blur`
BLUR_MARGIN = 2  # pixels beyond the edge that one pass of `blur` sees at the largest radius


def per_image(x_b: jax.Array) -> jax.Array:
    """Returns [b, 1, 1, 1], to be broadcast over pixels."""
    return x_b[:, None, None, None]


def grey(x_bHWc: jax.Array) -> jax.Array:
    """Returns brightness [b, H, W, 1]: weighted by LUMA for three channels, else the mean of the channels."""
    if x_bHWc.shape[-1] != 3:
        return jnp.floor(x_bHWc.mean(-1, keepdims=True) + 0.5)
    red, green, blue = (x_bHWc[..., c : c + 1].astype(jnp.int32) * weight for c, weight in enumerate(LUMA))
    return ((red + green + blue + 0x8000) >> 16).astype(jnp.float32)


def blend(from_: jax.Array, to: jax.Array, factor_b: jax.Array) -> jax.Array:
    """Returns from_ + factor (to - from_), clipped and truncated; factors may lie outside [0, 1]."""
    return jnp.floor(jnp.clip(from_ + per_image(factor_b) * (to - from_), 0, 255))


def mean_grey(x_bHWc: jax.Array) -> jax.Array:
    """Returns the mean brightness [b, 1, 1, 1], rounded: what `ImageEnhance.Contrast` blends with."""
    return jnp.floor(grey(x_bHWc).mean((1, 2, 3), keepdims=True) + 0.5)


def solarize(x_bHWc: jax.Array) -> jax.Array:
    """Returns images with pixels from 128 on inverted."""
    return jnp.where(x_bHWc >= 128, 255 - x_bHWc, x_bHWc)


def blur(x_bHWc: jax.Array, radius_b: jax.Array) -> jax.Array:
    """Returns square images after `ImageFilter.GaussianBlur`, for radii up to LARGEST_RADIUS.

    Pillow approximates the Gaussian by three box filters of fractional width, which continue the edge pixels (Gwosdek
    et al., SSVM 2011). Each image gets the product of the three as a matrix, for its columns and for its rows.
    """
    side = x_bHWc.shape[1]
    variance_b = radius_b**2 / 3  # of each of the three filters
    whole_b = jnp.floor((jnp.sqrt(12 * variance_b + 1) - 1) / 2)
    rest_b = (2 * whole_b + 1) * (whole_b * (whole_b + 1) - 3 * variance_b) / (6 * (variance_b - (whole_b + 1) ** 2))
    width_b = per_image(whole_b + rest_b)[..., 0]  # pixels on each side of the centre
    place = jnp.arange(-BLUR_MARGIN, side + BLUR_MARGIN)
    distance = jnp.abs(jnp.arange(side)[:, None] - place[None])
    weights = jnp.clip(width_b + 1 - distance[None], 0, 1) / (2 * width_b + 1)
    edge = (jnp.clip(place, 0, side - 1)[:, None] == jnp.arange(side)[None]).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):  # TF32 would be wrong by a level
        once_bHH = weights @ edge
        blur_bHH = once_bHH @ once_bHH @ once_bHH
        rows = blur_bHH @ x_bHWc.reshape(len(x_bHWc), side, -1)
        columns = jnp.einsum("bij,bhjc->bhic", blur_bHH, rows.reshape(x_bHWc.shape))
    return jnp.floor(columns + 0.5)
