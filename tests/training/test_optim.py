import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvitmoe import routing
from jvitmoe.config import OptimConfig
from jvitmoe.experts import cost
from jvitmoe.experts.params import Params, each, one
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import vit
from jvitmoe.training import build, optimizer, state, update

STEPS, EPOCHS, PEAK = 7, 5, 3e-3  # of one epoch, of the run


def made_of(config):
    """Returns the optimiser of a config."""
    return optimizer.Optimizer(config, routing.find(config))


def rates(config):
    """Returns the learning rate of every step of the run, and of the one after its last."""
    return np.asarray(jax.jit(jax.vmap(made_of(config).schedule(STEPS)))(jnp.arange(EPOCHS * STEPS + 1)))


@pytest.fixture
def config(tiny_config):
    def make(**fields):
        return tiny_config(optim={"learning_rate": PEAK, **fields}, train={"epochs": EPOCHS})

    return make


def test_the_epoch_schedule_is_pytorchs_cosine_annealing_and_constant_within_an_epoch(config):
    rate_S = rates(config(schedule="epoch"))
    for epoch in range(EPOCHS):
        closed_form = PEAK * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        within = rate_S[epoch * STEPS : (epoch + 1) * STEPS]
        np.testing.assert_allclose(within, closed_form, rtol=1e-6)
        np.testing.assert_array_equal(within, within[0])
    assert rate_S[-1] == pytest.approx(0, abs=1e-9)


def test_the_step_schedule_is_a_cosine_that_moves_every_step_to_0(config):
    rate_S = rates(config(schedule="step"))
    wanted = [PEAK * (1 + math.cos(math.pi * step / (EPOCHS * STEPS))) / 2 for step in range(EPOCHS * STEPS + 1)]
    np.testing.assert_allclose(rate_S, wanted, rtol=1e-5, atol=1e-9)
    assert (np.diff(rate_S) < 0).all()
    assert rate_S[-1] == pytest.approx(0, abs=1e-9)


def test_warm_up_is_linear_from_0_per_step_and_the_cosine_fills_the_rest(config):
    rate_S, warm = rates(config(schedule="step", warmup_epochs=1.5)), round(1.5 * STEPS)
    np.testing.assert_allclose(rate_S[: warm + 1], PEAK * np.arange(warm + 1) / warm, rtol=1e-6, atol=1e-9)
    rest = EPOCHS * STEPS - warm
    wanted = [PEAK * (1 + math.cos(math.pi * step / rest)) / 2 for step in range(rest + 1)]
    np.testing.assert_allclose(rate_S[warm:], wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("epochs", [2.5, 3.0, 5.0, 40.0, 3e38])
def test_warm_up_takes_at_most_half_of_the_training(config, epochs):
    capped = config(schedule="step", warmup_epochs=epochs)
    assert made_of(capped).warmup_steps(STEPS) == EPOCHS * STEPS // 2
    np.testing.assert_array_equal(rates(capped), rates(config(schedule="step", warmup_epochs=17 / 7)))
    assert rates(capped).max() == np.float32(PEAK)
    assert made_of(config(schedule="step", warmup_epochs=17 / 7)).warmup_steps(STEPS) == 17


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_direction_is_that_of_a_slow_numpy_adam(name):
    optim_config = OptimConfig(name=name, weight_decay=0.3, eps=1e-3)
    rng = np.random.default_rng(0)
    p = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    params = {k: jnp.asarray(x, jnp.float32) for k, x in p.items()}
    tx = optimizer.find(optim_config)
    # 1 - b2^t loses digits: not from step 1 on, where float32 has but four of it, and with the b2 that float32 has.
    b2 = float(np.float32(0.999))
    opt_state, update = optax.tree.set(tx.init(params), count=jnp.int32(20)), jax.jit(tx.update)
    for t in range(21, 27):
        grads = {k: rng.normal(size=x.shape) for k, x in p.items()}
        direction, opt_state = update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, opt_state, params)
        for k, g in grads.items():
            if name == "adam":
                g = g + 0.3 * p[k]  # L2 in the gradient, of every parameter
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            wanted = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - b2**t)) + 1e-3)
            if name == "adamw" and k == "kernel":
                wanted = wanted + 0.3 * p[k]  # decoupled, of matrices only
            np.testing.assert_allclose(direction[k], wanted, rtol=1e-5, atol=1e-6)
            p[k] = p[k] - 0.1 * wanted
        params = jax.tree.map(lambda x, d: x - 0.1 * d, params, direction)


TUNED = {"model": {"head_hidden": 4, "lora": 2, "adapter": 2}, "routing": {"experts": 2}, "init": {"source": "x"}}
SHARED = {"model": {"head_hidden": 4, "shared_hidden": 4}, "routing": {"experts": 2, "kind": "topk"}}
OF_TUNED = {"up_a", "up_b", "down_a", "down_b", "adapter_up", "adapter_down"}, {"adapter_up_bias", "adapter_down_bias"}
OF_SHARED = {"shared_up", "shared_down"}, {"shared_up_bias", "shared_down_bias"}


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
@pytest.mark.parametrize(("sections", "own"), [(TUNED, OF_TUNED), (SHARED, OF_SHARED)], ids=["tuned", "shared"])
def test_all_but_adam_decay_matrices_only(tiny_config, sections, own, name):
    shapes = routing.find(tiny_config(**sections)).shapes()
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    tx = optimizer.find(OptimConfig(name=name, weight_decay=0.25))
    direction = jax.jit(lambda p: tx.update(optax.tree.zeros_like(p), tx.init(p), p)[0])(params)
    seen = {"decayed": set(), "left": set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(direction):
        moved = np.unique(np.asarray(leaf))
        assert len(moved) == 1
        seen["decayed" if moved[0] else "left"].add(path[-1].key)
        if name != "adam":
            assert moved[0] in (0, 0.25)
    matrices = {"kernel", "up", "down"} | own[0]
    vectors = {"bias", "scale", "cls", "positions", "up_bias", "down_bias"} | own[1]
    wanted = (matrices | vectors, set()) if name == "adam" else (matrices, vectors)
    assert (seen["decayed"], seen["left"]) == wanted


def is_muons(path):
    """Returns True for what Muon takes; written apart from `optimizer.is_matrix`."""
    names = [entry.key for entry in path]
    of_mlp = ("up", "down", "shared_up", "shared_down")
    return names[-1] in of_mlp or (names[-1] == "kernel" and names[-3:-1][0] == "attention")


def matrix_of(path, x):
    """Returns the array of one layer and expert as the matrix of its inputs and outputs."""
    if path[-1].key != "kernel":  # of attention
        return x
    return x.reshape(-1, x.shape[-1]) if path[-2].key == "out" else x.reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"depth": 4, "head_hidden": 4}, "routing": {"experts": 2, "pattern": ("dense", "experts")}},
        SHARED,
    ],
    ids=["pattern", "shared"],
)
def test_muon_is_optaxs_on_the_matrix_of_each_layer_and_expert_alone_and_adamw_on_the_rest(tiny_config, sections):
    made, rng = tiny_config(**sections), np.random.default_rng(0)
    shapes = routing.find(made).shapes()
    noise = lambda: jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)  # noqa: E731
    params, grads_S = noise(), [noise() for _ in range(3)]

    def directions(name):
        tx = optimizer.find(OptimConfig(name=name, weight_decay=0.3, eps=1e-3))
        opt_state, found = state.create(params, tx).opt_state, None
        move = jax.jit(lambda g, s: update.directions(tx, g, s, params))
        for grads in grads_S:
            found, opt_state = move(grads, opt_state)
        return found

    tx = optax.contrib.muon(-1.0, beta=0.95, weight_decay=0.3, consistent_rms=0.2)  # -1: the direction, not the step
    alone = jax.jit(lambda s, g, p: tx.update(g, s, p))

    def check(axes, path, ours, adamws, p, *grads):
        if not is_muons(path):
            np.testing.assert_allclose(ours, adamws, rtol=1e-6, atol=1e-7)
            return
        for place in np.ndindex(p.shape[:axes]):
            matrix = functools.partial(matrix_of, path)
            opt_state = tx.init(matrix(p[place]))
            for g in grads:
                wanted, opt_state = alone(opt_state, matrix(g[place]), matrix(p[place]))
            np.testing.assert_allclose(matrix(ours[place]), wanted, rtol=1e-4, atol=1e-5)

    for axes, *trees in zip((1, 2), directions("muon"), directions("adamw"), params, *grads_S, strict=True):
        jax.tree.map_with_path(functools.partial(check, axes), *trees)  # layers, and experts and layers


def test_muon_makes_singular_values_about_equal_and_the_rms_of_an_update_0_2():
    rng = np.random.default_rng(0)
    for rows, columns in ((16, 16), (16, 64), (64, 16)):
        u, v = (np.linalg.qr(rng.normal(size=(n, 16)))[0] for n in (rows, columns))
        gradient = {"up": jnp.asarray(u * np.geomspace(0.1, 1, 16) @ v.T, jnp.float32)}
        tx = optimizer.find(OptimConfig(name="muon", weight_decay=0.0))
        found = np.asarray(tx.update(gradient, tx.init(gradient), gradient)[0]["up"])
        # The band in which five Newton-Schulz iterations leave singular values (Jordan et al., "0.7 to 1.2").
        values = np.linalg.svd(found, compute_uv=False) / (0.2 * max(rows, columns) ** 0.5)
        assert 0.65 < values.min() < values.max() < 1.25
        assert np.sqrt((found**2).mean()) == pytest.approx(0.2, rel=0.2)


@pytest.mark.slow
def test_training_with_muon_is_the_same_on_1_and_4_devices(tiny_config, training):
    def run(**train):
        made = tiny_config(
            model={"depth": 4},
            routing={"experts": 2, "kind": "sample", "pattern": ("dense", "experts")},
            optim={"name": "muon", "eps": 1e-3, "learning_rate": 1e-2},
            train=train,
        )
        return training(made).run(4)

    one, many = run(devices=1), run(devices=4, shard="parameters")
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(many.history[-1], one.history[-1], rtol=1e-5, atol=1e-5)
    moments = [x for x in jax.tree.leaves(many.state.opt_state) if x.size > 100]
    assert all(x.addressable_shards[0].data.size < x.size for x in moments)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("routed", [{}, {"experts": 2, "pattern": ("dense", "experts")}])
def test_each_layer_learns_faster_than_the_one_before(tiny_config, pool, routed):
    """The rule by hand; tests/interop/test_peers.py compares it with timm's."""
    made = tiny_config(optim={"layer_decay": 0.5}, model={"depth": 4, "pool": pool, "head_hidden": 4}, routing=routed)
    shapes = routing.find(made).shapes()
    scales = made_of(made).scales(shapes)
    first = {"blocks": None, "norm": 0.5 if pool == "cls" else 1.0, "head": 1.0}

    def check(path, scale, leaf):
        np.broadcast_to(scale, leaf.shape)
        if path[0].key not in ("blocks", "mlp"):
            assert scale == first.get(path[0].key, 0.5**5)
            return
        position = 1 if path[0].key == "mlp" else {"block0": 0, "block1": 1}.get(path[1].key)
        layers = range(4) if position is None else range(position, 4, 2)
        np.testing.assert_array_equal(scale.ravel(), [0.5 ** (4 - layer) for layer in layers])

    jax.tree.map_with_path(check, scales.trunk, shapes.trunk)
    jax.tree.map_with_path(check, scales.experts, jax.eval_shape(one, shapes.experts))


@pytest.mark.parametrize("kind", ["layer", "sample"])
def test_layer_decay_multiplies_the_step_of_each_parameter(tiny_config, kind):
    rng = np.random.default_rng(0)

    def step(layer_decay):
        made = tiny_config(optim={"layer_decay": layer_decay}, routing={"experts": 2, "kind": kind})
        plan = build.plan_for(made, make_mesh(made.train), STEPS * made.train.batch_size)

        @jax.jit
        def run(params):
            before = state.create(params, plan.optimizer.tx)
            active = state.take(plan.routing, before, plan.routing.draw(plan.root, before.step))
            grads = jax.tree.map(jnp.cos, active.params)
            after = update.update(plan, active, grads, jnp.float32(1))
            return jax.tree.map(jnp.subtract, after.params, active.params)

        return run, made

    (whole, made), (scaled, decayed) = step(1.0), step(0.5)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), routing.find(made).shapes())
    found, wanted = scaled(params), whole(params)
    scales = made_of(decayed).scales(wanted)
    trunk, expert = (functools.partial(jax.tree.map, jnp.multiply, part) for part in scales)
    scaled_down = Params(trunk(wanted.trunk), each(expert, wanted.experts))
    chex.assert_trees_all_close(found, scaled_down, rtol=0, atol=2e-7)


FROZEN = [
    (1, {}, "muon"),
    (3, {"experts": 2, "pattern": ("dense", "experts"), "kind": "sample"}, "adamw"),
    (4, {"experts": 2, "pattern": ("dense", "experts")}, "adam"),
]


@pytest.mark.parametrize(("layers", "routed", "name"), FROZEN)
def test_frozen_layers_keep_their_bits_and_count_in_no_norm(tiny_config, training, layers, routed, name):
    optim = {"name": name, "freeze_layers": layers, "learning_rate": 1e-2, "weight_decay": 0.1}
    made = tiny_config(model={"depth": 4, "cls_position": True}, optim=optim, routing=routed)
    run = training(made).run(3)
    before, after = run.history[0].params, run.history[-1].params
    moving = 0

    def check(path, old, new):
        nonlocal moving
        if path[0].key not in ("blocks", "mlp", "norm", "head"):
            assert old.tobytes() == new.tobytes(), path
        elif path[0].key in ("blocks", "mlp"):
            is_trained_L = np.arange(4) >= layers
            if path[0].key == "mlp":
                is_trained_L, old, new = is_trained_L[1::2], old.swapaxes(0, 1), new.swapaxes(0, 1)
            elif path[1].key in ("block0", "block1"):
                is_trained_L = is_trained_L[int(path[1].key[-1]) :: 2]
            moved_L = (old != new).any(tuple(range(1, old.ndim)))
            assert not moved_L[~is_trained_L].any(), path
            if path[-1].key in ("kernel", "up", "scale"):
                np.testing.assert_array_equal(moved_L, is_trained_L)
            moving += old.size // len(old) * is_trained_L.sum()
        else:
            assert (old != new).any()
            moving += old.size

    for old, new in zip(before, after, strict=True):
        jax.tree.map_with_path(check, old, new)
    assert run.plan.optimizer.count_trained(before) == moving
    if layers == 4:  # a linear probe: its gradient is that of norm and head, and nothing else has moments
        moments = sum(x.size for x in jax.tree.leaves(run.state.opt_state) if x.dtype == jnp.float32)
        assert moments == moving * 2
    if not routed:
        grads = plain_gradient(run)
        kept = jax.tree.map(lambda g, s: g * (s > 0), grads, run.plan.optimizer.scales(Params(grads, {})).trunk)
        kept = {part: kept[part] for part in ("blocks", "norm", "head")}
        np.testing.assert_allclose(run.metrics[0].grad_norm, optax.tree.norm(kept), rtol=1e-5)


def plain_gradient(run):
    """Returns the gradient of the first step's loss of a dense model."""
    index_B = np.asarray(run.plan.order.epoch(0))[0]
    images, labels = jnp.asarray(run.split.images_NHWc[index_B]) / 127.5 - 1.0, run.split.labels_N[index_B]

    def loss(params):
        logits = vit.logits(run.plan.model, params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(jax.grad(loss))(run.history[0].params.trunk)


def test_the_groups_of_an_optimiser_are_printed_with_what_they_hold(tiny_config):
    optim = {"name": "muon", "layer_decay": 0.5, "freeze_layers": 1, "mlp_rate": 2.0}
    made = tiny_config(model={"head_hidden": 4}, routing={"experts": 3}, optim=optim)
    shapes = routing.find(made).shapes()
    lines = made_of(made).groups(shapes)
    d, f, experts, hidden, classes = 8, 12, 3, 4, 3
    matrices = 4 * d * d + experts * 2 * d * f
    assert (
        f"muon, weight decay 0.05: {4 + 2 * experts} arrays, {matrices} parameters, learning rate 0.0005 to 0.001"
        in lines
    )
    heads = hidden * (d + classes)
    assert f"adamw, weight decay 0.05: 2 arrays, {heads} parameters, learning rate 0.001" in lines
    frozen = cost.tree_size(shapes) - made_of(made).count_trained(shapes)
    assert any(line.startswith("not trained: ") and line.endswith(f" {frozen:,} parameters") for line in lines)
    assert len(lines) == 4
