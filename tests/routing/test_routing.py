"""Routes and the ways of routing, without training.

N steps · L layers · E experts
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing
from jvitmoe.config import Config, ModelConfig, RoutingConfig, TrainConfig
from jvitmoe.experts.params import join, one
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.models.layers import Site
from jvitmoe.routing import StepInfo

DEPTH = 5


def find(experts: int = 4, **routed: object) -> routing.Routing:
    model, train = ModelConfig(depth=DEPTH), TrainConfig(batch_size=12)
    return routing.find(Config(model=model, routing=RoutingConfig(experts=experts, **routed), train=train))


def bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def many_routes(count: int, **routed: object) -> tuple[np.ndarray, ...]:
    """Returns the routes of `count` steps, an array per pass."""
    way, root = find(**routed), jax.random.key(3)
    return tuple(map(np.asarray, jax.jit(jax.vmap(lambda step: way.draw(root, step)))(jnp.arange(count))))


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_purposes_are_pinned():
    names = ["INIT", "ORDER", "AUGMENT", "DROPOUT", "ROUTE", "PATH", "SECOND_ROUTE"]
    assert {purpose.name: purpose.value for purpose in Purpose} == {name: n for n, name in enumerate(names)}
    names = ["HIDDEN", "WEIGHTS", "ATTENTION", "MLP", "ROUTER_NOISE", "EXPERTS", "ATTENTION_PATH", "MLP_PATH"]
    assert {site.name: site.value for site in Site} == {name: n for n, name in enumerate(names)}


def test_an_address_is_pure():
    one = bits(address(jax.random.key(7), Purpose.ROUTE, 5, 2))
    assert one == bits(address(jax.random.key(7), Purpose.ROUTE, jnp.int32(5), jnp.int32(2)))
    assert one == bits(jax.jit(lambda step: address(jax.random.key(7), Purpose.ROUTE, step, 2))(5))


def test_addresses_differ_across_seeds_purposes_and_numbers():
    numbers = [(), *((i,) for i in range(5)), *itertools.product(range(5), range(3))]
    keys = [bits(address(jax.random.key(seed), purpose, *n)) for seed in (0, 1) for purpose in Purpose for n in numbers]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("kind", "shape"), [("batch", (1,)), ("layer", (DEPTH,)), ("sample", (6,))])
def test_every_expert_is_drawn_equally_often(kind, shape):
    (routes_N,) = many_routes(6000, experts=6, kind=kind)
    chex.assert_shape(routes_N, (6000, *shape))
    assert routes_N.dtype == np.int32
    for column_N in routes_N.T:
        assert chi_square(np.bincount(column_N, minlength=6)) < 20.5  # 5 degrees of freedom: exceeded once in 1,000


def test_layers_and_steps_are_drawn_independently():
    (routes_NL,) = many_routes(4000, kind="layer")
    for i, j in itertools.combinations(range(DEPTH), 2):
        assert 0.22 < (routes_NL[:, i] == routes_NL[:, j]).mean() < 0.28  # 1/4, give or take four deviations
    (routes_N1,) = many_routes(4000, kind="batch")
    assert 0.22 < (np.diff(routes_N1[:, 0]) == 0).mean() < 0.28


def test_a_route_over_parts_of_the_batch_is_a_uniform_permutation():
    (routes_NE,) = many_routes(2000, kind="sample")
    assert (np.sort(routes_NE, axis=-1) == np.arange(4)).all()  # every expert sees exactly one part
    _, counts = np.unique(routes_NE, axis=0, return_counts=True)
    assert len(counts) == 24
    assert chi_square(counts) < 58  # 23 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("kind", ["batch", "layer", "sample"])
def test_a_second_route_differs_everywhere_and_is_as_good(kind):
    first_N, second_N = many_routes(50, experts=3, kind=kind, consistency=1.0)
    assert (first_N != second_N).all()
    shift_N = (second_N - first_N) % 3
    assert set(shift_N.ravel().tolist()) == {1, 2}
    assert (shift_N != shift_N[:, :1]).any() == (kind == "layer")  # a shift of its own for each layer
    np.testing.assert_array_equal(first_N, many_routes(50, experts=3, kind=kind)[0])  # the first is as without it
    if kind == "sample":
        assert (np.sort(second_N, axis=-1) == np.arange(3)).all()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_put_undoes_take_and_writes_nothing_else(kind, passes):
    way = find(kind=kind, consistency=float(passes - 1))
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(rng.normal(size=(4, DEPTH, 3)), jnp.float32)
    for step in range(3):
        routes = way.draw(jax.random.key(0), jnp.int32(step))
        taken = way.take({"up": leaf}, routes)
        chex.assert_shape(taken["up"], (passes, DEPTH, 3))
        chex.assert_trees_all_equal(way.put({"up": leaf}, taken, routes), {"up": leaf})
        written = np.asarray(way.put({"up": leaf}, jax.tree.map(lambda x: x + 100, taken), routes)["up"]) - leaf > 50
        ran = np.zeros((4, DEPTH), bool)
        for route in routes:
            ran[np.broadcast_to(route, DEPTH), np.arange(DEPTH)] = True
        np.testing.assert_array_equal(written, np.broadcast_to(ran[:, :, None], leaf.shape))
        assert ran.sum() == DEPTH * passes


@pytest.mark.parametrize(("kind", "init"), [("batch", "shared"), ("sample", "independent"), ("switch", "shared")])
def test_experts_start_as_dense_models(tiny_config, kind, init):
    """Equal ones average to the dense model's own start; different ones differ, each drawn for its own fan-in."""
    routed = {"experts": 3, "kind": kind, "init": init}
    made = routing.find(tiny_config(model={"hidden": 40}, routing=routed, train={"batch_size": 12}))
    dense = routing.find(tiny_config(model={"hidden": 40}))
    params, alone = (jax.jit(way.init)(jax.random.key(0)) for way in (made, dense))
    for name, leaf in params.experts["mlp"].items():
        own = alone.trunk["blocks"]["mlp"][name]
        assert leaf.shape == (3, *own.shape)
        bound = (40 if name.startswith("down") else 8) ** -0.5
        assert np.abs(leaf).max() <= bound
        if init == "shared":
            np.testing.assert_array_equal(leaf, np.broadcast_to(own, leaf.shape))
        else:
            assert len({np.asarray(leaf[e]).tobytes() for e in range(3)}) == 3
            assert np.abs(leaf).max() > 0.8 * bound
    for path, leaf in jax.tree.leaves_with_path(params.trunk):
        if all(entry.key != "router" for entry in path):
            found = alone.trunk
            for entry in path:
                found = found[entry.key]
            np.testing.assert_array_equal(leaf, found)


def test_a_pass_of_sample_is_each_expert_on_its_part(tiny_config):
    config = tiny_config(routing={"experts": 2, "kind": "sample", "consistency": 1.0})
    way, rng = routing.find(config), np.random.default_rng(0)
    model, params = way.model(), jax.jit(way.init)(jax.random.key(1))
    images_BHWc = jnp.asarray(rng.normal(size=(6, 8, 8, 1)), jnp.float32)
    routes = way.draw(jax.random.key(0), jnp.int32(0))
    for number in (0, 1):
        found, _ = way.logits(model, params, images_BHWc, None, StepInfo(number, routes))
        for part in range(2):
            expert = (part + number) % 2  # with two experts the second route swaps them
            tree = join(params.trunk, one(params.experts, expert))
            wanted = model.apply({"params": tree}, images_BHWc[3 * part : 3 * part + 3])
            np.testing.assert_allclose(found[3 * part : 3 * part + 3], wanted, rtol=1e-5, atol=1e-6)
