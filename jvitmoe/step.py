"""The compiled training step: draw the route, take its dense model, step it, put it back.

Devices form a mesh ("data", "expert"). Loss and gradients are computed per device under `shard_map`; everything else
is plain code over whole arrays, which XLA partitions as the state is sharded.

B global batch, b the share of one device · S steps of one epoch · N images · L layers · E experts
"""

import dataclasses
import functools
import os
import platform
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvitmoe import compilation, merging, optim, routing, state
from jvitmoe.config import Config, ConfigError, TrainConfig
from jvitmoe.data import augment
from jvitmoe.data.feed import Images
from jvitmoe.models import moe, vit
from jvitmoe.models.moe import RouterSettings, Statistics
from jvitmoe.routing import Purpose
from jvitmoe.state import TrainState

DATA, EXPERT = "data", "expert"
AXES = (DATA, EXPERT)
REPLICATED = PartitionSpec()
BY_DATA = PartitionSpec(DATA)  # of the rows of a streamed batch
BY_EXPERT = PartitionSpec(None, EXPERT)  # of leaves [L, E, ...]


class Metrics(NamedTuple):
    """What one step says of itself, over the global batch; float32 scalars."""

    loss: jax.Array  # what was minimised: cross-entropy, nats, smoothed labels if asked
    accuracy: jax.Array  # of the path that ran, before its update
    grad_norm: jax.Array  # global L2 norm before clipping
    learning_rate: jax.Array
    router: Statistics | None = None  # leaves [layers with experts, ...], means over the batch; None: no router
    skipped: state.Skipped | None = None  # this step included; None where a step that is not finite ends the run


def as_floats(metrics: Metrics, expert_layers: Sequence[int]) -> dict[str, float]:
    """Returns name -> value of metrics on the host; a router's as router/<name>/layer<l>[/expert<e>]."""
    scalars = {name: float(getattr(metrics, name)) for name in ("loss", "accuracy", "grad_norm", "learning_rate")}
    if metrics.skipped:
        scalars["skipped"] = int(metrics.skipped.total)
    for name, leaf in metrics.router._asdict().items() if metrics.router else ():
        for x, *expert in np.ndindex(leaf.shape):
            parts = [f"layer{expert_layers[x]}", *(f"expert{e}" for e in expert)]
            scalars["/".join(("router", name.removesuffix("_E"), *parts))] = float(leaf[x, *expert])
    return scalars


class TrainStep(Protocol):
    """What `jax.jit` makes of (state, images, index_SB of the epoch) -> (state, Metrics)."""

    def __call__(self, before: TrainState, split: Images, index_SB: jax.Array | None) -> tuple[TrainState, Metrics]: ...

    def lower(self, before: TrainState, split: Images, index_SB: jax.Array | None) -> Any: ...

    def trace(self, before: TrainState, split: Images, index_SB: jax.Array | None) -> Any: ...


def make_mesh(train: TrainConfig) -> Mesh:
    """Returns the mesh ("data", "expert") over the devices of all processes.

    Raises ConfigError for a platform or a number of devices not there.
    """
    try:
        devices = jax.devices(train.platform or None)
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
    if wanted < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"config.train.devices is {wanted}; it must be 0 or {len(devices)}, the devices of all processes"
        )
    if wanted % train.expert_devices:
        raise ConfigError(f"config.train.expert_devices is {train.expert_devices}; it must divide the {wanted} devices")
    shape = wanted // train.expert_devices, train.expert_devices
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def describe(mesh: Mesh) -> str:
    """Returns the devices in words: number, kind, and for a CPU its model."""
    first = mesh.devices.flat[0]
    kind = first.device_kind
    if first.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        kind = f"cpu ({found.group(1) if found else platform.machine()}, {os.cpu_count()} cores)"
    processes = jax.process_count()
    return f"{mesh.size} x {kind}" + (f", {processes} processes" if processes > 1 else "")


def settle(mesh: Mesh, outputs: Any) -> None:
    """Waits for `outputs` where the mesh is several CPU devices, and only there: XLA runs their collectives on one
    thread pool, which can deadlock with two programs in flight (seen on JAX 0.10)."""
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(outputs)


def make_model(config: Config, platform_name: str) -> vit.ViT:
    """Returns the model that training initialises, stacked where there are experts, for "cpu", "gpu" or "tpu"."""
    routed = config.routing
    router = None
    if config.learned:
        top_k = routed.experts if routed.router == "frozen" else routed.top_k  # when it is tested, all of them
        router = RouterSettings(routed.router, top_k, routed.capacity, routed.eval_capacity)
    pattern = routed.pattern if routed.experts > 1 else ("experts",)
    experts = routed.experts, routed.init, routed.shared_layer
    fused = platform_name == "gpu" and _fuses_attention()
    return vit.build(config.model, *experts, router, platform_name, pattern, fused)


def _fuses_attention() -> bool:
    """Whether the GPUs here have what cuDNN's fused attention needs: NVIDIA's compute capability 8.0 (A100) or more."""
    capability = str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", ""))
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8.0


def make_direction(config: Config) -> optax.GradientTransformation:
    """Returns the transformation from gradients to the direction that the learning rate multiplies."""
    return optim.direction(config.optim, optim.frozen(config))


def make_state(config: Config, model: vit.ViT, mesh: Mesh, dense: Any = None) -> TrainState:
    """Returns the state at step 0, sharded as the config says: a pure function of config and `dense`.

    With a trained dense tree, experts are copies of its MLPs, `init.noise` apart, and the trunk is its trunk: sparse
    upcycling.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, mesh))
    return jax.jit(functools.partial(_create, config, model), out_shardings=shardings)(dense)


def abstract_state(config: Config, model: vit.ViT, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of `make_state`, with nothing computed: what a checkpoint restores to.

    Experts and their moments lie along the expert axis, if it has several devices. `train.shard` splits moments, and
    parameters too, over the data axis, each leaf along its longest axis that divides.
    """
    shapes = jax.eval_shape(lambda: _create(config, model))
    marks, shard = merging.stacked(shapes.params), config.train.shard

    def place(x: jax.ShapeDtypeStruct, is_stacked: bool, split: bool) -> jax.ShapeDtypeStruct:
        along: list[str | None] = [None] * x.ndim
        if is_stacked and mesh.shape[EXPERT] > 1:
            along[merging.EXPERT_AXIS] = EXPERT
        free = [n for n, axis in enumerate(along) if axis is None and x.shape[n] % mesh.shape[DATA] == 0]
        if split and free:
            along[max(free, key=lambda n: x.shape[n])] = DATA
        while along and along[-1] is None:  # P() and P(None) mean one thing, but are two programs to jit
            along.pop()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*along)))

    def place_all(tree: Any, is_stacked: bool, split: bool) -> Any:
        return jax.tree.map(lambda x: place(x, is_stacked, split), tree)

    return TrainState(
        place_all(shapes.step, False, False),
        jax.tree.map(lambda x, is_stacked: place(x, is_stacked, shard == "parameters"), shapes.params, marks),
        state.OptState(
            place_all(shapes.opt_state.trunk, False, shard != "none"),
            place_all(shapes.opt_state.experts, True, shard != "none"),
        ),
        place_all(shapes.ema, False, shard != "none"),
        place_all(shapes.skipped, False, False),
    )


def _create(config: Config, model: vit.ViT, dense: Any = None) -> TrainState:
    params = vit.init(model, routing.address(jax.random.key(config.train.seed), Purpose.INIT))
    if dense is not None:
        params = merging.upcycle(dense, params)
        if config.init.noise:
            key = routing.address(jax.random.key(config.train.seed), Purpose.NOISE)
            params = merging.disturb(params, key, config.init.noise)
    return state.create(params, make_direction(config), config.train.ema > 0, config.optim.skip_nonfinite > 0)


def expert_schedule(config: Config, steps_per_epoch: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns step -> (scale, pull): what multiplies the experts' learning rate, and the share of the way to their
    mean that experts move after the step.

    In the last `tie_last` of training experts go all the way, so that from its first step on they are equal. Where
    one expert runs per batch, its step then counts E times (two: E/2 times each): the mean of E equal experts of which
    one moved has moved 1/E as far, and so the whole MLP takes the dense step.
    """
    routed = config.routing
    total = config.train.epochs * steps_per_epoch
    first_tied = round((1.0 - routed.tie_last) * total)

    def at(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        rise = (step + 1) / total if routed.pull_schedule == "rising" else 1.0
        pull = jnp.where((step + 1) % routed.pull_every == 0, routed.pull * rise, 0.0)
        one_runs = routed.granularity == "batch" and not config.learned
        times = routed.experts / (2 if routed.consistency else 1) if one_runs else 1
        scale = jnp.where(step >= first_tied, times * routed.learning_rate, routed.learning_rate)
        return scale, jnp.where(step + 1 >= first_tied, 1.0, pull)

    return at


def consistency(logits_p_BC: jax.Array, logits_q_BC: jax.Array, stop_gradients: bool) -> jax.Array:
    """Returns the mean over the batch of (KL(q || p) + KL(p || q)) / 2, nats; 0 for equal logits.

    With stop_gradients each term is differentiated through its second argument only (AdaMix, arXiv 2205.12410);
    without, through both (THOR, arXiv 2110.04260).
    """
    p_BC, q_BC = jax.nn.log_softmax(logits_p_BC), jax.nn.log_softmax(logits_q_BC)

    def divergence(a_BC: jax.Array, b_BC: jax.Array) -> jax.Array:
        a_BC = jax.lax.stop_gradient(a_BC) if stop_gradients else a_BC
        return jnp.sum(jnp.exp(a_BC) * (a_BC - b_BC), axis=-1)

    return 0.5 * jnp.mean(divergence(q_BC, p_BC) + divergence(p_BC, q_BC))


def make_train_step(config: Config, model: vit.ViT, mesh: Mesh, steps_per_epoch: int) -> TrainStep:
    """Returns the compiled step: (state, images, index_SB of the epoch) -> (state, Metrics). The state is donated.

    With `data.stream` the images are those of the batch, and index_SB is None.

    Routes, augmentation and dropout are addressed by (seed, step, place in the global batch), so the result does not
    depend on the number of devices beyond the order of floating-point sums. With granularity "batch" only the dense
    model on the route is differentiated, reduced over devices and updated; otherwise every expert runs on its slot,
    which an image has by its place in the batch modulo E, or on what a learned router sends it. The consistency loss
    makes two passes, on two distinct routes, at twice the cost.
    """
    root = jax.random.key(config.train.seed)
    routed, depth = config.routing, config.model.depth
    passes = 2 if routed.consistency else 1
    whole = _runs_whole(config)
    net = model if whole else model.clone(experts=passes)
    gradients = _make_gradients(config, net, mesh, config.train.epochs * steps_per_epoch)
    update = make_update(config, steps_per_epoch)

    def draw_routes(step: jax.Array) -> list[jax.Array]:
        route = routing.draw_route(routing.address(root, Purpose.ROUTE, step), routed, depth, config.model.tokens)
        if passes == 1:
            return [route]
        key = routing.address(root, Purpose.SECOND_ROUTE, step)
        return [route, routing.distinct_route(key, route, routed)]

    def train_step(before: TrainState, split: Images, index_SB: jax.Array | None) -> tuple[TrainState, Metrics]:
        step, params = before.step, before.params
        routes = draw_routes(step)
        picked = routes[0] if passes == 1 else jnp.stack(routes, axis=1)  # [L] or [L, 2]
        if not whole:
            params, _ = state.take_path(params, before.opt_state, picked)
            routes = [jnp.full((depth,), number) for number in range(passes)]
        index_B = None if index_SB is None else index_SB[step % steps_per_epoch]
        loss, accuracy, statistics, grads = gradients(params, split, index_B, step, routes)
        after, norm, rate = update(before, grads, picked, loss)
        return after, Metrics(loss, accuracy, norm, rate, statistics, after.skipped)

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, mesh))
    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, REPLICATED)),
        compiler_options=compilation.options(model.dtype, mesh.devices.flat[0].platform),
    )
    return cast(TrainStep, jitted)


def _runs_whole(config: Config) -> bool:
    """Whether the whole stack runs in a step: over slots and with a learned router. Otherwise the step runs on what its
    routes pick: one dense model, or two experts."""
    return config.slots > 1 or config.learned


def make_update(config: Config, steps_per_epoch: int) -> Callable[..., tuple[TrainState, jax.Array, jax.Array]]:
    """Returns (state, grads, picked, loss) -> (state, norm of the gradients, learning rate): all of a step that follows
    its gradients. They are those of the experts that the route `picked` picks, or of the whole stack where all of it
    runs.

    With `optim.skip_nonfinite`, a loss or a norm that is not finite leaves everything but the numbers of steps as it
    was, moments and Adam's counts included (as optax.apply_if_finite does).
    """
    learning_rate = optim.schedule(config, steps_per_epoch)
    tx = make_direction(config)
    whole = _runs_whole(config)
    all_run = whole or config.routing.consistency > 0
    moves_experts = config.routing.experts > 1 and (config.routing.pull > 0 or config.routing.tie_last > 0)
    experts_at = expert_schedule(config, steps_per_epoch)

    def update(
        before: TrainState, grads: Any, picked: jax.Array, loss: jax.Array | float = 0.0
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        params, opt_state = before.params, before.opt_state
        if not whole:
            params, opt_state = state.take_path(params, opt_state, picked)
        ran = params, opt_state
        norm = optax.tree.norm(grads)
        if config.optim.clip_norm:
            scale = jnp.minimum(1.0, config.optim.clip_norm / norm)
            grads = jax.tree.map(lambda g: g * scale, grads)
        expert_scale, pull = experts_at(before.step)
        stacked = merging.stacked(before.params)
        direction, opt_state = state.update(tx, grads, opt_state, params, stacked, all_run, expert_scale)
        rate = jnp.asarray(learning_rate(before.step), jnp.float32)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        finite, skipped = jnp.isfinite(norm) & jnp.isfinite(loss), before.skipped
        if skipped:
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state), ran)
            pull = jnp.where(finite, pull, 0.0)
            skipped = state.Skipped(skipped.total + ~finite, jnp.where(finite, 0, skipped.in_a_row + 1))
        if not whole:
            params, opt_state = state.put_path(before.params, before.opt_state, picked, params, opt_state)
        if moves_experts:
            params = jax.lax.cond(pull > 0, lambda tree: merging.pull(tree, pull), lambda tree: tree, params)
        ema, decay = before.ema, config.train.ema
        if decay:
            merged = merging.average_experts(params)
            keep = jnp.where(finite, decay, 1.0) if skipped else decay
            ema = jax.tree.map(lambda mean, new: keep * mean + (1.0 - keep) * new, ema, merged)
        return TrainState(before.step + 1, params, opt_state, ema, skipped), norm, rate

    return update


def _make_gradients(config: Config, net: vit.ViT, mesh: Mesh, total: int) -> Callable[..., Any]:
    """Returns (params of `net`, images, index_B or None, step, routes) -> (loss, accuracy, statistics, grads), all of
    them over the global batch: the part of the step that each device computes on its images.

    `total` is the number of steps of the run.
    """
    root = jax.random.key(config.train.seed)
    data, routed, depth = config.data, config.routing, config.model.depth
    batch, parts, slots = config.train.batch_size, config.train.accumulate, config.slots
    data_devices, expert_devices = mesh.shape[DATA], mesh.shape[EXPERT]
    frozen = optim.frozen(config)
    needs_keys = config.model.dropout > 0 or config.learned  # to a learned router, no keys mean evaluation
    # With one route for all layers, images are put where their expert is, once, instead of weights in each layer.
    images_move = (routed.granularity, routed.scope) == ("sample", "shared") and not routed.consistency
    if expert_devices > 1:
        net = net.clone(experts=net.experts // expert_devices)
    nets = [net]
    if net.router and routed.router == "frozen":  # its K grows, and shapes with it: one program holds them all
        growing = range(routed.top_k, routed.experts + 1)
        nets = [net.clone(router=dataclasses.replace(net.router, top_k=top_k)) for top_k in growing]

    def keys_b(purpose: Purpose, step: jax.Array, place_b: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(routing.address(root, purpose, step), place_b)

    def places(route: jax.Array) -> jax.Array:
        """Returns place_b in the global batch of this device's images; sorted by slot, or by expert if images move."""
        if slots == 1:
            share = batch // mesh.size
            return jax.lax.axis_index(AXES) * share + jnp.arange(share)
        share = batch // data_devices
        slot_E = jnp.argsort(route[0]) if images_move else jnp.arange(slots)
        here = slots // expert_devices
        slot_e = jax.lax.dynamic_slice(slot_E, (jax.lax.axis_index(EXPERT) * here,), (here,))
        place_eb = slot_e[:, None] + slots * jnp.arange(share // slots)[None]
        return jax.lax.axis_index(DATA) * share + place_eb.reshape(-1)

    def loss_fn(
        net: vit.ViT,
        params: Any,
        images: jax.Array,
        labels_b: jax.Array,
        place_b: jax.Array,
        step: jax.Array,
        routes: Any,
    ) -> tuple[jax.Array, tuple[jax.Array, Statistics | None]]:
        if config.tuned and frozen:  # what is not trained costs no gradient and counts in no norm
            params = jax.tree.map_with_path(
                lambda path, leaf: jax.lax.stop_gradient(leaf) if frozen(path) else leaf, params
            )
        if expert_devices > 1 and net.experts == 1:  # the one expert here is a dense model
            trunk, experts = merging.split(params, merging.stacked(params))
            params = merging.join(trunk, merging.take(experts, jnp.zeros((depth,), jnp.int32)))
        targets_bC = optax.smooth_labels(jax.nn.one_hot(labels_b, config.model.classes), config.train.label_smoothing)
        logits, auxiliary, statistics = [], jnp.float32(0), None
        for number, route in enumerate(routes):
            dropout = keys_b(Purpose.DROPOUT, step, place_b + number * batch) if needs_keys else None
            if config.learned:
                found, statistics = vit.logits_and_statistics(net, params, images, dropout)
                # Over the global batch before anything is multiplied: the loss of means is no mean of losses.
                statistics = jax.lax.pmean(statistics, AXES)
                auxiliary += routed.balance_loss * moe.balance_loss(routed.router, statistics)
                auxiliary += routed.z_loss * moe.z_loss(statistics)
                logits.append(found)
            else:
                logits.append(vit.logits(net, params, images, None if images_move else route, dropout))
        loss = optax.softmax_cross_entropy(logits[0], targets_bC).mean()
        if len(routes) == 2:
            if routed.consistency_loss == "thor":
                loss += optax.softmax_cross_entropy(logits[1], targets_bC).mean()
            loss += routed.consistency * consistency(logits[0], logits[1], routed.consistency_loss == "adamix")
        accuracy = (logits[0].argmax(-1) == labels_b).mean()
        # The mean over devices belongs inside: auxiliary losses are of the global batch.
        return jax.lax.pmean(loss, AXES) + auxiliary, (jax.lax.pmean(accuracy, AXES), statistics)

    def on_device(
        params: Any, split: Images, index_B: jax.Array | None, step: jax.Array, routes: list[jax.Array]
    ) -> Any:
        place_b = places(routes[0])
        # Of a streamed batch, a device is given the images of its part of the data axis.
        first = jax.lax.axis_index(DATA) * (batch // data_devices)
        index_b = place_b - first if index_B is None else index_B[place_b]
        images = augment.normalize(
            augment.augment(
                keys_b(Purpose.AUGMENT, step, place_b), split.images_NHWC[index_b], data.crop_padding, data.flip
            )
        )
        # Each device differentiates its own copy, so gradients are reduced once, at the end, and not where a
        # parameter first meets the images: inside the scan over layers, and the CLS token once per image.
        axes = jax.tree.map(lambda spec: (DATA,) if spec == BY_EXPERT else AXES, specs(params))
        mine = jax.tree.map(lambda x, over: jax.lax.pcast(x, over, to="varying"), params, axes)
        chosen = moe.top_k_at(step, total, routed.top_k, routed.experts) - routed.top_k

        def part(given: tuple[jax.Array, ...]) -> Any:
            steps = [
                lambda p, net=net: jax.value_and_grad(functools.partial(loss_fn, net), has_aux=True)(
                    p, *given, step, routes
                )
                for net in nets
            ]
            return jax.lax.switch(chosen, steps, mine)

        given = images, split.labels_N[index_b], place_b
        found = part(given) if parts == 1 else _mean_of_parts(part, given, parts, slots // expert_devices)
        (loss, (accuracy, statistics)), grads = found
        return loss, accuracy, statistics, jax.tree.map(jax.lax.psum, grads, axes)

    def specs(params: Any) -> Any:
        return jax.tree.map(
            lambda is_stacked: BY_EXPERT if is_stacked and expert_devices > 1 else REPLICATED, merging.stacked(params)
        )

    def gradients(
        params: Any, split: Images, index_B: jax.Array | None, step: jax.Array, routes: list[jax.Array]
    ) -> Any:
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs(params), BY_DATA if data.stream else REPLICATED, REPLICATED, REPLICATED, REPLICATED),
            out_specs=(REPLICATED, REPLICATED, REPLICATED, specs(params)),
        )(params, split, index_B, step, routes)

    return gradients


def _mean_of_parts(part: Callable[[Any], Any], given: Any, parts: int, slots: int) -> Any:
    """Returns the mean over `parts` equal parts of a device's images, run one after the other; each part has its share
    of every slot."""

    def cut(x_b: jax.Array) -> jax.Array:
        rest = x_b.shape[1:]
        return x_b.reshape(slots, parts, -1, *rest).swapaxes(0, 1).reshape(parts, -1, *rest)

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b / parts, total, part(piece)), None

    pieces = jax.tree.map(cut, given)
    first = jax.tree.map(lambda x: x / parts, part(jax.tree.map(lambda x: x[0], pieces)))
    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], pieces))[0]
