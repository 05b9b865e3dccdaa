"""Local training: experts that are whole models."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvitmoe import routing
from jvitmoe.data import augment
from jvitmoe.experts import merge
from jvitmoe.machine.devices import make_mesh
from jvitmoe.machine.programs import collectives, for_reading
from jvitmoe.models import vit
from jvitmoe.training import build, optimizer, step, update

E = 4
WHOLE = {"experts": E, "kind": "sample", "part": "model", "init": "shared"}


@pytest.fixture
def sgd(monkeypatch):
    monkeypatch.setitem(optimizer.OPTIMIZERS, "sgd", lambda _: optax.identity())
    return {"name": "sgd", "learning_rate": 0.3}


def test_whole_models_averaged_after_every_step_of_sgd_are_data_parallel_training(tiny_config, training, sgd):
    optim = sgd | {"mlp_rate": 2.0, "layer_decay": 0.9}
    drops = {"dropout": 0.2}
    dense = training(tiny_config(optim=optim, model=drops)).run(4)
    copies = training(tiny_config(optim=optim, model=drops, routing=WHOLE | {"pull": 1.0})).run(4)
    for one, many in zip(dense.history, copies.history, strict=True):
        chex.assert_trees_all_close(merge.average_experts(many.params), one.params.trunk, rtol=1e-6, atol=1e-6)
    assert np.abs(dense.history[-1].params.trunk["cls"] - dense.history[0].params.trunk["cls"]).max() > 0.01


@pytest.mark.slow
def test_a_whole_model_trains_as_a_dense_one_on_its_share_of_the_images(tiny_config, training):
    """With a norm, a step count and moments of its own."""
    optim = {"name": "muon", "clip_norm": 0.5, "learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-3, "mlp_rate": 2.0}
    run = training(tiny_config(optim=optim, routing=WHOLE | {"init": "independent"})).run(3)
    dense, updates = build.choose(tiny_config(optim=optim))
    tx, scales = updates.tx, updates.scales(dense.shapes()).trunk

    @jax.jit
    def dense_step(params, opt_state, images, labels, rate):
        def loss(params):
            logits = vit.logits(run.plan.model, params, augment.normalize(images))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        grads = jax.grad(loss)(params)
        norm = optax.tree.norm(grads)
        clip = jnp.minimum(1.0, 0.5 / norm)
        direction, opt_state = tx.update(jax.tree.map(lambda g: g * clip, grads), opt_state, params)
        return jax.tree.map(lambda p, d, s: p - rate * s * d, params, direction, scales), opt_state, norm

    norms_SE = np.zeros((3, E))
    for e in range(E):
        params = jax.tree.map(lambda x, e=e: jnp.asarray(x[e]), run.history[0].params.experts)
        opt_state = tx.init(params)
        for number in range(3):
            (route,) = run.plan.routing.draw(run.plan.root, jnp.int32(number))
            part = int(run.plan.routing.slot_of_expert((route,))[e])
            index_b = np.asarray(run.plan.order.epoch(0)[number][part::E])
            images, labels = jnp.asarray(run.split.images_NHWc[index_b]), run.split.labels_N[index_b]
            rate = run.metrics[number].learning_rate
            params, opt_state, norms_SE[number, e] = dense_step(params, opt_state, images, labels, rate)
            after = jax.tree.map(lambda x, e=e: x[e], run.history[number + 1].params.experts)
            chex.assert_trees_all_close(after, params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([metrics.grad_norm for metrics in run.metrics], norms_SE.mean(1), rtol=1e-5)


@pytest.mark.slow
def test_whole_models_are_the_same_on_any_devices(tiny_config, training):
    def run(**train):
        return training(
            tiny_config(
                data={"crop_padding": 1, "flip": True, "cutmix": 1.0},
                model={"dropout": 0.2},
                routing=WHOLE | {"pull": 1.0, "pull_every": 2},
                optim={"eps": 1e-3, "clip_norm": 0.5},
                train={"ema": 0.5, "batch_size": 16, "epochs": 8} | train,
            )
        ).run(4)

    one, many = run(devices=1), run(devices=8, expert_devices=4)
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(many.history, one.history, rtol=1e-6, atol=5e-7)
    shard = many.state.params.experts["norm"]["scale"].addressable_shards[0]
    assert shard.data.shape[0] == E // many.plan.expert_devices


@pytest.mark.slow
def test_between_pulls_devices_of_whole_models_exchange_nothing_but_metrics(tiny_config):
    config = tiny_config(
        model={"width": 32, "hidden": 64, "patch": 2},
        routing=WHOLE | {"pull": 1.0, "pull_every": 8},
        optim={"name": "muon", "clip_norm": 1.0, "layer_decay": 0.9, "mlp_rate": 2.0},
        train={"devices": E, "expert_devices": E, "batch_size": 16},
    )
    mesh = make_mesh(config.train)
    plan = build.plan_for(config, mesh, 64)
    found = collectives(for_reading(step.lower(plan)).as_text(), mesh.shape)
    sizes = {place: sum(one.bytes * one.times for one in found if one.place == place) for place in ("step", "some")}
    dense = 4 * routing.find(tiny_config(model={"width": 32, "hidden": 64, "patch": 2})).count_parameters()[0]
    assert {one.place for one in found} == {"step", "some"}
    assert sizes["step"] <= 4 * 4  # loss, accuracy, norm
    assert sizes["some"] == dense
    assert [update.bytes_reduced(plan)(done) for done in (7, 8, 80)] == [0, dense, 10 * dense]


def test_each_pass_of_a_batch_trains_one_whole_model_and_leaves_the_others_alone(tiny_config, training):
    run = training(tiny_config(routing=WHOLE | {"kind": "batch", "init": "independent", "consistency": 1.0})).run(1)
    routes = run.plan.routing.draw(jax.random.key(0), jnp.int32(0))
    before, after = run.history
    for e in range(E):
        same = jax.tree.map(lambda x, y, e=e: np.array_equal(x[e], y[e]), before.params.experts, after.params.experts)
        runs = any(int(route[0]) == e for route in routes)
        assert not any(jax.tree.leaves(same["head"])) if runs else all(jax.tree.leaves(same))
