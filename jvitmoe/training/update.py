"""The part of a step after the gradients: optimiser, pull toward the mean, EMA.

L layers · E experts · P forward passes
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jvitmoe.experts import merge, slices
from jvitmoe.training import optimizer
from jvitmoe.training.plan import StepPlan
from jvitmoe.training.state import OptState, Skipped, TrainState


def update(
    plan: StepPlan, active: TrainState, stacked: Any, grads: Any, norm: jax.Array, finite: jax.Array
) -> TrainState:
    """Returns the active slice after the optimiser's step; `finish` updates its step number and EMA.

    `stacked` marks the leaves that experts own, `norm` is the global norm of `grads`, and `finite` tells whether it and
    the loss are finite. If they are not and `optim.skip_nonfinite` is set, only the counts of steps change, as in
    optax.apply_if_finite.
    """
    config, params = plan.config, active.params
    if config.optim.clip_norm:
        clip = jnp.minimum(1.0, config.optim.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * clip, grads)
    tx = optimizer.direction(config)
    per_expert = plan.all_run or plan.passes == 2
    scale = expert_scale(plan, active.step)
    direction, opt_state = directions(tx, grads, active.opt_state, params, stacked, per_expert, scale)
    if optimizer.scales_differ(config):
        direction = jax.tree.map(operator.mul, optimizer.layer_scales(config, params), direction)
    rate = learning_rate(plan, active.step)
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    skipped = active.skipped
    if skipped:
        changed, unchanged = (params, opt_state), (active.params, active.opt_state)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, unchanged)
        skipped = Skipped(skipped.total + ~finite, jnp.where(finite, 0, skipped.in_a_row + 1))
    return active._replace(params=params, opt_state=opt_state, skipped=skipped)


def finish(plan: StepPlan, state: TrainState, finite: jax.Array) -> TrainState:
    """Returns the whole state with experts pulled toward their mean, the EMA updated and the step counted. The teacher
    is the model before the pull that makes all experts equal."""
    config, params, ema, teacher = plan.config, state.params, state.ema, state.teacher
    routed, decay = config.routing, config.train.ema
    if config.train.distil_last:
        teacher = jax.lax.cond(state.step + 1 == plan.first_tied, lambda: params, lambda: teacher)
    if routed.experts > 1 and (routed.pull > 0 or config.tied_last > 0):
        pull = pull_share(plan, state.step)
        if state.skipped:  # a skipped step changes nothing, except that experts must be equal from first_tied on
            pull = jnp.where(finite | (state.step + 1 == max(plan.first_tied, 1)), pull, 0.0)
        params = jax.lax.cond(pull > 0, lambda tree: merge.pull(tree, pull), lambda tree: tree, params)
    if decay:
        share: Any = 1.0 - decay
        if config.train.ema_warmup:
            share = 1.0 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        share = jnp.where(finite, share, 0.0) if state.skipped else share
        ema = optax.incremental_update(merge.average_experts(params), ema, share)
    return state._replace(step=state.step + 1, params=params, ema=ema, teacher=teacher)


def learning_rate(plan: StepPlan, step: jax.Array) -> jax.Array:
    """Returns the learning rate of a step, a float32 scalar."""
    return jnp.asarray(optimizer.schedule(plan.config, plan.steps_per_epoch)(step), jnp.float32)


def directions(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: OptState,
    params: Any,
    stacked: Any,
    per_expert: bool = False,
    expert_scale: jax.Array | float = 1.0,
) -> tuple[Any, OptState]:
    """Returns (direction, opt_state) of `tx` for the tree that ran: the whole one or what `state.take` selected.

    `stacked` marks the leaves that experts own. With per_expert they are [L, E, ...] or [L, P, ...], else [L, ...]. The
    direction of experts is multiplied by `expert_scale`.
    """
    grads_trunk, grads_experts = slices.split(grads, stacked)
    params_trunk, params_experts = slices.split(params, stacked)
    trunk, trunk_state = tx.update(grads_trunk, opt_state.trunk, params_trunk)
    if opt_state.experts is None:
        return trunk, OptState(trunk_state, None)
    # One Adam per layer, and per expert where several run: each has run its own number of steps.
    update_experts = jax.vmap(jax.vmap(tx.update)) if per_expert else jax.vmap(tx.update)
    experts, expert_state = update_experts(grads_experts, opt_state.experts, params_experts)
    experts = jax.tree.map(lambda x: x * expert_scale, experts)
    return slices.join(trunk, experts), OptState(trunk_state, expert_state)


def expert_scale(plan: StepPlan, step: jax.Array) -> jax.Array:
    """Returns what multiplies the experts' learning rate at a step.

    In the last `tied_last` of training all experts are equal. If one expert runs per batch, their mean moves by 1/E of
    its step. So the step is then multiplied by E (by E/2 if two experts run), and the merged MLP moves as a dense one.
    """
    routed = plan.config.routing
    one_runs = routed.granularity == "batch" and not plan.config.routes_in_model
    times = routed.experts / plan.passes if one_runs else 1
    return jnp.where(step >= plan.first_tied, times * routed.learning_rate, routed.learning_rate)


def pull_share(plan: StepPlan, step: jax.Array) -> jax.Array:
    """Returns the share of the way to their mean that experts move after a step.

    From the step before `first_tied` on it is 1, so experts are equal when the last part of training begins.
    """
    routed = plan.config.routing
    share = routed.pull * PULL_SCHEDULES[routed.pull_schedule](plan, step)
    return jnp.where(step + 1 >= plan.first_tied, 1.0, share)


def is_due(plan: StepPlan, step: jax.Array) -> jax.Array:
    """Returns 1 for every `pull_every`-th step, else 0."""
    return ((step + 1) % plan.config.routing.pull_every == 0).astype(jnp.float32)


# Name -> what multiplies routing.pull after a step, 0 to 1.
PULL_SCHEDULES: dict[str, Callable[[StepPlan, jax.Array], jax.Array]] = {
    "constant": is_due,
    "rising": lambda plan, step: is_due(plan, step) * (step + 1) / plan.total,
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
