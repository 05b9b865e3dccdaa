"""Routers in the model against loops over tokens, and the laws that their outputs, statistics and losses obey.

B batch · T tokens of an image · D width · F hidden width · E experts · K choices of a token · C slots · L layers
"""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jvitmoe import routing
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params, join_all
from jvitmoe.machine import programs
from jvitmoe.machine.addresses import Purpose
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import vit
from jvitmoe.models.layers import Site
from jvitmoe.models.mlp import Mlp, RoutedMlp
from jvitmoe.models.routers import ROUTERS, RouterSettings, Statistics
from jvitmoe.models.routers.dispatch import slots_per_expert
from jvitmoe.models.routers.random_tokens import RandomTokens
from jvitmoe.models.routers.topk import upper_tail
from jvitmoe.training import build
from jvitmoe.training.step import image_keys

BATCH, TOKENS, WIDTH, HIDDEN, EXPERTS = 4, 9, 5, 6, 4
KINDS = ("switch", "topk", "expert_choice", "soft", "hash", "token")
MLP = ("up", "up_bias", "down", "down_bias")
TRAINING = {"dropout": 0.5, "capacity": 0.5, "eval_capacity": float(EXPERTS)}  # with drops, in training only


def drawn(shapes, seed=0):
    """Returns NumPy arrays, here as everywhere below: each operation of JAX outside of jit is a compilation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


def images(batch=BATCH, tokens=TOKENS, seed=1):
    return drawn(jax.ShapeDtypeStruct((batch, tokens, WIDTH), jnp.float32), seed)


def keys(count=BATCH):
    return jax.random.split(jax.random.key(7), count)


def routed(kind, experts=EXPERTS, dropout=0.0, dtype=jnp.float32, **settings):
    return RoutedMlp(HIDDEN, dropout=dropout, dtype=dtype, settings=RouterSettings(kind, experts, **settings))


def make(kind, tokens=TOKENS, **options):
    """Returns (mlp, params), the parameters drawn by NumPy: initialising would cost a compilation."""
    mlp = routed(kind, **options)
    return mlp, drawn(jax.eval_shape(lambda: mlp.init(jax.random.key(0), images(1, tokens), None))["params"])


@functools.partial(jax.jit, static_argnums=0)
def apply(mlp, params, x_BTD, key_B=None):
    """Returns (y_BTD, Statistics)."""
    y_BTD, published = mlp.apply({"params": params}, x_BTD, key_B, mutable=["statistics"])
    return y_BTD, published["statistics"]["routing"]


def equal_experts(params):
    """Returns (params with every expert as the first, the dense MLP's params)."""
    dense = {name: params[name][0] for name in MLP}
    copies = {name: np.broadcast_to(params[name][:1], params[name].shape) for name in MLP}
    return params | copies, dense


def run_dense(dense, x_BTD):
    return jax.jit(Mlp(HIDDEN).apply)({"params": dense}, x_BTD, None)


def normal_tail(x):
    return 0.5 * np.vectorize(math.erfc)(x / math.sqrt(2))


def softmax(logits_BTE):
    weight_BTE = np.exp(np.asarray(logits_BTE, np.float64))
    return weight_BTE / weight_BTE.sum(-1, keepdims=True)


def slots(factor, tokens=TOKENS):
    return min(math.ceil(factor * tokens / EXPERTS), tokens)


def slow_mask(kind, probability_TE, capacity, order_T):
    """Returns mask_TE of the tokens that get into an expert of one image, one by one; capacity in tokens. `order_T` is
    the order in which random tokens are dealt."""
    tokens, experts = probability_TE.shape
    mask_TE, used_E = np.zeros((tokens, experts)), np.zeros(experts)
    choices = []
    if kind == "switch":
        choices = [(t, probability_TE[t].argmax()) for t in range(tokens)]
    elif kind == "topk":
        surest_first = sorted(range(tokens), key=lambda t: -probability_TE[t].max())
        choices = [(t, np.argsort(-probability_TE[t])[k]) for k in range(2) for t in surest_first]
    elif kind == "expert_choice":
        choices = [(t, e) for e in range(experts) for t in np.argsort(-probability_TE[:, e])]
    elif kind == "hash":
        by_hash = sorted(range(tokens), key=lambda t: t * 2654435761 % 2**32)
        choices = [(t, i % experts) for i, t in enumerate(by_hash)]
    elif kind == "token":
        choices = [(t, i % experts) for i, t in enumerate(order_T)]
    for t, e in choices:
        if used_E[e] < capacity:
            mask_TE[t, e] = 1
            used_E[e] += 1
    return mask_TE


def logits_of(params, x_BTD):
    return x_BTD @ params["router"]["kernel"] + params["router"]["bias"][None, None]


def masked_sum(params, x_BTD, noise_BTE, mask_BTE):
    """Returns y_BTD with every expert run on every token, and weighted."""
    weight_BTE = mask_BTE
    if "router" in params:
        weight_BTE = mask_BTE * jax.nn.softmax(logits_of(params, x_BTD) + noise_BTE)
    each = [Mlp(HIDDEN).apply({"params": {n: params[n][e] for n in MLP}}, x_BTD, None) for e in range(EXPERTS)]
    return sum(weight_BTE[..., e, None] * each[e] for e in range(EXPERTS))


@jax.jit
def masked_sum_and_gradients(params, x_BTD, direction_BTD, *of_tokens):
    y_BTD, pull_back = jax.vjp(lambda p, x: masked_sum(p, x, *of_tokens), params, x_BTD)
    return y_BTD, pull_back(direction_BTD)


@functools.partial(jax.jit, static_argnums=0)
def apply_and_gradients(mlp, params, x_BTD, direction_BTD, key_B):
    """Returns (y_BTD, gradients by params and x, Statistics)."""
    y_BTD, pull_back, statistics = jax.vjp(lambda p, x: apply(mlp, p, x, key_B), params, x_BTD, has_aux=True)
    return y_BTD, pull_back(direction_BTD), statistics


def dealt(key_B, tokens=TOKENS):
    """Returns order_BT, in which random tokens go to the experts in turn."""
    shuffle = jax.jit(jax.vmap(lambda k: jax.random.permutation(jax.random.fold_in(k, Site.ROUTER_NOISE), tokens)))
    return np.asarray(shuffle(key_B))


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        *(("switch", True), ("switch", False), ("topk", True), ("topk", False), ("expert_choice", True)),
        *(("hash", False), ("token", True), ("token", False)),
    ],
)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(kind, train):
    mlp, params = make(kind, capacity=0.75, eval_capacity=1.25)
    x_BTD, key_B = images(), keys() if train else None
    noise_BTE = np.zeros((BATCH, TOKENS, EXPERTS), np.float32)
    if kind == "topk" and train:
        noise_BTE = jax.vmap(
            lambda k: jax.random.normal(jax.random.fold_in(k, Site.ROUTER_NOISE), noise_BTE.shape[1:])
        )(key_B)
        noise_BTE = np.asarray(noise_BTE) / EXPERTS
    factor = 0.75 if train else 1.25
    others = {"hash": EXPERTS, "token": EXPERTS, "expert_choice": 0.75}
    factor = 2 * factor if kind == "topk" else others.get(kind, factor)
    probability_BTE = np.full(noise_BTE.shape, 1 / EXPERTS)
    if "router" in params:
        probability_BTE = softmax(logits_of(params, x_BTD) + noise_BTE)
    order_BT = dealt(key_B) if kind == "token" and train else [np.arange(TOKENS)] * BATCH
    inputs = zip(probability_BTE, order_BT, strict=True)
    mask_BTE = np.asarray([slow_mask(kind, p_TE, slots(factor), order_T) for p_TE, order_T in inputs], np.float32)
    direction_BTD = images(seed=3)
    y_BTD, gradients, statistics = apply_and_gradients(mlp, params, x_BTD, direction_BTD, key_B)
    wanted_BTD, wanted = masked_sum_and_gradients(params, x_BTD, direction_BTD, noise_BTE, mask_BTE)
    np.testing.assert_allclose(y_BTD, wanted_BTD, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-4, atol=1e-4)

    chosen_BT = mask_BTE.sum(-1)
    if kind == "expert_choice":
        np.testing.assert_allclose(statistics.dropped, (chosen_BT == 0).mean(), atol=1e-6)
    else:
        np.testing.assert_allclose(statistics.dropped, 1 - chosen_BT.mean() / (1 + (kind == "topk")), atol=1e-6)
    assert (statistics.dropped > 0) == ("router" in params)  # else the case would show nothing
    if "router" not in params:
        np.testing.assert_allclose(statistics.load_E, mask_BTE.sum((0, 1)) / BATCH / TOKENS, rtol=1e-6)
        assert set(mask_BTE.sum(1).ravel()) == {TOKENS // EXPERTS, -(-TOKENS // EXPERTS)}
        np.testing.assert_array_equal(chosen_BT, 1)


def test_soft_moe_is_the_formula_written_as_loops():
    mlp, params = make("soft")
    x_BTD = images(2)
    y_BTD, statistics = apply(mlp, params, x_BTD)
    kernel, scale = np.asarray(params["router"]["kernel"], np.float64), float(params["router"]["scale"])
    count = math.ceil(TOKENS / EXPERTS)
    assert kernel.shape == (WIDTH, EXPERTS, count)
    entropies = []
    for x_TD, y_TD in zip(np.asarray(x_BTD, np.float64), y_BTD, strict=True):
        weight = np.zeros((TOKENS, EXPERTS, count))
        for t in range(TOKENS):
            for e in range(EXPERTS):
                for c in range(count):
                    slot = kernel[:, e, c]
                    cosine = x_TD[t] @ slot / np.linalg.norm(x_TD[t]) / np.linalg.norm(slot)
                    weight[t, e, c] = np.exp(scale * cosine)
        expected = np.zeros((TOKENS, WIDTH))
        for e in range(EXPERTS):
            for c in range(count):
                dispatch_T = weight[:, e, c] / weight[:, e, c].sum()
                up, up_bias, down, down_bias = (np.asarray(params[name][e], np.float64) for name in MLP)
                h_F = dispatch_T @ x_TD @ up + up_bias
                out_D = (h_F * (1 - normal_tail(h_F))) @ down + down_bias
                expected += np.outer(weight[:, e, c] / weight.sum((1, 2)), out_D)
        np.testing.assert_allclose(y_TD, expected, rtol=1e-4, atol=1e-5)
        share_TE = weight.sum(2) / weight.sum((1, 2))[:, None]
        entropies.append(-(share_TE * np.log(share_TE)).sum(1).mean())
    np.testing.assert_allclose(statistics.entropy, np.mean(entropies), rtol=1e-5)


def test_with_equal_experts_and_no_drops_the_router_leaves_only_its_weights():
    x_BTD = images()
    for kind, options in {
        "hash": {},
        "token": {},
        "topk": {"top_k": EXPERTS},  # all of the softmax, which sums to one
        "expert_choice": {"capacity": EXPERTS},
        "switch": {"eval_capacity": EXPERTS},
    }.items():
        mlp, params = make(kind, **options)
        params, dense = equal_experts(params)
        y_BTD, statistics = apply(mlp, params, x_BTD)
        weight_BT1 = 1.0
        if kind == "switch":
            weight_BT1 = softmax(logits_of(params, x_BTD)).max(-1, keepdims=True)
        np.testing.assert_allclose(y_BTD, weight_BT1 * run_dense(dense, x_BTD), rtol=1e-4, atol=1e-5, err_msg=kind)
        np.testing.assert_allclose(statistics.dropped, 0, atol=1e-6, err_msg=kind)


def test_soft_moe_of_equal_experts_and_equal_tokens_is_dense():
    mlp, params = make("soft")
    params, dense = equal_experts(params)
    x_BTD = np.broadcast_to(images()[:, :1], (BATCH, TOKENS, WIDTH))
    np.testing.assert_allclose(apply(mlp, params, x_BTD)[0], run_dense(dense, x_BTD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["expert_choice", "soft"])
def test_shuffling_the_tokens_of_an_image_shuffles_its_outputs(kind):
    mlp, params = make(kind, capacity=0.5, eval_capacity=0.5)
    x_BTD, order_T = images(), np.random.default_rng(0).permutation(TOKENS)
    y_BTD, shuffled_BTD = (apply(mlp, params, x)[0] for x in (x_BTD, x_BTD[:, order_T]))
    np.testing.assert_allclose(shuffled_BTD, y_BTD[:, order_T], rtol=1e-4, atol=1e-5)


def test_parameters_are_the_mlps_and_a_pytorch_linear():
    mlp = RoutedMlp(HIDDEN, settings=RouterSettings())
    params = jax.jit(mlp.init)(jax.random.key(0), images(1), None)["params"]
    shapes = {"up": (EXPERTS, WIDTH, HIDDEN), "up_bias": (EXPERTS, HIDDEN)}
    shapes |= {"down": (EXPERTS, HIDDEN, WIDTH), "down_bias": (EXPERTS, WIDTH)}
    assert {name: params[name].shape for name in MLP} == shapes
    assert {name: x.shape for name, x in params["router"].items()} == {"kernel": (WIDTH, EXPERTS), "bias": (EXPERTS,)}
    chex.assert_trees_all_equal({n: params[n][0] for n in MLP}, {n: params[n][3] for n in MLP})
    for x in params["router"].values():
        assert 0.5 * WIDTH**-0.5 < np.abs(x).max() <= WIDTH**-0.5
        assert len(np.unique(x)) == x.size
    soft = jax.jit(routed("soft").init)(jax.random.key(0), images(1), None)["params"]["router"]
    assert soft["scale"] == 1
    assert "router" not in make("hash")[1]
    assert "router" not in make("token")[1]


def test_statistics_and_losses_of_constant_logits_are_those_worked_out_by_hand():
    mlp, params = make("switch", tokens=8, eval_capacity=1.0)
    bias_E = np.log([0.5, 0.25, 0.125, 0.125]).astype(np.float32) + 3
    params["router"] = {"kernel": np.zeros((WIDTH, EXPERTS), np.float32), "bias": bias_E}
    _, statistics = apply(mlp, params, images(tokens=8))
    expected = Statistics(
        load_E=np.array([1.0, 0, 0, 0]),
        probability_E=np.array([0.5, 0.25, 0.125, 0.125]),
        dropped=np.array(0.75),  # two slots for eight tokens
        entropy=np.array(1.75 * math.log(2)),
    )
    chex.assert_trees_all_close(statistics, expected, rtol=1e-5)
    two_layers = jax.tree.map(lambda x: np.stack([x, x]), statistics)
    np.testing.assert_allclose(ROUTERS["switch"].loss(two_layers), 4 * 0.5, rtol=1e-5)


def hand(load_LE, probability_LE, smooth_load_LE):
    zero = np.zeros(len(load_LE), np.float32)
    leaves = [np.asarray(x, np.float32) for x in (load_LE, probability_LE, smooth_load_LE)]
    return Statistics(*leaves[:2], zero, zero, leaves[2])


def test_balance_losses_are_those_worked_out_by_hand():
    statistics = hand([[0.5, 0.5, 0], [1, 0, 0]], [[0.5, 0.3, 0.2], [1 / 3] * 3], [[0.9, 0.6, 0.6], [0.7] * 3])
    # switch: 3 (0.25 + 0.15) and 3 / 3, averaged over the two layers.
    np.testing.assert_allclose(ROUTERS["switch"].loss(statistics), (1.2 + 1.0) / 2, rtol=1e-5)
    # topk: variance over squared mean is 0.14 / 9 over 1 / 9, and 0.02 over 0.49; both 0 in the second layer.
    np.testing.assert_allclose(ROUTERS["topk"].loss(statistics), (0.14 + 0.02 / 0.49) / 2 / 2, rtol=1e-5)
    for kind in ("expert_choice", "soft", "hash", "token"):
        assert ROUTERS[kind].loss(statistics) == 0.0


def test_smooth_load_is_the_chance_that_new_noise_puts_the_expert_in_the_top_k():
    mlp, params = make("topk")
    x_BTD = images()
    _, statistics = apply(mlp, params, x_BTD)
    logits_BTE = np.asarray(logits_of(params, x_BTD), np.float64)
    threshold_BT1 = np.sort(logits_BTE, axis=-1)[..., -2:-1]
    expected = normal_tail((threshold_BT1 - logits_BTE) * EXPERTS)
    np.testing.assert_allclose(statistics.smooth_load_E, expected.mean((0, 1)), rtol=1e-4)
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, Site.ROUTER_NOISE), (TOKENS, EXPERTS)))
    noisy_BTE = logits_BTE + np.asarray(draw(keys())) / EXPERTS
    _, statistics = apply(mlp, params, x_BTD, keys())
    threshold_BT1 = np.sort(noisy_BTE, axis=-1)[..., -2:-1]
    expected = normal_tail((threshold_BT1 - logits_BTE) * EXPERTS)
    np.testing.assert_allclose(statistics.smooth_load_E, expected.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(statistics.probability_E, softmax(logits_BTE).mean((0, 1)), rtol=1e-4)


def test_slots_are_rounded_up_but_not_for_the_error_of_a_product():
    assert [slots_per_expert(1.1, 100, 2), slots_per_expert(1.0, 5, 2), slots_per_expert(9.0, 4, 2)] == [55, 3, 4]


def test_the_upper_tail_and_its_slope_are_the_normal_distributions():
    x = np.linspace(-5, 5, 41)
    got, slope = jax.jvp(upper_tail, (x.astype(np.float32),), (np.ones(41, np.float32),))
    np.testing.assert_allclose(got, normal_tail(x), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(slope, -np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi), rtol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "soft", "token"])
def test_half_a_batch_is_routed_as_in_the_whole_and_statistics_average(kind):
    mlp, params = make(kind, **TRAINING)
    x_BTD, key_B = images(), keys()
    whole, statistics = apply(mlp, params, x_BTD, key_B)
    halves = [apply(mlp, params, x_BTD[half], key_B[half]) for half in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(whole, np.concatenate([y for y, _ in halves]), rtol=1e-5, atol=1e-5)
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, halves[0][1], halves[1][1])
    chex.assert_trees_all_close(statistics, mean, rtol=1e-5, atol=1e-6)


class Layer(nn.Module):
    mlp: RoutedMlp

    @nn.compact
    def __call__(self, x_BTD, key_B):
        return x_BTD + self.mlp(x_BTD, key_B), None


def scanned_gradients(kind):
    """Returns (params, value and gradient of a loss of two scanned layers, the same over four devices)."""
    axes = {"params": 0, "statistics": 0}
    scanned = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=2)
    net = scanned(routed(kind, capacity=0.75))

    def loss(params, x_BTD, key_B, sharded):
        if sharded:
            params = jax.lax.pcast(params, ("data",), to="varying")
        (y_BTD, _), published = net.apply({"params": params}, x_BTD, key_B, mutable=["statistics"])
        value, statistics = jnp.square(y_BTD).mean(), published["statistics"]["mlp"]["routing"]
        if sharded:
            value, statistics = jax.lax.pmean((value, statistics), "data")
        return value + ROUTERS[kind].loss(statistics) + statistics.entropy.mean(), statistics

    one, four = (jax.value_and_grad(functools.partial(loss, sharded=s), has_aux=True) for s in (False, True))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    four = jax.shard_map(four, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), images(), None))["params"]
    return drawn(params), jax.jit(one), jax.jit(four)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "soft"])
def test_gradients_of_scanned_layers_are_the_same_on_one_device_and_four(kind):
    params, one, four = scanned_gradients(kind)
    expected = one(params, images(), keys())
    chex.assert_trees_all_close(four(params, images(), keys()), expected, rtol=1e-4, atol=1e-5)
    chex.assert_shape(expected[0][1].load_E, (2, EXPERTS))
    for leaf in jax.tree.leaves(expected[1]["mlp"]["router"]):
        assert np.abs(leaf).max() > 1e-3


@pytest.mark.parametrize("kind", ["switch", "expert_choice", "hash", "token"])
def test_the_other_kinds_too_are_accepted_over_devices(kind):
    params, one, four = scanned_gradients(kind)  # shard_map refuses while tracing, so compiling would add nothing
    arguments = params, images(), keys()
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(four, *arguments), jax.eval_shape(one, *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_deterministic(kind):
    mlp, params = make(kind, **TRAINING)
    draws = [
        "random" in str(jax.make_jaxpr(functools.partial(apply, mlp))(params, images(), key_B))
        for key_B in (None, keys())
    ]
    assert draws == [False, True]


@pytest.mark.parametrize("kind", ["topk", "soft"])
def test_bfloat16_leaves_the_router_in_float32(kind):
    mlp, params = make(kind, dtype=jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(params), jnp.float32)
    x_BTD = images().astype(jnp.bfloat16)  # NumPy knows it through JAX
    y_BTD, statistics = apply(mlp, params, x_BTD)
    chex.assert_type(y_BTD, jnp.bfloat16)
    full, exact = apply(mlp.clone(dtype=jnp.float32), params, x_BTD.astype(np.float32))
    chex.assert_trees_all_close(statistics, exact, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.asarray(y_BTD, np.float32), full, rtol=0.1, atol=0.1)


def largest(jaxpr):
    """Returns the most elements of any array that a jaxpr computes."""
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes, default=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_array_holds_tokens_times_experts_times_slots_but_in_soft_moe(kind):
    tokens, experts = 64, 16
    mlp, params = make(kind, tokens=tokens, experts=experts, dropout=0.1)
    gradient = jax.grad(lambda p, x, key_B: apply(mlp, p, x, key_B)[0].sum(), (0, 1))
    jaxpr = jax.make_jaxpr(gradient)(params, images(1, tokens), keys(1)).jaxpr
    count = tokens // experts  # the fewest slots of any kind
    assert (largest(jaxpr) >= tokens * experts * count) == (kind == "soft")


@pytest.mark.parametrize("kind", ["batch", *ROUTERS])
def test_a_model_and_its_gradient_promote_no_dtype_by_accident(tiny_config, kind):
    """Traced only, and in float32: Flax's LayerNorm promotes bfloat16, and Optax integers (`decay**count`)."""
    model = routing.find(tiny_config(model={"dropout": 0.1}, routing={"experts": 2, "kind": kind})).model()

    def loss(params, images, keys):
        return vit.logits(model, params, images, keys).sum()

    with jax.numpy_dtype_promotion("strict"):
        params = vit.shapes(model)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
        gradient = jax.eval_shape(jax.grad(loss), params, jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32), keys)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)


@pytest.mark.parametrize(("tokens", "partitions", "limit"), [(4, 6, 20.5), (5, 10, 27.9)])
def test_random_tokens_are_a_uniform_partition_of_each_image(tokens, partitions, limit):
    count, router = 6000, RandomTokens(RouterSettings("token", 2))
    route = jax.jit(lambda key_B: router.route(jnp.zeros((count, tokens, 1)), key_B)[0].token_EBQ)
    token_EBQ = np.asarray(route(keys(count)))
    slots = token_EBQ.shape[2]
    assert (np.sort(token_EBQ.swapaxes(0, 1).reshape(count, -1)) == np.arange(2 * slots)).all()  # each token once
    assert slots == -(-tokens // 2)
    first_BT = (token_EBQ[0][:, :, None] == np.arange(tokens)[None, None]).any(1)  # of two experts one tells all
    _, found = np.unique(first_BT, axis=0, return_counts=True)
    assert len(found) == partitions
    expected = count / partitions
    assert ((found - expected) ** 2 / expected).sum() < limit  # exceeded once in 1,000


def test_random_tokens_are_dealt_anew_for_every_image_layer_and_step(tiny_config, monkeypatch):
    class Seen(RandomTokens):
        def route(self, x_BTD, key_B):
            slots, statistics = super().route(x_BTD, key_B)
            self.sow("intermediates", "tokens", slots.token_EBQ)
            return slots, statistics

    monkeypatch.setitem(ROUTERS, "token", Seen)
    config = tiny_config(model={"patch": 2}, routing={"experts": 4, "kind": "token"})
    plan = build.plan_for(config, make_mesh(config.train), 24)

    @jax.jit
    def dealt_in(step, params):
        key_B = image_keys(plan, Purpose.DROPOUT, step, jnp.arange(8))
        _, found = plan.model.apply({"params": params}, jnp.zeros((8, 8, 8, 1)), key_B, mutable=["intermediates"])
        return found["intermediates"]["blocks"]["mlp"]["router"]["tokens"][0]

    params = join_all(drawn(plan.routing.shapes()))
    token_SLEBQ = np.stack([np.sort(dealt_in(step, params)) for step in range(3)])
    chex.assert_shape(token_SLEBQ, (3, 2, 4, 8, 5))
    assert len({x.tobytes() for x in token_SLEBQ.swapaxes(2, 3).reshape(-1, 4, 5)}) == 3 * 2 * 8


def test_random_tokens_cost_the_flops_of_the_dense_mlp():
    x_BTD, hidden = np.zeros((2, 32, 64), np.float32), 256

    def flops(mlp):
        params = jax.eval_shape(lambda: mlp.init(jax.random.key(0), jnp.asarray(x_BTD), None))["params"]
        lowered = jax.jit(lambda p, x_BTD: mlp.apply({"params": p}, x_BTD, None)).lower(params, x_BTD)
        return programs.for_reading(lowered).cost_analysis()["flops"]

    dense = flops(Mlp(hidden))
    assert dense > 2 * 2 * 32 * 2 * 64 * hidden
    assert flops(RoutedMlp(hidden, settings=RouterSettings("token", 4))) == pytest.approx(dense, rel=0.01)


@pytest.mark.parametrize("kind", ["switch", "topk"])
def test_a_selection_bias_chooses_experts_and_weighs_nothing(kind):
    """DeepSeek-V3, arXiv 2412.19437, equation 16."""
    mlp, params = make(kind, has_bias=True, eval_capacity=float(EXPERTS))
    bias_E = np.array([0.0, 3.0, 2.0, 0.0], np.float32)  # more than any probability
    params["router"]["selection_bias"] = bias_E
    x_BTD, direction_BTD = images(), images(seed=3)
    y_BTD, gradients, _ = apply_and_gradients(mlp, params, x_BTD, direction_BTD, None)
    chosen_E = np.array([0, 1, kind == "topk", 0], np.float32)
    mask_BTE = np.broadcast_to(chosen_E, (BATCH, TOKENS, EXPERTS))
    unbiased = params | {"router": {name: params["router"][name] for name in ("kernel", "bias")}}
    wanted_BTD, wanted = masked_sum_and_gradients(unbiased, x_BTD, direction_BTD, np.zeros_like(mask_BTE), mask_BTE)
    np.testing.assert_allclose(y_BTD, wanted_BTD, rtol=1e-4, atol=1e-5)
    assert not gradients[0]["router"].pop("selection_bias").any()
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-4, atol=1e-4)


def test_a_shared_expert_adds_what_every_token_gets_and_experts_have_a_width_of_their_own(tiny_config):
    model = {"expert_hidden": 3, "shared_hidden": 5}
    way = routing.find(tiny_config(model=model, routing={"experts": EXPERTS, "kind": "topk"}))
    params = drawn(way.shapes())
    block = jax.tree.map(lambda leaf: leaf[0], join_all(params)["blocks"]["mlp"])
    assert (block["up"].shape, block["shared_up"].shape) == ((EXPERTS, 8, 3), (8, 5))
    x_BTD = drawn(jax.ShapeDtypeStruct((BATCH, TOKENS, 8), jnp.float32), 1)
    names = {name: block[name] for name in (*MLP, "router")}
    alone_BTD, _ = apply(RoutedMlp(3, settings=way.router_settings), names, x_BTD)
    both_BTD, _ = apply(RoutedMlp(3, settings=way.router_settings, shared=5), block, x_BTD)
    shared = {name: block[f"shared_{name}"] for name in MLP}
    wanted_BTD = alone_BTD + jax.jit(Mlp(5).apply)({"params": shared}, x_BTD, None)
    np.testing.assert_allclose(both_BTD, wanted_BTD, rtol=1e-4, atol=1e-5)

    equal, dense = equal_experts(block)
    experts = {name: equal[name][:, None] for name in MLP}
    rest = {name: jax.tree.map(lambda x: x[None], leaf) for name, leaf in equal.items() if name not in MLP}
    trunk = params.trunk | {"blocks": params.trunk["blocks"] | {"mlp": rest}}
    folded = merge.average_experts(Params(trunk, {"mlp": experts}))
    merged = jax.tree.map(lambda leaf: leaf[0], folded["blocks"]["mlp"])
    found_BTD, expert_BTD, shared_BTD = (
        jax.jit(Mlp(width).apply)({"params": weights}, x_BTD, None)
        for width, weights in ((8, merged), (3, dense), (5, shared))
    )
    np.testing.assert_allclose(found_BTD, expert_BTD + shared_BTD, rtol=1e-4, atol=1e-5)
    assert vit.shapes(way.model().plain())["blocks"]["mlp"]["up"].shape == (2, 8, 8)
