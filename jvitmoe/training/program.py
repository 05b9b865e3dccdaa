"""The compiled training step of a run, for any devices, from shapes only: nothing is allocated or run."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jvitmoe import routing
from jvitmoe.config import Config
from jvitmoe.data.batches import Images, TrainOrder
from jvitmoe.runtime.devices import BY_DEVICE, REPLICATED
from jvitmoe.training.state import StepPlan, TrainState, abstract_state
from jvitmoe.training.step import make_train_step


def plan_for(config: Config, mesh: Mesh, count: int) -> StepPlan:
    """Returns the plan of a run on `count` training images. Raises ConfigError."""
    way, train = routing.find(config), config.train
    order = TrainOrder(count, train.batch_size, jax.random.key(train.seed), mesh, way.slots, train.accumulate)
    return StepPlan(config, way, way.model(mesh), mesh, order.steps_per_epoch)


def abstract_inputs(plan: StepPlan, count: int) -> tuple[TrainState, Images, Any]:
    """Returns shapes, dtypes and shardings of what a step takes: state, images, and the order of an epoch."""
    config, model = plan.config, plan.config.model
    whole = NamedSharding(plan.mesh, REPLICATED)
    where = NamedSharding(plan.mesh, BY_DEVICE) if config.data.stream else whole
    rows = config.train.batch_size if config.data.stream else count
    shape = model.image_size, model.image_size, model.channels
    pixels_NP: Any = jax.ShapeDtypeStruct((rows, math.prod(shape)), jnp.uint8, sharding=where)
    labels_N: Any = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=where)
    order = (plan.steps_per_epoch, config.train.batch_size)
    index_SB = None if config.data.stream else jax.ShapeDtypeStruct(order, jnp.int32, sharding=whole)
    return abstract_state(config, plan.routing, plan.mesh), Images(pixels_NP, labels_N, shape), index_SB


def lower(plan: StepPlan, count: int) -> Any:
    """Returns the step of a run on `count` images, lowered for the devices of its mesh."""
    return make_train_step(plan).lower(*abstract_inputs(plan, count))
