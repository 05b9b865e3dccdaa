"""The part of a step after the gradients: optimiser, pull toward the mean, EMA; and the bytes that a run reduces.

L layers · E experts
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jvitmoe.experts import merge, trees
from jvitmoe.runtime.devices import REPLICATED
from jvitmoe.training import optimizer
from jvitmoe.training.state import OptState, OuterState, StepPlan, TrainState, leaf_spec, one_copy, per_expert


def update(plan: StepPlan, active: TrainState, stacked: Any, grads: Any, norm: jax.Array) -> TrainState:
    """Returns the active slice after the optimiser's step; `finish` updates its step number and EMA.

    `stacked` marks the leaves that experts own, and `norm` is `gradient_norm` of `grads`.
    """
    config, params = plan.config, active.params if active.fast is None else active.fast
    if config.optim.clip_norm:
        clip = jnp.minimum(1.0, config.optim.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * clip.reshape(-1, *[1] * (g.ndim - 1)) if clip.ndim else g * clip, grads)
    tx, factor = optimizer.direction(config), plan.routing.rate(active.step)
    moments = whole_matrices(plan, active.opt_state)
    direction, opt_state = directions(tx, grads, moments, params, stacked, factor)
    # Results too: else XLA splits what they are computed from.
    direction, opt_state = whole_matrices(plan, (direction, opt_state))
    if optimizer.scales_differ(config):
        scale = functools.partial(jax.tree.map, operator.mul, optimizer.layer_scales(config, params))
        direction = jax.vmap(scale)(direction) if trees.is_whole(params) else scale(direction)
    rate = learning_rate(plan, active.step)
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    if active.fast is not None:
        share = 1.0 - config.optim.primal_averaging
        # Not as a weighted sum, whose two weights are rounded: weights that are not trained would drift.
        mean = jax.tree.map(lambda slow, fast: slow + share * (fast - slow), active.params, params)
        return active._replace(params=mean, fast=params, opt_state=opt_state)
    return active._replace(params=params, opt_state=opt_state)


def gradient_norm(plan: StepPlan, grads: Any) -> jax.Array:
    """Returns the global norm of the gradients; [E], that of each, if a step trains E whole models apart."""
    return jax.vmap(optax.tree.norm)(grads) if plan.routing.trained_apart > 1 else optax.tree.norm(grads)


def gather_slices(plan: StepPlan, whole: Any, taken: Any) -> Any:
    """Returns the parameters that ran, slices of experts among them laid out as `whole` is: with train.shard=optimizer
    XLA would put split slices back, and then gather all experts."""

    def lay_out(before: jax.Array, leaf: jax.Array) -> jax.Array:
        if before.shape == leaf.shape:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(plan.mesh, REPLICATED))

    return jax.tree.map(lay_out, whole, taken) if plan.config.train.shard == "optimizer" else taken


def whole_matrices(plan: StepPlan, tree: Any) -> Any:
    """Returns moments or directions with each matrix that `train.shard` splits gathered, if the optimiser multiplies
    it: XLA would exchange it in every one of Muon's products."""
    if plan.config.train.shard == "none":
        return tree

    def gather(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        if not optimizer.multiplies_whole(plan.config, path):
            return leaf
        is_stacked = plan.routing.has_whole_models or trees.is_stacked(path, leaf)
        spec = leaf_spec(plan.mesh, leaf.shape, plan.routing.axis if is_stacked else None, False)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(plan.mesh, spec))

    return jax.tree.map_with_path(gather, tree)


def finish(plan: StepPlan, state: TrainState) -> TrainState:
    """Returns the whole state with experts pulled toward their mean or to where the outer optimiser steps, the EMA
    updated and the step counted."""
    config, params, ema, outer = plan.config, state.params, state.ema, state.outer
    if outer is not None:
        due = PULL_SCHEDULES[config.routing.pull_schedule](plan, state.step) > 0
        step = functools.partial(outer_step, optimizer.outer(config))
        params, outer = jax.lax.cond(due, step, lambda *same: same, params, outer)
    elif config.routing.experts > 1 and config.routing.pull > 0:
        pull = pull_share(plan, state.step)
        params = jax.lax.cond(pull > 0, lambda tree: merge.pull(tree, pull), lambda tree: tree, params)
    if config.train.ema:
        decay = jnp.minimum(config.train.ema, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(merge.average_experts(params), ema, 1.0 - decay)
    return state._replace(step=state.step + 1, params=params, ema=ema, outer=outer)


def outer_step(tx: optax.GradientTransformation, params: Any, outer: OuterState) -> tuple[Any, OuterState]:
    """Returns (params, outer) after a step of the outer optimiser, whose gradient is the way back from the mean of the
    experts to the anchor. All experts begin again at the new anchor.

    Sources: DiLoCo, arXiv 2311.08105, algorithm 1; of a dense model SNOO, arXiv 2510.15830, and without momentum
    Lookahead, arXiv 1907.08610.
    """
    way_back = jax.tree.map(operator.sub, outer.anchor, one_copy(params))
    updates, momentum = tx.update(way_back, outer.momentum)
    anchor = optax.apply_updates(outer.anchor, updates)
    marks = trees.stacked(params)
    if not any(jax.tree.leaves(marks)):
        return anchor, OuterState(anchor, momentum)
    trunk, experts = trees.split(params, marks)
    axis = trees.expert_axis(params)
    begin = jax.tree.map(lambda x, like: jnp.broadcast_to(jnp.expand_dims(x, axis), like.shape), anchor, experts)
    return trees.join(trunk, begin), OuterState(anchor, momentum)


def gradient_point(plan: StepPlan, state: TrainState) -> Any:
    """Returns the parameters at which a step differentiates: with `optim.primal_averaging`, a point between the mean
    and the weights that the optimiser steps from (GPA, arXiv 2512.17131)."""
    if state.fast is None:
        return state.params
    return optax.incremental_update(state.params, state.fast, plan.config.optim.primal_share)


def learning_rate(plan: StepPlan, step: jax.Array) -> jax.Array:
    """Returns the learning rate of a step, a float32 scalar."""
    return jnp.asarray(optimizer.schedule(plan.config, plan.steps_per_epoch)(step), jnp.float32)


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


def pull_share(plan: StepPlan, step: jax.Array) -> jax.Array:
    """Returns the share of the way to their mean that experts move after a step."""
    routed = plan.config.routing
    return routed.pull * PULL_SCHEDULES[routed.pull_schedule](plan, step)


def is_due(plan: StepPlan, step: jax.Array) -> jax.Array:
    """Returns 1 for every `pull_every`-th step, else 0."""
    return ((step + 1) % plan.config.routing.pull_every == 0).astype(jnp.float32)


# Name -> what multiplies routing.pull after a step, 0 to 1.
PULL_SCHEDULES: dict[str, Callable[[StepPlan, jax.Array], jax.Array]] = {
    "constant": is_due,
    # PAPA, arXiv 2304.03094
    "learning_rate": lambda plan, step: (
        is_due(plan, step) * learning_rate(plan, step) / plan.config.optim.learning_rate
    ),
    "qsr": lambda plan, step: jnp.asarray(qsr_pulls(plan))[step].astype(jnp.float32),
}


def qsr_pulls(plan: StepPlan) -> np.ndarray:
    """Returns bool [steps of the run], True for a step that a pull follows.

    The quadratic synchronization rule (Gu et al., arXiv 2310.14423): an interval that begins at learning rate r has
    max(pull_every, floor((alpha / r)^2)) steps. alpha is sqrt(pull_every) * optim.learning_rate, with which an interval
    at the highest learning rate has pull_every steps. Intervals that begin in the warm-up have as many, as in the
    paper.
    """
    config, total = plan.config, plan.total
    with jax.ensure_compile_time_eval():
        rates = np.asarray(optimizer.schedule(config, plan.steps_per_epoch)(jnp.arange(total)), np.float64)
    rates[: optimizer.warmup_steps(config, plan.steps_per_epoch)] = config.optim.learning_rate
    pulls, step = np.zeros(total, bool), 0
    while step < total:
        relative = max(rates[step] / config.optim.learning_rate, 1e-9)
        step += min(max(config.routing.pull_every, int(config.routing.pull_every / relative**2)), total)
        pulls[min(step, total) - 1] = True  # the last interval ends with the run
    return pulls


def bytes_reduced(plan: StepPlan) -> Callable[[int], int]:
    """Returns a function of the number of steps done: the bytes that each device reduces with others in these steps, on
    the devices of the plan, in gradients of what is trained, pulls and the EMA, scalars apart.

    On one device it is what each would reduce if there were several, and for routing.kind=sample one for each expert.
    On the expert axis an expert's gradients stay on its devices; a pull reduces its weights, and an EMA of the merged
    model reduces them at every step. Otherwise every device has all experts and reduces every gradient, and pulls and
    EMA move nothing.
    """
    routing, mesh, is_frozen = plan.routing, plan.mesh, optimizer.frozen(plan.config)
    params = routing.shapes()
    trunk, experts = (
        sum(4 * x.size for path, x in jax.tree.leaves_with_path(part) if not (is_frozen and is_frozen(path)))
        for part in trees.split(params, trees.stacked(params))
    )
    one = experts // routing.experts
    if routing.slots == 1 or 1 == plan.expert_devices < mesh.size:
        return lambda done: done * (trunk + routing.reduced_experts * one)
    gradients = trunk + (experts // plan.expert_devices if 1 < plan.expert_devices < mesh.size else 0)
    pulls = pulls_until(plan)
    return lambda done: done * gradients + (pulls(done) + (done if plan.config.train.ema else 0)) * one


def pulls_until(plan: StepPlan) -> Callable[[int], int]:
    """Returns a function of the number of steps done: the pulls until then that move something."""
    routed = plan.config.routing
    if not routed.pull:  # a dense model is not pulled together
        return lambda done: 0
    if routed.pull_schedule == "qsr":
        qsr = np.flatnonzero(qsr_pulls(plan))
        return lambda done: int(np.searchsorted(qsr, done))
    # A warm-up begins at learning rate 0, so a pull in proportion to it moves nothing after the first step.
    none_at_first = routed.pull_every == 1 and not pull_share(plan, jnp.int32(0))
    return lambda done: done // routed.pull_every - (none_at_first and done > 0)
