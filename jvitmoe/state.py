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
    experts: Any  # leaves [L, E, ...] (active: [L, ...]); None in a dense model


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Any
    opt_state: OptState


def create(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state of a run at step 0."""
    trunk, experts = merging.split(params, merging.stacked(params))
    expert_state = jax.vmap(jax.vmap(tx.init))(experts) if jax.tree.leaves(experts) else None
    return TrainState(jnp.zeros((), jnp.int32), params, OptState(tx.init(trunk), expert_state))


def take_active(state: TrainState, route_L: jax.Array) -> tuple[Any, OptState]:
    """Returns (params, opt_state) of the dense model that the route picks out of the state."""
    experts = jax.tree.map(lambda leaf: merging.take(leaf, route_L), state.opt_state.experts)
    return merging.take_path(state.params, route_L), OptState(state.opt_state.trunk, experts)


def put_active(state: TrainState, route_L: jax.Array, params: Any, opt_state: OptState) -> TrainState:
    """Returns the state after the step, with the dense model written back where `take_active` found it.

    Nothing else is written: idle experts, their moments and counts keep their bits.
    """

    def put(leaf: jax.Array, part: jax.Array) -> jax.Array:
        return merging.put(leaf, part, route_L)

    params = jax.tree.map(
        lambda leaf, part, is_stacked: put(leaf, part) if is_stacked else part,
        state.params,
        params,
        merging.stacked(state.params),
    )
    experts = jax.tree.map(put, state.opt_state.experts, opt_state.experts)
    return TrainState(state.step + 1, params, OptState(opt_state.trunk, experts))


def update_active(
    tx: optax.GradientTransformation, grads: Any, opt_state: OptState, params: Any, stacked: Any
) -> tuple[Any, OptState]:
    """Returns (direction, opt_state) of the active dense model; `stacked` marks the leaves that came from experts."""
    grads_trunk, grads_experts = merging.split(grads, stacked)
    params_trunk, params_experts = merging.split(params, stacked)
    trunk, trunk_state = tx.update(grads_trunk, opt_state.trunk, params_trunk)
    if opt_state.experts is None:
        return trunk, OptState(trunk_state, None)
    # One Adam per layer: with scope "layer", experts of different layers have run different numbers of steps.
    experts, expert_state = jax.vmap(tx.update)(grads_experts, opt_state.experts, params_experts)
    return merging.join(trunk, experts), OptState(trunk_state, expert_state)
