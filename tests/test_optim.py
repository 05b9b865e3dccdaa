import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvitmoe.config import OptimConfig
from jvitmoe.models import vit
from jvitmoe.training import optimizer

STEPS, EPOCHS, PEAK = 7, 5, 3e-3  # of one epoch, of the run


def rates(config):
    """Returns the learning rate of every step of the run, and of the one after its last."""
    return np.array([float(optimizer.schedule(config, STEPS)(jnp.int32(step))) for step in range(EPOCHS * STEPS + 1)])


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
    assert optimizer.warmup_steps(capped, STEPS) == EPOCHS * STEPS // 2
    np.testing.assert_array_equal(rates(capped), rates(config(schedule="step", warmup_epochs=17 / 7)))
    assert rates(capped).max() == np.float32(PEAK)
    assert optimizer.warmup_steps(config(schedule="step", warmup_epochs=17 / 7), STEPS) == 17


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_direction_is_that_of_a_slow_numpy_adam(name):
    optim_config = OptimConfig(name=name, weight_decay=0.3, b1=0.8, b2=0.95, eps=1e-3)
    rng = np.random.default_rng(0)
    p = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    params = {k: jnp.asarray(x, jnp.float32) for k, x in p.items()}
    tx = optimizer.direction(optim_config)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, 7):
        grads = {k: rng.normal(size=x.shape) for k, x in p.items()}
        direction, opt_state = update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, opt_state, params)
        for k, g in grads.items():
            if name == "adam":
                g = g + 0.3 * p[k]  # L2 in the gradient, of every parameter
            m[k] = 0.8 * m[k] + 0.2 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            wanted = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-3)
            if name == "adamw" and k == "kernel":
                wanted = wanted + 0.3 * p[k]  # decoupled, of matrices only
            np.testing.assert_allclose(direction[k], wanted, rtol=1e-5, atol=1e-6)
            p[k] = p[k] - 0.1 * wanted
        params = jax.tree.map(lambda x, d: x - 0.1 * d, params, direction)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adamw_decays_matrices_only_and_adam_everything(tiny_config, name):
    config = tiny_config(model={"head_hidden": 4}, routing={"experts": 2}).model
    shapes = jax.eval_shape(lambda: vit.init(vit.build(config, 2), jax.random.key(0)))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    tx = optimizer.direction(OptimConfig(name=name, weight_decay=0.25))
    direction = jax.jit(lambda p: tx.update(optax.tree.zeros_like(p), tx.init(p), p)[0])(params)
    seen = {"decayed": set(), "left": set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(direction):
        moved = np.unique(np.asarray(leaf))
        assert len(moved) == 1
        seen["decayed" if moved[0] else "left"].add(path[-1].key)
        if name == "adamw":
            assert moved[0] in (0, 0.25)
    vectors = {"bias", "scale", "cls", "positions", "up_bias", "down_bias"}
    matrices = {"kernel", "up", "down"}
    wanted = (matrices, vectors) if name == "adamw" else (matrices | vectors, set())
    assert (seen["decayed"], seen["left"]) == wanted
