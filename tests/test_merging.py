import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe.experts import merge, routes, slices
from jvitmoe.models import vit
from jvitmoe.models.routers import RouterSettings

E = 3
EXPERT_LEAVES = {"up", "up_bias", "down", "down_bias"}


@pytest.fixture(scope="module")
def trees(tiny_config):
    """Returns (stacked, dense) trees as `init` shapes them, filled with noise."""
    config, rng = tiny_config(model={"head_hidden": 4}).model, np.random.default_rng(0)
    return tuple(
        jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
            jax.eval_shape(lambda experts=experts: vit.init(vit.build(config, experts), jax.random.key(0))),
        )
        for experts in (E, 1)
    )


@pytest.fixture
def params(trees):
    return trees[0]


@pytest.fixture
def dense(trees):
    return trees[1]


def by_name(tree):
    """Returns {path: leaf as NumPy}."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def is_expert(path: str) -> bool:
    return path.split("'")[-2] in EXPERT_LEAVES


def test_averaged_tree_is_the_dense_tree(params, dense):
    chex.assert_trees_all_equal_shapes_and_dtypes(merge.average_experts(params), dense)
    chex.assert_trees_all_equal_shapes_and_dtypes(merge.take_path(params, jnp.array([0, 2])), dense)


def test_only_the_four_mlp_leaves_have_an_expert_axis(params, dense):
    marks, dense_marks = by_name(slices.stacked(params)), by_name(slices.stacked(dense))
    assert {path for path, mark in marks.items() if mark} == {path for path in marks if is_expert(path)}
    assert sum(marks.values()) == 4
    assert not any(dense_marks.values())


def test_averaging_is_the_mean_over_experts_and_leaves_the_trunk_alone(params):
    before, after = by_name(params), by_name(merge.average_experts(params))
    for path, leaf in before.items():
        if is_expert(path):
            mean = sum(leaf[:, e].astype(np.float64) for e in range(E)) / E
            np.testing.assert_allclose(after[path], mean, rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(after[path], leaf)


def test_a_dense_tree_passes_through_unchanged(dense):
    chex.assert_trees_all_equal(merge.average_experts(dense), dense)
    chex.assert_trees_all_equal(merge.take_path(dense, jnp.zeros(2, jnp.int32)), dense)


def test_the_average_of_equal_experts_is_that_expert(params, dense):
    equal = jax.tree.map(
        lambda x, is_stacked: jnp.repeat(x[:, :1], E, axis=1) if is_stacked else x, params, slices.stacked(params)
    )
    expert = merge.take_path(params, routes.constant_route(0, 2))
    chex.assert_trees_all_close(merge.average_experts(equal), expert, rtol=1e-6)


def test_experts_of_shared_initialisation_average_to_the_dense_initialisation(tiny_config):
    config = tiny_config().model
    params, dense = (
        jax.jit(lambda experts=experts: vit.init(vit.build(config, experts, "shared"), jax.random.key(0)))()
        for experts in (E, 1)
    )
    chex.assert_trees_all_close(merge.average_experts(params), dense, rtol=1e-6)


@pytest.mark.parametrize("expert", range(E))
def test_a_constant_route_slices_out_that_expert(params, expert):
    before = by_name(params)
    path_tree = by_name(merge.take_path(params, routes.constant_route(expert, 2)))
    for path, leaf in path_tree.items():
        np.testing.assert_array_equal(leaf, before[path][:, expert] if is_expert(path) else before[path])


def test_a_path_takes_each_layer_from_its_own_expert(params):
    before, after = by_name(params), by_name(merge.take_path(params, jnp.array([2, 1])))
    for path in filter(is_expert, before):
        np.testing.assert_array_equal(after[path], np.stack([before[path][0, 2], before[path][1, 1]]))


@pytest.mark.parametrize("route", [[0, 0, 0, 0], [2, 0, 1, 0], [1, 1, 2, 2]])
def test_put_writes_what_take_reads_and_nothing_else(route):
    rng = np.random.default_rng(0)
    leaf = rng.normal(size=(4, E, 5)).astype(np.float32)
    part = rng.normal(size=(4, 5)).astype(np.float32)
    route_L = jnp.array(route)
    after = slices.put({"up": jnp.asarray(leaf)}, {"up": jnp.asarray(part)}, route_L)
    np.testing.assert_array_equal(slices.take(after, route_L)["up"], part)
    wanted = leaf.copy()
    for layer, expert in enumerate(route):
        wanted[layer, expert] = part[layer]
    np.testing.assert_array_equal(np.asarray(after["up"]).view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("which", ["params", "dense"])
def test_join_undoes_split(request, which):
    tree = request.getfixturevalue(which)
    trunk, experts = slices.split(tree, slices.stacked(tree))
    assert len(jax.tree.leaves(experts)) == (4 if which == "params" else 0)
    assert not any(is_expert(path) for path in by_name(trunk)) or which == "dense"
    assert len(jax.tree.leaves(trunk)) + len(jax.tree.leaves(experts)) == len(jax.tree.leaves(tree))
    chex.assert_trees_all_equal(slices.join(trunk, experts), tree)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_pull_keeps_the_mean_and_shrinks_the_distance_to_it(params, rate):
    pulled = merge.pull(params, rate)
    chex.assert_trees_all_close(merge.average_experts(pulled), merge.average_experts(params), rtol=1e-5, atol=1e-6)
    marks = slices.stacked(params)
    for before, after, is_stacked in zip(*map(jax.tree.leaves, (params, pulled, marks)), strict=True):
        if is_stacked:
            mean = before.mean(1, keepdims=True)
            np.testing.assert_allclose(after - mean, (1 - rate) * (before - mean), rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(before, after)


def test_upcycled_experts_are_the_dense_model_on_every_path_and_on_average(params):
    dense = merge.take_path(params, jnp.array([2, 0]))
    upcycled = merge.upcycle(dense, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(upcycled, params)
    chex.assert_trees_all_close(merge.average_experts(upcycled), dense, rtol=2e-7)  # a mean of three rounds
    chex.assert_trees_all_equal(merge.take_path(upcycled, jnp.array([3, 1])), dense)


@pytest.mark.parametrize("router", [None, RouterSettings("switch")], ids=["random", "switch"])
@pytest.mark.parametrize("pattern", [("dense", "experts"), ("experts", "experts", "dense"), ("experts",)])
def test_a_pattern_of_layers_merges_to_the_dense_tree_and_back(tiny_config, pattern, router):
    config = tiny_config(model={"depth": 6}).model
    model = vit.build(config, E, router=router, pattern=pattern)
    rng = np.random.default_rng(0)
    params, dense = (
        jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(x.dtype),
            jax.eval_shape(lambda net=net: vit.init(net, jax.random.key(0))),
        )
        for net in (model, model.plain())
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(merge.average_experts(params), dense)
    upcycled = merge.upcycle(dense, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(upcycled, params)
    chex.assert_trees_all_equal(merge.take_path(upcycled, jnp.array([0, 1, 2, 2, 1, 0])), dense)
    if router:
        last = f"block{pattern.index('experts')}"
        kept = [tree["blocks"].get(last, tree["blocks"])["mlp"]["router"] for tree in (upcycled, params)]
        chex.assert_trees_all_equal(*kept)
    # Every layer's MLP is that of the expert that the route names there.
    path = merge.take_path(params, jnp.array([0, 1, 2, 2, 1, 0]))["blocks"]["mlp"]["up"]
    for layer, expert in enumerate([0, 1, 2, 2, 1, 0]):
        turn, place = divmod(layer, len(pattern))
        blocks = params["blocks"] if len(pattern) == 1 else params["blocks"][f"block{place}"]
        leaf = blocks["mlp"]["up"][turn]
        np.testing.assert_array_equal(path[layer], leaf[expert] if pattern[place] == "experts" else leaf)
    layers = merge.expert_layers(params)["mlp"]["up"]
    assert layers.shape[:2] == (6 // len(pattern) * pattern.count("experts"), E)


def test_a_model_with_a_pattern_on_a_route_is_the_dense_model_on_its_path(tiny_config):
    config = tiny_config(model={"depth": 4}).model
    model = vit.build(config, E, pattern=("experts", "dense"))
    params = jax.jit(lambda: vit.init(model, jax.random.key(0)))()
    images, route_L = np.random.default_rng(0).normal(size=(5, 8, 8, 1)), jnp.array([2, 0, 1, 1])
    expected = jax.jit(lambda p: vit.logits(model.plain(), merge.take_path(p, route_L), images))(params)
    logits = jax.jit(lambda p: vit.logits(model, p, images, route_L))(params)
    chex.assert_trees_all_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_noise_sets_copies_apart_by_its_deviation_and_leaves_the_trunk_alone(params):
    equal = merge.upcycle(merge.take_path(params, jnp.zeros((2,), int)), params)
    apart = merge.add_noise(equal, jax.random.key(0), 0.1)
    marks = slices.stacked(params)
    trunks = [slices.split(tree, marks)[0] for tree in (apart, equal)]
    chex.assert_trees_all_equal(*trunks)
    before, after = (slices.split(tree, marks)[1]["blocks"]["mlp"]["up"] for tree in (equal, apart))
    noise = np.asarray(after - before)
    assert noise.std() == pytest.approx(0.1 * float(before.std()), rel=0.2)
    assert abs(noise.mean()) < noise.std()
    assert len({expert.tobytes() for expert in noise.swapaxes(0, 1)}) == noise.shape[1]
    chex.assert_trees_all_equal(merge.add_noise(equal, jax.random.key(0), 0.1), apart)
