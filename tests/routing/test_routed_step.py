import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvitmoe import routing
from jvitmoe.config import Config, OptimConfig, RoutingConfig, TrainConfig
from jvitmoe.data import augment
from jvitmoe.experts import cost, merge
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import routers, vit
from jvitmoe.routing import StepInfo
from jvitmoe.training import build, losses, step, update
from jvitmoe.training.state import make_state

pytestmark = pytest.mark.slow


def test_with_sample_the_loss_is_that_of_each_expert_on_its_images(tiny_config, training):
    run = training(tiny_config(routing={"experts": 4, "kind": "sample"})).run(3)
    logits_of = jax.jit(functools.partial(vit.logits, run.plan.model.plain()))
    for number in range(3):
        (route_E,) = run.plan.routing.draw(run.plan.root, jnp.int32(number))
        index_B = np.asarray(run.plan.order.epoch(0))[number]
        x, labels_B = augment.normalize(run.split.images_NHWc[index_B]), run.split.labels_N[index_B]
        wanted = []
        for slot in range(4):
            path = merge.take_path(run.history[number].params, route_E[slot : slot + 1])
            logits = logits_of(path, x[slot::4])
            wanted.append(optax.softmax_cross_entropy_with_integer_labels(logits, labels_B[slot::4]))
        np.testing.assert_allclose(run.metrics[number].loss, np.mean(wanted), rtol=1e-5)


def test_each_expert_on_a_share_of_the_images_costs_what_dense_costs(tiny_config):
    flops = []
    for experts in (1, 4):
        # Wide against the optimiser's work, which E experts do E times.
        routed = {"experts": experts, "kind": "sample"} if experts > 1 else {}
        config = tiny_config(model={"width": 32, "hidden": 128, "patch": 2}, routing=routed, train={"batch_size": 24})
        way = routing.find(config)
        model = way.model().clone(unroll=2)  # because XLA counts the body of a loop once

        def loss(params, images, way=way, model=model):
            return way.logits(model, params, images, None, StepInfo(0, (jnp.arange(4),)))[0].sum()

        lowered = jax.jit(jax.grad(loss)).lower(way.shapes(), jnp.zeros((24, 8, 8, 1)))
        flops.append(lowered.compile().cost_analysis()["flops"])
    assert flops[1] == pytest.approx(flops[0], rel=0.01)


def test_with_pull_1_experts_that_started_different_are_equal_after_every_step(tiny_config, training):
    def spread(state):
        return max(float(np.ptp(leaf, axis=0).max()) for leaf in jax.tree.leaves(state.params.experts))

    routed = {"experts": 2, "kind": "batch", "init": "independent", "pull": 1.0}
    first, *later = map(spread, training(tiny_config(routing=routed)).run(3).history)
    assert first > 0 == max(later)


@pytest.mark.parametrize("routed", [{"experts": 4, "kind": "topk", "balance_loss": 0.0}, {}])
def test_experts_shared_ones_and_the_mlps_of_a_dense_model_move_by_their_own_rate(tiny_config, training, routed):
    moved = []
    for times in (1.0, 3.0):
        model = {"shared_hidden": 4, "expert_hidden": 6} if routed else {}
        run = training(tiny_config(model=model, routing=routed, optim={"mlp_rate": times})).run(1)
        before, after = run.history[:2]
        moved.append(jax.tree.map(lambda a, b: b - a, before.params, after.params)._asdict())

    def check(path, once, thrice):
        part, *_, name = (entry.key for entry in path)
        is_dense_mlp = not routed and any(entry.key == "mlp" for entry in path)
        own = part == "experts" or name.startswith("shared_") or is_dense_mlp
        np.testing.assert_allclose(thrice, (3 if own else 1) * once, rtol=1e-3, atol=1e-7)
        assert not own or np.abs(once).max() > 9e-4  # Adam's first step is the rate, 1e-3

    jax.tree.map_with_path(check, *moved)


def make_plan(config, steps_per_epoch=1):
    return build.plan_for(config, make_mesh(config.train), steps_per_epoch * config.train.batch_size)


def test_experts_are_pulled_by_their_share_after_every_nth_step(tiny_config):
    plan = make_plan(tiny_config(routing={"experts": 4, "pull": 0.2, "pull_every": 3}))
    before = make_state(plan)
    after_step = jax.jit(functools.partial(update.after_step, plan))
    for done in range(7):
        after = after_step(before._replace(step=jnp.int32(done)))
        pulled = merge.pull(before.params, 0.2) if done in (2, 5) else before.params
        chex.assert_trees_all_close(after.params, pulled, rtol=1e-6, atol=1e-7)
        assert after.step == done + 1


def test_consistency_of_equal_logits_costs_nothing_and_equals_the_formula_otherwise():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 4))
    assert losses.consistency(p, p, True) == 0

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(p), log_softmax(q)
    wanted = 0.5 * ((np.exp(log_q) * (log_q - log_p)).sum(-1) + (np.exp(log_p) * (log_p - log_q)).sum(-1)).mean()
    for stop in (True, False):
        np.testing.assert_allclose(losses.consistency(p, q, stop), wanted, rtol=1e-5)
    # AdaMix's form moves p toward q only as far as KL(q || p) asks: its slope is (p - q) / 2 per image.
    slope = jax.grad(lambda x: losses.consistency(x, jnp.asarray(q), True))(jnp.asarray(p))
    np.testing.assert_allclose(slope, 0.5 * (np.exp(log_p) - np.exp(log_q)) / 5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "routed",
    [
        {"pull": 0.1, "pull_every": 3},
        {"pull": 1.0},
        {},
    ],
)
def test_the_bytes_of_pulls_are_counted(routed):
    config = Config(train=TrainConfig(epochs=10, devices=1), optim=OptimConfig(warmup_epochs=1))
    config.routing = RoutingConfig(experts=4, kind="sample", **routed)
    plan = make_plan(config, 3)
    count = update.bytes_reduced(plan)
    found = np.diff([count(done) for done in range(plan.total + 1)])
    pulled = [bool(routed) and done % config.routing.pull_every == 0 for done in range(1, plan.total + 1)]
    trunk, experts = plan.routing.shapes()
    np.testing.assert_array_equal(found, 4 * cost.tree_size(trunk) + np.array(pulled) * cost.tree_size(experts))


def test_cosub_equals_its_formula():
    """Means of both cross-entropies, and of both with the other pass as target, weighted; the paper's weight is 1/2."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 4))
    y = np.eye(4)[rng.integers(0, 4, 5)]
    routed = RoutingConfig(experts=2, consistency=0.3, consistency_loss="cosub")

    def loss(p, q):
        return losses.classification_loss(routed, [p, q], jnp.asarray(y))

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    targets = [(p, y), (q, y), (p, np.exp(log_softmax(q))), (q, np.exp(log_softmax(p)))]
    parts = [-(t * log_softmax(x)).sum(-1).mean() for x, t in targets]
    np.testing.assert_allclose(loss(p, q), 0.7 * sum(parts[:2]) / 2 + 0.3 * sum(parts[2:]) / 2, rtol=1e-5)
    # Targets have no gradient: that of the logits is the mean of (softmax - target).
    slope = jax.grad(loss)(jnp.asarray(p), jnp.asarray(q))
    wanted = sum(w * (np.exp(log_softmax(p)) - t) for w, t in ((0.7, y), (0.3, np.exp(log_softmax(q))))) / 2 / 5
    np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-6)


def test_two_passes_touch_exactly_their_two_experts_and_have_the_loss_of_both(tiny_config, training):
    routed = {"experts": 4, "kind": "layer", "consistency": 1.0, "consistency_loss": "thor"}
    run = training(tiny_config(routing=routed)).run(3)
    root = run.plan.root
    for number, (before, after) in enumerate(zip(run.history[:-1], run.history[1:], strict=True)):
        ran = np.stack(run.plan.routing.draw(root, jnp.int32(number)), axis=1)
        up_before, up_after = (now.params.experts["mlp"]["up"] for now in (before, after))
        for layer in range(2):
            for expert in range(4):
                same = up_before[expert, layer].tobytes() == up_after[expert, layer].tobytes()
                assert same == (expert not in ran[layer])
    index_B = np.asarray(run.plan.order.epoch(0))[0]
    x, labels_B = augment.normalize(run.split.images_NHWc[index_B]), run.split.labels_N[index_B]
    routes = run.plan.routing.draw(root, jnp.int32(0))
    logits_of = jax.jit(functools.partial(vit.logits, run.plan.model))
    p, q = (logits_of(merge.take_path(run.history[0].params, route_L), x) for route_L in routes)
    ce = [optax.softmax_cross_entropy_with_integer_labels(logits, labels_B).mean() for logits in (p, q)]
    np.testing.assert_allclose(run.metrics[0].loss, sum(ce) + losses.consistency(p, q, False), rtol=1e-5)


@pytest.mark.parametrize(("kind", "form"), [("batch", "thor"), ("sample", "adamix")])
def test_two_passes_give_the_gradients_of_the_whole_stack(tiny_config, training, kind, form):
    """The step on two picked experts moves the trunk as plain differentiation through all experts says."""
    routed = {"experts": 3, "kind": kind, "consistency": 2.0, "consistency_loss": form}
    run = training(tiny_config(routing=routed, train={"devices": 2, "batch_size": 12})).run(1)
    before, root = run.history[0], run.plan.root
    index_B = np.asarray(run.plan.order.epoch(0))[0]
    expert_PB = [np.broadcast_to(route, 3)[np.arange(12) % 3] for route in run.plan.routing.draw(root, jnp.int32(0))]
    x = augment.normalize(run.split.images_NHWc[index_B])
    labels_B = run.split.labels_N[index_B]

    def loss_fn(params):
        every_EBC = jnp.stack(
            [vit.logits(run.plan.model, merge.take_path(params, jnp.array([e])), x) for e in range(3)]
        )
        p, q = (every_EBC[expert_B, np.arange(12)] for expert_B in expert_PB)
        ce = [optax.softmax_cross_entropy_with_integer_labels(logits, labels_B).mean() for logits in (p, q)]
        return (sum(ce) if form == "thor" else ce[0]) + 2.0 * losses.consistency(p, q, form == "adamix")

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(before.params)
    np.testing.assert_allclose(run.metrics[0].loss, loss, rtol=1e-6)
    np.testing.assert_allclose(run.metrics[0].grad_norm, optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.parametrize(
    ("drops", "form", "weight"), [({"dropout": 0.3}, "thor", 2.0), ({"drop_path": 0.5}, "cosub", 0.5)]
)
def test_a_dense_model_s_two_passes_differ_in_what_they_drop(tiny_config, training, drops, form, weight):
    """R-Drop and cosub: the loss is that of both passes, and they are those of one pass under their own keys."""
    routed = {"consistency": weight, "consistency_loss": form}
    made = [tiny_config(model=drops, routing=routed, optim={"eps": 1e-3}, train={"devices": n}) for n in (1, 2)]
    runs = [training(config).run(2) for config in made]
    before, plan = runs[0].history[0], runs[0].plan
    index_B = np.asarray(plan.order.epoch(0))[0]
    batch, key = plan.train.batch_size, address(plan.root, Purpose.DROPOUT, 0)
    x = augment.normalize(runs[0].split.images_NHWc[index_B])
    labels_B = runs[0].split.labels_N[index_B]
    numbers = (np.arange(batch), np.arange(batch) + batch)
    keys = [jax.vmap(jax.random.fold_in, (None, 0))(key, number_B) for number_B in numbers]
    logits_of = jax.jit(functools.partial(vit.logits, plan.model))
    p, q = (logits_of(before.params.trunk, x, keys_B) for keys_B in keys)
    assert jnp.abs(p - q).max() > 1e-3
    wanted = sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels_B).mean() for logits in (p, q))
    if form == "thor":
        wanted += weight * losses.consistency(p, q, False)
    else:  # the other pass is the target as often as the label
        wanted += sum(optax.softmax_cross_entropy(x, jax.nn.softmax(y)).mean() for x, y in ((p, q), (q, p)))
        wanted /= 4
    np.testing.assert_allclose(runs[0].metrics[0].loss, wanted, rtol=1e-5)
    chex.assert_trees_all_close(runs[0].state.params, runs[1].state.params, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def routed_run(tiny_config, training):
    """Returns three steps with a learned router, and its losses or not: routed_run(router, devices)."""

    @functools.cache
    def run(router, devices, losses=True):
        config = tiny_config(
            routing={"experts": 2, "kind": router, "capacity": 0.75, "top_k": 1, "balance_loss": 0.1 * losses},
            optim={"eps": 1e-3},
            model={"dropout": 0.1},
            train={"devices": devices},
        )
        return training(config).run(3)

    return run


# test_moe has the gradients of the other routers on one device and four.
@pytest.mark.parametrize("router", ["switch", "expert_choice"])
def test_training_with_a_learned_router_is_the_same_on_1_and_4_devices(routed_run, router):
    one, many = routed_run(router, 1), routed_run(router, 4)
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(many.history[-1], one.history[-1], rtol=1e-5, atol=1e-6)


def test_the_loss_holds_the_routers_losses_over_the_global_batch(routed_run):
    plain, routed = (routed_run("switch", 4, losses).metrics[0] for losses in (False, True))
    extra = 0.1 * routers.find("switch").loss(routed.router)
    assert extra > 0.001
    np.testing.assert_allclose(routed.loss, plain.loss + extra, rtol=1e-6)


def test_a_routers_metrics_are_named_by_layer_and_expert(routed_run):
    floats = step.as_floats(routed_run("switch", 1).metrics[0], expert_layers=(1, 3))
    assert {"loss", "accuracy", "router/dropped/layer3", "router/entropy/layer1", "router/load/layer3/expert0"} <= set(
        floats
    )
    np.testing.assert_allclose(
        floats["router/load/layer1/expert0"] + floats["router/load/layer1/expert1"], 1, rtol=1e-6
    )
    assert 0 <= floats["router/dropped/layer1"] < 1


def test_without_dropout_too_a_router_trains_at_its_capacity(tiny_config, training):
    run = training(tiny_config(routing={"experts": 2, "kind": "switch", "capacity": 0.25})).run(1)
    assert (run.metrics[0].router.dropped > 0.5).all()  # that of evaluation drops nothing


def test_what_is_augmented_follows_the_step(tiny_config, training):
    def losses_of(data):
        routed = {"experts": 2, "init": "shared"}
        train = {"batch_size": 16, "epochs": 8}
        # At this rate nothing moves: only the images differ.
        run = training(tiny_config(data=data, routing=routed, optim={"learning_rate": 1e-30}, train=train)).run(8)
        return np.array([metrics.loss for metrics in run.metrics])

    plain, erased = losses_of({}), losses_of({"erase": 1.0})
    assert not np.isclose(plain, erased, rtol=1e-5).any()
    late = losses_of({"erase": 1.0, "plain_at_end": 0.25})
    np.testing.assert_allclose(late, np.where(np.arange(8) >= 6, plain, erased), rtol=1e-5)


def test_layers_without_experts_train_as_the_trunk_does(tiny_config, training):
    routed = {"experts": 2, "pattern": ("dense", "experts"), "kind": "layer"}
    config = tiny_config(model={"depth": 4}, routing=routed, optim={"eps": 1e-3}, train={"devices": 4})
    history = training(config).run(4).history
    for before, after in itertools.pairwise(history):
        old, new = (
            (state.params.trunk["blocks"]["block0"]["mlp"]["up"], state.params.experts["mlp"]["up"])
            for state in (before, after)
        )
        dense_moved_L, moved_EX = ((a != b).any((-2, -1)) for a, b in zip(old, new, strict=True))
        assert (dense_moved_L.shape, moved_EX.shape) == ((2,), (2, 2))
        assert dense_moved_L.all()
        assert (moved_EX.sum(0) == 1).all()


@pytest.mark.parametrize(("kind", "parts"), [("batch", 4), ("sample", 2)])
def test_accumulated_parts_have_equal_shares_of_every_slot_and_a_mean(tiny_config, kind, parts):
    config = tiny_config(routing={"experts": 2, "kind": kind}, train={"batch_size": 8, "accumulate": parts})
    plan = make_plan(config)
    index_b = jnp.arange(8)
    sizes = []

    def differentiate(part):
        sizes.append(part.index_b.size)
        share = (part.index_b < 4).mean()  # of slot 0, where there are two
        return part.images_bHWc.mean(), jnp.abs(share - 0.5)

    shard = step.Shard(jnp.square(index_b.astype(jnp.float32)), index_b, index_b, index_b)
    mean, uneven = step.accumulate(plan, differentiate, shard)
    np.testing.assert_allclose(mean, np.square(np.arange(8)).mean(), rtol=1e-6)
    assert uneven == (0 if kind == "sample" else 0.5)
    assert set(sizes) == {8 // parts}


def test_a_selection_bias_steps_against_the_load_of_the_whole_batch_and_nothing_else_moves_it(tiny_config, training):
    """DeepSeek-V3, arXiv 2412.19437: b += u sign(mean load - load). In a layer that is not trained it stays."""
    run = training(
        tiny_config(
            routing={
                **{"experts": 4, "kind": "topk", "pattern": ("dense", "experts"), "init": "shared"},
                **{"balance_bias": 0.01, "balance_loss": 0.0},
            },
            optim={"name": "muon", "weight_decay": 0.5, "eps": 1e-3, "freeze_layers": 2},
            model={"shared_hidden": 0, "depth": 4},
            train={"devices": 4},
        )
    ).run(4)
    bias_XE = np.zeros((2, 4), np.float32)
    for metrics, after in zip(run.metrics, run.history[1:], strict=True):
        moved_XE = np.float32(0.01) * np.sign(np.float32(0.25) - metrics.router.load_E)
        bias_XE = bias_XE + moved_XE * [[False], [True]]
        found = after.params.trunk["blocks"]["block1"]["mlp"]["router"]["selection_bias"]
        np.testing.assert_allclose(found, bias_XE, rtol=1e-6)
    assert np.abs(bias_XE).max() > 0.01
