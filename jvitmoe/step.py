"""The compiled training step: draw the route, take its dense model, step it, put it back.

B global batch, b the share of one device · S steps of one epoch · N images · L layers
"""

import os
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvitmoe import merging, optim, routing, state
from jvitmoe.config import Config, ConfigError, TrainConfig
from jvitmoe.data import augment
from jvitmoe.data.feed import Images
from jvitmoe.models import vit
from jvitmoe.routing import Purpose
from jvitmoe.state import TrainState

AXIS = "data"
REPLICATED = PartitionSpec()
BY_COLUMN = PartitionSpec(None, AXIS)


class Metrics(NamedTuple):
    """What one step says of itself, over the global batch; float32 scalars."""

    loss: jax.Array  # what was minimised: cross-entropy, nats, smoothed labels if asked
    accuracy: jax.Array  # of the path that ran, before its update
    grad_norm: jax.Array  # global L2 norm before clipping
    learning_rate: jax.Array


TrainStep = Callable[[TrainState, Images, jax.Array], tuple[TrainState, Metrics]]


def make_mesh(train: TrainConfig) -> Mesh:
    """Returns the mesh over local devices. Raises ConfigError for a platform or a number of devices not there."""
    try:
        devices = jax.local_devices(backend=train.platform or None)
    except RuntimeError as error:
        raise ConfigError(
            f"config.train.platform is {train.platform!r}; JAX finds {jax.default_backend()} devices only; "
            "install jvitmoe[cuda12] or jvitmoe[cuda13], or set --config.train.platform=''"
        ) from error
    chosen = train.platform or os.environ.get("JAX_PLATFORMS")
    if not chosen and devices[0].platform == "cpu" and Path("/dev/nvidia0").exists():
        warnings.warn("an NVIDIA GPU is here but JAX finds only the CPU; install jvitmoe[cuda12]", RuntimeWarning, 2)
    wanted = train.devices or len(devices)
    if wanted > len(devices):
        raise ConfigError(
            f"config.train.devices is {wanted}; it must be at most {len(devices)}, the devices that are there"
        )
    return jax.make_mesh((wanted,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:wanted])


def describe(mesh: Mesh) -> str:
    """Returns the devices in words: number, kind, and for a CPU its model."""
    first = mesh.devices.flat[0]
    kind = first.device_kind
    if first.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        kind = f"cpu ({found.group(1) if found else platform.machine()}, {os.cpu_count()} cores)"
    return f"{mesh.size} x {kind}"


def settle(mesh: Mesh, outputs: Any) -> None:
    """Waits for `outputs` where the mesh is several CPU devices, and only there: XLA runs their collectives on one
    thread pool, which can deadlock with two programs in flight (seen on JAX 0.10)."""
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(outputs)


def make_model(config: Config, platform_name: str) -> vit.ViT:
    """Returns the model that training initialises, stacked where there are experts, for "cpu", "gpu" or "tpu"."""
    routed = config.routing
    return vit.build(config.model, routed.experts, routed.init, routed.shared_layer, platform_name)


def make_state(config: Config, model: vit.ViT, mesh: Mesh, dense: Any = None) -> TrainState:
    """Returns the state at step 0, whole on every device of the mesh: a pure function of config and `dense`.

    With a trained dense tree, experts are copies of its MLPs and the trunk is its trunk: sparse upcycling.
    """
    key = routing.address(jax.random.key(config.train.seed), Purpose.INIT)
    tx = optim.direction(config.optim)

    def create() -> TrainState:
        params = vit.init(model, key)
        if dense is not None:
            params = merging.upcycle(dense, params)
        return state.create(params, tx, ema=config.train.ema > 0)

    return jax.jit(create, out_shardings=NamedSharding(mesh, REPLICATED))()


def abstract_state(config: Config, model: vit.ViT, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of `make_state`, with nothing computed: what a checkpoint restores to."""
    sharding = NamedSharding(mesh, REPLICATED)
    shapes = jax.eval_shape(lambda: make_state(config, model, mesh))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def expert_schedule(config: Config, steps_per_epoch: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns step -> (scale, pull): what multiplies the experts' learning rate, and the share of the way to their
    mean that experts move after the step.

    In the last `tie_last` of training experts go all the way, so that from its first step on they are equal. Where
    one expert runs per batch, its step then counts E times: the mean of E equal experts of which one moved has moved
    1/E as far, and so the whole MLP takes the dense step.
    """
    routed = config.routing
    total = config.train.epochs * steps_per_epoch
    first_tied = round((1.0 - routed.tie_last) * total)

    def at(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        rise = (step + 1) / total if routed.pull_schedule == "rising" else 1.0
        pull = jnp.where((step + 1) % routed.pull_every == 0, routed.pull * rise, 0.0)
        times = routed.experts if routed.granularity == "batch" else 1
        scale = jnp.where(step >= first_tied, times * routed.learning_rate, routed.learning_rate)
        return scale, jnp.where(step + 1 >= first_tied, 1.0, pull)

    return at


def make_train_step(config: Config, model: vit.ViT, mesh: Mesh, steps_per_epoch: int) -> TrainStep:
    """Returns the compiled step: (state, images, index_SB of the epoch) -> (state, Metrics). The state is donated.

    Routes, augmentation and dropout are addressed by (seed, step, place in the global batch), so the result does not
    depend on the number of devices beyond the order of floating-point sums. With granularity "batch" only the dense
    model on the route is differentiated, reduced over devices and updated; otherwise every expert runs on its slot,
    which an image has by its place in the batch modulo E.
    """
    root = jax.random.key(config.train.seed)
    learning_rate = optim.schedule(config, steps_per_epoch)
    tx = optim.direction(config.optim)
    data, routed, smoothing = config.data, config.routing, config.train.label_smoothing
    one_path = routed.granularity == "batch" or routed.experts == 1
    net = vit.ViT(config.model, dtype=model.dtype) if one_path else model
    moves_experts = routed.experts > 1 and (routed.pull > 0 or routed.tie_last > 0)
    experts_at = expert_schedule(config, steps_per_epoch)

    def keys_b(purpose: Purpose, step: jax.Array, slot_b: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(routing.address(root, purpose, step), slot_b)

    def train_step(before: TrainState, split: Images, index_Sb: jax.Array) -> tuple[TrainState, Metrics]:
        step = before.step
        index_b = index_Sb[step % steps_per_epoch]
        place_b = jax.lax.axis_index(AXIS) * index_b.shape[0] + jnp.arange(index_b.shape[0])
        if not one_path:  # sorted by slot, so that the network sees [E, b / E]
            by_slot = jnp.arange(index_b.shape[0]).reshape(-1, routed.experts).T.reshape(-1)
            index_b, place_b = index_b[by_slot], place_b[by_slot]
        images = augment.augment(
            keys_b(Purpose.AUGMENT, step, place_b), split.images_NHWC[index_b], data.crop_padding, data.flip
        )
        labels_b = split.labels_N[index_b]
        dropout_key_b = keys_b(Purpose.DROPOUT, step, place_b) if config.model.dropout else None
        route = routing.draw_route(
            routing.address(root, Purpose.ROUTE, step), routed, config.model.depth, config.tokens
        )
        stacked = merging.stacked(before.params)
        params, opt_state = before.params, before.opt_state
        if one_path:
            params, opt_state = state.take_path(params, opt_state, route)

        def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
            # Each device differentiates its own copy, so gradients are reduced once, at the end, and not where a
            # parameter first meets the images: inside the scan over layers, and the CLS token once per image.
            params = jax.lax.pcast(params, (AXIS,), to="varying")
            logits_bC = vit.logits(net, params, augment.normalize(images), None if one_path else route, dropout_key_b)
            targets_bC = optax.smooth_labels(jax.nn.one_hot(labels_b, logits_bC.shape[-1]), smoothing)
            loss = optax.softmax_cross_entropy(logits_bC, targets_bC).mean()
            accuracy = (logits_bC.argmax(-1) == labels_b).mean()
            # The mean over devices belongs inside: shard_map then returns reduced gradients, and a pmean of
            # gradients after the fact would be wrong by a factor of the device count.
            return jax.lax.pmean(loss, AXIS), jax.lax.pmean(accuracy, AXIS)

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        norm = optax.tree.norm(grads)
        if config.optim.clip_norm:
            scale = jnp.minimum(1.0, config.optim.clip_norm / norm)
            grads = jax.tree.map(lambda g: g * scale, grads)
        expert_scale, pull = experts_at(step)
        direction, opt_state = state.update(tx, grads, opt_state, params, stacked, not one_path, expert_scale)
        rate = learning_rate(step)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        if one_path:
            params, opt_state = state.put_path(before.params, before.opt_state, route, params, opt_state)
        if moves_experts:
            params = jax.lax.cond(pull > 0, lambda tree: merging.pull(tree, pull), lambda tree: tree, params)
        ema, decay = before.ema, config.train.ema
        if decay:
            merged = merging.average_experts(params)
            ema = jax.tree.map(lambda mean, new: decay * mean + (1.0 - decay) * new, ema, merged)
        return TrainState(step + 1, params, opt_state, ema), Metrics(
            loss, accuracy, norm, jnp.asarray(rate, jnp.float32)
        )

    sharded = jax.shard_map(
        train_step, mesh=mesh, in_specs=(REPLICATED, REPLICATED, BY_COLUMN), out_specs=(REPLICATED, REPLICATED)
    )
    return jax.jit(sharded, donate_argnums=0)
