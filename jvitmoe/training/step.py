"""The compiled training step: draw a route, take its experts, update them, put them back.

Devices form a mesh ("data", "expert"). Loss and gradients are computed per device under `shard_map`; everything else
is plain code over whole arrays, which XLA partitions by the sharding of the state.

B global batch, b the share of one device · S steps of one epoch · N images · L layers · E experts
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from jvitmoe.data.batches import Images
from jvitmoe.experts import trees
from jvitmoe.models.routers import Statistics
from jvitmoe.runtime import compilation
from jvitmoe.runtime.devices import REPLICATED
from jvitmoe.training.gradients import Inputs, gradients
from jvitmoe.training.plan import StepPlan
from jvitmoe.training.state import TrainState, abstract_state, put, take
from jvitmoe.training.update import finish, learning_rate, update


class Metrics(NamedTuple):
    """The metrics of one step over the global batch; float32 scalars."""

    loss: jax.Array  # the minimised loss, nats: cross-entropy with smoothed labels, and auxiliary losses
    accuracy: jax.Array  # of the selected path, before its update
    grad_norm: jax.Array  # global L2 norm before clipping
    learning_rate: jax.Array
    router: Statistics | None = None  # leaves [layers with experts, ...], means over the batch; None: no router


def as_floats(metrics: Metrics, expert_layers: Sequence[int]) -> dict[str, float]:
    """Returns name -> value of metrics on the host; a router's as router/<name>/layer<l>[/expert<e>]."""
    scalars = {name: float(getattr(metrics, name)) for name in ("loss", "accuracy", "grad_norm", "learning_rate")}
    for name, leaf in metrics.router._asdict().items() if metrics.router else ():
        for x, *expert in np.ndindex(leaf.shape):
            parts = [f"layer{expert_layers[x]}", *(f"expert{e}" for e in expert)]
            scalars["/".join(("router", name.removesuffix("_E"), *parts))] = float(leaf[x, *expert])
    return scalars


class TrainStep(Protocol):
    """`train_step` of one plan under `jax.jit`."""

    def __call__(self, before: TrainState, split: Images, index_SB: jax.Array | None) -> tuple[TrainState, Metrics]: ...

    def lower(self, before: TrainState, split: Images, index_SB: jax.Array | None) -> Any: ...

    def trace(self, before: TrainState, split: Images, index_SB: jax.Array | None) -> Any: ...


def make_train_step(plan: StepPlan) -> TrainStep:
    """Returns `train_step` compiled for a run; the state is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(plan.config, plan.routing, plan.mesh))
    jitted = jax.jit(
        functools.partial(train_step, plan),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(plan.mesh, REPLICATED)),
        compiler_options=compilation.options(plan.model.dtype, plan.mesh.devices.flat[0].platform),
    )
    return cast(TrainStep, jitted)


def train_step(
    plan: StepPlan, before: TrainState, split: Images, index_SB: jax.Array | None
) -> tuple[TrainState, Metrics]:
    """Returns (state, Metrics) after one step on the images that index_SB, the order of an epoch, selects.

    With `data.stream` the images are those of the batch, and index_SB is None.

    Routes, augmentation and dropout are addressed by (seed, step, index in the global batch), so the result does not
    depend on the number of devices beyond the order of floating-point sums. The consistency loss makes two passes, at
    twice the cost.
    """
    step, routing = before.step, plan.routing
    routes = routing.draw(plan.root, step)
    active = take(routing, before, routes)
    index_B = None if index_SB is None else index_SB[step % plan.steps_per_epoch]
    loss, accuracy, statistics, grads = gradients(plan, active.params, Inputs(split, index_B, step, routes))
    norm = optax.tree.norm(grads)
    active = update(plan, active, trees.stacked(before.params), grads, norm)
    after = finish(plan, put(routing, before, active, routes))
    return after, Metrics(loss, accuracy, norm, learning_rate(plan, step), statistics)
