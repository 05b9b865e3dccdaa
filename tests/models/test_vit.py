"""The ViT: agreement with PyTorch, exact sizes, and the laws its options and dropout obey.

B batch · T tokens · D width · L layers · C classes
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing
from jvitmoe.config import Config, ModelConfig, RoutingConfig
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params
from jvitmoe.models import layers, mlp, vit

GOLDEN = np.load(Path(__file__).with_name("torch_vit_golden.npz"))  # written by scripts/make_torch_golden.py
SMALL = ModelConfig(image_size=8, channels=2, classes=5, patch=4, width=12, hidden=10, depth=3, heads=3)


def small(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns jax.jit without optimisation: programs this small cost seconds to compile and nothing to run."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def jitted(model: vit.ViT) -> Callable[..., jax.Array]:
    """Returns logits(params, images, key_B), compiled."""
    return quick_jit(functools.partial(vit.logits, model))


def tree_of(model: vit.ViT) -> Any:
    """Returns the model's tree of shapes and types."""
    return jax.eval_shape(lambda: vit.init(model, jax.random.key(0)))


def drawn(model: vit.ViT) -> Any:
    """Returns parameters without a zero or a one among them, unlike initial ones."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), tree_of(model))


def images(count: int = 4) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, 8, 8, SMALL.channels)), jnp.float32)


def keys(count: int = 4) -> jax.Array:
    return jax.random.split(jax.random.key(9), count)


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = leaf
    return tree


@pytest.mark.parametrize("variant", ["pre", "mean", "experts"])
def test_logits_are_those_of_the_original_in_pytorch(variant):
    settings = json.loads(str(GOLDEN[f"{variant}/settings"]))
    experts = settings.pop("experts")
    config = Config(model=ModelConfig(**settings), routing=RoutingConfig(experts=experts))
    prefix = f"{variant}/params/"
    params = nested({name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)})
    given = Params(params, {})
    if experts > 1:  # there the leaves of experts are [L, E, ...]
        mlps = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), params["blocks"].pop("mlp"))
        given = Params(params | {"blocks": params["blocks"] | {"mlp": {}}}, {"mlp": mlps})
        params = merge.take_path(given, GOLDEN[f"{variant}/route"])
    chex.assert_trees_all_equal_shapes_and_dtypes(given, routing.find(config).shapes())
    logits_BC = jitted(vit.ViT(config.model))(params, GOLDEN["images"])
    np.testing.assert_allclose(logits_BC, GOLDEN[f"{variant}/logits"], rtol=0, atol=1e-5)


def test_initial_parameters_have_pytorch_defaults():
    model = vit.ViT(small(image_size=32, width=96, hidden=64, head_hidden=128))
    params = quick_jit(lambda: vit.init(model, jax.random.key(0)))()
    blocks, head = params["blocks"], params["head"]
    linears = [
        (params["patches"], 4 * 4 * SMALL.channels),
        *((blocks["attention"][name], 96) for name in ("query", "key", "value", "out")),
        *((head["hidden"], 96), (head["logits"], 128)),
    ]
    for layer, fan_in in linears:
        chex.assert_tree_all_finite(layer)
        assert max(np.abs(leaf).max() for leaf in layer.values()) <= fan_in**-0.5
        assert np.abs(layer["kernel"]).max() > 0.99 * fan_in**-0.5
        np.testing.assert_allclose(np.std(layer["kernel"]), (3 * fan_in) ** -0.5, rtol=0.1)
        assert np.ptp(layer["bias"]) > 0
    for norm in (blocks["norm1"], blocks["norm2"], params["norm"]):
        chex.assert_trees_all_equal(norm, {"scale": np.ones_like(norm["scale"]), "bias": np.zeros_like(norm["bias"])})
    chex.assert_shape(params["positions"], (64, 96))
    assert not params["positions"].any()
    assert 0.7 < np.std(params["cls"]) < 1.3
    assert np.ptp(blocks["mlp"]["up"], axis=0).min() > 0, "layers start alike"


def test_bfloat16_compute_keeps_parameters_and_logits_in_float32():
    model, rounded = vit.build(small(dtype="float32")), vit.build(small(dtype="bfloat16"))
    params = drawn(model)
    exact = jitted(model)(params, images())
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm promotes bfloat16
        chex.assert_type(jax.tree.leaves(tree_of(rounded)), jnp.float32)
        near = jitted(rounded)(params, images())
    chex.assert_type(near, jnp.float32)
    np.testing.assert_allclose(near, exact, atol=0.03)
    assert np.abs(near - exact).max() > 1e-5, "nothing was computed in bfloat16"


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("float32", "gpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_auto_computes_in_bfloat16_on_accelerators_only(dtype, platform, expected):
    assert vit.build(small(dtype=dtype), platform=platform).dtype == jnp.dtype(expected)


@pytest.mark.parametrize(("grid", "width"), [(3, 16), (2, 4)])
def test_sincos2d_is_the_slow_obvious_loop(grid, width):
    quarter = width // 4
    table_TD = np.zeros((grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                frequency = 10000.0 ** (-i / (quarter - 1)) if quarter > 1 else 1.0
                for q, value in enumerate(
                    [
                        math.sin(column * frequency),
                        math.cos(column * frequency),
                        math.sin(row * frequency),
                        math.cos(row * frequency),
                    ]
                ):
                    table_TD[row * grid + column, q * quarter + i] = value
    np.testing.assert_allclose(layers.sincos2d(grid, width), table_TD, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_only_positions_tell_patches_apart(pool):
    here = images()
    moved = jnp.concatenate([here[:, 4:], here[:, :4]], axis=1)  # the two rows of patches trade places
    model = vit.ViT(small(pool=pool))
    run, params = jitted(model), drawn(model)
    alike = {**params, "positions": jnp.zeros_like(params["positions"])}
    np.testing.assert_allclose(run(alike, moved), run(alike, here), atol=1e-6)
    assert np.abs(run(params, moved) - run(params, here)).max() > 1e-3


def test_rows_of_the_table_beyond_the_patches_are_never_read():
    model = vit.ViT(small(init="original"))
    params = drawn(model)
    spoilt = {**params, "positions": params["positions"].at[4:].set(jnp.nan)}
    run = jitted(model)
    chex.assert_trees_all_equal(run(spoilt, images()), run(params, images()))


def test_dropout_depends_on_the_key_of_each_image_alone():
    model = vit.ViT(small(dropout=0.3))
    apply, params, order = jitted(model), drawn(model), np.array([2, 0, 3, 1])
    logits_BC = apply(params, images(), keys())
    permuted_BC = apply(params, images()[order], keys()[order])
    np.testing.assert_allclose(permuted_BC, logits_BC[order], atol=1e-5)
    alone_BC = apply(params, images()[:1], keys()[:1])
    np.testing.assert_allclose(alone_BC, logits_BC[:1], atol=1e-5)
    other_keys_BC = apply(params, images(), keys()[order])
    assert (np.abs(other_keys_BC - logits_BC).max(axis=1) > 1e-3).all()


def test_dropout_acts_at_the_four_places_of_the_original(monkeypatch):
    places = set()

    def record(x_B: jax.Array, key_B: jax.Array | None, site: int, rate: float) -> jax.Array:
        places.add((site, x_B.shape, rate))
        return x_B

    for module in (layers, mlp, vit):
        monkeypatch.setattr(module, "dropout", record)
    model = vit.ViT(small(dropout=0.3))
    params = tree_of(model)
    places.clear()
    jax.eval_shape(functools.partial(vit.logits, model), params, images(), keys())
    assert places == {
        (0, (4, 5, 10), 0.3),  # after GELU
        (1, (4, 3, 5, 5), 0.3),  # on attention weights
        (2, (4, 5, 12), 0.3),  # on the attention branch
        (3, (4, 5, 12), 0.3),  # on the MLP branch
    }


def test_layers_drop_different_entries():
    block = vit.Block(small(dropout=0.5), jnp.float32)
    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 12)), jnp.float32)
    params = jax.tree.map(lambda leaf_L: leaf_L[0], drawn(vit.ViT(SMALL))["blocks"])

    @quick_jit
    def run(index: int) -> jax.Array:
        return block.apply({"params": params}, x_BTD, index, keys(2))[0]

    assert (np.abs(run(1) - run(2)).max(axis=(1, 2)) > 1e-3).all()


def test_the_norms_have_the_epsilon_of_the_config():
    """One so large that what is normalised vanishes: of the last norm's output only its bias is left."""
    config = small(norm_epsilon=1e9)
    params = drawn(vit.ViT(config))
    features_BD = quick_jit(functools.partial(vit.features, vit.ViT(config)))(params, images())
    chex.assert_trees_all_close(features_BD, jnp.broadcast_to(params["norm"]["bias"], (4, 12)), atol=1e-3)
    assert not np.allclose(jitted(vit.ViT(SMALL))(params, images()), jitted(vit.ViT(config))(params, images()))


@pytest.mark.parametrize("pattern", [("experts",), ("dense", "experts")])
def test_layers_start_equal_where_asked(pattern):
    """The original deep-copies one layer: attention and every expert start the same in all layers."""
    routed = RoutingConfig(experts=2, pattern=pattern)

    def start(init):
        config = Config(model=small(depth=4, init=init), routing=routed)
        return quick_jit(routing.find(config).init)(jax.random.key(0))

    equal, different = start("original"), start("independent")
    leaves, others = ([*jax.tree.leaves(tree.trunk["blocks"])] for tree in (equal, different))
    for tree, found in ((equal, leaves), (different, others)):
        found += [leaf.swapaxes(0, 1) for leaf in jax.tree.leaves(tree.experts)]
    for leaf_L, other_L in zip(leaves, others, strict=True):
        assert (leaf_L == leaf_L[:1]).all()
        assert (leaf_L[0] == other_L[0]).all()
    up_ELDF = equal.experts["mlp"]["up"]
    assert (up_ELDF[0] != up_ELDF[1]).any()  # experts of one layer still differ
    assert (different.trunk["patches"]["kernel"] == equal.trunk["patches"]["kernel"]).all()
    blocks = different.trunk["blocks"]
    kernel_LD = blocks.get("block0", blocks)["attention"]["query"]["kernel"]
    assert (kernel_LD[0] != kernel_LD[1]).any()
