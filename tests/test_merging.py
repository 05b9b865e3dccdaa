import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing
from jvitmoe.experts import merge, trees

E = 3
EXPERT_LEAVES = {"up", "up_bias", "down", "down_bias"}


@pytest.fixture(scope="module")
def both(tiny_config):
    """Returns (stacked, dense) trees as `init` shapes them, filled with noise."""
    configs = [tiny_config(model={"head_hidden": 4}, routing={"experts": experts}) for experts in (E, 1)]
    return tuple(noise(routing.find(config).shapes(), np.random.default_rng(0)) for config in configs)


def noise(shapes, rng):
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture
def params(both):
    return both[0]


@pytest.fixture
def dense(both):
    return both[1]


def by_name(tree):
    """Returns {path: leaf as NumPy}."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def is_expert(path: str) -> bool:
    return path.split("'")[-2] in EXPERT_LEAVES


def test_only_the_four_mlp_leaves_have_an_expert_axis(params, dense):
    marks, dense_marks = by_name(trees.stacked(params)), by_name(trees.stacked(dense))
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


def test_a_path_takes_each_layer_from_its_own_expert_and_the_trunk_as_it_is(params):
    before, after = by_name(params), by_name(merge.take_path(params, jnp.array([2, 1])))
    for path, leaf in after.items():
        wanted = np.stack([before[path][0, 2], before[path][1, 1]]) if is_expert(path) else before[path]
        np.testing.assert_array_equal(leaf, wanted)


@pytest.mark.parametrize("route", [1, [0, 0, 0, 0], [2, 0, 1, 0], [1, 1, 2, 2]])
def test_put_writes_what_take_reads_and_nothing_else(route):
    rng = np.random.default_rng(0)
    leaf = rng.normal(size=(4, E, 5)).astype(np.float32)
    part = rng.normal(size=(4, 5)).astype(np.float32)
    route_L = jnp.array(route)
    after = trees.put({"up": jnp.asarray(leaf)}, {"up": jnp.asarray(part)}, route_L)
    np.testing.assert_array_equal(trees.take(after, route_L)["up"], part)
    wanted = leaf.copy()
    for layer, expert in enumerate(np.broadcast_to(route, 4)):
        wanted[layer, expert] = part[layer]
    np.testing.assert_array_equal(np.asarray(after["up"]).view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("which", ["params", "dense"])
def test_join_undoes_split(request, which):
    tree = request.getfixturevalue(which)
    trunk, experts = trees.split(tree, trees.stacked(tree))
    assert len(jax.tree.leaves(experts)) == (4 if which == "params" else 0)
    assert not any(is_expert(path) for path in by_name(trunk)) or which == "dense"
    assert len(jax.tree.leaves(trunk)) + len(jax.tree.leaves(experts)) == len(jax.tree.leaves(tree))
    chex.assert_trees_all_equal(trees.join(trunk, experts), tree)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_pull_keeps_the_mean_and_shrinks_the_distance_to_it(params, rate):
    pulled = merge.pull(params, rate)
    chex.assert_trees_all_close(merge.average_experts(pulled), merge.average_experts(params), rtol=1e-5, atol=1e-6)
    marks = trees.stacked(params)
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


@pytest.mark.parametrize("kind", ["soft", "switch"])
@pytest.mark.parametrize("pattern", [("dense", "experts"), ("experts", "experts", "dense"), ("experts",)])
def test_a_pattern_of_layers_merges_to_the_dense_tree_and_back(tiny_config, pattern, kind):
    routed = {"experts": E, "kind": kind, "pattern": pattern}
    configs = [tiny_config(model={"depth": 6}, routing=settings) for settings in (routed, {})]
    rng = np.random.default_rng(0)
    params, dense = (noise(routing.find(config).shapes(), rng) for config in configs)
    chex.assert_trees_all_equal_shapes_and_dtypes(merge.average_experts(params), dense)
    upcycled = merge.upcycle(dense, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(upcycled, params)
    chex.assert_trees_all_equal(merge.take_path(upcycled, jnp.array([0, 1, 2, 2, 1, 0])), dense)
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
