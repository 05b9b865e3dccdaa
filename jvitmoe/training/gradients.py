"""The loss and its gradients, computed by each device on its images and reduced once.

B global batch, b the share of one device · N images · C classes · L layers, X those with experts · E experts, e
the share of one device
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.losses import kl_divergence, kl_divergence_with_log_targets

from jvitmoe.config import RoutingConfig
from jvitmoe.data import augment
from jvitmoe.data.batches import Images
from jvitmoe.experts import build, merge, slices
from jvitmoe.experts.routes import Purpose, address
from jvitmoe.models import routers, vit
from jvitmoe.models.routers import Statistics
from jvitmoe.runtime.devices import AXES, BY_DATA, BY_EXPERT, DATA, EXPERT, REPLICATED
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
    """The images of one device, sorted by slot, or by expert where `StepPlan.images_move`."""

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
    """Returns the gradients of the global batch for the parameters of `plan.net` that this device holds. Of a streamed
    batch, `inputs.split` holds the rows of this device."""
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
    slot_E = jnp.argsort(route[0]) if plan.images_move else jnp.arange(slots)
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

    These lie on the mirrored device of the data axis; on the expert axis images may be sorted by expert, so its devices
    exchange theirs.
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
    params = trainable(plan, params)
    if plan.config.routes_in_model:
        logits_bC, statistics = routed_logits(plan, params, shard, inputs.step)
        passes, auxiliary = [logits_bC], router_losses(plan, statistics)
    else:
        passes = [logits_of_pass(plan, params, shard, inputs, number) for number in range(plan.passes)]
        statistics, auxiliary = None, jnp.float32(0)
    loss = classification_loss(plan, passes, shard.targets_bC)
    if (teacher := inputs.teacher) is not None:
        is_taught = inputs.step >= plan.first_tied
        loss = jax.lax.cond(is_taught, lambda: (loss + divergence(plan, teacher, shard, passes[0])) / 2, lambda: loss)
    accuracy = (passes[0].argmax(-1) == shard.labels_b).mean()
    # The mean over devices belongs inside: auxiliary losses are of the global batch.
    return jax.lax.pmean(loss, AXES) + auxiliary, (jax.lax.pmean(accuracy, AXES), statistics)


def trainable(plan: StepPlan, params: Any) -> Any:
    """Returns the parameters as the network takes them, without gradients for what is not trained."""
    frozen = build.frozen(plan.config)

    def stop(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        if frozen and frozen(path):
            return jax.lax.stop_gradient(leaf)
        trained = build.trained_layers(plan.config, path, leaf)
        return leaf if trained.all() else jnp.where(trained, leaf, jax.lax.stop_gradient(leaf))

    if frozen:  # what is not trained costs no gradient and counts in no norm
        params = jax.tree.map_with_path(stop, params)
    if plan.expert_devices > 1 and plan.net.experts == 1:  # the one expert here is a dense model
        trunk, experts = slices.split(params, slices.stacked(params))
        first_L = jnp.zeros((plan.config.model.depth,), jnp.int32)
        params = slices.join(trunk, slices.take(experts, first_L))
    return params


def logits_of_pass(plan: StepPlan, params: Any, shard: Shard, inputs: Inputs, number: int) -> jax.Array:
    """Returns logits_bC of forward pass `number`, by its random route."""
    route: jax.Array | None = inputs.routes[number]
    if plan.images_move:
        route = None  # the images of expert e are in slot e
    elif not plan.all_run:
        route = jnp.full((plan.config.model.depth,), number)  # expert p of what `state.take` selected is that of pass p
    index_b = shard.index_b + number * plan.config.train.batch_size
    keys_b = image_keys(plan, Purpose.DROPOUT, inputs.step, index_b) if plan.config.model.drops else None
    return vit.logits(plan.net, params, shard.images_bHWc, route, keys_b)


def routed_logits(plan: StepPlan, params: Any, shard: Shard, step: jax.Array) -> tuple[jax.Array, Statistics]:
    """Returns (logits_bC, statistics over the global batch) of a model with a router."""
    routed = plan.config.routing
    keys_b = image_keys(plan, Purpose.DROPOUT, step, shard.index_b)  # also without dropout: no keys mean evaluation
    top_k = routers.find(routed.router).top_k_at(step, plan.total, routed.top_k, routed.experts)
    logits_bC, statistics = vit.logits_and_statistics(plan.net, params, shard.images_bHWc, keys_b, top_k)
    # Reduced before anything is multiplied: the loss of means is no mean of losses.
    return logits_bC, jax.lax.pmean(statistics, AXES)


def router_losses(plan: StepPlan, statistics: Statistics) -> jax.Array:
    """Returns the weighted sum of a learned router's balance loss and z-loss."""
    routed = plan.config.routing
    balance = routed.balance_loss * routers.find(routed.router).loss(statistics)
    return balance + routed.z_loss * routers.z_loss(statistics)


def classification_loss(plan: StepPlan, passes: list[jax.Array], targets_bC: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy with the targets; of two passes, the one of CONSISTENCY_LOSSES."""
    losses = [optax.softmax_cross_entropy(logits_bC, targets_bC).mean() for logits_bC in passes]
    if len(passes) == 1:
        return losses[0]
    routed = plan.config.routing
    return CONSISTENCY_LOSSES[routed.consistency_loss](losses, passes, routed.consistency)


def adamix(losses: list[jax.Array], passes: list[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of AdaMix (arXiv 2205.12410): the cross-entropy of the first pass, and the divergence."""
    return losses[0] + weight * consistency(passes[0], passes[1], stop_gradients=True)


def thor(losses: list[jax.Array], passes: list[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of THOR (arXiv 2110.04260): the cross-entropies of both passes, and the divergence. R-Drop
    (arXiv 2106.14448) has the same loss; its passes differ in dropout."""
    return losses[0] + losses[1] + weight * consistency(passes[0], passes[1], stop_gradients=False)


def cosub(losses: list[jax.Array], passes: list[jax.Array], weight: float) -> jax.Array:
    """Returns the loss of cosub (arXiv 2212.04884) for softmax: (1 - weight) times the mean of both cross-entropies,
    and weight times that of each pass with the other's probabilities as targets."""
    return (1 - weight) * (losses[0] + losses[1]) / 2 + weight * mutual_cross_entropy(passes[0], passes[1])


def mutual_cross_entropy(logits_p_bC: jax.Array, logits_q_bC: jax.Array) -> jax.Array:
    """Returns the mean over the device's images of the cross-entropies of each pass with the other's probabilities as
    targets, which have no gradient; nats."""
    target_p_bC, target_q_bC = (jax.lax.stop_gradient(jax.nn.softmax(x)) for x in (logits_p_bC, logits_q_bC))
    first_b = optax.softmax_cross_entropy(logits_p_bC, target_q_bC)
    return 0.5 * jnp.mean(first_b + optax.softmax_cross_entropy(logits_q_bC, target_p_bC))


def divergence(plan: StepPlan, teacher: Any, shard: Shard, logits_bC: jax.Array) -> jax.Array:
    """Returns the mean over the images of KL(q || p), nats: p are the probabilities of these logits, q is the mean of
    those of the teacher's experts, each in all layers. Distillation of Hinton et al. (arXiv 1503.02531)."""

    def probabilities(expert: jax.Array) -> jax.Array:
        path = merge.take_path(teacher, jnp.broadcast_to(expert, (plan.config.model.depth,)))
        return jax.nn.softmax(vit.logits(plan.model.plain(), path, shard.images_bHWc))

    q_bC = jax.lax.map(probabilities, jnp.arange(plan.config.routing.experts)).mean(0)
    return kl_divergence(jax.nn.log_softmax(logits_bC), q_bC).mean()


def consistency(logits_p_bC: jax.Array, logits_q_bC: jax.Array, stop_gradients: bool) -> jax.Array:
    """Returns the mean over the device's images of (KL(q || p) + KL(p || q)) / 2, nats; 0 for equal logits.

    With stop_gradients the targets q and p of the two terms have no gradient (AdaMix, arXiv 2205.12410); without, both
    arguments have one (THOR, arXiv 2110.04260).
    """
    p_bC, q_bC = jax.nn.log_softmax(logits_p_bC), jax.nn.log_softmax(logits_q_bC)
    target_p_bC, target_q_bC = jax.lax.stop_gradient((p_bC, q_bC)) if stop_gradients else (p_bC, q_bC)
    kl_q_p_b = kl_divergence_with_log_targets(p_bC, target_q_bC)
    kl_p_q_b = kl_divergence_with_log_targets(q_bC, target_p_bC)
    return 0.5 * jnp.mean(kl_q_p_b + kl_p_q_b)


# Name -> the loss of two passes: (their cross-entropies, their logits, routing.consistency) -> a scalar.
CONSISTENCY_LOSSES: dict[str, Callable[[list[jax.Array], list[jax.Array], float], jax.Array]] = {
    "adamix": adamix,
    "thor": thor,
    "cosub": cosub,
}
