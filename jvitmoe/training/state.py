"""What is fixed for all steps, the training state, and its active slice: the arrays that a step reads and writes.

Experts keep optimiser states of their own, one per (layer, expert), or one per whole model, Adam's step count included.
So an expert's moments, bias correction and weight decay are those of a dense Adam that saw only the steps of this
expert.

L layers · E experts
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvitmoe.config import DataConfig, TrainConfig
from jvitmoe.data.batches import TrainOrder
from jvitmoe.experts import merge, trees
from jvitmoe.models import vit
from jvitmoe.routing import Routing
from jvitmoe.routing.base import Route
from jvitmoe.runtime.addresses import Purpose, address
from jvitmoe.runtime.devices import DATA, EXPERT
from jvitmoe.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run as its settings make it (`build`), and values derived from it: all that the functions of a step share."""

    routing: Routing
    optimizer: Optimizer
    model: vit.ViT  # that `routing.model` returns for these devices
    mesh: Mesh
    order: TrainOrder
    data: DataConfig  # of these sections the step reads augmentation and normalisation,
    train: TrainConfig  # and batch, loss, EMA and what the devices share

    @property
    def root(self) -> jax.Array:
        """The key of the run (`addresses.address`)."""
        return jax.random.key(self.train.seed)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def total(self) -> int:
        """Number of steps of the run."""
        return self.train.epochs * self.steps_per_epoch

    @property
    def data_devices(self) -> int:
        return self.mesh.shape[DATA]

    @property
    def expert_devices(self) -> int:
        return self.mesh.shape[EXPERT]


class OptState(NamedTuple):
    trunk: Any  # state of the parameters that every step updates
    experts: Any  # leaves [L, E, ...] (one path: [L, ...]), of whole models [E, ...]; None in a dense model


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Any
    opt_state: OptState
    ema: Any = None  # exponential moving average of the merged tree; None if train.ema is 0


def create(params: Any, tx: optax.GradientTransformation, ema: bool = False) -> TrainState:
    """Returns the state of a run at step 0."""
    marks = trees.stacked(params)
    trunk, experts = trees.split(params, marks)
    expert_state = per_expert(tx.init, marks, several=True)(experts) if jax.tree.leaves(experts) else None
    average = merge.average_experts(params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, OptState(tx.init(trunk), expert_state), average)


def per_expert(function: Callable[..., Any], marks: Any, several: bool) -> Callable[..., Any]:
    """Returns a function of the experts' trees that calls `function` for each expert alone, and in each layer, if
    experts are MLPs. `marks` are `trees.stacked` of all parameters; without `several` the trees have one expert."""
    whole = all(jax.tree.leaves(marks))
    for _ in range(several + (not whole)):
        function = jax.vmap(function)
    return function


def take(routing: Routing, state: TrainState, routes: tuple[Route, ...]) -> TrainState:
    """Returns what a step runs and updates: parameters, moments and counts of the experts that run."""
    trunk, experts = trees.split(state.params, trees.stacked(state.params))
    opt_state = OptState(state.opt_state.trunk, routing.take(state.opt_state.experts, routes))
    return state._replace(params=trees.join(trunk, routing.take(experts, routes)), opt_state=opt_state)


def put(routing: Routing, state: TrainState, active: TrainState, routes: tuple[Route, ...]) -> TrainState:
    """Returns `active` with its experts written back into those of `state`, where `take` read them.

    Nothing else is written: idle experts, their moments and counts keep their bits.
    """
    marks = trees.stacked(state.params)
    _, experts = trees.split(state.params, marks)
    trunk, parts = trees.split(active.params, marks)
    expert_state = routing.put(state.opt_state.experts, active.opt_state.experts, routes)
    return active._replace(
        params=trees.join(trunk, routing.put(experts, parts, routes)),
        opt_state=OptState(active.opt_state.trunk, expert_state),
    )


def make_state(plan: Plan, dense: Any = None) -> TrainState:
    """Returns the state at step 0, sharded as `train` says: a pure function of the settings and `dense`.

    With a trained dense tree, the trunk is that of the tree, and the experts are copies of its MLPs: sparse upcycling.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(plan))
    return jax.jit(functools.partial(_create, plan), out_shardings=shardings)(dense)


def abstract_state(plan: Plan) -> TrainState:
    """Returns shapes, dtypes and shardings of `make_state` without computing it, as restoring a checkpoint needs.

    Experts and their moments lie along the expert axis, if it has several devices. `train.shard` splits moments, and
    parameters too, over the data axis, each leaf along its longest axis that divides.
    """
    shapes = jax.eval_shape(lambda: _create(plan))
    marks, shard = trees.stacked(shapes.params), plan.train.shard

    def shard_leaf(x: Any, is_stacked: bool, split: bool) -> jax.ShapeDtypeStruct:
        spec = leaf_spec(plan.mesh, x.shape, plan.routing.axis if is_stacked else None, split)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(plan.mesh, spec))

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
    )


def leaf_spec(mesh: Mesh, shape: Sequence[int], expert_axis: int | None, split: bool) -> PartitionSpec:
    """Returns how a leaf of parameters, gradients or optimiser state lies on the mesh; `split`: over the data axis,
    along its longest axis that divides."""
    along: list[str | None] = [None] * len(shape)
    if expert_axis is not None and mesh.shape[EXPERT] > 1:
        along[expert_axis] = EXPERT
    free = [n for n in range(len(shape)) if along[n] is None and shape[n] % mesh.shape[DATA] == 0]
    if split and free:
        along[max(free, key=lambda n: shape[n])] = DATA
    while along and along[-1] is None:  # P() and P(None) mean one thing, but are two programs to jit
        along.pop()
    return PartitionSpec(*along)


def _create(plan: Plan, dense: Any = None) -> TrainState:
    params = plan.routing.init(address(plan.root, Purpose.INIT))
    if dense is not None:
        params = merge.upcycle(dense, params)
    return create(params, plan.optimizer.tx, plan.train.ema > 0)
