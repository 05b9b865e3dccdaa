import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe.config import Config, RoutingConfig
from jvitmoe.experts.routes import Purpose, address, constant_route, describe, distinct_route, draw_route


def bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def many_routes(count: int, experts: int, scope: str, depth: int) -> np.ndarray:
    """Returns routes_NL of `count` steps."""
    config = RoutingConfig(experts=experts, scope=scope)
    root = jax.random.key(3)
    return np.asarray(
        jax.jit(jax.vmap(lambda step: draw_route(address(root, Purpose.ROUTE, step), config, depth, 1)))(
            jnp.arange(count)
        )
    )


def test_purposes_are_pinned():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "INIT": 0,
        "ORDER": 1,
        "AUGMENT": 2,
        "DROPOUT": 3,
        "ROUTE": 4,
        "PATH": 5,
        "SECOND_ROUTE": 6,
        "NOISE": 7,
    }


@pytest.mark.parametrize(
    ("routing", "says"),
    [
        ({}, "one is drawn for each batch; never pulled together"),
        (
            {"tie_last": 0.2},
            "one is drawn for each batch; never pulled together; all equal in the last 20% of training",
        ),
        (
            {"granularity": "token", "pull": 0.1, "pull_schedule": "rising"},
            "a random share of the tokens; pulled together by 0.1 (rising)",
        ),
        ({"granularity": "sample", "pull": 1.0}, "images; averaged after every step, so all are equal"),
        ({"granularity": "sample", "pull": 1.0, "pull_every": 2}, "images; pulled together by 1 (constant)"),
        ({"router": "switch"}, "4 experts per MLP: switch routes the tokens; never pulled together"),
        ({"router": "switch", "pull": 0.1}, "switch routes the tokens; pulled together by 0.1 (constant)"),
    ],
)
def test_a_run_says_how_it_routes(routing, says):
    assert describe(Config(routing=RoutingConfig(experts=4, **routing))).endswith(says)


def test_an_address_is_pure():
    one = bits(address(jax.random.key(7), Purpose.ROUTE, 5, 2))
    assert one == bits(address(jax.random.key(7), Purpose.ROUTE, jnp.int32(5), jnp.int32(2)))
    assert one == bits(jax.jit(lambda step: address(jax.random.key(7), Purpose.ROUTE, step, 2))(5))


def test_addresses_differ_across_seeds_purposes_and_numbers():
    numbers = [(), *((i,) for i in range(5)), *itertools.product(range(5), range(3))]
    keys = [bits(address(jax.random.key(seed), purpose, *n)) for seed in (0, 1) for purpose in Purpose for n in numbers]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_a_route_is_one_integer_per_layer_in_range(scope):
    routes_NL = many_routes(200, 3, scope, depth=5)
    chex.assert_shape(routes_NL, (200, 5))
    assert routes_NL.dtype == np.int32
    assert set(routes_NL.ravel().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_every_expert_of_every_layer_is_drawn_equally_often(scope):
    experts, count = 6, 6000
    for column_N in many_routes(count, experts, scope, depth=3).T:
        seen_E = np.bincount(column_N, minlength=experts)
        chi_square = ((seen_E - count / experts) ** 2 / (count / experts)).sum()
        assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in 1,000


def test_scope_shared_gives_every_layer_the_same_expert():
    routes_NL = many_routes(200, 4, "shared", depth=6)
    np.testing.assert_array_equal(routes_NL, np.broadcast_to(routes_NL[:, :1], routes_NL.shape))


def test_scope_layer_draws_layers_independently():
    routes_NL = many_routes(4000, 4, "layer", depth=3)
    for i, j in itertools.combinations(range(3), 2):
        assert 0.22 < (routes_NL[:, i] == routes_NL[:, j]).mean() < 0.28  # 1/4, give or take four deviations


def test_routes_differ_from_step_to_step():
    repeats = (np.diff(many_routes(4000, 4, "shared", depth=1)[:, 0]) == 0).mean()
    assert 0.22 < repeats < 0.28


def test_a_constant_route_is_the_expert_in_every_layer():
    route_L = constant_route(2, 4)
    assert route_L.dtype == jnp.int32
    np.testing.assert_array_equal(route_L, [2, 2, 2, 2])


@pytest.mark.parametrize("scope", ["shared", "layer"])
@pytest.mark.parametrize(("granularity", "shape"), [("sample", (5, 4)), ("token", (5, 7, 4))])
def test_a_route_over_slots_is_a_uniform_permutation(granularity, shape, scope):
    config = RoutingConfig(experts=4, granularity=granularity, scope=scope)
    keys = jax.random.split(jax.random.key(0), 2000)
    routes = np.asarray(jax.jit(jax.vmap(lambda key: draw_route(key, config, 5, 7)))(keys))
    chex.assert_shape(routes, (2000, *shape))
    assert routes.dtype == np.int32
    assert (np.sort(routes, axis=-1) == np.arange(4)).all()  # balanced: every expert serves exactly one slot
    assert (routes == routes[:, :1]).all() == (scope == "shared")
    last = routes[:, -1] if granularity == "sample" else routes[:, -1, 3]
    _, counts = np.unique(last, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 2000 / 24) ** 2 / (2000 / 24)).sum() < 58  # chi-square, 23 degrees of freedom, p = 1e-4
    if granularity == "token":
        assert (routes[:, 0, 0] != routes[:, 0, 1]).any()


@pytest.mark.parametrize("scope", ["shared", "layer"])
@pytest.mark.parametrize("granularity", ["batch", "sample", "token"])
def test_a_second_route_differs_everywhere_and_is_as_good(granularity, scope):
    config = RoutingConfig(experts=3, granularity=granularity, scope=scope)
    shifts = set()
    for seed in range(20):
        first_key, second_key = jax.random.split(jax.random.key(seed))
        first = draw_route(first_key, config, 4, 5)
        second = distinct_route(second_key, first, config)
        assert second.shape == first.shape
        assert (np.asarray(first) != np.asarray(second)).all()
        if granularity != "batch":
            assert (np.sort(second, axis=-1) == np.arange(3)).all()
        if scope == "shared":
            assert (second == second[:1]).all()
        shifts |= set(np.unique((second - first) % 3).tolist())
    assert shifts == {1, 2}
