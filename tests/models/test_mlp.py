"""The MLP, its GELU, its initialisation and dropout, against plain float64 formulas.

B batch · T tokens · D width · F hidden width
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec as P

from jvitmoe.models.layers import dropout, gelu, random_words, torch_uniform
from jvitmoe.models.mlp import Mlp

drop = jax.jit(dropout, static_argnums=3)  # (x_B, key_B, site, rate); each operation outside of jit is a compilation
GRID = np.concatenate([np.linspace(-12, 12, 481), [-40.0, -1e-3, 1e-3, 40.0]])


def cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * np.vectorize(math.erfc)(-np.asarray(x, np.float64) / math.sqrt(2))


def gelu_slope(x: np.ndarray) -> np.ndarray:
    return cdf(x) + x * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def images_keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def test_gelu_is_x_times_the_normal_distribution_function():
    x = GRID.astype(np.float32)
    np.testing.assert_allclose(gelu(jnp.asarray(x)), x * cdf(x), rtol=2e-6, atol=1e-6)


def test_gelu_has_the_slope_of_the_formula_forward_and_backward():
    x = jnp.asarray(GRID, jnp.float32)
    expected = gelu_slope(np.asarray(x, np.float64))
    value, forward = jax.jvp(gelu, (x,), (jnp.ones_like(x),))
    backward = jax.vmap(jax.grad(gelu))(x)
    np.testing.assert_allclose(value, gelu(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(forward, expected, atol=1e-6)
    np.testing.assert_allclose(backward, expected, atol=1e-6)


def test_gelu_and_its_gradient_stay_in_bfloat16():
    x = jnp.asarray(1.5, jnp.bfloat16)
    chex.assert_type([gelu(x), jax.grad(gelu)(x)], jnp.bfloat16)


def test_gelu_differentiates_over_devices_as_on_one():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x_BD = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    scale_D = jnp.asarray([0.5, -1.0, 2.0])

    def loss(scale_D: jax.Array, x_BD: jax.Array) -> jax.Array:
        return gelu(x_BD * scale_D[None]).mean()

    def sharded_loss(scale_D: jax.Array, x_bD: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss(scale_D, x_bD), "data")

    gradient = jax.jit(jax.shard_map(jax.grad(sharded_loss), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    x, scale = np.asarray(x_BD, np.float64), np.asarray(scale_D, np.float64)
    expected = (gelu_slope(x * scale) * x).mean(0) / 3
    np.testing.assert_allclose(gradient(scale_D, x_BD), expected, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(scale_D, x_BD), expected, atol=1e-6)


def test_the_mlp_is_the_plain_formula():
    shapes = {"up": (5, 7), "up_bias": (7,), "down": (7, 5), "down_bias": (5,)}
    mlp, x_BTD = Mlp(hidden=7), np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    tree = jax.eval_shape(lambda: mlp.init(jax.random.key(0), x_BTD, None))["params"]
    assert {name: (x.shape, x.dtype) for name, x in tree.items()} == {n: (s, jnp.float32) for n, s in shapes.items()}
    rng = np.random.default_rng(0)
    params = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}
    y_BTD = jax.jit(mlp.apply)({"params": jax.tree.map(np.float32, params)}, x_BTD, None)
    h_BTF = x_BTD.astype(np.float64) @ params["up"] + params["up_bias"]
    np.testing.assert_allclose(y_BTD, (h_BTF * cdf(h_BTF)) @ params["down"] + params["down_bias"], atol=1e-6)


@pytest.mark.parametrize("fan_in", [1, 16, 300])
def test_torch_uniform_fills_its_bounds_evenly(fan_in):
    bound, count = fan_in**-0.5, 20_000
    draws = np.asarray(torch_uniform(fan_in)(jax.random.key(fan_in), (count,)), np.float64) / bound
    assert draws.min() >= -1
    assert draws.max() <= 1
    quarters, _ = np.histogram(draws, bins=4, range=(-1, 1))
    # Five standard deviations of a binomial count.
    np.testing.assert_allclose(quarters / count, 0.25, atol=5 * math.sqrt(0.25 * 0.75 / count))
    assert np.abs(draws).max() > 1 - 20 / count


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_its_rate_and_keeps_the_mean(rate):
    x_B = jnp.ones((8, 50, 40))
    y_B = np.asarray(drop(x_B, images_keys(8), 0, rate))
    dropped, exact = y_B == 0, round(rate * 2**16) / 2**16
    sigma = math.sqrt(rate * (1 - rate) / y_B.size)
    assert abs(dropped.mean() - exact) < 5 * sigma
    np.testing.assert_allclose(y_B[~dropped], 1 / (1 - exact), rtol=1e-6)
    assert abs(y_B.mean() - 1) < 5 * sigma / (1 - rate)
    assert y_B.var() == pytest.approx(exact / (1 - exact), rel=0.05)


@pytest.mark.parametrize("rate", [0.1, 1e-9, 0.999999])
def test_dropout_zeroes_the_entries_whose_16_bits_are_below_the_rate(rate):
    """The rate is exact, because the bits are uniform: a share of `threshold` of their 2^16 values is dropped."""
    key_B, x_B = images_keys(3), jnp.ones((3, 7, 5))  # 7 rows are no multiple of 4
    seeded_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, 2)
    words = [np.asarray(word_B) for word_B in jax.jit(random_words, static_argnums=1)(seeded_B, (2, 5))]
    bits_B = np.stack([word_B >> shift & 0xFFFF for word_B in words for shift in (0, 16)], axis=2).reshape(3, 8, 5)[
        :, :7
    ]
    threshold = min(round(rate * 2**16), 2**16 - 1)
    np.testing.assert_array_equal(np.asarray(drop(x_B, key_B, 2, rate)) == 0, bits_B < threshold)


def test_the_mask_of_a_row_does_not_depend_on_how_many_rows_follow():
    """So a model with fewer slots per expert drops what one with more slots drops in the slots they share."""
    seven_B, three_B = (np.asarray(drop(jnp.ones((2, rows, 50)), images_keys(2), 0, 0.5)) for rows in (7, 3))
    np.testing.assert_array_equal(seven_B[:, :3], three_B)


def test_dropout_over_devices_is_that_of_one():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x_B, key_B = jnp.ones((8, 6, 5)), images_keys(8)
    sharded = jax.shard_map(lambda x, key: dropout(x, key, 1, 0.3), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(sharded)(x_B, key_B), drop(x_B, key_B, 1, 0.3))


def test_the_random_words_are_those_of_jax_own_generator():
    words_2BST = np.asarray(jax.jit(random_words, static_argnums=1)(images_keys(3), (5, 4)))
    for number, key in enumerate(images_keys(3)):
        count = jnp.concatenate([jnp.arange(20, dtype=jnp.uint32), jnp.zeros((20,), jnp.uint32)])
        words = threefry_2x32(jax.random.bits(key, (2,)), count)
        np.testing.assert_array_equal(words_2BST[:, number], words.reshape(2, 5, 4))


def test_dropout_without_keys_or_without_rate_is_the_identity():
    x_B = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x_B, None, 0, 0.5) is x_B
    assert dropout(x_B, images_keys(2), 0, 0.0) is x_B


def test_dropout_keeps_bfloat16_and_its_mean():
    """The scale is not rounded to bfloat16: 1 / 0.9 would become 1.109375."""
    x_B = jax.random.uniform(jax.random.key(0), (8, 50, 40), jnp.bfloat16, 0.5, 1)
    y_B = drop(x_B, images_keys(8), 0, 0.1)
    chex.assert_type(y_B, jnp.bfloat16)
    x_B, y_B = (np.asarray(array, np.float64) for array in (x_B, y_B))
    assert y_B[y_B != 0].sum() / x_B[y_B != 0].sum() == pytest.approx(1 / 0.9, rel=3e-4)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.95])
def test_dropout_keeps_the_mean_of_all_numbers_of_bfloat16(rate):
    """What is kept is a function of the number alone, so its mean is known without a draw."""
    numbers = jnp.arange(2**7, 2**8, dtype=jnp.bfloat16)  # all of 8 bits; others are these times a power of two
    x_B = jnp.broadcast_to(numbers, (16, 40, len(numbers)))
    y_B, numbers = (np.asarray(x, np.float64) for x in (drop(x_B, images_keys(16), 0, rate), numbers))
    kept = y_B.max((0, 1))  # each number is kept somewhere
    assert (kept > 0).all()
    assert (1 - round(rate * 2**16) / 2**16) * kept.sum() / numbers.sum() == pytest.approx(1, abs=5e-5)
