"""The compiled training step: draw a route, take its experts, update them, put them back.

Devices form a mesh ("data", "expert"). Loss and gradients are computed per device under `shard_map`; everything else
is plain code over whole arrays, which XLA partitions by the sharding of the state.

B global batch, b the share of one device · C classes · L layers, X those with experts
E experts, e the share of one device
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jvitmoe.data import augment
from jvitmoe.data.batches import Batch
from jvitmoe.experts.params import Params
from jvitmoe.machine import compilation
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.machine.devices import AXES, BY_DEVICE, DATA, EXPERT, REPLICATED
from jvitmoe.models.routers import Statistics
from jvitmoe.routing import StepInfo
from jvitmoe.routing.base import Route
from jvitmoe.training import losses
from jvitmoe.training.state import Plan, TrainState, abstract_state, leaf_spec, put, take
from jvitmoe.training.update import after_step, gradient_norm, lay_out_slices, learning_rate, update


class Metrics(NamedTuple):
    """The metrics of one step over the global batch; float32 scalars."""

    loss: jax.Array  # the minimised loss, nats: cross-entropy with smoothed labels, and auxiliary losses
    accuracy: jax.Array  # of the selected path, before its update
    grad_norm: jax.Array  # global L2 norm before clipping; the mean over whole models that are trained apart
    learning_rate: jax.Array
    router: Statistics | None = None  # leaves [layers with experts, ...], means over the batch; None: no router


def as_floats(metrics: Metrics, expert_layers: Sequence[int]) -> dict[str, float]:
    """Returns name -> value of metrics on the host; a router's as router/<name>/layer<l>[/expert<e>]."""
    scalars = {name: float(getattr(metrics, name)) for name in ("loss", "accuracy", "grad_norm", "learning_rate")}
    for name, leaf in metrics.router._asdict().items() if metrics.router else ():
        for x, *expert in () if leaf is None else np.ndindex(leaf.shape):
            parts = [f"layer{expert_layers[x]}", *(f"expert{e}" for e in expert)]
            scalars["/".join(("router", name.removesuffix("_E"), *parts))] = float(leaf[x, *expert])
    return scalars


def make_train_step(plan: Plan) -> jax.stages.Wrapped:
    """Returns `train_step` compiled for a run; the state is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(plan))
    return jax.jit(
        functools.partial(train_step, plan),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(plan.mesh, REPLICATED)),
        compiler_options=compilation.of_training(plan.model.dtype, plan.mesh.devices.flat[0].platform),
    )


def abstract_inputs(plan: Plan) -> tuple[TrainState, Batch]:
    """Returns shapes, dtypes and shardings of what a step takes. Nothing is allocated."""
    model, rows, where = plan.model.config, plan.train.batch_size, NamedSharding(plan.mesh, BY_DEVICE)
    pixels_BP: Any = jax.ShapeDtypeStruct((rows, model.image_size**2 * model.channels), jnp.uint8, sharding=where)
    number_B: Any = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=where)
    return abstract_state(plan), Batch(pixels_BP, number_B, number_B)


def lower(plan: Plan) -> Any:
    """Returns the step, lowered for the devices of its mesh, from shapes only."""
    return make_train_step(plan).lower(*abstract_inputs(plan))


def train_step(plan: Plan, before: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Returns (state, Metrics) after one step on a batch, whose images lie as `TrainOrder` says.

    Routes, augmentation and dropout are addressed by (seed, step, index in the global batch), so the result does not
    depend on the number of devices beyond the order of floating-point sums. The consistency loss makes two passes, at
    twice the cost.
    """
    step, routing = before.step, plan.routing
    routes = routing.draw(plan.root, step)
    active = take(routing, before, routes)
    active = active._replace(params=lay_out_slices(plan, before.params, active.params))
    inputs = Inputs(batch, step, routes)
    loss, accuracy, statistics, grads = gradients(plan, active.params, inputs)
    norm = gradient_norm(plan, grads)
    active = update(plan, active, grads, norm)
    params = lay_out_slices(plan, before.params, routing.adjust(active.params, statistics))
    active = active._replace(params=params)
    after = after_step(plan, put(routing, before, active, routes))
    return after, Metrics(loss, accuracy, norm.mean(), learning_rate(plan, step), statistics)


class Inputs(NamedTuple):
    """What the gradients of a step depend on, besides the parameters."""

    batch: Batch
    step: jax.Array
    routes: tuple[Route, ...]


class Gradients(NamedTuple):
    """Means over the global batch."""

    loss: jax.Array  # nats
    accuracy: jax.Array
    statistics: Statistics | None  # of a learned router, leaves [X, ...] over the layers with experts
    grads: Params


class Shard(NamedTuple):
    """The images of one device, in `Routing.slots` equal parts, sorted by expert."""

    images_bHWc: jax.Array  # augmented and normalised
    labels_b: jax.Array
    targets_bC: jax.Array  # smoothed labels after augmentation, times the weights of classes
    index_b: jax.Array  # of each image in the global batch


def gradients(plan: Plan, params: Params, inputs: Inputs) -> Gradients:
    """Returns `local_gradients` of all devices as whole arrays; the arguments are whole arrays too."""
    whole, rows = cast(Any, REPLICATED), cast(Any, BY_DEVICE)
    by_expert = PartitionSpec(EXPERT) if plan.expert_devices > 1 else REPLICATED
    found = gradient_specs(plan, params)
    return jax.shard_map(
        functools.partial(local_gradients, plan, found),
        mesh=plan.mesh,
        in_specs=(Params(REPLICATED, by_expert), Inputs(rows, whole, whole)),
        out_specs=Gradients(whole, whole, whole, found),
    )(params, inputs)


def gradient_specs(plan: Plan, params: Params) -> Any:
    """Returns how the gradients of whole parameters lie on the mesh. With `train.shard` each device gets the part that
    its moments need: half of the bytes of an all-reduce. Muon needs whole matrices."""

    def spec(of_experts: bool, path: Sequence[Any], leaf: jax.Array) -> PartitionSpec:
        split = plan.train.shard != "none" and not plan.optimizer.multiplies_whole(path)
        return leaf_spec(plan.mesh, leaf.shape, of_experts, split)

    parts = (params.trunk, False), (params.experts, True)
    return Params(*(jax.tree.map_with_path(functools.partial(spec, of), part) for part, of in parts))


def local_gradients(plan: Plan, specs: Any, params: Params, inputs: Inputs) -> Gradients:
    """Returns the gradients of the global batch for the parameters that this device holds, split as `specs` say; the
    batch holds the rows of this device."""
    shard = images_of_device(plan, inputs)
    # Each device differentiates its own copy, so gradients are reduced once, at the end, and not where a parameter
    # first meets the images: inside the scan over layers, and the CLS token once per image.
    of_experts = (DATA,) if plan.expert_devices > 1 else AXES
    axes = Params(jax.tree.map(lambda _: AXES, params.trunk), jax.tree.map(lambda _: of_experts, params.experts))
    own = jax.tree.map(lambda x, over: jax.lax.pcast(x, over, to="varying"), params, axes)

    def differentiate(part: Shard) -> Any:
        return jax.value_and_grad(loss_and_metrics, has_aux=True)(own, plan, part, inputs)

    (loss, (accuracy, statistics)), grads = accumulate(plan, differentiate, shard)
    if plan.routing.trained_apart > 1:  # each whole model descends the loss of its own share of the images
        grads = jax.tree.map(lambda g: plan.routing.trained_apart * g, grads)
    return Gradients(loss, accuracy, statistics, jax.tree.map(reduce, grads, axes, specs))


def reduce(grad: jax.Array, axes: tuple[str, ...], spec: PartitionSpec) -> jax.Array:
    """Returns the sum of a gradient over the devices of the axes; if `spec` splits it over data, the part of this
    device."""
    if DATA not in spec:
        return jax.lax.psum(grad, axes)
    part = jax.lax.psum_scatter(grad, DATA, scatter_dimension=list(spec).index(DATA), tiled=True)
    return jax.lax.psum(part, tuple(axis for axis in axes if axis != DATA))


def images_of_device(plan: Plan, inputs: Inputs) -> Shard:
    """Returns the images of this device and their targets, augmented."""
    data, (batch, step, _) = plan.data, inputs
    labels_b, index_b = batch.labels_B, batch.index_B
    targets_bC = optax.smooth_labels(jax.nn.one_hot(labels_b, plan.model.config.classes), plan.train.label_smoothing)
    draws = augment.Draws(
        key_b=image_keys(plan, Purpose.AUGMENT, step, index_b),
        key=address(plan.root, Purpose.AUGMENT, step, plan.train.batch_size),  # no image has this index
        partner=functools.partial(partner_rows, plan, index_b),
        plain=step >= round((1.0 - data.plain_at_end) * plan.total),
    )
    images_bHWc, targets_bC = augment.augment(data, draws, batch.images(plan.model.config), targets_bC)
    if plan.weight_C is not None:
        targets_bC *= plan.weight_C[None]
    x_bHWc = augment.normalize(images_bHWc, data.mean, data.std)
    return Shard(x_bHWc, labels_b, targets_bC, index_b)


def partner_rows(plan: Plan, index_b: jax.Array, rows: Any) -> Any:
    """Returns the rows [b, ...] of the images B - 1 - index_b, the reversed batch, from arrays of this device's images.

    They lie on the mirrored device of the data axis. Images may be sorted by expert, so the devices of the expert axis
    exchange their images.
    """
    last = plan.data_devices - 1
    mirrored = [(device, last - device) for device in range(last + 1)]

    def fetch(x_b: jax.Array) -> jax.Array:
        return jax.lax.all_gather(jax.lax.ppermute(x_b, DATA, mirrored), EXPERT, tiled=True)

    there_b = fetch(index_b)  # a permutation of consecutive indices
    row_b = jnp.argsort(there_b)[plan.train.batch_size - 1 - index_b - there_b.min()]
    return jax.tree.map(lambda x_b: fetch(x_b)[row_b], rows)


def image_keys(plan: Plan, purpose: Purpose, step: jax.Array, index_b: jax.Array) -> jax.Array:
    """Returns one key per image, a function of seed, step and index: the same on any number of devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(address(plan.root, purpose, step), index_b)


def accumulate(plan: Plan, differentiate: Callable[[Shard], Any], shard: Shard) -> Any:
    """Returns the mean of `differentiate` over `train.accumulate` equal parts of the shard, run one after the other.

    Each part has its share of every slot.
    """
    parts, slots = plan.train.accumulate, plan.routing.slots // plan.expert_devices
    if parts == 1:
        return differentiate(shard)

    def cut(x_b: jax.Array) -> jax.Array:
        rest = x_b.shape[1:]
        return x_b.reshape(slots, parts, -1, *rest).swapaxes(0, 1).reshape(parts, -1, *rest)

    def add(total: Any, part: Shard) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b / parts, total, differentiate(part)), None

    pieces = jax.tree.map(cut, shard)
    first = jax.tree.map(lambda x: x / parts, differentiate(jax.tree.map(lambda x: x[0], pieces)))
    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], pieces))[0]


def loss_and_metrics(
    params: Params, plan: Plan, shard: Shard, inputs: Inputs
) -> tuple[jax.Array, tuple[jax.Array, Statistics | None]]:
    """Returns (loss, (accuracy, statistics of a learned router)), each a mean over the shards of all devices."""
    params, routing = plan.optimizer.stop_frozen(params), plan.routing

    def run(number: int) -> tuple[jax.Array, Statistics | None]:
        index_b = shard.index_b + number * plan.train.batch_size
        key_b = image_keys(plan, Purpose.DROPOUT, inputs.step, index_b) if routing.needs_keys else None
        info = StepInfo(number, inputs.routes)
        return routing.logits(plan.model, params, shard.images_bHWc, key_b, info)

    passes, statistics = zip(*map(run, range(routing.passes)), strict=True)
    loss = losses.classification_loss(routing.settings, passes, shard.targets_bC)
    accuracy = (passes[0].argmax(-1) == shard.labels_b).mean()
    # Means over devices belong inside. Those of statistics come first: the loss of means is no mean of losses.
    whole = jax.lax.pmean(statistics[0], AXES)
    return jax.lax.pmean(loss, AXES) + routing.loss(whole), (jax.lax.pmean(accuracy, AXES), whole)
