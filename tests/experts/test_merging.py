import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing
from jvitmoe.experts import merge
from jvitmoe.experts import params as params_lib
from jvitmoe.experts.params import Params
from jvitmoe.models import vit

E = 3
EXPERT_LEAVES = {"up", "up_bias", "down", "down_bias"}


@pytest.fixture(scope="module")
def both(tiny_config):
    """Returns the parameters of E experts and of a dense run as `init` shapes them, filled with noise."""
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


def test_experts_own_the_four_leaves_of_their_mlps_and_the_trunk_has_the_rest(params, dense):
    owned = {name: (E, *leaf.shape) for name, leaf in dense.trunk["blocks"]["mlp"].items()}
    assert {name: leaf.shape for name, leaf in params.experts["mlp"].items()} == owned
    assert owned.keys() == EXPERT_LEAVES
    assert by_name(dense.trunk).keys() - by_name(params.trunk).keys() == {
        f"['blocks']['mlp']['{name}']" for name in EXPERT_LEAVES
    }
    assert dense.experts == {}


def test_averaging_is_the_mean_over_experts_and_leaves_the_trunk_alone(params):
    merged = merge.average_experts(params)
    for name, leaf in params.experts["mlp"].items():
        mean = sum(np.asarray(leaf[e], np.float64) for e in range(E)) / E
        np.testing.assert_allclose(merged["blocks"]["mlp"][name], mean, rtol=1e-6, atol=1e-7)
    after = by_name(merged)
    for path, leaf in by_name(params.trunk).items():
        np.testing.assert_array_equal(after[path], leaf)


def test_a_dense_tree_passes_through_unchanged(dense):
    chex.assert_trees_all_equal(merge.average_experts(dense), dense.trunk)
    chex.assert_trees_all_equal(merge.take_path(dense, jnp.zeros(2, jnp.int32)), dense.trunk)


def test_a_path_takes_each_layer_from_its_own_expert_and_the_trunk_as_it_is(params):
    path = merge.take_path(params, jnp.array([2, 1]))
    for name, leaf in params.experts["mlp"].items():
        np.testing.assert_array_equal(path["blocks"]["mlp"][name], np.stack([leaf[2, 0], leaf[1, 1]]))
    after = by_name(path)
    for name, leaf in by_name(params.trunk).items():
        np.testing.assert_array_equal(after[name], leaf)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_pull_keeps_the_mean_and_shrinks_the_distance_to_it(params, rate):
    pulled = merge.pull(params, rate)
    chex.assert_trees_all_close(merge.average_experts(pulled), merge.average_experts(params), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(pulled.trunk, params.trunk)
    for name, before in params.experts["mlp"].items():
        mean = before.mean(0, keepdims=True)
        after = pulled.experts["mlp"][name]
        np.testing.assert_allclose(after - mean, (1 - rate) * (before - mean), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("routed", [{}, {"part": "model"}, {"init": "independent"}], ids=str)
def test_upcycled_experts_are_the_dense_model_on_every_path_and_on_average(tiny_config, dense, routed):
    way = routing.find(tiny_config(model={"head_hidden": 4}, routing={"experts": E} | routed))
    upcycled = jax.jit(way.init)(jax.random.key(0), dense.trunk)
    chex.assert_trees_all_equal_shapes_and_dtypes(upcycled, way.shapes())
    chex.assert_trees_all_close(merge.average_experts(upcycled), dense.trunk, rtol=2e-7)  # a mean of three rounds
    for route in ([0], [2]) if routed.get("part") else ([2, 0], [1]):
        chex.assert_trees_all_equal(merge.take_path(upcycled, jnp.array(route)), dense.trunk)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [(("dense", "experts"), "soft"), (("experts", "experts", "dense"), "switch"), (("experts",), "soft")],
)
def test_a_pattern_of_layers_merges_to_the_dense_tree_and_back(tiny_config, pattern, kind):
    routed = {"experts": E, "kind": kind, "pattern": pattern}
    made, plain = (routing.find(tiny_config(model={"depth": 6}, routing=settings)) for settings in (routed, {}))
    rng = np.random.default_rng(0)
    params, dense = (noise(way.shapes(), rng) for way in (made, plain))
    chex.assert_trees_all_equal_shapes_and_dtypes(merge.average_experts(params), dense.trunk)
    upcycled, drawn = (jax.jit(made.init)(jax.random.key(0), trained) for trained in (dense.trunk, None))
    chex.assert_trees_all_equal_shapes_and_dtypes(upcycled, params)
    route_L = np.array([0, 1, 2, 2, 1, 0])
    route_X = jnp.array(route_L[np.array(made.layers_with_experts)])
    chex.assert_trees_all_equal(merge.take_path(upcycled, route_X), dense.trunk)
    last = f"block{pattern.index('experts')}"
    kept = [tree.trunk["blocks"].get(last, tree.trunk["blocks"])["mlp"]["router"] for tree in (upcycled, drawn)]
    chex.assert_trees_all_equal(*kept)
    # Every layer's MLP is that of the expert that the route names there.
    path, leaf = merge.take_path(params, route_X)["blocks"]["mlp"]["up"], params.experts["mlp"]["up"]
    assert leaf.shape[:2] == (E, 6 // len(pattern) * pattern.count("experts"))
    for layer, expert in enumerate(route_L):
        turn, place = divmod(layer, len(pattern))
        if layer in made.layers_with_experts:
            wanted = leaf[expert, made.layers_with_experts.index(layer)]
        else:
            wanted = params.trunk["blocks"][f"block{place}"]["mlp"]["up"][turn]
        np.testing.assert_array_equal(path[layer], wanted)


@pytest.mark.parametrize("pattern", [("experts",), ("experts", "dense", "experts")])
def test_a_model_is_called_with_the_tree_that_it_draws(tiny_config, pattern):
    """Of one expert, and with a router of all of them; the leaves of each layer are where the model looks for them."""
    for kind in ("sample", "switch"):
        routed = {"experts": E, "kind": kind, "pattern": pattern}
        way = routing.find(tiny_config(model={"depth": 6}, routing=routed, train={"batch_size": 9}))
        params = noise(way.shapes(), np.random.default_rng(0))
        if kind == "switch":
            joined, wanted_X = params_lib.join_all(params), params.experts["mlp"]["up"].swapaxes(0, 1)
        else:
            joined, wanted_X = (
                params_lib.join(params.trunk, params_lib.one(params.experts)),
                params.experts["mlp"]["up"][0],
            )
        chex.assert_trees_all_equal_shapes_and_dtypes(joined, vit.shapes(way.model()))
        for wanted, layer in zip(wanted_X, way.layers_with_experts, strict=True):
            turn, place = divmod(layer, len(pattern))
            blocks = joined["blocks"].get(f"block{place}", joined["blocks"])
            np.testing.assert_array_equal(blocks["mlp"]["up"][turn], wanted)


def test_the_outputs_of_experts_are_scaled_by_the_gate_of_their_layer(params):
    scaled = merge.scale_by_gate(params, jnp.array([0.5, 2.0]))
    for name, leaf in params.experts["mlp"].items():
        factor = np.array([0.5, 2.0]) if name.startswith("down") else np.ones(2)
        np.testing.assert_allclose(scaled.experts["mlp"][name], leaf * factor.reshape(1, 2, *[1] * (leaf.ndim - 2)))
    assert isinstance(scaled, Params)
