"""The training step of one config, timed as a whole and in parts, and the peak of the machine to compare with."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvitmoe.config import Config
from jvitmoe.data import augment, batches
from jvitmoe.data.splits import Split
from jvitmoe.experts import build, routes
from jvitmoe.experts.cost import count_parameters, flops_per_image
from jvitmoe.experts.routes import Purpose
from jvitmoe.runtime import compilation, devices
from jvitmoe.training import step
from jvitmoe.training.plan import StepPlan
from jvitmoe.training.state import TrainState, make_state

REPEATS = 5  # of what is timed apart from the step
PRODUCT_SIDE = 2048  # the product of two square matrices of this side measures the peak of the machine


def forward_flops(config: Config) -> float:
    """Returns the FLOPs per image of a forward pass in training, those of a learned router included."""
    model = build.make_model(config, "cpu")
    if model.router is None:
        return flops_per_image(model.plain(), config.train.batch_size)
    settings = dataclasses.replace(model.router, eval_capacity=model.router.capacity)
    return flops_per_image(model.clone(router=settings), config.train.batch_size)


class TimedStep:
    """The compiled step of one config, and its state."""

    def __init__(self, name: str, config: Config, mesh: Mesh, images: batches.Images) -> None:
        self.name, self._mesh, self._config, self._images = name, mesh, config, images
        platform, batch = mesh.devices.flat[0].platform, config.train.batch_size
        model = build.make_model(config, platform)
        self.dtype, self.batch = model.dtype.name, batch
        key = routes.address(jax.random.key(config.train.seed), Purpose.ORDER)
        self._order = order = batches.TrainOrder(
            len(images.labels_N), batch, key, mesh, config.slots, config.train.accumulate
        )
        self._index_SB = order.epoch(0)
        self._plan = StepPlan(config, model, mesh, order.steps_per_epoch)
        train_step = step.make_train_step(self._plan)
        self._state = make_state(config, model, mesh)
        began = time.perf_counter()
        self._step = train_step.lower(self._state, self._images, self._index_SB).compile()
        self.compile_seconds = time.perf_counter() - began
        self._state, _ = jax.block_until_ready(self._step(self._state, self._images, self._index_SB))  # warm
        active, total = count_parameters(config)
        self.facts = {
            "parameters": active,
            "total_parameters": total,
            "compile_seconds": self.compile_seconds,
            "planned_bytes": compilation.planned_bytes(self._step),
            # A backward pass costs two forward passes: gradients of the weights and of the activations.
            "flops": 3 * batch * forward_flops(config),
        }

    def text(self) -> str:
        """Returns the HLO text of the compiled step."""
        return str(self._step.as_text())

    def seconds(self, steps: int) -> float:
        """Returns the mean seconds of a step over several."""
        began = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._images, self._index_SB)
            devices.wait_on_cpu(self._mesh, metrics)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / steps

    def update_seconds(self) -> float:
        """Returns the median seconds of a step's optimiser, pull and EMA, compiled apart from the gradients."""
        plan, picked = self._plan, step.draw_routes(self._plan, jnp.int32(0))
        active = step.take(plan, self._state, picked).params
        grads = jax.block_until_ready(jax.tree.map(lambda x: x * 1e-3, active))

        def after_gradients(before: TrainState, grads: Any) -> TrainState:
            return step.apply_gradients(plan, before, step.take(plan, before, picked), picked, jnp.float32(0), grads)[0]

        program = jax.jit(after_gradients, donate_argnums=0)
        times = []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            self._state = jax.block_until_ready(program(self._state, grads))
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def read_seconds(self) -> float:
        """Returns the median seconds of a step's input: selecting and augmenting a batch, compiled apart, and a step's
        share of drawing the order of an epoch."""
        config = self._config

        @jax.jit
        def read(split: batches.Images, index_B: jax.Array) -> jax.Array:
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(len(index_B)))
            targets_BC = jax.nn.one_hot(split.labels_N[index_B], config.model.classes)
            batch = augment.Batch(key_B, jax.random.key(1), augment.reversed_rows)
            images, _ = augment.augment(config.data, batch, split.images_NHWc[index_B], targets_BC)
            return augment.normalize(images, config.data.mean, config.data.std)

        shares: tuple[tuple[Callable[[], Any], int], ...] = (
            (lambda: read(self._images, self._index_SB[0]), 1),
            (lambda: self._order.epoch(1), self._order.steps_per_epoch),
        )
        return sum(_median_seconds(work) / steps for work, steps in shares)


def random_images(config: Config, count: int, mesh: Mesh) -> batches.Images:
    """Returns `count` random images of the config's shape, on the devices."""
    rng, model = np.random.default_rng(0), config.model
    shape = count, model.image_size, model.image_size, model.channels
    pixels, labels = rng.integers(0, 256, shape, np.uint8), rng.integers(0, model.classes, shape[:1], np.int32)
    return batches.on_devices(Split(pixels, labels), mesh)


def peak_flops(dtype: str, mesh: Mesh) -> float:
    """Returns the FLOP/s of a large matrix product, the best of several."""
    device = mesh.devices.flat[0]
    x = jax.device_put(jnp.ones((PRODUCT_SIDE, PRODUCT_SIDE), dtype), device)
    product = jax.jit(jnp.matmul, compiler_options=compilation.options(jnp.dtype(dtype), device.platform))
    return 2 * PRODUCT_SIDE**3 / min(_seconds(lambda: product(x, x)) for _ in range(12)) * mesh.size


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def _median_seconds(work: Callable[[], Any]) -> float:
    _seconds(work)
    return statistics.median(_seconds(work) for _ in range(REPEATS))
