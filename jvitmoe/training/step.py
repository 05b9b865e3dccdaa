"""The compiled training step: draw a route, take its experts, update them, put them back.

Devices form a mesh ("data", "expert"). Loss and gradients are computed per device under `shard_map`; everything else
is plain code over whole arrays, which XLA partitions by the sharding of the state.

B global batch, b the share of one device · S steps of one epoch · N images · L layers · E experts
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jvitmoe.data.batches import Images
from jvitmoe.experts import slices
from jvitmoe.experts.routes import Purpose, address, distinct_route, draw_route
from jvitmoe.models.routers import Statistics
from jvitmoe.runtime import compilation
from jvitmoe.runtime.devices import REPLICATED
from jvitmoe.training import state
from jvitmoe.training.gradients import Inputs, Routes, gradients
from jvitmoe.training.plan import StepPlan
from jvitmoe.training.state import TrainState, abstract_state
from jvitmoe.training.update import finish, learning_rate, update


class Metrics(NamedTuple):
    """The metrics of one step over the global batch; float32 scalars."""

    loss: jax.Array  # the minimised loss, nats: cross-entropy with smoothed labels, and auxiliary losses
    accuracy: jax.Array  # of the selected path, before its update
    grad_norm: jax.Array  # global L2 norm before clipping
    learning_rate: jax.Array
    router: Statistics | None = None  # leaves [layers with experts, ...], means over the batch; None: no router
    skipped: state.Skipped | None = None  # counts up to this step; None if a non-finite step ends the run


def as_floats(metrics: Metrics, expert_layers: Sequence[int]) -> dict[str, float]:
    """Returns name -> value of metrics on the host; a router's as router/<name>/layer<l>[/expert<e>]."""
    scalars = {name: float(getattr(metrics, name)) for name in ("loss", "accuracy", "grad_norm", "learning_rate")}
    if metrics.skipped:
        scalars["skipped"] = int(metrics.skipped.total)
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
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(plan.config, plan.model, plan.mesh))
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
    depend on the number of devices beyond the order of floating-point sums. With granularity "batch" only the dense
    model on the route is differentiated, reduced over devices and updated. Otherwise every expert runs: on its slot of
    images (index in the batch modulo E), or on the tokens that a route or a router gives it. The consistency loss
    makes two passes, on two distinct routes, at twice the cost.
    """
    step = before.step
    routes = draw_routes(plan, step)
    index_B = None if index_SB is None else index_SB[step % plan.steps_per_epoch]
    active = take(plan, before, routes)
    inputs = Inputs(split, index_B, step, routes, before.teacher)
    loss, accuracy, statistics, grads = gradients(plan, active.params, inputs)
    after, norm = apply_gradients(plan, before, active, routes, loss, grads)
    return after, Metrics(loss, accuracy, norm, learning_rate(plan, step), statistics, after.skipped)


def apply_gradients(
    plan: StepPlan, before: TrainState, active: TrainState, routes: Routes, loss: jax.Array, grads: Any
) -> tuple[TrainState, jax.Array]:
    """Returns (the whole state after the step, global L2 norm of the gradients of the active slice)."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    active = update(plan, active, slices.stacked(before.params), grads, norm, finite)
    return finish(plan, put(plan, before, active, routes), finite), norm


def draw_routes(plan: StepPlan, step: jax.Array) -> Routes:
    """Returns the route of each forward pass of a step; two differ everywhere, if there are several experts."""
    config = plan.config
    key = address(plan.root, Purpose.ROUTE, step)
    route = draw_route(key, config.routing, config.model.depth, config.model.tokens)
    if plan.passes == 1 or config.routing.experts == 1:
        return (route,) * plan.passes
    key = address(plan.root, Purpose.SECOND_ROUTE, step)
    return route, distinct_route(key, route, config.routing)


def take(plan: StepPlan, whole: TrainState, routes: Routes) -> TrainState:
    """Returns the slice of the state that a step runs and updates: one expert for each pass, or everything."""
    return whole if plan.all_run else state.take(whole, _selected(routes))


def put(plan: StepPlan, whole: TrainState, active: TrainState, routes: Routes) -> TrainState:
    """Returns the whole state, the active slice written back."""
    return active if plan.all_run else state.put(whole, active, _selected(routes))


def _selected(routes: Routes) -> jax.Array:
    """Returns the experts of all passes, [L] of one and [L, P] of several."""
    return routes[0] if len(routes) == 1 else jnp.stack(routes, axis=1)
