"""To add one of each kind takes a class or function and a line in a registry. The kinds added here are toys."""

import contextlib
import dataclasses
import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvitmoe import config as config_lib
from jvitmoe import routing
from jvitmoe.config import ModelConfig, OptimConfig
from jvitmoe.data import augment, sources
from jvitmoe.data.pictures import DataError
from jvitmoe.data.splits import Dataset, Source, check_fit, in_memory
from jvitmoe.errors import ConfigError
from jvitmoe.experts import cost
from jvitmoe.experts import params as params_lib
from jvitmoe.experts.params import Params
from jvitmoe.machine import compilation
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.models import vit
from jvitmoe.models.routers import ROUTERS, find
from jvitmoe.models.routers.dispatch import Router, RouterSettings, fill_slots
from jvitmoe.models.routers.dispatch import statistics as statistics_of
from jvitmoe.routing import Routing
from jvitmoe.runs.checkpoint_writer import CheckpointWriter
from jvitmoe.training import losses, optimizer, state
from jvitmoe.training.update import directions

pytestmark = pytest.mark.slow


class RoundRobin(Router):
    """Token t goes to the expert t mod E, scaled by a learned gate."""

    @nn.compact
    def route(self, x_BTD, key_B):
        batch, tokens, _ = x_BTD.shape
        logits_BTE = self.logits(x_BTD)
        choice_BT1 = jnp.broadcast_to(jnp.arange(tokens)[None, :, None] % self.experts, (batch, tokens, 1))
        weight_BT1 = jnp.take_along_axis(jax.nn.softmax(logits_BTE), choice_BT1, axis=-1)
        slots, load_E, dropped = fill_slots(choice_BT1, weight_BT1, self.experts, self.capacity(tokens, key_B))
        return slots, statistics_of(logits_BTE, load_E, dropped)

    @staticmethod
    def loss(statistics):
        return statistics.entropy.mean()


def test_a_router_is_a_class_and_a_line_in_its_registry(monkeypatch, tiny_config, training):
    monkeypatch.setitem(ROUTERS, "round_robin", RoundRobin)
    routed = {"experts": 2, "kind": "round_robin", "capacity": 2.0}
    run = training(tiny_config(routing=routed)).run(3)
    first, last = (run.history[n].params for n in (0, -1))
    routers = [params.trunk["blocks"]["mlp"]["router"]["kernel"] for params in (first, last)]
    assert not np.array_equal(*routers)
    assert not np.array_equal(first.experts["mlp"]["up"][1], last.experts["mlp"]["up"][1])
    tokens, statistics = run.plan.model.config.tokens, run.metrics[0].router
    share_E = np.bincount(np.arange(tokens) % 2) / tokens
    np.testing.assert_allclose(statistics.load_E, np.stack([share_E] * 2), rtol=1e-6)
    unbalanced = training(tiny_config(routing=routed | {"balance_loss": 0.0})).run(1)
    balance_loss = run.metrics[0].loss - unbalanced.metrics[0].loss
    np.testing.assert_allclose(balance_loss, 0.01 * statistics.entropy.mean(), rtol=1e-3)
    active, total = run.plan.routing.count_parameters()
    assert 0 < active < total
    with pytest.raises(ConfigError, match="must be 1 for a router with a balance loss"):
        routing.find(tiny_config(routing=routed, train={"accumulate": 2}))


class SecondMoment(RoundRobin):
    """Its balance loss is the square of the mean over the entries of a gated product of the tokens with themselves."""

    @nn.compact
    def route(self, x_BTD, key_B):
        slots, statistics = RoundRobin.route(self, x_BTD, key_B)
        gate_BT = jax.nn.sigmoid(self.logits(x_BTD)[..., 0])
        x_BTD = jax.lax.stop_gradient(x_BTD)
        moment_BDD = jnp.einsum("bti,btj->bij", x_BTD, gate_BT[..., None] * x_BTD)
        return slots, statistics._replace(entropy=moment_BDD.mean())

    @staticmethod
    def loss(statistics):
        return jnp.square(statistics.entropy).mean()


def test_a_router_with_the_derivative_of_a_mean_has_right_gradients(monkeypatch, tiny_config, training):
    """XLA's default on CPUs computes the sum of products in it wrongly; in bfloat16 too: test_compilation.py."""
    monkeypatch.setitem(ROUTERS, "second_moment", SecondMoment)
    model = {"image_size": 8, "patch": 1, "width": 60, "dtype": "float32"}
    config = tiny_config(model=model, routing={"experts": 2, "kind": "second_moment", "balance_loss": 1.0})
    runs = []
    for options in (compilation.of_training(jnp.dtype("float32"), "cpu"), {compilation.YNNPACK: ""}):
        as_trained = {"xla_backend_optimization_level": 3, **options}  # the other tests leave out LLVM's optimisation
        monkeypatch.setattr(compilation, "of_training", lambda *_, options=as_trained: options)
        runs.append(training(config).run(1))
    norms = [float(run.metrics[0].grad_norm) for run in runs]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    moments = [run.history[1].opt_state.trunk for run in runs]
    chex.assert_trees_all_close(*moments, rtol=1e-2, atol=1e-3)


class Pairs(Routing):
    """Two experts are drawn, their mean runs, and both take its step. The logits are halved, and experts learn in the
    first two steps only."""

    meaning = "two are drawn for each batch, and their mean runs"

    @classmethod
    def faults(cls, config):
        yield from super().faults(config)
        if config.routing.experts < 3:
            yield "routing.experts", "must be above 2 for routing.kind=pairs"

    def draw(self, root, step):
        return (jax.random.permutation(address(root, Purpose.ROUTE, step), self.experts)[:2],)

    def take(self, experts, routes):
        pair = [params_lib.take(experts, expert[None]) for expert in routes[0]]
        return jax.tree.map(lambda a, b: (a + b) // 2 if a.dtype == jnp.int32 else (a + b) / 2, *pair)

    def put(self, experts, taken, routes):
        step = jax.tree.map(jnp.subtract, taken, self.take(experts, routes))
        for expert in routes[0]:
            moved = jax.tree.map(jnp.add, params_lib.take(experts, expert[None]), step)
            experts = params_lib.put(experts, moved, expert[None])
        return experts

    def logits(self, model, given, images_bHWc, key_b, info):
        tree = params_lib.join(given.trunk, params_lib.one(given.experts))
        return vit.logits(model, tree, images_bHWc, key_b) / 2, None

    def rate(self, step):
        return super().rate(step) * (step < 2)


def test_a_way_of_routing_is_a_class_and_a_line(monkeypatch, tiny_config, training):
    monkeypatch.setitem(routing.ROUTINGS, "pairs", Pairs)
    run = training(tiny_config(routing={"experts": 4, "kind": "pairs"})).run(4)
    way = run.plan.routing
    for step, (before, after) in enumerate(zip(run.history, run.history[1:], strict=False)):
        (route,) = map(np.asarray, way.draw(jax.random.key(0), jnp.int32(step)))
        counts = [optax.tree.get(now.opt_state.experts, "count") for now in (before, after)]
        np.testing.assert_array_equal(counts[1] - counts[0], np.isin(np.arange(4), route)[:, None].repeat(2, 1))
        moved_ELDF = after.params.experts["mlp"]["up"] - before.params.experts["mlp"]["up"]
        assert set(np.flatnonzero(moved_ELDF.any((1, 2, 3)))) == (set(route.tolist()) if step < 2 else set())
        np.testing.assert_allclose(moved_ELDF[route[0]], moved_ELDF[route[1]], atol=1e-6)
    # The loss of the first step is that of half the logits of the mean of two experts.
    start, index_B = run.history[0].params, np.asarray(run.plan.order.epoch(0))[0]

    @jax.jit
    def loss(start):
        given = start._replace(experts=way.take(start.experts, way.draw(jax.random.key(0), jnp.int32(0))))
        tree = params_lib.join(given.trunk, params_lib.one(given.experts))
        logits_BC = vit.logits(run.plan.model, tree, jnp.asarray(run.split.images_NHWc[index_B]) / 127.5 - 1.0) / 2
        return optax.softmax_cross_entropy_with_integer_labels(logits_BC, run.split.labels_N[index_B]).mean()

    np.testing.assert_allclose(run.metrics[0].loss, loss(start), rtol=1e-5)
    with pytest.raises(ConfigError, match=r"routing\.experts is 2; it must be above 2"):
        routing.find(tiny_config(routing={"experts": 2, "kind": "pairs"}))
    with pytest.raises(ConfigError, match=r"model\.shared_hidden is 3; it must be 0 without a router"):
        routing.find(tiny_config(routing={"experts": 3, "kind": "pairs"}, model={"shared_hidden": 3}))


def test_the_choices_of_a_setting_are_the_names_of_its_registry():
    choices = {path: field.metadata["choices"] for path, field in config_lib.SETTINGS.items()}
    assert choices["routing.consistency_loss"] == tuple(losses.CONSISTENCY_LOSSES)


def test_each_router_says_how_many_experts_a_token_passes_through():
    most = {name: find(name).most_experts(2, 8) for name in ROUTERS}
    settings = {name: RouterSettings(name, 8, top_k, capacity=1.5) for name, top_k in most.items()}
    found = {name: find(name).active_experts(settings[name], tokens=16) for name in ROUTERS}
    assert found == {"switch": 1, "topk": 2, "expert_choice": 1.5, "soft": 1, "hash": 1, "token": 1}
    assert find("expert_choice").active_experts(settings["expert_choice"], tokens=4) == 2  # one slot per expert


@pytest.mark.parametrize("capacity", [1.0, 1.5, 4.0])
def test_the_parameters_of_a_token_under_expert_choice_follow_its_capacity(tiny_config, capacity):
    config = tiny_config(routing={"experts": 2, "kind": "expert_choice", "capacity": capacity})
    way = routing.find(config)
    (active, total), experts = way.count_parameters(), way.shapes().experts
    tokens = config.model.tokens
    taken = min(math.ceil(capacity * tokens / 2), tokens)  # by each of the two experts
    assert active == total - round((1 - taken / tokens) * cost.tree_size(experts))


def changed(config, section, **fields):
    """Returns the config with other values in one section, unvalidated: names of this file are new to it."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def test_a_data_source_is_a_class_and_a_line(tiny_config, tiny_split, monkeypatch):
    class Toy(Source):
        def browse(self):
            check_fit("toy", (8, 8, 1), 3, self.model)
            return Dataset(in_memory(tiny_split), in_memory(tiny_split.select(np.arange(9))), ("a", "b", "c"))

    monkeypatch.setitem(sources.SOURCES, "toy", Toy)
    config = tiny_config(data={"name": "toy"})
    found, records = sources.load(config.data, config.model), sources.browse(config.data, config.model)
    assert (len(found.train), len(found.test), len(records.train)) == (26, 9, 26)
    np.testing.assert_array_equal(found.train.images_NHWc, tiny_split.images_NHWc)
    np.testing.assert_array_equal(found.train.labels_N, tiny_split.labels_N)
    with pytest.raises(DataError, match="toy has 3 classes"):
        sources.load(config.data, ModelConfig())


def test_an_augmentation_is_a_function_and_a_line(tiny_config, training, monkeypatch):
    """The toy gives each image the target of the next class. Logged accuracy stays that on its own label."""

    def shift(batch, images_bHWc, targets_bC):
        return images_bHWc, jnp.roll(targets_bC, 1, axis=-1)

    (plain,) = training(tiny_config()).run(1).metrics
    monkeypatch.setitem(augment.AUGMENTATIONS, "shift", lambda data: shift)
    (shifted,) = training(tiny_config()).run(1).metrics
    assert np.isfinite(shifted.loss)
    assert shifted.loss != plain.loss
    assert shifted.accuracy == plain.accuracy


def toy_optimizer(optim):
    """Returns the direction of LAMB without Adam: each leaf scaled to the norm of its parameter."""
    return optimizer.per_layer(optax.scale_by_trust_ratio())


def test_an_optimiser_is_a_factory_and_a_line(tiny_config, training, monkeypatch, tmp_path):
    monkeypatch.setitem(optimizer.OPTIMIZERS, "toy", toy_optimizer)
    config = changed(tiny_config(routing={"experts": 2}), "optim", name="toy")
    run = training(config).run(3)
    assert all(np.isfinite(metrics.loss) for metrics in run.metrics)
    before, after = run.history[0].params, run.history[-1].params
    assert (before.experts["mlp"]["up"] != after.experts["mlp"]["up"]).any()
    with contextlib.closing(CheckpointWriter(tmp_path / "checkpoints", 1)) as checkpoints:
        checkpoints.save(run.state, config, None)  # the toy has no state
    with contextlib.closing(CheckpointWriter(tmp_path / "checkpoints", 1)) as checkpoints:
        restored, _ = checkpoints.restore(state.abstract_state(run.plan))
    chex.assert_trees_all_equal(restored, run.state)


@pytest.mark.parametrize("experts", [1, 2])
def test_each_layer_is_a_leaf_of_its_own_to_an_optimiser_that_asks(tiny_config, experts):
    params = jax.jit(routing.find(tiny_config(routing={"experts": experts})).init)(jax.random.key(0))
    grads = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    tx = toy_optimizer(OptimConfig())

    @jax.jit
    def update(grads, params):
        return directions(tx, grads, state.create(params, tx).opt_state, params)[0]

    def alone(g, p):
        norms = np.linalg.norm(g), np.linalg.norm(p)
        return g * norms[1] / norms[0] if all(norms) else g

    def slow(axes, path, g, p):
        places = list(np.ndindex(g.shape[:axes])) if path[0].key in ("blocks", "mlp") else [()]
        out = np.zeros(g.shape, g.dtype)
        for place in places:
            out[place] = alone(g[place], p[place])
        return out

    pairs = zip((1, 2), *jax.device_get((grads, params)), strict=True)  # layers, and experts and layers
    wanted = Params(*(jax.tree.map_with_path(functools.partial(slow, axes), g, p) for axes, g, p in pairs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), update(grads, params), wanted)
