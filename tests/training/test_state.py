import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvitmoe import routing
from jvitmoe.config import OptimConfig
from jvitmoe.data import augment
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params
from jvitmoe.models import vit
from jvitmoe.training import optimizer, state, update
from jvitmoe.training.state import OptState

E, L = 4, 2


@pytest.fixture(scope="module")
def params(tiny_config):
    """Returns the parameters of a run with experts, filled with noise."""
    rng = np.random.default_rng(1)
    shapes = routing.find(tiny_config(routing={"experts": E})).shapes()
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def layer(tiny_config):
    """Returns the routing that draws an expert for each layer."""
    return routing.find(tiny_config(routing={"experts": E, "kind": "layer"}))


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_an_experts_state_is_that_of_a_dense_optimiser_that_saw_only_its_steps(params, layer, name):
    tx = optimizer.find(OptimConfig(name=name, weight_decay=0.1, eps=1e-3))
    now = state.create(params, tx)
    rng = np.random.default_rng(0)
    routes_SL = [[0, 1], [0, 3], [2, 1], [0, 0], [2, 1], [1, 1]]  # layers differ; expert 3 of layer 0 never runs

    @jax.jit
    def step(now, grads, route_L):
        active = state.take(layer, now, (route_L,))
        direction, opt_state = update.directions(tx, grads, active.opt_state, active.params)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, active.params, direction)
        active = active._replace(step=now.step + 1, params=params, opt_state=opt_state)
        return state.put(layer, now, active, (route_L,))

    dense_step = jax.jit(tx.update)
    dense = {}
    for place in np.ndindex(E, L):
        p = jax.tree.map(lambda x, at=place: x[at], params.experts)
        dense[place] = p, tx.init(p)
    for route in routes_SL:
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
            state.take(layer, now, (jnp.array(route),)).params,
        )
        now = step(now, grads, jnp.array(route))
        for at, e in enumerate(route):
            p, opt_state = dense[e, at]
            grads_here = jax.tree.map(lambda g, at=at: g[0, at], grads.experts)
            direction, opt_state = dense_step(grads_here, opt_state, p)
            dense[e, at] = jax.tree.map(lambda x, d: x - 0.1 * d, p, direction), opt_state
    for place, (p, opt_state) in dense.items():
        here = jax.tree.map(lambda x, at=place: x[at], (now.params.experts, now.opt_state.experts))
        chex.assert_trees_all_close(here, (p, opt_state), rtol=1e-5, atol=1e-7)
    assert now.step == len(routes_SL)


def test_the_active_slice_is_the_dense_models_tree(params, layer, tiny_config):
    tx = optimizer.find(OptimConfig())
    dense = jax.eval_shape(lambda: vit.init(vit.build(tiny_config().model), jax.random.key(0)))
    active = state.take(layer, state.create(params, tx), (jnp.array([3, 1]),))
    chex.assert_trees_all_equal_shapes_and_dtypes(merge.average_experts(active.params), dense)
    wanted = jax.eval_shape(jax.vmap(jax.vmap(tx.init)), active.params.experts)  # one state per layer
    chex.assert_trees_all_equal_shapes_and_dtypes(active.opt_state.experts, wanted)
    assert {len(leaf) for leaf in jax.tree.leaves(active.opt_state.experts)} == {1}


@pytest.mark.slow
def test_one_expert_trains_as_plain_optax_on_the_dense_model(tiny_config, training):
    config = tiny_config(optim={"name": "adamw", "weight_decay": 0.1, "eps": 1e-3, "learning_rate": 1e-2})
    run = training(config).run(4)
    optax_schedule = run.plan.optimizer.schedule(run.plan.steps_per_epoch)
    mask = lambda tree: jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "up", "down"), tree)  # noqa: E731
    tx = optax.adamw(optax_schedule, eps=1e-3, weight_decay=0.1, mask=mask)
    params = run.history[0].params.trunk
    opt_state = tx.init(params)

    @jax.jit
    def plain_step(params, opt_state, images, labels):
        def loss_fn(params):
            logits = run.plan.model.apply({"params": params}, augment.normalize(images))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    per_epoch = run.plan.steps_per_epoch
    for step in range(4):
        index_B = np.asarray(run.plan.order.epoch(step // per_epoch))[step % per_epoch]
        params, opt_state = plain_step(params, opt_state, run.split.images_NHWc[index_B], run.split.labels_N[index_B])
        after = run.history[step + 1]
        chex.assert_trees_all_close(after.params, Params(params, {}), rtol=1e-5, atol=1e-6)
        assert isinstance(after.opt_state, OptState)
        for moment in ("mu", "nu"):
            ours = optax.tree.get(after.opt_state.trunk, moment)
            chex.assert_trees_all_close(ours, optax.tree.get(opt_state, moment), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [("experts", "dense"), ("dense", "dense", "experts")])
def test_with_a_pattern_an_experts_count_of_steps_is_taken_and_put_with_its_parameters(tiny_config, pattern):
    config = tiny_config(model={"depth": 6}, routing={"experts": E, "kind": "layer", "pattern": pattern})
    way = routing.find(config)
    shapes = jax.eval_shape(lambda: state.create(way.init(jax.random.key(0)), optimizer.find(config.optim)))
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    groups = 6 // len(pattern)

    def numbered(tree):
        """Returns the tree with each leaf [E, groups, ...] filled with the number of its group and expert."""
        number = np.arange(groups * E).reshape(groups, E).T
        return jax.tree.map(
            lambda x: jnp.broadcast_to(number.reshape(E, groups, *[1] * (x.ndim - 2)), x.shape).astype(x.dtype), tree
        )

    made = made._replace(
        params=made.params._replace(experts=numbered(made.params.experts)),
        opt_state=made.opt_state._replace(experts=numbered(made.opt_state.experts)),
    )
    route_L = np.array([3, 0, 2, 1, 1, 2])
    route_G = route_L[pattern.index("experts") :: len(pattern)]
    active = state.take(way, made, (jnp.asarray(route_L),))
    for leaf in jax.tree.leaves(active.opt_state.experts):
        np.testing.assert_array_equal(np.asarray(leaf).reshape(groups, -1)[:, 0], np.arange(groups) * E + route_G)
    counted = active._replace(opt_state=jax.tree.map(lambda x: x - x - 1, active.opt_state))
    after = state.put(way, made, counted, (jnp.asarray(route_L),))
    for leaf in jax.tree.leaves(after.opt_state.experts):
        changed = np.asarray(leaf).reshape(E, groups, -1)[..., 0] == -1
        np.testing.assert_array_equal(changed, np.arange(E)[:, None] == route_G)
