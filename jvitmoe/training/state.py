"""The training state, and its active slice: the arrays that one route reads and writes.

Experts keep optimiser states of their own, one per (layer, expert), Adam's step count included. So an expert's
moments, bias correction and weight decay are those of a dense Adam that saw only the steps of this expert.

L layers · E experts
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvitmoe.config import Config
from jvitmoe.experts import merge, routes, slices
from jvitmoe.experts.routes import Purpose
from jvitmoe.models import vit
from jvitmoe.runtime.devices import DATA, EXPERT
from jvitmoe.training.optimizer import direction


class OptState(NamedTuple):
    trunk: Any  # state of the parameters that every step updates
    experts: Any  # leaves [L, E, ...] (one path: [L, ...]); None in a dense model


class Skipped(NamedTuple):
    """Counts of the steps that changed nothing because loss or gradients were not finite; int32 scalars."""

    total: jax.Array
    in_a_row: jax.Array  # consecutive ones, the last step included


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Any
    opt_state: OptState
    ema: Any = None  # exponential moving average of the merged tree; None if train.ema is 0
    skipped: Skipped | None = None  # None if a non-finite step ends the run
    teacher: Any = None  # as params: those before train.distil_last began, zeros until then; None if that is 0


def create(
    params: Any, tx: optax.GradientTransformation, ema: bool = False, skips: bool = False, teaches: bool = False
) -> TrainState:
    """Returns the state of a run at step 0."""
    trunk, experts = slices.split(params, slices.stacked(params))
    expert_state = jax.vmap(jax.vmap(tx.init))(experts) if jax.tree.leaves(experts) else None
    average = merge.average_experts(params) if ema else None
    skipped = Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)) if skips else None
    opt_state = OptState(tx.init(trunk), expert_state)
    teacher = jax.tree.map(jnp.zeros_like, params) if teaches else None
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, average, skipped, teacher)


def take(state: TrainState, route: jax.Array) -> TrainState:
    """Returns the active slice: the state with parameters, moments and counts of the selected experts only.

    A route [L] gives the tree that `ViT` has with one expert; a route [L, P] the tree with P experts.
    """
    trunk, experts = slices.split(state.params, slices.stacked(state.params))
    opt_state = OptState(state.opt_state.trunk, slices.take(state.opt_state.experts, route))
    return state._replace(params=slices.join(trunk, slices.take(experts, route)), opt_state=opt_state)


def put(state: TrainState, active: TrainState, route: jax.Array) -> TrainState:
    """Returns `active` with its experts written back into those of `state`, at the indices that `take` read.

    Nothing else is written: idle experts, their moments and counts keep their bits.
    """
    marks = slices.stacked(state.params)
    _, experts = slices.split(state.params, marks)
    trunk, parts = slices.split(active.params, marks)
    expert_state = slices.put(state.opt_state.experts, active.opt_state.experts, route)
    return active._replace(
        params=slices.join(trunk, slices.put(experts, parts, route)),
        opt_state=OptState(active.opt_state.trunk, expert_state),
    )


def make_state(config: Config, model: vit.ViT, mesh: Mesh, dense: Any = None) -> TrainState:
    """Returns the state at step 0, sharded as the config says: a pure function of config and `dense`.

    With a trained dense tree, the trunk is that of the tree, and the experts are copies of its MLPs with noise of
    `init.noise`: sparse upcycling.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, mesh))
    return jax.jit(functools.partial(_create, config, model), out_shardings=shardings)(dense)


def abstract_state(config: Config, model: vit.ViT, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of `make_state` without computing it, as restoring a checkpoint needs.

    Experts and their moments lie along the expert axis, if it has several devices. `train.shard` splits moments, and
    parameters too, over the data axis, each leaf along its longest axis that divides.
    """
    shapes = jax.eval_shape(lambda: _create(config, model))
    marks, shard = slices.stacked(shapes.params), config.train.shard

    def shard_leaf(x: jax.ShapeDtypeStruct, is_stacked: bool, split: bool) -> jax.ShapeDtypeStruct:
        along: list[str | None] = [None] * x.ndim
        if is_stacked and mesh.shape[EXPERT] > 1:
            along[slices.EXPERT_AXIS] = EXPERT
        free = [n for n, axis in enumerate(along) if axis is None and x.shape[n] % mesh.shape[DATA] == 0]
        if split and free:
            along[max(free, key=lambda n: x.shape[n])] = DATA
        while along and along[-1] is None:  # P() and P(None) mean one thing, but are two programs to jit
            along.pop()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*along)))

    def shard_tree(tree: Any, is_stacked: bool, split: bool) -> Any:
        return jax.tree.map(lambda x: shard_leaf(x, is_stacked, split), tree)

    params = jax.tree.map(lambda x, is_stacked: shard_leaf(x, is_stacked, shard == "parameters"), shapes.params, marks)
    return TrainState(
        shard_tree(shapes.step, False, False),
        params,
        OptState(
            shard_tree(shapes.opt_state.trunk, False, shard != "none"),
            shard_tree(shapes.opt_state.experts, True, shard != "none"),
        ),
        shard_tree(shapes.ema, False, shard != "none"),
        shard_tree(shapes.skipped, False, False),
        None if shapes.teacher is None else params,
    )


def _create(config: Config, model: vit.ViT, dense: Any = None) -> TrainState:
    params = vit.init(model, routes.address(jax.random.key(config.train.seed), Purpose.INIT))
    if dense is not None:
        params = merge.upcycle(dense, params)
        if config.init.noise:
            key = routes.address(jax.random.key(config.train.seed), Purpose.NOISE)
            params = merge.add_noise(params, key, config.init.noise)
    optional = config.train.ema > 0, config.optim.skip_nonfinite > 0, config.train.distil_last > 0
    return create(params, direction(config), *optional)
