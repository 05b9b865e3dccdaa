"""LoRA and adapters as experts (AdaMix): only they and the head are trained, and they fold into a plain ViT exactly."""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jvitmoe
from jvitmoe import config as config_lib
from jvitmoe import routing, rules
from jvitmoe.config import Config
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params, join, one
from jvitmoe.interop import load
from jvitmoe.machine import devices, signals
from jvitmoe.models import mlp, vit
from jvitmoe.training import build, loop
from jvitmoe.training.state import TrainState, make_state
from run_folders import assert_same_run, lose_newest, saved

pytestmark = pytest.mark.slow

KINDS = {"lora": {"lora": 2}, "both": {"lora": 2, "adapter": 3}}
E = 3


class Start(NamedTuple):
    config: Config
    source: dict  # the dense tree that it starts from
    model: vit.ViT  # that one expert is
    state: TrainState  # at step 0
    logits: Callable  # compiled: (parameters, images, route) of the experts that a route takes
    plain: Callable  # compiled: (parameters, images) of the plain ViT that it folds into


@pytest.fixture(scope="module", params=KINDS)
def start(request, tiny_config):
    config = tiny_config(
        model=KINDS[request.param], routing={"experts": E, "kind": "layer"}, init={"source": "somewhere"}
    )
    source = jax.jit(functools.partial(vit.init, vit.build(untuned(config))))(jax.random.key(7))
    plan = build.plan_for(config, devices.make_mesh(config.train), config.train.batch_size)
    model, state = plan.model, make_state(plan, source)

    @jax.jit
    def logits(params, images, route_L):
        expert = one(plan.routing.take(params.experts, (route_L,)))
        return vit.logits(model, join(params.trunk, expert), images)

    return Start(config, source, model, state, logits, jax.jit(functools.partial(vit.logits, model.plain())))


def untuned(config):
    return dataclasses.replace(config.model, lora=0, adapter=0)


def shaken(tree):
    """Returns the tree with every leaf moved at random, also those that start at zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [leaf + 0.3 * rng.normal(size=leaf.shape).astype("f") for leaf in leaves])


def images(config):
    size = config.model.image_size
    return jax.random.normal(jax.random.key(5), (4, size, size, config.model.channels))


def test_every_expert_starts_as_the_source(start):
    wanted = vit.logits(vit.build(untuned(start.config)), start.source, images(start.config))
    for route_L in ([0, 0], [2, 1]):
        found = start.logits(start.state.params, images(start.config), jnp.array(route_L))
        chex.assert_trees_all_close(found, wanted, atol=1e-6)
    merged = merge.average_experts(start.state.params)
    chex.assert_trees_all_close(start.plain(merged, images(start.config)), wanted, atol=1e-6)


def test_one_expert_and_the_plain_vit_it_folds_into_compute_the_same(start):
    params, route_L = shaken(start.state.params), jnp.array([2, 1])
    folded = merge.take_path(params, route_L)
    shapes = jax.eval_shape(lambda: vit.init(start.model.plain(), jax.random.key(0)))
    chex.assert_trees_all_equal_shapes_and_dtypes(folded, shapes)
    wanted = start.logits(params, images(start.config), route_L)
    chex.assert_trees_all_close(start.plain(folded, images(start.config)), wanted, atol=1e-5)
    other = start.logits(params, images(start.config), jnp.array([0, 1]))
    assert not np.allclose(other, wanted, atol=1e-3)


def test_merging_averages_matrices_and_then_folds():
    """AdaMix averages A and B apart, so the product is of the means and not the mean of products."""
    rng = np.random.default_rng(0)
    a_EDR, b_ERF = rng.normal(size=(E, 4, 2)), rng.normal(size=(E, 2, 5))
    plain = {"up": rng.normal(size=(4, 5)), "up_bias": np.zeros(5), "down": np.ones((5, 4)), "down_bias": np.zeros(4)}
    zeros = {"down_a": np.zeros((5, 2)), "down_b": np.zeros((2, 4))}
    trunk = {name: jnp.asarray(leaf)[None] for name, leaf in plain.items()}
    experts = {"up_a": jnp.asarray(a_EDR)[:, None], "up_b": jnp.asarray(b_ERF)[:, None]}
    experts |= {name: jnp.broadcast_to(leaf, (E, 1, *leaf.shape)) for name, leaf in zeros.items()}
    merged = merge.average_experts(Params({"blocks": {"mlp": trunk}}, {"mlp": experts}))["blocks"]["mlp"]
    assert set(merged) == set(plain)
    wanted = plain["up"] + a_EDR.mean(0) @ b_ERF.mean(0)
    np.testing.assert_allclose(merged["up"][0], wanted, rtol=1e-5)
    assert not np.allclose(wanted, plain["up"] + (a_EDR @ b_ERF).mean(0), atol=1e-2)


def test_with_the_second_matrices_shared_the_mean_of_adamix_is_the_mean_of_products(tiny_config):
    """AdaMix, arXiv 2205.12410, section 3.4: experts own the matrices that read the input, and share the others."""
    config = tiny_config(
        model=KINDS["both"], routing={"experts": E, "kind": "layer", "part": "up"}, init={"source": "somewhere"}
    )
    params = shaken(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), routing.find(config).shapes()))
    assert set(params.experts["mlp"]) == {"up_a", "down_a", "adapter_up", "adapter_up_bias"}
    paths = [merge.take_path(params, jnp.array([e]))["blocks"]["mlp"] for e in range(E)]
    merged = merge.average_experts(params)["blocks"]["mlp"]
    width = config.model.hidden  # after it come the units of the adapter
    wanted = np.mean([path["up"][..., :width] for path in paths], 0)
    np.testing.assert_allclose(merged["up"][..., :width], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("experts", "kind"), [(1, "batch"), (E, "sample")])
def test_training_moves_what_is_tuned_and_the_head_and_not_one_bit_more(tiny_config, training, experts, kind):
    config = tiny_config(
        model={"lora": 2, "adapter": 3},
        routing={"experts": experts, "kind": kind, "pull": 0.1 if experts > 1 else 0.0},
        init={"source": "somewhere"},
        optim={"weight_decay": 0.5, "learning_rate": 0.05},
        train={"batch_size": 9, "ema": 0.5},
    )
    run = training(config).run(4)
    before, after = run.history[0], run.history[-1]
    moved = set()
    for (path, old), new in zip(jax.tree.leaves_with_path(before.params), jax.tree.leaves(after.params), strict=True):
        if not np.array_equal(old, new):
            moved.add((path[1].key, path[-1].key))
    tuned = {("mlp" if experts > 1 else "blocks", name) for name in (*mlp.LORA, *mlp.ADAPTER)}
    assert moved == tuned | {("head", "kernel"), ("head", "bias")}
    wanted = jax.eval_shape(lambda: vit.init(run.plan.model.plain(), jax.random.key(0)))
    chex.assert_trees_all_equal_shapes(after.ema, wanted)
    chex.assert_trees_all_equal_shapes(merge.dense_tree(after.params), wanted)


def test_the_trained_parameters_are_counted_and_only_they_have_moments(start):
    config = start.config
    d, f, layers, classes = 8, 12, 2, 3
    lora = 2 * (d + f) * 2 if config.model.lora else 0
    adapter = (3 * (2 * d + 1) + d) if config.model.adapter else 0
    moving = E * layers * (lora + adapter) + classes * (d + 1)
    assert build.choose(config)[1].count_trained(start.state.params) == moving
    floats = [leaf for leaf in jax.tree.leaves(start.state.opt_state) if leaf.dtype == jnp.float32]
    assert sum(leaf.size for leaf in floats) == 2 * moving
    plain, updates = build.choose(dataclasses.replace(config, model=config.model.plain()))
    assert updates.count_trained(plain.shapes()) == plain.count_parameters()[1]


def test_the_gradient_norm_is_of_what_is_trained(tiny_config, training):
    config = tiny_config(model={"lora": 2}, routing={"experts": 2}, init={"source": "x"})
    run = training(config).run(1)
    images = jnp.asarray(run.split.images_NHWc[run.plan.order.epoch(0)[0]]) / 127.5 - 1.0
    labels = run.split.labels_N[run.plan.order.epoch(0)[0]]

    @jax.jit
    @jax.grad
    def gradient(tree):
        log_p = jax.nn.log_softmax(vit.logits(run.plan.model.plain(), merge.take_path(tree, route_1), images))
        return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

    (route_1,) = run.plan.routing.draw(run.plan.root, jnp.int32(0))
    grads = jax.tree.leaves_with_path(gradient(run.history[0].params))
    trained = [leaf for path, leaf in grads if path[1].key == "head" or path[-1].key in mlp.LORA]
    np.testing.assert_allclose(run.metrics[0].grad_norm, optax.tree.norm(trained), rtol=1e-5)
    assert optax.tree.norm(trained) < 0.9 * optax.tree.norm([leaf for _, leaf in grads])


def test_a_run_tunes_prints_resumes_without_its_source_and_ships_a_plain_vit(experiment_run, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(experiment_run, source)
    config = config_lib.loads((experiment_run / "config.json").read_text(), "config.json")
    config.model.lora, config.model.adapter = 2, 3
    config.init.source, config.routing.consistency = str(source), 0.1
    config.train.epochs, config.train.checkpoint_every = 1, 2
    chosen = way, updates = build.choose(rules.check(config))

    def run():
        with contextlib.ExitStack() as held:
            loop.fit(build.build(config, chosen), tmp_path / "run", held.enter_context(signals.Stop()), held)

    run()
    out = capsys.readouterr().out
    assert f"trained     {updates.count_trained(way.shapes()):,} of" in out
    assert "(run): " in out
    shutil.rmtree(source)
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    lose_newest(tmp_path / "run")
    run()
    assert f"resuming    from step {saved(whole)[-2].name}\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)
    found = load.read(tmp_path / "run")
    assert found.model == config.model.plain()
    assert found.params["blocks.mlp.up"].shape == (2, 8, 12 + 3)
    assert "folded LoRA and adapters into the MLP" in found.notes
    digits = np.zeros((2, 8, 8, 1), np.uint8)
    assert jvitmoe.load(tmp_path / "run").logits(digits).shape == (2, 10)
