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
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvitmoe.config import DataConfig, TrainConfig
from jvitmoe.data.batches import TrainOrder
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params, each
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.machine.devices import DATA, EXPERT
from jvitmoe.models import vit
from jvitmoe.routing import Routing
from jvitmoe.routing.base import Route
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
    weight_C: np.ndarray | None = None  # of classes in the loss; None: all are 1

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
    experts: Any  # that of each expert, leaves [E, X, ...], of whole models [E, ...]; {} in a dense model


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Params
    opt_state: OptState
    ema: Any = None  # exponential moving average of the merged tree; None if train.ema is 0


def create(params: Params, tx: optax.GradientTransformation, ema: bool = False) -> TrainState:
    """Returns the state of a run at step 0."""
    experts = each(per_expert(tx.init, params.experts), params.experts)
    average = merge.average_experts(params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, OptState(tx.init(params.trunk), experts), average)


def per_expert(function: Callable[..., Any], experts: Any) -> Callable[..., Any]:
    """Returns a function of one expert's trees that calls `function` for each layer alone, if experts are MLPs."""
    return jax.vmap(function) if "mlp" in experts else function


def take(routing: Routing, state: TrainState, routes: tuple[Route, ...]) -> TrainState:
    """Returns what a step runs and updates: parameters, moments and counts of the experts that run."""
    params = state.params._replace(experts=routing.take(state.params.experts, routes))
    opt_state = state.opt_state._replace(experts=routing.take(state.opt_state.experts, routes))
    return state._replace(params=params, opt_state=opt_state)


def put(routing: Routing, state: TrainState, active: TrainState, routes: tuple[Route, ...]) -> TrainState:
    """Returns `active` with its experts written back into those of `state`, where `take` read them.

    Nothing else is written: idle experts, their moments and counts keep their bits.
    """
    experts = routing.put(state.params.experts, active.params.experts, routes)
    expert_state = routing.put(state.opt_state.experts, active.opt_state.experts, routes)
    return active._replace(
        params=active.params._replace(experts=experts), opt_state=active.opt_state._replace(experts=expert_state)
    )


def make_state(plan: Plan, dense: Any = None) -> TrainState:
    """Returns the state at step 0, sharded as `train` says: a pure function of the settings and `dense`.

    With a trained dense tree, trunk and experts start as copies of it: sparse upcycling.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(plan))
    return jax.jit(functools.partial(_create, plan), out_shardings=shardings)(dense)


def abstract_state(plan: Plan) -> TrainState:
    """Returns shapes, dtypes and shardings of `make_state` without computing it, as restoring a checkpoint needs.

    Experts and their moments lie along the expert axis, if it has several devices. `train.shard` splits moments, and
    parameters too, over the data axis, each leaf along its longest axis that divides.
    """
    shapes = jax.eval_shape(lambda: _create(plan))

    def shard(tree: Any, of_experts: bool, split: bool) -> Any:
        def of_leaf(x: Any) -> jax.ShapeDtypeStruct:
            where = NamedSharding(plan.mesh, leaf_spec(plan.mesh, x.shape, of_experts, split))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        return jax.tree.map(of_leaf, tree)

    def shard_both(pair: Any, split: bool) -> Any:
        return type(pair)(shard(pair.trunk, False, split), shard(pair.experts, True, split))

    return TrainState(
        shard(shapes.step, False, False),
        shard_both(shapes.params, plan.train.shard == "parameters"),
        shard_both(shapes.opt_state, plan.train.shard != "none"),
        shard(shapes.ema, False, plan.train.shard != "none"),
    )


def leaf_spec(mesh: Mesh, shape: Sequence[int], of_experts: bool, split: bool) -> PartitionSpec:
    """Returns how a leaf of parameters, gradients or optimiser state lies on the mesh; `split`: over the data axis,
    along its longest axis that divides."""
    along: list[str | None] = [None] * len(shape)
    if of_experts and mesh.shape[EXPERT] > 1:
        along[0] = EXPERT
    free = [n for n in range(len(shape)) if along[n] is None and shape[n] % mesh.shape[DATA] == 0]
    if split and free:
        along[max(free, key=lambda n: shape[n])] = DATA
    while along and along[-1] is None:  # P() and P(None) mean one thing, but are two programs to jit
        along.pop()
    return PartitionSpec(*along)


def _create(plan: Plan, dense: Any = None) -> TrainState:
    params = plan.routing.init(address(plan.root, Purpose.INIT), dense)
    return create(params, plan.optimizer.tx, plan.train.ema > 0)
