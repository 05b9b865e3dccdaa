import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe.config import DataConfig
from jvitmoe.data.augment import augment, normalize

B, SIDE = 400, 6


@pytest.fixture(scope="module")
def images():
    """Returns images without zeros, no two rows or columns alike: a crop shows where it was cut."""
    return np.random.default_rng(0).integers(1, 256, (B, SIDE, SIDE, 3)).astype(np.uint8)


def keys(seed=0):
    """Returns one key per image; made anew for each use, because a key must not be used twice."""
    return jax.random.split(jax.random.key(seed), B)


def run(key_B, images_BHWc, padding, flip):
    data, targets_BC = DataConfig(crop_padding=padding, flip=flip), jax.nn.one_hot(jnp.arange(len(images_BHWc)) % 3, 3)
    images, targets = jax.jit(functools.partial(augment, data))(key_B, images_BHWc, targets_BC)
    np.testing.assert_array_equal(targets, targets_BC)
    return np.asarray(images)


def slow_crop(image_HWc, padding, row, column):
    """Returns the SIDE x SIDE window at (row, column) of the image with `padding` zeros around it."""
    out = np.zeros_like(image_HWc)
    for i in range(SIDE):
        for j in range(SIDE):
            y, x = row + i - padding, column + j - padding
            if 0 <= y < SIDE and 0 <= x < SIDE:
                out[i, j] = image_HWc[y, x]
    return out


@pytest.mark.parametrize("padding", [1, 2])
def test_every_image_is_a_padded_crop_at_a_uniform_offset(images, padding):
    offsets = [(row, column) for row in range(2 * padding + 1) for column in range(2 * padding + 1)]
    drawn = collections.Counter()
    for before, after in zip(images, run(keys(), images, padding, False), strict=True):
        found = [offset for offset in offsets if np.array_equal(after, slow_crop(before, padding, *offset))]
        assert len(found) == 1
        drawn.update(found)
    mean = B / len(offsets)
    chi_square = sum((drawn[offset] - mean) ** 2 / mean for offset in offsets)
    assert chi_square < {1: 26.2, 2: 51.2}[padding]  # 8 and 24 degrees of freedom: exceeded once in 1,000
    assert set(drawn) == set(offsets)


def test_a_flip_is_a_mirror_and_happens_half_the_time(images):
    flipped = 0
    for before, after in zip(images, run(keys(), images, 0, True), strict=True):
        mirrored = np.array_equal(after, before[:, ::-1])
        assert mirrored != np.array_equal(after, before)
        flipped += mirrored
    assert abs(flipped - B / 2) < 4 * (B / 4) ** 0.5


def test_crop_and_flip_are_drawn_independently(images):
    cropped = run(keys(), images, 1, False)
    both = run(keys(), images, 1, True)
    same = (both == cropped).all((1, 2, 3))
    mirrored = (both == cropped[:, :, ::-1]).all((1, 2, 3))
    assert (same | mirrored).all()
    left = np.array([np.array_equal(c[:, 0], np.zeros((SIDE, 3))) for c in cropped])  # cut at the left edge
    assert 0.3 < mirrored[left].mean() < 0.7
    assert 0.4 < mirrored[~left].mean() < 0.6


def test_off_is_the_identity(images):
    after = run(keys(), images, 0, False)
    assert after.dtype == jnp.uint8
    np.testing.assert_array_equal(after, images)


def test_an_image_depends_on_its_own_key_only(images):
    whole = run(keys(), images, 2, True)
    assert whole.dtype == np.uint8
    some = np.array([7, 3, 250, 4])
    np.testing.assert_array_equal(run(keys()[some], images[some], 2, True), whole[some])
    other = run(keys(1), images, 2, True)
    assert (other != whole).any((1, 2, 3)).mean() > 0.9


def test_crop_and_flip_draw_the_numbers_of_version_0_1_0(images):
    def slow(key, image_HWc):
        crop_key, flip_key = jax.random.split(key)
        row, column = jax.random.randint(crop_key, (2,), 0, 5)
        image_HWc = slow_crop(image_HWc, 2, int(row), int(column))
        return image_HWc[:, ::-1] if jax.random.bernoulli(flip_key) else image_HWc

    wanted = [slow(key, image) for key, image in zip(keys()[:20], images[:20], strict=True)]
    np.testing.assert_array_equal(run(keys()[:20], images[:20], 2, True), wanted)


def test_normalize_spans_minus_1_to_1():
    x = normalize(jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x.ravel(), np.linspace(-1, 1, 256), atol=1e-6)
    assert (x.min(), x.max()) == (-1, 1)
