"""Operations on a batch of 8-bit images, each with parameters per image, equal to Pillow's.

Pixels are float32 whole numbers in [0, 255], so that XLA fuses operations; results are rounded as Pillow rounds them.
Own functions and not dm-pix's: dm-pix computes on pixels in [0, 1] without Pillow's rounding, and lacks posterize,
autocontrast, equalize and sharpness.

b images · H, W rows and columns · c colour channels
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

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


def solarize(x_bHWc: jax.Array, threshold_b: jax.Array) -> jax.Array:
    """Returns images with pixels from the threshold on inverted; 256 inverts none."""
    return jnp.where(x_bHWc >= per_image(threshold_b), 255 - x_bHWc, x_bHWc)


def posterize(x_bHWc: jax.Array, bits_b: jax.Array) -> jax.Array:
    """Returns images with the upper `bits` bits of each pixel; 8 keeps all."""
    step = per_image(jnp.exp2(8.0 - bits_b))
    return jnp.floor(x_bHWc / step) * step


def autocontrast(x_bHWc: jax.Array) -> jax.Array:
    """Returns images with each channel stretched to [0, 255]; a constant channel stays."""
    low, high = x_bHWc.min((1, 2), keepdims=True), x_bHWc.max((1, 2), keepdims=True)
    return jnp.where(high > low, jnp.floor((x_bHWc - low) * 255 / jnp.maximum(high - low, 1)), x_bHWc)


def equalize(x_HWc: jax.Array) -> jax.Array:
    """Returns one image, the histogram of each channel made as flat as `ImageOps.equalize` makes it."""

    def channel(x_HW: jax.Array) -> jax.Array:
        index_HW = x_HW.astype(jnp.int32)
        histogram = jnp.zeros(256, jnp.int32).at[index_HW.reshape(-1)].add(1)
        step = (x_HW.size - histogram[index_HW.max()]) // 255
        below = jnp.cumsum(histogram) - histogram
        table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[index_HW].astype(jnp.float32), x_HW)

    return jax.vmap(channel, -1, -1)(x_HWc)


def smooth(x_HWc: jax.Array) -> jax.Array:
    """Returns one image after Pillow's `ImageFilter.SMOOTH`, a mean of 3 x 3 pixels; the border stays."""
    height, width, _ = x_HWc.shape
    inner = x_HWc[1:-1, 1:-1]
    windows = sum(x_HWc[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    return x_HWc.at[1:-1, 1:-1].set(jnp.floor((windows + 4 * inner) / 13 + 0.5))


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


def affine(x_bHWc: jax.Array, matrices: np.ndarray, *chosen_b: jax.Array) -> jax.Array:
    """Returns images whose pixel at (x, y) is the nearest one to matrix @ (x, y, 1) of the old image, 0 outside of it;
    `chosen_b` is the index of an image's matrix in matrices [..., 2, 3].

    Coordinates are those of pixel centres. To the bit `Image.transform` with AFFINE and NEAREST, which counts in
    1/65536 of a pixel. Sides may have up to 8,000 pixels.
    """
    b, height, width, channels = x_bHWc.shape
    first = matrices[..., 2] + matrices[..., :2].sum(-1) / 2  # at the centre of the first pixel
    fixed = np.floor(np.concatenate([matrices[..., :2], first[..., None]], -1) * 65536 + 0.5).astype(np.int32)
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    grid_3N = jnp.stack([x.reshape(-1), y.reshape(-1), jnp.ones(height * width, jnp.int32)])
    from_bN = (jnp.asarray(fixed)[chosen_b][..., None] * grid_3N[None, None]).sum(2) >> 16
    column_bN, row_bN = from_bN[:, 0], from_bN[:, 1]
    inside_bN = (column_bN >= 0) & (column_bN < width) & (row_bN >= 0) & (row_bN < height)
    index_bN = jnp.clip(row_bN, 0, height - 1) * width + jnp.clip(column_bN, 0, width - 1)
    moved = jax.vmap(lambda pixels_Nc, index_N: pixels_Nc[index_N])(x_bHWc.reshape(b, -1, channels), index_bN)
    return jnp.where(inside_bN[..., None], moved, 0).reshape(x_bHWc.shape)


def only(chosen_b: jax.Array, change: Callable[[jax.Array, jax.Array], jax.Array], x_bHWc: jax.Array) -> jax.Array:
    """Returns images of which the chosen ones are replaced by change(image_HWc, index), one after the other: a costly
    operation that few images draw costs the others nothing."""
    first_b = jnp.argsort(~chosen_b)

    def replace(n: jax.Array, x_bHWc: jax.Array) -> jax.Array:
        return x_bHWc.at[first_b[n]].set(change(x_bHWc[first_b[n]], first_b[n]))

    return jax.lax.fori_loop(0, chosen_b.sum(), replace, x_bHWc)
