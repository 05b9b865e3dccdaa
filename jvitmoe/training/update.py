"""The part of a step after the gradients: optimiser, pull toward the mean, EMA; and the bytes that a run reduces.

L layers · E experts
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jvitmoe.config import LARGEST
from jvitmoe.experts import merge, trees
from jvitmoe.runtime.devices import REPLICATED
from jvitmoe.training.state import OptState, Plan, TrainState, leaf_spec, per_expert


def update(plan: Plan, active: TrainState, stacked: Any, grads: Any, norm: jax.Array) -> TrainState:
    """Returns the active slice after the optimiser's step; `finish` updates its step number and EMA.

    `stacked` marks the leaves that experts own, and `norm` is `gradient_norm` of `grads`.
    """
    optimizer, params = plan.optimizer, active.params
    if optimizer.settings.clip_norm:
        clip = jnp.minimum(1.0, optimizer.settings.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * clip.reshape(-1, *[1] * (g.ndim - 1)) if clip.ndim else g * clip, grads)
    moments = whole_matrices(plan, active.opt_state)
    direction, opt_state = directions(optimizer.tx, grads, moments, params, stacked, plan.routing.rate(active.step))
    # Results too: else XLA splits what they are computed from.
    direction, opt_state = whole_matrices(plan, (direction, opt_state))
    if optimizer.scales_differ:
        scale = functools.partial(jax.tree.map, operator.mul, optimizer.scales(params))
        direction = jax.vmap(scale)(direction) if trees.is_whole(params) else scale(direction)
    rate = learning_rate(plan, active.step)
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    return active._replace(params=params, opt_state=opt_state)


def gradient_norm(plan: Plan, grads: Any) -> jax.Array:
    """Returns the global norm of the gradients; [E], that of each, if a step trains E whole models apart."""
    return jax.vmap(optax.tree.norm)(grads) if plan.routing.trained_apart > 1 else optax.tree.norm(grads)


def gather_slices(plan: Plan, whole: Any, taken: Any) -> Any:
    """Returns the parameters that ran, slices of experts among them laid out as `whole` is: with train.shard=optimizer
    XLA would put split slices back, and then gather all experts."""

    def lay_out(before: jax.Array, leaf: jax.Array) -> jax.Array:
        if before.shape == leaf.shape:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(plan.mesh, REPLICATED))

    return jax.tree.map(lay_out, whole, taken) if plan.train.shard == "optimizer" else taken


def whole_matrices(plan: Plan, tree: Any) -> Any:
    """Returns moments or directions with each matrix that `train.shard` splits gathered, if the optimiser multiplies
    it: XLA would exchange it in every one of Muon's products."""
    if plan.train.shard == "none":
        return tree

    def gather(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        if not plan.optimizer.multiplies_whole(path):
            return leaf
        is_stacked = plan.routing.has_whole_models or trees.is_stacked(path, leaf)
        spec = leaf_spec(plan.mesh, leaf.shape, plan.routing.axis if is_stacked else None, False)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(plan.mesh, spec))

    return jax.tree.map_with_path(gather, tree)


def finish(plan: Plan, state: TrainState) -> TrainState:
    """Returns the whole state with experts pulled toward their mean, the EMA updated and the step counted."""
    params, ema, routed = state.params, state.ema, plan.routing.settings
    if routed.experts > 1 and routed.pull:
        due = (state.step + 1) % routed.pull_every == 0
        params = jax.lax.cond(due, lambda tree: merge.pull(tree, routed.pull), lambda tree: tree, params)
    if plan.train.ema:
        decay = jnp.minimum(plan.train.ema, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(merge.average_experts(params), ema, 1.0 - decay)
    return state._replace(step=state.step + 1, params=params, ema=ema)


def learning_rate(plan: Plan, step: jax.Array) -> jax.Array:
    """Returns the learning rate of a step, a float32 scalar."""
    return jnp.asarray(plan.optimizer.schedule(plan.steps_per_epoch)(step), jnp.float32)


def directions(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: OptState,
    params: Any,
    stacked: Any,
    factor: jax.Array | float = 1.0,
) -> tuple[Any, OptState]:
    """Returns (direction, opt_state) of `tx` for the tree that ran: the whole one or what `state.take` selected.

    `stacked` marks the leaves that experts own; their direction is multiplied by `factor`.
    """
    grads_trunk, grads_experts = trees.split(grads, stacked)
    params_trunk, params_experts = trees.split(params, stacked)
    trunk, trunk_state = tx.update(grads_trunk, opt_state.trunk, params_trunk)
    if opt_state.experts is None:
        return trunk, OptState(trunk_state, None)
    # Each expert has run its own number of steps, with routing.kind=layer in each layer.
    update_experts = per_expert(tx.update, stacked, several=any(jax.tree.leaves(trees.stacked(params))))
    experts, expert_state = update_experts(grads_experts, opt_state.experts, params_experts)
    experts = jax.tree.map(lambda x: x * factor, experts)
    return trees.join(trunk, experts), OptState(trunk_state, expert_state)


def bytes_reduced(plan: Plan) -> Callable[[int], int]:
    """Returns a function of the number of steps done: the bytes that each device reduces with others in these steps, on
    the devices of the plan, in gradients of what is trained, pulls and the EMA, scalars apart.

    On one device it is what each would reduce if there were several, and for routing.kind=sample one for each expert.
    On the expert axis an expert's gradients stay on its devices; a pull reduces its weights, and an EMA of the merged
    model reduces them at every step. Otherwise every device has all experts and reduces every gradient, and pulls and
    EMA move nothing.
    """
    routing, mesh, is_frozen = plan.routing, plan.mesh, plan.optimizer.is_frozen
    params = routing.shapes()
    trunk, experts = (
        sum(4 * x.size for path, x in jax.tree.leaves_with_path(part) if not is_frozen(path))
        for part in trees.split(params, trees.stacked(params))
    )
    one = experts // routing.experts
    if routing.slots == 1 or 1 == plan.expert_devices < mesh.size:
        return lambda done: done * (trunk + routing.reduced_experts * one)
    gradients = trunk + (experts // plan.expert_devices if 1 < plan.expert_devices < mesh.size else 0)
    pull_every = routing.settings.pull_every if routing.settings.pull else LARGEST
    return lambda done: done * gradients + (done // pull_every + (done if plan.train.ema else 0)) * one
