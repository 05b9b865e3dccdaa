import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvitmoe.config import Config, OptimConfig, RoutingConfig, TrainConfig
from jvitmoe.data import augment
from jvitmoe.experts import build, cost, merge, routes, slices
from jvitmoe.experts.routes import Purpose
from jvitmoe.models import routers, vit
from jvitmoe.runtime.devices import make_mesh
from jvitmoe.training import communication, gradients, losses, step, update
from jvitmoe.training.state import StepPlan
from jvitmoe.training.state import make_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slot_run(tiny_config, training):
    """Returns five steps where all experts run, once for each setting: slot_run(granularity, scope, devices)."""

    @functools.cache
    def run(granularity, scope, devices):
        config = tiny_config(
            data={"crop_padding": 1, "flip": True},
            model={"dropout": 0.2},
            routing={"experts": 2, "granularity": granularity, "scope": scope, "pull": 0.1, "learning_rate": 2.0},
            optim={"eps": 1e-3},
            train={"devices": devices, "ema": 0.75, "batch_size": 16, "epochs": 8},
        )
        return training(config).run(5)

    return run


@pytest.mark.parametrize(("granularity", "scope"), [("sample", "layer"), ("token", "shared")])
def test_training_over_slots_is_the_same_on_1_and_8_devices(slot_run, granularity, scope):
    one, many = slot_run(granularity, scope, 1), slot_run(granularity, scope, 8)
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(many.history[-1], one.history[-1], rtol=1e-6, atol=3e-7)


def test_over_slots_every_expert_runs_every_step(slot_run):
    run = slot_run("sample", "layer", 1)
    counts_LE = optax.tree.get(run.history[-1].opt_state.experts, "count")
    np.testing.assert_array_equal(counts_LE, np.full((2, 2), 5))


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_over_slots_the_loss_is_that_of_each_expert_on_its_images(tiny_config, training, scope):
    run = training(tiny_config(routing={"experts": 4, "granularity": "sample", "scope": scope})).run(3)
    for number in range(3):
        key = routes.address(jax.random.key(run.config.train.seed), Purpose.ROUTE, number)
        route_LE = routes.draw_route(key, run.config.routing, 2, run.config.model.tokens)
        index_B = np.asarray(run.order.epoch(0))[number]
        x, labels_B = augment.normalize(run.images.images_NHWc[index_B]), run.images.labels_N[index_B]
        wanted = []
        for slot in range(4):
            path = merge.take_path(run.history[number].params, route_LE[:, slot])
            logits = vit.logits(run.model.plain(), path, x[slot::4])
            wanted.append(optax.softmax_cross_entropy_with_integer_labels(logits, labels_B[slot::4]))
        np.testing.assert_allclose(run.metrics[number].loss, np.mean(wanted), rtol=1e-5)


def test_ema_is_the_running_mean_of_the_merged_tree(slot_run):
    run = slot_run("sample", "layer", 1)
    expected = merge.average_experts(run.history[0].params)
    for after in run.history[1:]:
        merged = merge.average_experts(after.params)
        expected = jax.tree.map(lambda mean, new: 0.75 * mean + 0.25 * new, expected, merged)
        chex.assert_trees_all_close(after.ema, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_routing_over_slots_costs_what_dense_costs(tiny_config, training, granularity):
    flops = []
    for experts in (1, 4):
        # Wide against the optimiser's work, which E experts do E times; unrolled, as XLA counts a loop's body once.
        run = training(
            tiny_config(
                model={"width": 32, "hidden": 128, "unroll": 2, "patch": 2},
                routing={"experts": experts, "granularity": granularity if experts > 1 else "batch"},
                train={"batch_size": 24},
            )
        )
        model, params = run.model, run.state.params
        route = routes.draw_route(jax.random.key(0), run.config.routing, 2, run.config.model.tokens)
        images = jnp.zeros((24, 8, 8, 1))
        loss = jax.jit(jax.grad(lambda p, m=model, i=images, r=route: vit.logits(m, p, i, r).sum()))
        flops.append(loss.lower(params).compile().cost_analysis()["flops"])
    assert flops[1] == pytest.approx(flops[0], rel=0.01)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_equal_experts_with_pull_1_stay_equal_and_tie_last_makes_them_so(tiny_config, training, granularity):
    routed = {"experts": 2, "granularity": granularity, "init": "independent", "tie_last": 0.5}
    run = training(tiny_config(routing=routed, train={"epochs": 2})).run(6)  # 6 steps, tied from step 3 on

    def spread(state):
        _, experts = slices.split(state.params, slices.stacked(state.params))
        return max(float(np.ptp(leaf, axis=1).max()) for leaf in jax.tree.leaves(experts))

    spreads = [spread(state) for state in run.history]
    assert min(spreads[:3]) > 1e-3
    assert max(spreads[3:]) == 0
    pulled = {"experts": 2, "granularity": granularity, "init": "shared", "pull": 1.0}
    assert max(map(spread, training(tiny_config(routing=pulled)).run(3).history)) == 0


def test_tied_batch_routing_takes_the_dense_step(tiny_config, training):
    """With equal experts, one expert's step counts for all: the merged tree moves as the dense model does."""
    dense = training(tiny_config(train={"epochs": 2})).run(1)
    routed = {"experts": 2, "init": "shared", "tie_last": 0.99}
    tied = training(tiny_config(routing=routed, train={"epochs": 2})).run(1)
    merged = merge.average_experts(tied.history[1].params)
    chex.assert_trees_all_close(merged, dense.history[1].params, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("routed", [{"experts": 2, "granularity": "sample"}, {}])
def test_experts_and_the_mlps_of_a_dense_model_move_by_their_own_learning_rate(tiny_config, training, routed):
    moved = []
    for times in (1.0, 3.0):
        run = training(tiny_config(routing=routed | {"learning_rate": times})).run(1)
        before, after = run.history[:2]
        moved.append(jax.tree.map(lambda a, b: b - a, before.params, after.params))

    def check(path, once, thrice):
        is_mlp = any(entry.key == "mlp" for entry in path)
        np.testing.assert_allclose(thrice, (3 if is_mlp else 1) * once, rtol=1e-3, atol=1e-7)

    jax.tree.map_with_path(check, *moved)


def make_plan(config, steps_per_epoch=1):
    return StepPlan(config, build.make_model(config, "cpu"), make_mesh(config.train), steps_per_epoch)


def pulls_of(config, steps_per_epoch=1):
    plan = make_plan(config, steps_per_epoch)
    return np.asarray(jax.jit(jax.vmap(functools.partial(update.pull_share, plan)))(jnp.arange(plan.total)))


def test_pull_follows_its_schedule():
    config = Config(train=TrainConfig(epochs=10))
    config.routing = RoutingConfig(experts=4, pull=0.2, pull_every=2, pull_schedule="rising", tie_last=0.2)
    np.testing.assert_allclose(pulls_of(config), [0, 0.04, 0, 0.08, 0, 0.12, 0, 1, 1, 1], rtol=1e-6)
    scales = [float(update.expert_scale(make_plan(config), jnp.int32(s))) for s in range(10)]
    assert scales == [1.0] * 8 + [4.0] * 2
    config.routing = RoutingConfig(experts=4, pull=0.2, pull_every=5)
    np.testing.assert_allclose(pulls_of(config), [0, 0, 0, 0, 0.2] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "free", "tied"),
    [({}, 2.0, 8.0), ({"consistency": 1.0}, 2.0, 4.0), ({"granularity": "sample"}, 2.0, 2.0)],
)
def test_tied_experts_move_as_one_mlp_with_the_experts_learning_rate(more, free, tied):
    config = Config(train=TrainConfig(epochs=10))
    config.routing = RoutingConfig(experts=4, tie_last=0.2, learning_rate=2.0, **more)
    found = [float(update.expert_scale(make_plan(config), jnp.int32(step))) for step in (7, 8)]
    assert found == [free, tied]


def test_pull_follows_the_learning_rate():
    config = Config(train=TrainConfig(epochs=3), optim=OptimConfig(learning_rate=0.03, warmup_epochs=1))
    config.routing = RoutingConfig(experts=4, pull=0.2, pull_schedule="learning_rate")
    plan = make_plan(config, 4)
    rates = np.asarray(jax.vmap(functools.partial(update.learning_rate, plan))(jnp.arange(12)))
    assert rates[0] == 0 < rates.max() == pytest.approx(0.03)
    np.testing.assert_allclose(pulls_of(config, 4), 0.2 * rates / 0.03, rtol=1e-5)


def test_intervals_between_pulls_grow_as_the_learning_rate_falls():
    """QSR: H = max(H_0, floor((alpha / rate)^2)) where an interval begins, and H_0 in the warm-up."""
    config = Config(train=TrainConfig(epochs=20), optim=OptimConfig(learning_rate=0.03, warmup_epochs=2))
    config.routing = RoutingConfig(experts=4, pull=1.0, pull_every=4, pull_schedule="qsr")
    ends = np.flatnonzero(pulls_of(config, 10)) + 1
    begins = np.array([0, *ends[:-1]])
    rate = 0.03 * np.where(begins < 20, 1.0, (1 + np.cos(np.pi * (begins - 20) / 180)) / 2)
    wanted = np.maximum(4, np.floor((np.sqrt(4) * 0.03 / rate) ** 2))
    assert (np.diff(ends, prepend=0)[:-1] == wanted[:-1]).all()
    assert ends[-1] == 200  # the last interval is cut off
    assert (wanted[:6] == 4).all()
    assert wanted[-2] > 20
    assert (np.diff(wanted) >= 0).all()


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
        {"pull": 0.1, "pull_schedule": "rising", "tie_last": 0.2},
        {"pull": 1.0, "pull_every": 2, "pull_schedule": "qsr", "tie_last": 0.1},
        {"pull": 0.1, "pull_schedule": "learning_rate"},
        {"pull": 0.1, "pull_every": 2, "pull_schedule": "learning_rate", "tie_last": 0.1},
        {"tie_last": 0.3},
        {"tie_last": 0.99},
        {},
    ],
)
def test_the_bytes_of_pulls_are_counted(routed):
    config = Config(train=TrainConfig(epochs=10), optim=OptimConfig(warmup_epochs=1))
    config.routing = RoutingConfig(experts=4, granularity="sample", **routed)
    plan = make_plan(config, 3)
    count = communication.bytes_reduced(plan)
    found = np.diff([count(done) for done in range(plan.total + 1)])
    pulled = pulls_of(config, 3) > 0 if routed else np.zeros(plan.total, bool)
    trunk, experts = slices.split(vit.shapes(plan.model), slices.stacked(vit.shapes(plan.model)))
    np.testing.assert_array_equal(found, 4 * cost.tree_size(trunk) + pulled * cost.tree_size(experts))


def test_cosub_equals_its_formula():
    """Means of both cross-entropies, and of both with the other pass as target, weighted; the paper's weight is 1/2."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 4))
    y = np.eye(4)[rng.integers(0, 4, 5)]
    config = Config(routing=RoutingConfig(experts=2, consistency=0.3, consistency_loss="cosub"))

    def loss(p, q):
        return losses.classification_loss(make_plan(config), [p, q], jnp.asarray(y))

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    targets = [(p, y), (q, y), (p, np.exp(log_softmax(q))), (q, np.exp(log_softmax(p)))]
    parts = [-(t * log_softmax(x)).sum(-1).mean() for x, t in targets]
    np.testing.assert_allclose(loss(p, q), 0.7 * sum(parts[:2]) / 2 + 0.3 * sum(parts[2:]) / 2, rtol=1e-5)
    # Targets have no gradient: that of the logits is the mean of (softmax - target).
    slope = jax.grad(loss)(jnp.asarray(p), jnp.asarray(q))
    wanted = sum(w * (np.exp(log_softmax(p)) - t) for w, t in ((0.7, y), (0.3, np.exp(log_softmax(q))))) / 2 / 5
    np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("granularity", "form", "times"), [("batch", "adamix", 1), ("sample", "thor", 2)])
def test_with_equal_experts_consistency_adds_nothing(tiny_config, training, granularity, form, times):
    routed = {"experts": 4, "granularity": granularity, "init": "shared", "scope": "layer"}
    plain, two = (
        training(tiny_config(routing=routed | more)).run(1).metrics[0].loss
        for more in ({}, {"consistency": 5.0, "consistency_loss": form})
    )
    np.testing.assert_allclose(two, times * plain, rtol=1e-5)


def test_two_passes_over_batch_routes_touch_exactly_their_two_experts(tiny_config, training):
    routed = {"experts": 4, "scope": "layer", "consistency": 1.0, "consistency_loss": "thor"}
    run = training(tiny_config(routing=routed)).run(3)
    root = jax.random.key(run.config.train.seed)
    for number, (before, after) in enumerate(zip(run.history[:-1], run.history[1:], strict=True)):
        first = routes.draw_route(
            routes.address(root, Purpose.ROUTE, number), run.config.routing, 2, run.config.model.tokens
        )
        key = routes.address(root, Purpose.SECOND_ROUTE, number)
        ran = np.stack([first, routes.distinct_route(key, first, run.config.routing)], axis=1)
        up_before, up_after = before.params["blocks"]["mlp"]["up"], after.params["blocks"]["mlp"]["up"]
        for layer in range(2):
            for expert in range(4):
                same = up_before[layer, expert].tobytes() == up_after[layer, expert].tobytes()
                assert same == (expert not in ran[layer])


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("form", ["thor", "adamix"])
def test_two_passes_give_the_gradients_of_the_whole_stack(tiny_config, training, granularity, form):
    """The step on two picked experts moves the trunk as plain differentiation through all experts says."""
    routed = {"experts": 3, "granularity": granularity, "consistency": 2.0, "consistency_loss": form}
    run = training(tiny_config(routing=routed, train={"devices": 2, "batch_size": 12})).run(1)
    before, config = run.history[0], run.config
    root = jax.random.key(config.train.seed)
    first = routes.draw_route(routes.address(root, Purpose.ROUTE, 0), config.routing, 2, config.model.tokens)
    second = routes.distinct_route(routes.address(root, Purpose.SECOND_ROUTE, 0), first, config.routing)
    index_B = np.asarray(run.order.epoch(0))[0]
    if granularity == "sample":
        index_B = index_B.reshape(-1, 3).T.ravel()  # the model's slots lie one after the other
    x = augment.normalize(np.asarray(run.images.images_NHWc)[index_B])
    labels_B = np.asarray(run.images.labels_N)[index_B]

    def loss_fn(params):
        p, q = (vit.logits(run.model, params, x, route) for route in (first, second))
        ce = [optax.softmax_cross_entropy_with_integer_labels(logits, labels_B).mean() for logits in (p, q)]
        return (sum(ce) if form == "thor" else ce[0]) + 2.0 * losses.consistency(p, q, form == "adamix")

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(before.params)
    np.testing.assert_allclose(run.metrics[0].loss, loss, rtol=1e-6)
    np.testing.assert_allclose(run.metrics[0].grad_norm, optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.parametrize(
    ("drops", "form", "weight"),
    [({"dropout": 0.3}, "thor", 2.0), ({"drop_path": 0.5}, "thor", 2.0), ({"drop_path": 0.5}, "cosub", 0.5)],
)
def test_a_dense_model_s_two_passes_differ_in_what_they_drop(tiny_config, training, drops, form, weight):
    """R-Drop and cosub: the loss is that of both passes, and they are those of one pass under their own keys."""
    routed = {"consistency": weight, "consistency_loss": form}
    made = [tiny_config(model=drops, routing=routed, optim={"eps": 1e-3}, train={"devices": n}) for n in (1, 2)]
    runs = [training(config).run(2) for config in made]
    before, config = runs[0].history[0], runs[0].config
    index_B = np.asarray(runs[0].order.epoch(0))[0]
    batch = config.train.batch_size
    key = routes.address(jax.random.key(config.train.seed), Purpose.DROPOUT, 0)
    x = augment.normalize(np.asarray(runs[0].images.images_NHWc)[index_B])
    labels_B = np.asarray(runs[0].images.labels_N)[index_B]
    numbers = (np.arange(batch), np.arange(batch) + batch)
    keys = [jax.vmap(jax.random.fold_in, (None, 0))(key, number_B) for number_B in numbers]
    p, q = (vit.logits(runs[0].model, before.params, x, None, keys_B) for keys_B in keys)
    assert jnp.abs(p - q).max() > 1e-3
    wanted = sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels_B).mean() for logits in (p, q))
    if form == "thor":
        wanted += weight * losses.consistency(p, q, False)
    else:  # the other pass is the target as often as the label
        wanted += sum(optax.softmax_cross_entropy(x, jax.nn.softmax(y)).mean() for x, y in ((p, q), (q, p)))
        wanted /= 4
    np.testing.assert_allclose(runs[0].metrics[0].loss, wanted, rtol=1e-5)
    chex.assert_trees_all_close(runs[0].state.params, runs[1].state.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routed", [{"experts": 3, "granularity": "sample"}, {"experts": 3}, {}])
def test_in_the_end_one_model_learns_from_the_mean_of_the_experts(tiny_config, training, routed):
    more = {"optim": {"eps": 1e-3}, "routing": {"init": "shared", "scope": "layer"} | routed}
    plain, one, two = (
        training(tiny_config(**more, train={"epochs": 2, "batch_size": 12, "distil_last": last, "devices": n}))
        for last, n in ((0.0, 1), (0.5, 1), (0.5, 2))
    )
    first = one.order.steps_per_epoch
    plain.run(first), one.run(first + 2), two.run(first + 2)
    chex.assert_trees_all_close(one.metrics[:first], plain.metrics)  # nothing changes before
    chex.assert_trees_all_close(one.metrics, two.metrics, rtol=1e-5, atol=1e-6)

    before, teacher = one.history[first], plain.history[first].params
    chex.assert_trees_all_equal(one.state.teacher, before.teacher)
    chex.assert_trees_all_close(before.teacher, teacher, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(before.params, merge.pull(teacher, 1.0), rtol=1e-6, atol=1e-7)  # all experts are one
    index_B = np.asarray(one.order.epoch(1))[0]
    x, labels_B = (
        augment.normalize(np.asarray(one.images.images_NHWc)[index_B]),
        np.asarray(one.images.labels_N)[index_B],
    )
    net = one.model.plain()
    experts = routed.get("experts", 1)
    paths = [merge.take_path(teacher, routes.constant_route(e, one.config.model.depth)) for e in range(experts)]
    q = sum(jax.nn.softmax(vit.logits(net, path, x)) for path in paths) / experts
    p = jax.nn.log_softmax(vit.logits(net, merge.average_experts(before.params), x))
    loss = -p[np.arange(len(p)), labels_B].mean() / 2 + (q * (jnp.log(q) - p)).sum(-1).mean() / 2
    np.testing.assert_allclose(one.metrics[first].loss, loss, rtol=1e-5)
    ends = [merge.take_path(one.state.params, routes.constant_route(e, one.config.model.depth)) for e in range(experts)]
    for end in ends[1:]:
        chex.assert_trees_all_equal(end, ends[0])


@pytest.fixture(scope="module")
def routed_run(tiny_config, training):
    """Returns three steps with a learned router, and its losses or not: routed_run(router, devices)."""

    @functools.cache
    def run(router, devices, losses=True):
        weights = {"balance_loss": 0.1 * losses, "z_loss": 0.01 * losses}
        config = tiny_config(
            routing={"experts": 2, "router": router, "capacity": 0.75, "top_k": 1, **weights},
            optim={"eps": 1e-3},
            model={"dropout": 0.1},
            train={"devices": devices},
        )
        return training(config).run(3)

    return run


# test_moe has the gradients of the other routers on one device and four.
@pytest.mark.parametrize("router", ["switch", "expert_choice", "frozen"])
def test_training_with_a_learned_router_is_the_same_on_1_and_4_devices(routed_run, router):
    one, many = routed_run(router, 1), routed_run(router, 4)
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(many.history[-1], one.history[-1], rtol=1e-5, atol=1e-6)


def test_the_loss_holds_the_routers_losses_over_the_global_batch(routed_run):
    plain, routed = (routed_run("switch", 4, losses).metrics[0] for losses in (False, True))
    extra = 0.1 * routers.find("switch").loss(routed.router) + 0.01 * routers.z_loss(routed.router)
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
    assert "router/z/layer1" in floats
    assert 0 <= floats["router/dropped/layer1"] < 1


def test_without_dropout_too_a_router_trains_at_its_capacity(tiny_config, training):
    run = training(tiny_config(routing={"experts": 2, "router": "switch", "capacity": 0.25})).run(1)
    assert (run.metrics[0].router.dropped > 0.5).all()  # that of evaluation drops nothing


def test_what_is_augmented_follows_the_step_and_the_expert(tiny_config, training):
    def losses_of(data, spread=0.0):
        routed = {"experts": 2, "init": "shared", "augment_spread": spread}
        train = {"batch_size": 16, "epochs": 8}
        # At this rate nothing moves: only the images differ.
        run = training(tiny_config(data=data, routing=routed, optim={"learning_rate": 1e-30}, train=train)).run(8)
        return run, np.array([metrics.loss for metrics in run.metrics])

    (run, plain), (_, erased) = losses_of({}), losses_of({"erase": 1.0})
    assert not np.isclose(plain, erased, rtol=1e-5).any()
    _, late = losses_of({"erase": 1.0, "plain_last": 0.25})
    np.testing.assert_allclose(late, np.where(np.arange(8) >= 6, plain, erased), rtol=1e-5)
    root, routed = jax.random.key(run.config.train.seed), run.config.routing
    drawn = [
        routes.draw_route(routes.address(root, Purpose.ROUTE, n), routed, 2, run.config.model.tokens) for n in range(8)
    ]
    ran = np.array([route_L[0] for route_L in drawn])
    assert set(ran.tolist()) == {0, 1}
    np.testing.assert_allclose(losses_of({"erase": 1.0}, 1.0)[1], np.where(ran == 0, plain, erased), rtol=1e-5)


@pytest.mark.parametrize("router", ["switch", "soft"])
def test_experts_of_a_learned_router_average_to_the_dense_models_tree(tiny_config, training, router):
    merged = merge.average_experts(training(tiny_config(routing={"experts": 2, "router": router})).state.params)
    dense = jax.eval_shape(lambda: vit.init(vit.build(tiny_config().model), jax.random.key(0)))
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, dense)


def test_a_frozen_router_keeps_its_bits_and_sends_tokens_to_ever_more_experts(tiny_config, training):
    config = tiny_config(
        routing={"experts": 4, "router": "frozen", "top_k": 2, "capacity": 4.0},
        optim={"name": "adam", "weight_decay": 0.1},
        train={"epochs": 2},
    )
    run = training(config).run(6)
    before, after = (state.params["blocks"]["mlp"] for state in (run.history[0], run.history[-1]))
    chex.assert_trees_all_equal(after["router"], before["router"])
    assert not np.array_equal(after["up"], before["up"])
    frozen = [x for x in jax.tree.leaves(run.state.opt_state.trunk) if x.shape == before["router"]["kernel"].shape]
    assert not frozen  # no moments are kept
    # A share of choices is 1 / (K tokens) times an integer: over 6 steps K is 2, 2, 3, 3, 4, 4.
    choices = config.train.batch_size * config.model.tokens
    for top_k, metrics in zip([2, 2, 3, 3, 4, 4], run.metrics, strict=True):
        count_LE = metrics.router.load_E * choices * top_k
        np.testing.assert_allclose(count_LE, np.round(count_LE), atol=1e-3)
        assert count_LE.max() <= choices * (1 + 1e-6)
        np.testing.assert_allclose(metrics.router.load_E.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(run.metrics[-1].router.load_E, 0.25, rtol=1e-6)  # all run on all


@pytest.fixture(scope="module")
def patterned_run(tiny_config, training):
    """Returns four steps of a model whose every second layer has experts: patterned_run(granularity, devices)."""

    @functools.cache
    def run(granularity, devices):
        routed = {"experts": 2, "pattern": ("dense", "experts"), "granularity": granularity, "scope": "layer"}
        config = tiny_config(model={"depth": 4}, routing=routed, optim={"eps": 1e-3}, train={"devices": devices})
        return training(config).run(4)

    return run


def test_training_of_a_pattern_is_the_same_on_1_and_4_devices(patterned_run):
    one, many = patterned_run("sample", 1), patterned_run("sample", 4)
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(many.history[-1], one.history[-1], rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_layers_without_experts_train_as_the_trunk_does(patterned_run, granularity):
    history = patterned_run(granularity, 4).history
    for before, after in itertools.pairwise(history):
        old, new = (
            [state.params["blocks"][block]["mlp"]["up"] for block in ("block0", "block1")] for state in (before, after)
        )
        dense_moved_L, moved_LE = ((a != b).any((-2, -1)) for a, b in zip(old, new, strict=True))
        assert (dense_moved_L.shape, moved_LE.shape) == ((2,), (2, 2))
        assert dense_moved_L.all()
        assert (moved_LE.sum(1) == (1 if granularity == "batch" else 2)).all()


def test_frozen_layers_of_a_pattern_have_counts_of_steps_only_and_train_the_head(tiny_config, training):
    routed = {"experts": 2, "pattern": ("dense", "experts")}
    config = tiny_config(model={"depth": 4}, routing=routed, optim={"freeze_layers": 4})
    first, *_, last = training(config).run(3).history
    chex.assert_trees_all_equal(first.params["blocks"], last.params["blocks"])
    assert (first.params["head"]["logits"]["kernel"] != last.params["head"]["logits"]["kernel"]).any()


@pytest.mark.parametrize(("step", "equal"), [(3, False), (4, True)])
def test_a_skipped_step_is_pulled_only_where_the_last_part_begins(tiny_config, step, equal):
    config = tiny_config(routing={"experts": 2, "pull": 0.5, "tie_last": 0.5}, optim={"skip_nonfinite": 1})
    config.train.epochs = 10
    plan = make_plan(config)
    assert plan.first_tied == 5
    before = make_state(config, plan.model, plan.mesh)._replace(step=jnp.int32(step))
    experts = before.params["blocks"]["mlp"]["up"]
    assert (experts[:, 0] != experts[:, 1]).any()
    after = update.finish(plan, before, jnp.bool_(False))
    found = after.params["blocks"]["mlp"]["up"]
    assert (found[:, 0] == found[:, 1]).all() == equal
    assert (found == experts).all() == (not equal)


def test_a_last_part_that_is_nearly_all_of_training_begins_after_a_step(tiny_config):
    """The end of the step before it makes experts equal, and keeps the teacher."""
    config = tiny_config(routing={"experts": 2}, train={"distil_last": 0.95, "epochs": 6})
    plan = StepPlan(config, build.make_model(config, "cpu"), make_mesh(config.train), steps_per_epoch=1)
    assert plan.first_tied == 1


@pytest.mark.parametrize(("granularity", "parts"), [("batch", 4), ("sample", 2)])
def test_accumulated_parts_have_equal_shares_of_every_slot_and_a_mean(tiny_config, granularity, parts):
    config = tiny_config(
        routing={"experts": 2, "granularity": granularity}, train={"batch_size": 8, "accumulate": parts}
    )
    plan = StepPlan(config, build.make_model(config, "cpu"), make_mesh(config.train), steps_per_epoch=1)
    index_b = jnp.arange(8)
    sizes = []

    def differentiate(part):
        sizes.append(part.index_b.size)
        share = (part.index_b < 4).mean()  # of slot 0, where there are two
        return part.images_bHWc.mean(), jnp.abs(share - 0.5)

    shard = gradients.Shard(jnp.square(index_b.astype(jnp.float32)), index_b, index_b, index_b)
    mean, uneven = gradients.accumulate(plan, differentiate, shard)
    np.testing.assert_allclose(mean, np.square(np.arange(8)).mean(), rtol=1e-6)
    assert uneven == (0 if granularity == "sample" else 0.5)
    assert set(sizes) == {8 // parts}
