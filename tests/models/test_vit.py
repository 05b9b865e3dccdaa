"""The ViT: agreement with PyTorch, exact sizes, and the laws its options, routes and dropout obey.

B batch · T tokens · D width · L layers · E experts · C classes
"""

import dataclasses
import functools
import itertools
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

from jvitmoe.config import Config, ModelConfig, RoutingConfig
from jvitmoe.experts import merge, slices
from jvitmoe.experts.cost import count_parameters
from jvitmoe.models import layers, mlp, vit

GOLDEN = np.load(Path(__file__).with_name("torch_vit_golden.npz"))  # written by scripts/make_torch_golden.py
SMALL = ModelConfig(image_size=8, channels=2, classes=5, patch=4, width=12, hidden=10, depth=3, heads=3)
ORIGINAL = ModelConfig(
    **{"image_size": 32, "channels": 3, "classes": 10, "patch": 4, "width": 300, "hidden": 1024, "depth": 12},
    **{"heads": 12, "position_rows": 300, "head_hidden": 3072},
)


def small(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns jax.jit without optimisation: programs this small cost seconds to compile and nothing to run."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def jitted(model: vit.ViT) -> Callable[..., jax.Array]:
    """Returns logits(params, images, route_L, key_B), compiled."""
    return quick_jit(functools.partial(vit.logits, model))


@functools.cache
def initial(experts: int, expert_init: str) -> Any:
    model = vit.ViT(small(), experts, expert_init)
    return quick_jit(lambda: vit.init(model, jax.random.key(3)))()


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


@pytest.mark.parametrize("variant", ["pre", "post", "mean", "experts"])
def test_logits_are_those_of_the_original_in_pytorch(variant):
    settings = json.loads(str(GOLDEN[f"{variant}/settings"]))
    experts = settings.pop("experts")
    model = vit.ViT(ModelConfig(**settings), experts)
    prefix = f"{variant}/params/"
    params = nested({name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)})
    route_L = GOLDEN[f"{variant}/route"] if experts > 1 else None

    chex.assert_trees_all_equal_shapes_and_dtypes(params, tree_of(model))
    logits_BC = jax.jit(functools.partial(vit.logits, model))(params, GOLDEN["images"], route_L)
    np.testing.assert_allclose(logits_BC, GOLDEN[f"{variant}/logits"], rtol=0, atol=1e-5)


def test_parameters_of_the_original_are_counted_exactly():
    dense = Config(model=ORIGINAL)
    routed = Config(model=ORIGINAL, routing=RoutingConfig(experts=4))
    assert count_parameters(dense) == (12_798_490, 12_798_490)
    assert count_parameters(routed) == (12_798_490, 34_964_554)


@pytest.mark.parametrize(
    ("norm", "pool", "positions", "head_hidden"),
    [  # every pair of options meets
        *(("pre", "cls", "learned", 0), ("pre", "cls", "sincos2d", 7), ("pre", "mean", "learned", 7)),
        *(("post", "cls", "learned", 7), ("post", "mean", "sincos2d", 0), ("pre", "mean", "sincos2d", 7)),
        *(("post", "cls", "sincos2d", 0), ("post", "mean", "learned", 0)),
    ],
)
def test_every_option_gives_finite_logits_of_one_row_per_image(norm, pool, positions, head_hidden):
    model = vit.ViT(small(norm=norm, pool=pool, positions=positions, head_hidden=head_hidden))
    params = drawn(model)
    logits_BC = jitted(model)(params, images())
    chex.assert_shape(logits_BC, (4, 5))
    chex.assert_type(logits_BC, jnp.float32)
    chex.assert_tree_all_finite(logits_BC)
    assert ("cls" in params, "positions" in params) == (pool == "cls", positions == "learned")
    assert ("hidden" in params["head"]) == bool(head_hidden)


def test_initial_parameters_have_pytorch_defaults():
    model = vit.ViT(small(image_size=32, width=96, hidden=64, head_hidden=128, position_rows=100))
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
    chex.assert_shape(params["positions"], (100, 96))
    assert not params["positions"].any()
    assert 0.7 < np.std(params["cls"]) < 1.3
    assert np.ptp(blocks["mlp"]["up"], axis=0).min() > 0, "layers start alike"


@pytest.mark.parametrize("unroll", [3, 9])
def test_unrolling_the_layers_does_not_change_logits(unroll):
    model = vit.ViT(small(depth=4))
    unrolled = vit.ViT(small(depth=4, unroll=unroll))
    params = drawn(model)
    chex.assert_trees_all_equal_shapes(params, tree_of(unrolled))
    expected = jitted(model)(params, images())
    np.testing.assert_allclose(jitted(unrolled)(params, images()), expected, atol=1e-6)


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
    model = vit.ViT(small(position_rows=9))
    params = drawn(model)
    spoilt = {**params, "positions": params["positions"].at[4:].set(jnp.nan)}
    run = jitted(model)
    chex.assert_trees_all_equal(run(spoilt, images()), run(params, images()))


def test_dropout_depends_on_the_key_of_each_image_alone():
    model = vit.ViT(small(dropout=0.3))
    apply, params, order = jitted(model), drawn(model), np.array([2, 0, 3, 1])
    logits_BC = apply(params, images(), None, keys())
    permuted_BC = apply(params, images()[order], None, keys()[order])
    np.testing.assert_allclose(permuted_BC, logits_BC[order], atol=1e-5)
    alone_BC = apply(params, images()[:1], None, keys()[:1])
    np.testing.assert_allclose(alone_BC, logits_BC[:1], atol=1e-5)
    other_keys_BC = apply(params, images(), None, keys()[order])
    assert (np.abs(other_keys_BC - logits_BC).max(axis=1) > 1e-3).all()


def test_dropout_is_off_without_keys():
    dropping, plain = vit.ViT(small(dropout=0.5)), vit.ViT(small())
    params = drawn(plain)
    chex.assert_trees_all_equal(jitted(dropping)(params, images()), jitted(plain)(params, images()))


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
    jax.eval_shape(functools.partial(vit.logits, model), params, images(), None, keys())
    assert places == {
        (0, (4, 5, 10), 0.3),  # after GELU
        (1, (4, 3, 5, 5), 0.3),  # on attention weights
        (2, (4, 5, 12), 0.3),  # on the attention branch
        (3, (4, 5, 12), 0.3),  # on the MLP branch
    }


def test_layers_drop_different_entries():
    block = vit.Block(small(dropout=0.5), experts=1, expert_init="independent", shared_layer="none", dtype=jnp.float32)
    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 12)), jnp.float32)
    params = jax.tree.map(lambda leaf_L: leaf_L[0], drawn(vit.ViT(SMALL))["blocks"])

    @quick_jit
    def run(index: int) -> jax.Array:
        return block.apply({"params": params}, x_BTD, (index, None), keys(2))[0]

    chex.assert_trees_all_equal(run(1), run(1))
    assert (np.abs(run(1) - run(2)).max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize("compiled", [jax.jit, quick_jit])
def test_a_routed_model_is_the_dense_model_on_its_path(compiled):
    dropping = compiled is quick_jit  # whose compilation would be slow
    dense, routed = (vit.ViT(small(dropout=0.2), experts) for experts in (1, 3))
    run_dense, run_routed = (compiled(functools.partial(vit.logits, model)) for model in (dense, routed))
    params, key_B, seen = drawn(routed), keys() if dropping else None, []
    for route in [(0, 0, 0), (2, 2, 2), (2, 0, 1)]:
        route_L = jnp.asarray(route, jnp.int32)
        seen.append(run_routed(params, images(), route_L, key_B))
        path = merge.take_path(params, route_L)
        chex.assert_trees_all_equal(seen[-1], run_dense(path, images(), None, key_B))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(seen, 2)), "the route did not matter"


def test_equal_experts_make_the_route_irrelevant():
    model = vit.ViT(small(), experts=4)
    params = drawn(vit.ViT(small()))
    params["blocks"]["mlp"] = {name: jnp.stack([x] * 4, axis=1) for name, x in params["blocks"]["mlp"].items()}
    run = jitted(model)
    routes = [(0, 0, 0), (3, 3, 3), (1, 2, 3)]
    first, *others = [run(params, images(), jnp.asarray(route, jnp.int32)) for route in routes]
    for other in others:
        chex.assert_trees_all_equal(other, first)


def test_averaged_tree_of_a_shared_start_is_the_dense_start():
    dense, routed = initial(1, "shared"), initial(4, "shared")
    chex.assert_trees_all_equal(merge.average_experts(routed), dense)  # to the bit: sums of 4 equal floats are exact
    chex.assert_trees_all_equal(merge.take_path(routed, jnp.asarray([3, 0, 2])), dense)


def test_independent_experts_start_different_and_the_trunk_starts_dense():
    dense, routed = initial(1, "shared"), initial(4, "independent")
    for name, leaf in routed["blocks"]["mlp"].items():
        for a, b in itertools.combinations(range(4), 2):
            assert (leaf[:, a] != leaf[:, b]).mean() > 0.99, name
    trunk, _ = slices.split(routed, slices.stacked(routed))
    dense_trunk, _ = slices.split(dense, slices.stacked(routed))
    chex.assert_trees_all_equal(trunk, dense_trunk)


def test_a_batch_is_compiled_once_for_every_route():
    model = vit.ViT(small(), experts=4)
    params = drawn(model)

    @quick_jit
    @chex.assert_max_traces(n=1)
    def run(params: Any, route_L: jax.Array) -> jax.Array:
        return vit.logits(model, params, images(), route_L)

    for expert in range(4):
        run(params, jnp.full((3,), expert, jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layers_written_out_compute_what_the_loop_computes(norm):
    model = vit.build(ModelConfig(width=8, hidden=12, depth=3, heads=2, patch=4, norm=norm))
    params = vit.init(model, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    wanted = vit.logits(model, params, images)
    chex.assert_trees_all_close(vit.logits(model.clone(loops=False), params, images), wanted, rtol=1e-5, atol=1e-6)


def test_a_position_of_cls_is_added_to_cls():
    plain = ModelConfig(width=8, hidden=12, depth=1, heads=2, patch=4)
    model = vit.build(dataclasses.replace(plain, cls_position=True))
    params = vit.init(model, jax.random.key(0))
    assert not params["cls_position"].any()
    position_D = jax.random.normal(jax.random.key(2), (8,))
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    moved = {name: leaf for name, leaf in params.items() if name != "cls_position"}
    wanted = vit.logits(vit.build(plain), moved | {"cls": params["cls"] + position_D}, images)
    found = vit.logits(model, params | {"cls_position": position_D}, images)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    assert not np.allclose(found, vit.logits(model, params, images), atol=1e-4)


def test_the_last_layer_norm_has_the_epsilon_of_the_config():
    for norm in ("pre", "post"):
        logits = []
        for epsilon in (1e-5, 1e9):  # so large that what is normalised vanishes: only the head's biases are left
            model = vit.build(
                ModelConfig(width=8, hidden=12, depth=1, heads=2, patch=4, norm=norm, norm_epsilon=epsilon)
            )
            params = jax.jit(lambda key, m=model: vit.init(m, key))(jax.random.key(0))
            logits.append(vit.logits(model, params, jax.random.normal(jax.random.key(1), (2, 8, 8, 1))))
        chex.assert_trees_all_close(logits[1], jnp.broadcast_to(params["head"]["logits"]["bias"], (2, 10)), atol=1e-3)
        assert not np.allclose(logits[0], logits[1], atol=1e-2)


@pytest.mark.parametrize("pattern", [("experts",), ("dense", "experts")])
def test_layers_start_equal_where_asked(pattern):
    """The original deep-copies one layer: attention and every expert start the same in all layers."""
    config = ModelConfig(width=8, hidden=8, depth=4, heads=2)

    def start(init_layers):
        model = vit.build(dataclasses.replace(config, init_layers=init_layers), experts=2, pattern=pattern)
        return jax.jit(lambda key: vit.init(model, key))(jax.random.key(0))

    equal, different = start("shared"), start("independent")
    chex.assert_trees_all_equal_shapes_and_dtypes(equal, different)
    for leaf_L, other_L in zip(jax.tree.leaves(equal["blocks"]), jax.tree.leaves(different["blocks"]), strict=True):
        assert (leaf_L == leaf_L[:1]).all()
        assert (leaf_L[0] == other_L[0]).all()
    up_LED = vit.in_layers(slices.split(equal, slices.stacked(equal))[1]["blocks"])["mlp"]["up"]
    assert (up_LED[:, 0] != up_LED[:, 1]).any()  # experts of one layer still differ
    assert (different["patches"]["kernel"] == equal["patches"]["kernel"]).all()
