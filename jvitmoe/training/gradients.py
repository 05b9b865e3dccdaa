"""The gradients of the loss, computed by each device on its images and reduced once.

B global batch, b the share of one device · N images · C classes · L layers, X those with experts · E experts, e
the share of one device
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jvitmoe.config import RoutingConfig
from jvitmoe.data import augment
from jvitmoe.data.batches import Images
from jvitmoe.experts import build, slices
from jvitmoe.experts.routes import Purpose, address, constant_route
from jvitmoe.models import routers, vit
from jvitmoe.models.routers import Statistics
from jvitmoe.runtime.devices import AXES, BY_DATA, BY_EXPERT, DATA, EXPERT, REPLICATED
from jvitmoe.training import losses
from jvitmoe.training.plan import StepPlan

Routes = tuple[jax.Array, ...]  # one for each forward pass (experts.routes.draw_route)


class Inputs(NamedTuple):
    """What the gradients of a step depend on, besides the parameters."""

    split: Images
    index_B: jax.Array | None  # which images of `split` make the batch; None if a stream gives just them
    step: jax.Array
    routes: Routes
    teacher: Any  # experts that the last part of training learns from (`train.distil_last`), or None


class Gradients(NamedTuple):
    """Means over the global batch."""

    loss: jax.Array  # nats
    accuracy: jax.Array
    statistics: Statistics | None  # of a learned router, leaves [X, ...] over the layers with experts
    grads: Any  # shaped as the parameters


class Shard(NamedTuple):
    """The images of one device, sorted by slot, or by expert where `StepPlan.sorts_images`."""

    images_bHWc: jax.Array  # augmented and normalised
    labels_b: jax.Array
    targets_bC: jax.Array  # smoothed labels after augmentation
    index_b: jax.Array  # of each image in the global batch


def gradients(plan: StepPlan, params: Any, inputs: Inputs) -> Gradients:
    """Returns `local_gradients` of all devices as whole arrays; the arguments are whole arrays too."""
    spec = jax.tree.map(lambda leaf: BY_EXPERT if leaf else REPLICATED, on_expert_axis(plan, params))
    whole: Any = REPLICATED
    images: Any = BY_DATA if plan.config.data.stream else whole
    return jax.shard_map(
        functools.partial(local_gradients, plan),
        mesh=plan.mesh,
        in_specs=(spec, Inputs(images, whole, whole, whole, whole)),
        out_specs=Gradients(whole, whole, whole, spec),
    )(params, inputs)


def local_gradients(plan: StepPlan, params: Any, inputs: Inputs) -> Gradients:
    """Returns the gradients of the global batch for the parameters of `plan.local_model` that this device holds. Of a
    streamed batch, `inputs.split` holds the rows of this device."""
    shard = images_of_device(plan, inputs, batch_indices(plan, inputs.routes[0]))
    # Each device differentiates its own copy, so gradients are reduced once, at the end, and not where a parameter
    # first meets the images: inside the scan over layers, and the CLS token once per image.
    axes = jax.tree.map(lambda leaf: (DATA,) if leaf else AXES, on_expert_axis(plan, params))
    own = jax.tree.map(lambda x, over: jax.lax.pcast(x, over, to="varying"), params, axes)

    def differentiate(part: Shard) -> Any:
        return jax.value_and_grad(loss_and_metrics, has_aux=True)(own, plan, part, inputs)

    (loss, (accuracy, statistics)), grads = accumulate(plan, differentiate, shard)
    return Gradients(loss, accuracy, statistics, jax.tree.map(jax.lax.psum, grads, axes))


def on_expert_axis(plan: StepPlan, params: Any) -> Any:
    """Returns the tree of bools that marks the leaves split over the devices of the expert axis."""
    return jax.tree.map(lambda is_stacked: is_stacked and plan.expert_devices > 1, slices.stacked(params))


def batch_indices(plan: StepPlan, route: jax.Array) -> jax.Array:
    """Returns index_b in the global batch of this device's images, sorted by slot, or by expert if images move."""
    batch, slots = plan.config.train.batch_size, plan.config.slots
    if slots == 1:
        share = batch // plan.mesh.size
        return jax.lax.axis_index(AXES) * share + jnp.arange(share)
    share, here = batch // plan.data_devices, slots // plan.expert_devices
    slot_E = jnp.argsort(route[0]) if plan.sorts_images else jnp.arange(slots)
    slot_e = jax.lax.dynamic_slice(slot_E, (jax.lax.axis_index(EXPERT) * here,), (here,))
    index_eb = slot_e[:, None] + slots * jnp.arange(share // slots)[None]
    return jax.lax.axis_index(DATA) * share + index_eb.reshape(-1)


def images_of_device(plan: StepPlan, inputs: Inputs, index_b: jax.Array) -> Shard:
    """Returns the images at these indices of the batch and their targets, augmented."""
    config, (split, index_B, step, routes, _) = plan.config, inputs
    share = config.train.batch_size // plan.data_devices
    image_b = index_b - jax.lax.axis_index(DATA) * share if index_B is None else index_B[index_b]
    labels_b = split.labels_N[image_b]
    targets_bC = optax.smooth_labels(jax.nn.one_hot(labels_b, config.model.classes), config.train.label_smoothing)
    batch = augment.Batch(
        key_b=image_keys(plan, Purpose.AUGMENT, step, index_b),
        key=address(plan.root, Purpose.AUGMENT, step, config.train.batch_size),  # no image has this index
        partner=functools.partial(partner_rows, plan, index_b),
        plain=step >= round((1.0 - config.data.plain_last) * plan.total),
        share_b=augmented_share(config.routing, routes[0], index_b) if config.routing.augment_spread else None,
    )
    images_bHWc, targets_bC = augment.augment(config.data, batch, split.images_NHWc[image_b], targets_bC)
    x_bHWc = augment.normalize(images_bHWc, config.data.mean, config.data.std)
    return Shard(x_bHWc, labels_b, targets_bC, index_b)


def augmented_share(routing: RoutingConfig, route: jax.Array, index_b: jax.Array) -> jax.Array:
    """Returns the probability that an image is augmented beyond crop and flip: 1 - augment_spread for the images of the
    first expert, rising linearly to 1 for those of the last. In PAPA too, members see different augmentations (arXiv
    2304.03094)."""
    expert_b = jnp.broadcast_to(route[0], index_b.shape) if route.ndim == 1 else route[0, index_b % routing.experts]
    return 1.0 - routing.augment_spread * (1.0 - expert_b / (routing.experts - 1))


def partner_rows(plan: StepPlan, index_b: jax.Array, rows: Any) -> Any:
    """Returns the rows [b, ...] of the images B - 1 - index_b, the reversed batch, from arrays of this device's images.

    They lie on the mirrored device of the data axis. Images may be sorted by expert, so the devices of the expert axis
    exchange their images.
    """
    last = plan.data_devices - 1
    mirrored = [(device, last - device) for device in range(last + 1)]

    def fetch(x_b: jax.Array) -> jax.Array:
        return jax.lax.all_gather(jax.lax.ppermute(x_b, DATA, mirrored), EXPERT, tiled=True)

    there_b = fetch(index_b)  # a permutation of consecutive indices
    row_b = jnp.argsort(there_b)[plan.config.train.batch_size - 1 - index_b - there_b.min()]
    return jax.tree.map(lambda x_b: fetch(x_b)[row_b], rows)


def image_keys(plan: StepPlan, purpose: Purpose, step: jax.Array, index_b: jax.Array) -> jax.Array:
    """Returns one key per image, a function of seed, step and index: the same on any number of devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(address(plan.root, purpose, step), index_b)


def accumulate(plan: StepPlan, differentiate: Callable[[Shard], Any], shard: Shard) -> Any:
    """Returns the mean of `differentiate` over `train.accumulate` equal parts of the shard, run one after the other.

    Each part has its share of every slot.
    """
    parts, slots = plan.config.train.accumulate, plan.config.slots // plan.expert_devices
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
    params: Any, plan: StepPlan, shard: Shard, inputs: Inputs
) -> tuple[jax.Array, tuple[jax.Array, Statistics | None]]:
    """Returns (loss, (accuracy, statistics of a learned router)), each a mean over the shards of all devices."""
    params = without_expert_axis(plan, stop_frozen(plan, params))
    if plan.config.routes_in_model:
        logits_bC, statistics = routed_logits(plan, params, shard, inputs.step)
        passes, auxiliary = [logits_bC], losses.router_losses(plan, statistics)
    else:
        passes = [logits_of_pass(plan, params, shard, inputs, number) for number in range(plan.passes)]
        statistics, auxiliary = None, jnp.float32(0)
    loss = losses.classification_loss(plan, passes, shard.targets_bC)
    if (teacher := inputs.teacher) is not None:
        own, images_bHWc = loss, shard.images_bHWc
        loss = jax.lax.cond(
            inputs.step >= plan.first_tied,
            lambda: (own + losses.divergence(plan, teacher, images_bHWc, passes[0])) / 2,
            lambda: own,
        )
    accuracy = (passes[0].argmax(-1) == shard.labels_b).mean()
    # The mean over devices belongs inside: auxiliary losses are of the global batch.
    return jax.lax.pmean(loss, AXES) + auxiliary, (jax.lax.pmean(accuracy, AXES), statistics)


def stop_frozen(plan: StepPlan, params: Any) -> Any:
    """Returns the parameters, with no gradient for those that are not trained: they cost none and count in no norm."""
    frozen = build.frozen(plan.config)
    if not frozen:
        return params

    def stop(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        if frozen(path):
            return jax.lax.stop_gradient(leaf)
        trained = build.trained_layers(plan.config, path, leaf)
        return leaf if trained.all() else jnp.where(trained, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map_with_path(stop, params)


def without_expert_axis(plan: StepPlan, params: Any) -> Any:
    """Returns the parameters as the network takes them: if a device of the expert axis has one expert, a dense tree."""
    if plan.expert_devices == 1 or plan.local_model.experts > 1:
        return params
    trunk, experts = slices.split(params, slices.stacked(params))
    return slices.join(trunk, slices.take(experts, constant_route(0, plan.config.model.depth)))


def logits_of_pass(plan: StepPlan, params: Any, shard: Shard, inputs: Inputs, number: int) -> jax.Array:
    """Returns logits_bC of forward pass `number`, by its random route."""
    route: jax.Array | None = inputs.routes[number]
    if plan.sorts_images:
        route = None  # the images of expert e are in slot e
    elif not plan.all_run:
        route = constant_route(number, plan.config.model.depth)  # expert p of what `state.take` selected is of pass p
    index_b = shard.index_b + number * plan.config.train.batch_size
    keys_b = image_keys(plan, Purpose.DROPOUT, inputs.step, index_b) if plan.config.model.drops else None
    return vit.logits(plan.local_model, params, shard.images_bHWc, route, keys_b)


def routed_logits(plan: StepPlan, params: Any, shard: Shard, step: jax.Array) -> tuple[jax.Array, Statistics]:
    """Returns (logits_bC, statistics over the global batch) of a model with a router."""
    routed = plan.config.routing
    keys_b = image_keys(plan, Purpose.DROPOUT, step, shard.index_b)  # also without dropout: no keys mean evaluation
    top_k = routers.find(routed.router).top_k_at(step, plan.total, routed.top_k, routed.experts)
    logits_bC, statistics = vit.logits_and_statistics(plan.local_model, params, shard.images_bHWc, keys_b, top_k)
    # Reduced before anything is multiplied: the loss of means is no mean of losses.
    return logits_bC, jax.lax.pmean(statistics, AXES)
