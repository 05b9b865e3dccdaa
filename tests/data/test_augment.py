import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from jvitmoe.config import DataConfig
from jvitmoe.data import augment as augment_lib
from jvitmoe.data.augment import AUGMENTATIONS, Draws, augment, normalize, reversed_rows

B, SIDE = 400, 6
TARGETS = np.asarray(jax.nn.one_hot(np.arange(B) % 4, 4))


@pytest.fixture(scope="module")
def images():
    """Returns images without zeros, no two rows or columns alike: a crop shows where it was cut."""
    return np.random.default_rng(0).integers(1, 256, (B, SIDE, SIDE, 3)).astype(np.uint8)


def keys(seed=0):
    """Returns one key per image; made anew for each use, because a key must not be used twice."""
    return jax.random.split(jax.random.key(seed), B)


def augmenter(data):
    """Returns (keys, images, targets, plain=False, seed=5) -> (images, targets) of a whole batch, compiled once."""

    @jax.jit
    def augmented(key_B, images_BHWc, targets_BC, plain, seed):
        return augment(data, Draws(key_B, jax.random.key(seed), reversed_rows, plain), images_BHWc, targets_BC)

    def run(key_B, images_BHWc, targets_BC, plain=False, seed=5):
        return tuple(map(np.asarray, augmented(key_B, images_BHWc, targets_BC, plain, seed)))

    return run


def apply(data, *inputs, **options):
    return augmenter(data)(*inputs, **options)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (1, False), (2, True)])
def test_a_crop_has_an_offset_and_a_flip_a_coin_of_the_key_of_its_image(images, padding, flip):
    """As drawn and cut here one image at a time: uniform, half the time, and independent of each other."""
    crop_keys, flip_keys = jax.vmap(lambda key: tuple(jax.random.fold_in(key, at) for at in (0, 1)))(keys())
    offsets_B2 = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))(crop_keys)
    coins_B = jax.vmap(jax.random.bernoulli)(flip_keys) & flip
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    wanted = []
    for image, (row, column), coin in zip(padded, np.asarray(offsets_B2), np.asarray(coins_B), strict=True):
        cut = image[row : row + SIDE, column : column + SIDE]
        wanted.append(cut[:, ::-1] if coin else cut)
    found, targets = apply(DataConfig(crop_padding=padding, flip=flip), keys(), images, TARGETS)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(targets, TARGETS)
    assert len(np.unique(offsets_B2, axis=0)) == (2 * padding + 1) ** 2
    assert abs(coins_B.mean() - flip / 2) < 0.1


def test_normalize_spans_minus_1_to_1_with_the_same_bits_or_takes_a_mean_and_deviation():
    x = jax.jit(normalize)(jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1))
    np.testing.assert_array_equal(x.ravel(), jax.jit(lambda x: x / 127.5 - 1.0)(jnp.arange(256, dtype=jnp.float32)))
    assert (x.dtype, x.min(), x.max()) == (jnp.float32, -1, 1)
    x = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3)).astype(np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    np.testing.assert_allclose(normalize(x, mean, std), (x / 255 - np.array(mean)) / np.array(std), atol=1e-5)
    np.testing.assert_allclose(normalize(x, (0.4,), std), (x / 255 - 0.4) / np.array(std), atol=1e-5)


def smooth_images(count, channels=3, side=32):
    """Returns uint8 images of smooth random colours, which have few flat parts and reach 0 and 255."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        found.append(np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))[..., :channels])
    return np.stack(found)


def levels_apart(found, wanted):
    return np.abs(np.asarray(found).astype(int) - np.stack([np.asarray(image) for image in wanted]).astype(int))


@pytest.mark.parametrize("name", augment_lib.THREE)
def test_each_of_the_three_augmentations_is_pillows(name):
    """To the bit; the blur within three levels and unbiased, because Pillow rounds after each of its six passes."""
    images, radius_B = smooth_images(30), np.linspace(*augment_lib.RADIUS, 30).astype(np.float32)
    kind_B = np.full(30, augment_lib.THREE.index(name), np.float32)
    by_pillow = {
        "grey": lambda image, _: image.convert("L").convert("RGB"),
        "solarize": lambda image, _: ImageOps.solarize(image),
        "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
    }[name]
    wanted = [by_pillow(Image.fromarray(image), r) for image, r in zip(images, radius_B.tolist(), strict=True)]
    found = jax.jit(augment_lib.one_of_three)(kind_B, radius_B, images)
    apart = levels_apart(found, wanted)
    assert apart.max() <= (3 if name == "blur" else 0)
    assert apart.mean() < 0.5
    assert abs(np.mean(found) - np.mean(wanted)) < 0.05


def test_colour_jitter_is_pillows_in_one_order():
    images = smooth_images(30)
    factors_3B = np.random.default_rng(0).uniform(0.7, 1.3, (3, 30)).astype(np.float32)
    wanted = []
    for image, factors in zip(map(Image.fromarray, images), factors_3B.T.tolist(), strict=True):
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
        ):
            image = enhance(image).enhance(factor)
        wanted.append(image)
    found = jax.jit(augment_lib.colour_jitter)(factors_3B, images.astype(np.float32))
    assert levels_apart(found, wanted).max() <= 2  # one level of an earlier step is more than one after the next


ON = {  # settings of each augmentation
    "crop": {"crop_padding": 2},
    "flip": {"flip": True},
    "three_augment": {"augment": "three"},
    "erase": {"erase": 0.5},
    "mix_images": {"mixup": 0.8, "cutmix": 1.0},
}


def test_every_augmentation_is_off_by_default():
    assert list(ON) == list(AUGMENTATIONS)  # their order is part of a run's identity
    assert not any(make(DataConfig()) for make in AUGMENTATIONS.values())
    for name, settings in ON.items():
        assert [other for other, make in AUGMENTATIONS.items() if make(DataConfig(**settings))] == [name]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in ON if name != "mix_images"])
def test_an_image_after_each_augmentation_depends_on_its_own_key_only(name, channels):
    images, run = smooth_images(B, channels, 8), augmenter(DataConfig(**ON[name]))
    whole, targets = run(keys(), images, TARGETS)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(targets, TARGETS)
    some = np.array([7, 3, 250, 4])
    np.testing.assert_array_equal(run(keys()[some], images[some], TARGETS[some])[0], whole[some])
    assert (whole != images).any((1, 2, 3)).mean() > 0.4
    other = run(keys(1), images, TARGETS)[0]
    assert (other != whole).any((1, 2, 3)).mean() > 0.4


def test_three_augment_draws_the_three_equally_often_and_all_strengths():
    """A flat image of two colours tells grey from solarized from blurred, even after jitter."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = (200, 100, 50)
    found = apply(DataConfig(augment="three"), keys(), np.stack([image] * B), TARGETS)[0].astype(int)
    grey = (np.ptp(found, -1) <= 1).all((1, 2))
    blurred = ~grey & (found[:, 0, 3] != found[:, 0, 0]).any(-1)
    for share in (grey.mean(), blurred.mean()):
        assert abs(share - 1 / 3) < 4 * (2 / 9 / B) ** 0.5 + 0.06  # the smallest radii blur by less than a level
    brightest = found[grey].max((1, 2, 3))
    assert brightest.min() < 100 < 140 < brightest.max()


def test_erasing_fills_a_rectangle_with_the_mean_as_often_as_it_is_told():
    """Its areas, ratios and places are timm's: tests/interop/test_peers.py."""
    images = np.maximum(smooth_images(B), 1)
    images[images == 51] = 52
    found = apply(DataConfig(erase=0.75, mean=(0.2,)), keys(), images, TARGETS)[0]
    changed = (found != images).any(-1)
    assert (found[changed] == 51).all()
    erased = changed.any((1, 2))
    assert abs(erased.mean() - 0.75) < 4 * (0.75 * 0.25 / B) ** 0.5
    rows, columns = changed.any(2).sum(1)[erased], changed.any(1).sum(1)[erased]
    np.testing.assert_array_equal(rows * columns, changed.sum((1, 2))[erased])  # a whole rectangle
    share, ratio = rows * columns / 32**2, rows / columns
    assert 0.01 < share.min() < share.max() < 0.36
    assert 0.2 < ratio.min() < ratio.max() < 4.5


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_mixes_pixels_and_targets_by_one_share_of_the_batch(mixup, cutmix):
    """White images of class 0 are paired with black ones of class 1, so brightness is the share of class 0. How shares
    and boxes follow from what is drawn: tests/interop/test_peers.py."""
    white = np.arange(8) < 4
    images = np.where(white[:, None, None, None], 255, 0) * np.ones((8, 16, 16, 3), np.uint8)
    targets = np.eye(3, dtype=np.float32)[np.where(white, 0, 1)] * 0.9 + 0.1 / 3
    run, shares, cut = augmenter(DataConfig(mixup=mixup, cutmix=cutmix)), [], []
    for seed in range(60):
        found, mixed = run(keys()[:8], images.astype(np.uint8), targets, seed=seed)
        np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(found.mean((1, 2, 3)) / 255, (mixed[:, 0] - 0.1 / 3) / 0.9, atol=1e-4)
        assert np.ptp(mixed[:4], 0).max() < 1e-6
        shares.append(round(float(mixed[0, 0]), 6))
        cut.append(set(np.unique(found)) <= {0.0, 255.0})
    assert len(set(shares)) > 20
    assert (0.25 < np.mean(cut) < 0.75) if mixup and cutmix else np.mean(cut) == bool(cutmix)


def test_in_the_last_part_only_crop_and_flip_go_on():
    images = smooth_images(40, side=8)
    settings = functools.reduce(lambda a, b: a | b, ON.values()) | {"plain_at_end": 0.5}
    everything, plain = augmenter(DataConfig(**settings)), DataConfig(crop_padding=2, flip=True)
    found, targets = everything(keys()[:40], images, TARGETS[:40], plain=True)
    np.testing.assert_array_equal(found, apply(plain, keys()[:40], images, TARGETS[:40])[0])
    np.testing.assert_array_equal(targets, TARGETS[:40])
    before = everything(keys()[:40], images, TARGETS[:40], plain=False)
    never = apply(DataConfig(**settings | {"plain_at_end": 0.0}), keys()[:40], images, TARGETS[:40])
    np.testing.assert_array_equal(before[0], never[0])
    np.testing.assert_array_equal(before[1], never[1])
    assert (before[0] != found).any((1, 2, 3)).all()
