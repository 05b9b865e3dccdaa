"""Parts of the ViT that are off by default: convolutional stem, sequence pooling, registers, drop path, layer scale.

Whole models with these parts are compared with timm in tests/interop/test_peers.py.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing, rules
from jvitmoe.config import Config, ModelConfig
from jvitmoe.experts import cost
from jvitmoe.models import layers, vit

SMALL = ModelConfig(image_size=8, channels=3, classes=5, patch=4, width=16, hidden=24, depth=3, heads=2, pool="mean")


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def made(config, seed=0):
    """Returns (model, parameters that are all moved from where they start)."""
    model, rng = vit.build(config), np.random.default_rng(seed)
    params = jax.device_get(jax.jit(lambda: vit.init(model, jax.random.key(seed)))())
    return model, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype("f"), params)


def compiled(model):
    """Returns the logits of IMAGES, a function of the parameters."""
    return jax.jit(lambda params: vit.logits(model, params, IMAGES))


IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype("f")


@pytest.mark.parametrize("module", [layers.LayerNorm, layers.TwoPassLayerNorm])
def test_layer_norm_is_exact_at_a_mean_of_100_deviations(module):
    x_BD = np.random.default_rng(0).normal(100, 1, (64, 96)).astype("f")
    params = {"scale": np.ones(96, "f"), "bias": np.zeros(96, "f")}
    found = jax.jit(lambda x: module(1e-6).apply({"params": params}, x))(x_BD)
    exact = x_BD.astype(float)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, exact, atol=3e-5)


def tokens_by_loops(params, x_BHWc, strided):
    """The tokenizers in NumPy, one window at a time: convolutions without bias, ReLU, and CCT's maxima over 3 x 3."""
    for name in sorted(params):
        kernel = np.asarray(params[name]["kernel"])
        b, side, _, _ = x_BHWc.shape
        padded = np.pad(x_BHWc, ((0, 0), (1, 1), (1, 1), (0, 0)))
        maps = np.zeros((b, side, side, kernel.shape[-1]), "f")
        for row, column in np.ndindex(side, side):
            window = padded[:, row : row + 3, column : column + 3]
            maps[:, row, column] = np.maximum(np.einsum("bijc,ijcd->bd", window, kernel), 0)
        if strided:
            x_BHWc = maps[:, ::2, ::2]
            continue
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x_BHWc = np.zeros((b, side // 2, side // 2, kernel.shape[-1]), "f")
        for row, column in np.ndindex(side // 2, side // 2):
            x_BHWc[:, row, column] = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].max((1, 2))
    return x_BHWc.reshape(len(x_BHWc), -1, x_BHWc.shape[-1])


@pytest.mark.parametrize(("patch", "strided"), [(2, False), (8, False), (8, True)])
def test_the_convolutional_stem_is_that_of_the_papers(patch, strided):
    module = layers.ConvStem(patch, 6, jnp.float32, strided)
    tokens, variables = module.init_with_output(jax.random.key(0), IMAGES)
    kernels = [layer["kernel"].shape for _, layer in sorted(variables["params"].items())]
    assert kernels == ([(3, 3, 3, 6)] if patch == 2 else [(3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 64, 6)])
    np.testing.assert_allclose(tokens, tokens_by_loops(variables["params"], IMAGES, strided), atol=2e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
def test_the_gradients_of_a_stem_s_convolution_are_those_of_jax(dtype, rtol):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (5, 6, 8, 3), (3, 3, 3, 7), (5, 6, 8, 7)
    images, kernel, weights = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))

    def by_jax(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (found, *of_found), (wanted, *of_wanted) = (
        (function(images, kernel), *jax.vjp(function, images, kernel)[1](weights))
        for function in (layers.convolve, by_jax)
    )
    np.testing.assert_array_equal(found, wanted)
    for one, other in zip(of_found, of_wanted, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype("f"), other.astype("f"), rtol=rtol, atol=1e-5)


def test_the_gradient_of_max_pooling_goes_to_the_largest_value():
    maps = np.random.default_rng(1).uniform(0.1, 1, (2, 6, 6, 3)).astype("f")
    weights = np.random.default_rng(2).normal(size=(2, 3, 3, 3)).astype("f")
    found = jax.grad(lambda x: (layers.max_pool(x) * weights).sum())(maps)
    wanted = np.zeros_like(maps)
    for b, row, column, c in np.ndindex(weights.shape):
        rows, columns = np.mgrid[max(2 * row - 1, 0) : 2 * row + 2, max(2 * column - 1, 0) : 2 * column + 2]
        best = maps[b, rows, columns, c].argmax()
        wanted[b, rows.flat[best], columns.flat[best], c] += weights[b, row, column, c]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_of_equal_values_one_gets_the_whole_gradient_of_max_pooling():
    weights = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype("f")
    found = jax.grad(lambda x: (layers.max_pool(x) * weights).sum())(np.ones((2, 6, 6, 3), "f"))
    np.testing.assert_allclose(found[:, ::2, ::2], weights, atol=0)  # the window's centre
    assert not np.asarray(found[:, 1::2]).any()
    assert not np.asarray(found[:, :, 1::2]).any()


def test_sequence_pooling_weights_the_tokens():
    x_BTD = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("f")
    pooled, variables = layers.SequencePool(jnp.float32).init_with_output(jax.random.key(0), x_BTD)
    kernel, bias = (np.asarray(variables["params"]["scores"][name]) for name in ("kernel", "bias"))
    scores_BT = x_BTD @ kernel[:, 0] + bias
    weights_BT = np.exp(scores_BT) / np.exp(scores_BT).sum(1, keepdims=True)
    np.testing.assert_allclose(pooled, np.einsum("bt,btd->bd", weights_BT, x_BTD), atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "cls", "cls_mean", "seq"])
def test_the_head_sees_the_patches_and_not_the_registers_themselves(pool):
    """Without blocks that mix tokens, registers change nothing."""
    config = small(pool=pool, registers=2)
    model, mixing = made(config)
    logits, moved = compiled(model), {"registers": -mixing["registers"]}
    assert not np.allclose(logits(mixing | moved), logits(mixing), atol=1e-3)
    params = mixing | {"blocks": jax.tree.map(np.zeros_like, mixing["blocks"])}
    chex.assert_trees_all_equal(logits(params | moved), logits(params))
    assert config.tokens == 4 + 2 + (pool in ("cls", "cls_mean"))


def test_drop_path_drops_whole_branches_of_images_more_often_in_later_layers(monkeypatch):
    config = small(drop_path=0.6, depth=4)
    params = made(config)[1]
    keys_B = jax.random.split(jax.random.key(3), 4)
    rates = []
    real = layers.drop_path

    def record(x_B, key_B, site, rate):
        rates.append((site, float(rate)))
        return real(x_B, key_B, site, rate)

    monkeypatch.setattr(vit, "drop_path", record)
    block = vit.Block(config, jnp.float32, parent=None)
    x_BTD = jnp.ones((4, 4, 16))
    for index in range(4):
        layer = jax.tree.map(lambda leaf: leaf[index], params["blocks"])  # noqa: B023
        block.apply({"params": layer}, x_BTD, jnp.int32(index), keys_B)
    np.testing.assert_allclose([rate for _, rate in rates], np.repeat([0, 0.2, 0.4, 0.6], 2), rtol=1e-6)
    assert [site for site, _ in rates] == [layers.Site.ATTENTION_PATH, layers.Site.MLP_PATH] * 4


def test_drop_path_scales_what_is_kept_and_keys_alone_decide():
    x_B = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 3)), jnp.float32)
    keys_B = jax.random.split(jax.random.key(0), 4000)
    dropped = np.asarray(layers.drop_path(x_B, keys_B, 4, jnp.float32(0.25)))
    kept_B = (dropped != 0).any(axis=1)
    np.testing.assert_allclose(dropped[kept_B], np.asarray(x_B)[kept_B] / 0.75, rtol=1e-6)
    assert abs(kept_B.mean() - 0.75) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    np.testing.assert_array_equal(layers.drop_path(x_B[7:9], keys_B[7:9], 4, jnp.float32(0.25)), dropped[7:9])
    assert ((np.asarray(layers.drop_path(x_B, keys_B, 5, jnp.float32(0.25))) != 0).any(axis=1) != kept_B).any()
    assert layers.drop_path(x_B, None, 4, jnp.float32(0.25)) is x_B
    rounded_B = x_B.astype(jnp.bfloat16)
    dropped, exact = layers.drop_path(rounded_B, keys_B, 4, jnp.float32(0.1)), np.asarray(rounded_B, float) / 0.9
    chex.assert_type(dropped, jnp.bfloat16)
    dropped = np.asarray(dropped, float)
    assert np.abs(dropped[dropped != 0]).sum() == pytest.approx(np.abs(exact[dropped != 0]).sum(), rel=3e-4)


def test_a_layer_scale_of_one_changes_nothing_and_of_zero_leaves_the_stem():
    model, params = made(small(layer_scale=0.1))
    first, second = params["blocks"].pop("layer_scale1"), params["blocks"].pop("layer_scale2")
    chex.assert_shape([first, second], (3, 16))
    assert (vit.init(model, jax.random.key(0))["blocks"]["layer_scale1"] == np.float32(0.1)).all()
    plain, with_scales = compiled(vit.build(SMALL)), compiled(model)

    def scaled(value):
        scales = {name: np.full_like(first, value) for name in ("layer_scale1", "layer_scale2")}
        return with_scales(params | {"blocks": params["blocks"] | scales})

    chex.assert_trees_all_close(scaled(1.0), plain(params), rtol=1e-6)
    zeros = jax.tree.map(np.zeros_like, params["blocks"])
    chex.assert_trees_all_close(scaled(0.0), plain(params | {"blocks": zeros}), rtol=1e-6)


@pytest.mark.parametrize(
    "parts",
    [{}, {"stem": "conv", "pool": "seq", "registers": 1, "layer_scale": 0.5, "qk_norm": True, "drop_path": 0.5}],
)
def test_layers_written_out_compute_what_the_loop_computes(parts):
    model, params = made(small(**parts))
    written_out = compiled(model.clone(loops=False))
    chex.assert_trees_all_close(written_out(params), compiled(model)(params), rtol=1e-5, atol=1e-5)


def test_parameters_and_flops_of_cct_are_counted():
    """CCT-2/3x2 has 284,000 parameters and 33 million multiply-adds (its paper, table 2, without the convolutions' bias
    and with attention's; ours counts what XLA does besides)."""
    parts = {"stem": "conv", "pool": "seq"}
    sizes = {"image_size": 32, "channels": 3, "classes": 10, "patch": 4, "width": 128, "hidden": 128}
    config = rules.check(Config(model=ModelConfig(**sizes, depth=2, heads=2, **parts)))
    active, total = routing.find(config).count_parameters()
    assert active == total
    assert 0.28e6 < total < 0.29e6
    assert 2 * 33e6 < cost.flops_per_image(vit.build(config.model), 2) < 2 * 40e6


D, DEPTH, TOKENS = 128, 2, 16


@pytest.mark.parametrize(
    ("part", "parameters", "tokens"),  # both beside those of a ViT that pools by the mean
    [
        ({"registers": 4}, 4 * D, 4),
        ({"pool": "cls"}, D, 1),
        ({"pool": "cls", "cls_position": True}, 2 * D, 1),
        ({"pool": "cls_mean"}, D, 1),
        ({"pool": "seq"}, D + 1, 0),
        ({"layer_scale": 0.1}, DEPTH * 2 * D, 0),
        ({"qk_norm": True}, DEPTH * 2 * 2 * D // 4, 0),  # scale and bias of the queries and keys of one head
        ({"drop_path": 0.5}, 0, 0),
    ],
)
def test_each_part_adds_its_parameters_and_the_products_of_its_tokens(part, parameters, tokens):
    base = small(image_size=16, width=D, hidden=D, depth=DEPTH, heads=4)
    with_part = dataclasses.replace(base, **part)
    counts = [cost.tree_size(vit.shapes(vit.build(model))) for model in (base, with_part)]
    assert counts[1] == counts[0] + parameters

    def products(count):
        return DEPTH * 2 * (count * 6 * D**2 + 2 * count**2 * D)

    flops = [cost.flops_per_image(vit.build(model), 2) for model in (base, with_part)]
    grown = products(TOKENS + tokens) - products(TOKENS)
    assert flops[1] - flops[0] == pytest.approx(grown, abs=0.02 * products(TOKENS))
