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
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params, each
from jvitmoe.training.state import OptState, Plan, TrainState, leaf_spec, per_expert


def update(plan: Plan, active: TrainState, grads: Params, norm: jax.Array) -> TrainState:
    """Returns the active slice after the optimiser's step; `after_step` updates its step number and EMA. `norm` is
    `gradient_norm` of `grads`."""
    optimizer, params = plan.optimizer, active.params
    if optimizer.settings.clip_norm:
        clip = jnp.minimum(1.0, optimizer.settings.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * clip.reshape(-1, *[1] * (g.ndim - 1)) if clip.ndim else g * clip, grads)
    moments = whole_matrices(plan, active.opt_state)
    direction, opt_state = directions(optimizer.tx, grads, moments, params, plan.routing.rate(active.step))
    # Results too: else XLA splits what they are computed from.
    direction, opt_state = whole_matrices(plan, direction), whole_matrices(plan, opt_state)
    if optimizer.scales_differ:
        trunk, expert = (functools.partial(jax.tree.map, operator.mul, part) for part in optimizer.scales(params))
        direction = Params(trunk(direction.trunk), each(expert, direction.experts))
    rate = learning_rate(plan, active.step)
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    return active._replace(params=params, opt_state=opt_state)


def gradient_norm(plan: Plan, grads: Params) -> jax.Array:
    """Returns the global norm of the gradients; [E], that of each, if a step trains E whole models apart."""
    return jax.vmap(optax.tree.norm)(grads) if plan.routing.trained_apart > 1 else optax.tree.norm(grads)


def lay_out_slices(plan: Plan, whole: Params, taken: Params) -> Params:
    """Returns what was taken of the parameters, slices of experts laid out as `whole` is: with `train.shard` XLA would
    gather all experts to take a slice, or put back split slices and then gather all."""

    def lay_out(before: jax.Array, leaf: jax.Array) -> jax.Array:
        if before.shape == leaf.shape:
            return leaf
        spec = leaf_spec(plan.mesh, leaf.shape, False, plan.train.shard == "parameters")
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(plan.mesh, spec))

    if plan.train.shard == "none":
        return taken
    return taken._replace(experts=jax.tree.map(lay_out, whole.experts, taken.experts))


def whole_matrices(plan: Plan, pair: Any) -> Any:
    """Returns moments or directions with each matrix that `train.shard` splits gathered, if the optimiser multiplies
    it: XLA would exchange it in every one of Muon's products."""
    if plan.train.shard == "none":
        return pair

    def gather(of_experts: bool, path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        if not plan.optimizer.multiplies_whole(path):
            return leaf
        spec = leaf_spec(plan.mesh, leaf.shape, of_experts, False)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(plan.mesh, spec))

    parts = (pair.trunk, False), (pair.experts, True)
    return type(pair)(*(jax.tree.map_with_path(functools.partial(gather, of), part) for part, of in parts))


def after_step(plan: Plan, state: TrainState) -> TrainState:
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
    grads: Params,
    opt_state: OptState,
    params: Params,
    factor: jax.Array | float = 1.0,
) -> tuple[Params, OptState]:
    """Returns (direction, opt_state) of `tx` for what `state.take` selected. The direction of experts is multiplied by
    `factor`."""
    trunk, trunk_state = tx.update(grads.trunk, opt_state.trunk, params.trunk)
    if not params.experts:
        return Params(trunk, {}), OptState(trunk_state, {})
    # Each expert has run its own number of steps, with routing.kind=layer in each layer.
    update_experts = jax.vmap(per_expert(tx.update, params.experts))
    experts, expert_state = update_experts(grads.experts, opt_state.experts, params.experts)
    return Params(trunk, jax.tree.map(lambda x: x * factor, experts)), OptState(trunk_state, expert_state)


def bytes_reduced(plan: Plan) -> Callable[[int], int]:
    """Returns a function of the number of steps done: the bytes that each device reduces with others in these steps, on
    the devices of the plan, in gradients of what is trained, pulls and the EMA, scalars apart.

    On one device it is what each would reduce if there were several, and for routing.kind=sample one for each expert.
    On the expert axis an expert's gradients stay on its devices; a pull reduces its weights, and an EMA of the merged
    model reduces them at every step. Otherwise every device has all experts and reduces every gradient, and pulls and
    EMA move nothing.
    """
    routing, mesh, is_frozen = plan.routing, plan.mesh, plan.optimizer.is_frozen
    trunk, experts = (
        sum(4 * x.size for path, x in jax.tree.leaves_with_path(part) if not is_frozen(path))
        for part in routing.shapes()
    )
    one = experts // routing.experts
    if routing.slots == 1 or 1 == plan.expert_devices < mesh.size:
        return lambda done: done * (trunk + routing.reduced_experts * one)
    gradients = trunk + (experts // plan.expert_devices if 1 < plan.expert_devices < mesh.size else 0)
    pull_every = routing.settings.pull_every if routing.settings.pull else LARGEST
    return lambda done: done * gradients + (done // pull_every + (done if plan.train.ema else 0)) * one
