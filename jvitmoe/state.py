"""The training state, and the active slice of it: what one route reads and writes.

Experts keep optimiser states of their own, one per (layer, expert), Adam's step count included. So an expert's
moments, bias correction and weight decay are those of a dense Adam that saw only the steps this expert ran.

L layers · E experts
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jvitmoe import merging


class OptState(NamedTuple):
    trunk: Any  # state of everything that every step touches
    experts: Any  # leaves [L, E, ...] (one path: [L, ...]); None in a dense model


class Skipped(NamedTuple):
    """Steps that changed nothing, because their loss or gradients were not finite; int32 scalars."""

    total: jax.Array
    in_a_row: jax.Array  # up to the last step


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Any
    opt_state: OptState
    ema: Any = None  # running mean of the merged tree, dense; None where none is kept
    skipped: Skipped | None = None  # None where such a step ends the run


def create(params: Any, tx: optax.GradientTransformation, ema: bool = False, skips: bool = False) -> TrainState:
    """Returns the state of a run at step 0."""
    trunk, experts = merging.split(params, merging.stacked(params))
    expert_state = jax.vmap(jax.vmap(tx.init))(experts) if jax.tree.leaves(experts) else None
    average = merging.average_experts(params) if ema else None
    skipped = Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)) if skips else None
    return TrainState(jnp.zeros((), jnp.int32), params, OptState(tx.init(trunk), expert_state), average, skipped)


def take_path(params: Any, opt_state: OptState, route: jax.Array) -> tuple[Any, OptState]:
    """Returns (params, opt_state) of what the route picks: with [L], the tree that `ViT` has with one expert; with
    [L, P], with P of them."""
    trunk, experts = merging.split(params, merging.stacked(params))
    path_state = OptState(opt_state.trunk, merging.take(opt_state.experts, route))
    return merging.join(trunk, merging.take(experts, route)), path_state


def put_path(
    params: Any, opt_state: OptState, route: jax.Array, path: Any, path_opt_state: OptState
) -> tuple[Any, OptState]:
    """Returns (params, opt_state) with the path written back where `take_path` found it.

    Nothing else is written: idle experts, their moments and counts keep their bits.
    """
    marks = merging.stacked(params)
    _, experts = merging.split(params, marks)
    trunk, parts = merging.split(path, marks)
    expert_state = merging.put(opt_state.experts, path_opt_state.experts, route)
    return merging.join(trunk, merging.put(experts, parts, route)), OptState(path_opt_state.trunk, expert_state)


def update(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: OptState,
    params: Any,
    stacked: Any,
    all_run: bool = False,
    expert_scale: jax.Array | float = 1.0,
) -> tuple[Any, OptState]:
    """Returns (direction, opt_state) for the whole stacked tree or for one path of it.

    Args:
        tx: from gradients to direction.
        grads, opt_state, params: of the tree that ran.
        stacked: marks the leaves that experts own, in the whole tree or after `take_path`.
        all_run: whether the experts come as [L, E, ...], all of them, or as [L, ...], one path.
        expert_scale: what the direction of experts is multiplied by.
    """
    grads_trunk, grads_experts = merging.split(grads, stacked)
    params_trunk, params_experts = merging.split(params, stacked)
    trunk, trunk_state = tx.update(grads_trunk, opt_state.trunk, params_trunk)
    if opt_state.experts is None:
        return trunk, OptState(trunk_state, None)
    # One Adam per layer, and per expert where all run: each has run its own number of steps.
    update_experts = jax.vmap(jax.vmap(tx.update)) if all_run else jax.vmap(tx.update)
    experts, expert_state = update_experts(grads_experts, opt_state.experts, params_experts)
    experts = jax.tree.map(lambda x: x * expert_scale, experts)
    return merging.join(trunk, experts), OptState(trunk_state, expert_state)
