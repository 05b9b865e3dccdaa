"""JAX set strict before anything imports it, and the few fixtures that several files share."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jvitmoe import config as config_lib
from jvitmoe import routing, step
from jvitmoe.config import Config
from jvitmoe.data import feed
from jvitmoe.data.feed import Images
from jvitmoe.data.sources import Split
from jvitmoe.models import vit
from jvitmoe.routing import Purpose
from jvitmoe.state import TrainState
from jvitmoe.step import Metrics, TrainStep

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

TINY = {
    "model": {"width": 8, "hidden": 12, "depth": 2, "heads": 2, "patch": 4, "classes": 3},
    "train": {"batch_size": 8, "epochs": 4, "devices": 1},
}


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """Returns a maker of small valid configs: tiny_config(routing={"experts": 4}, train={"devices": 2})."""

    def make(**overrides: dict[str, Any]) -> Config:
        sections = {*TINY, *overrides}
        return config_lib.from_dict({s: {**TINY.get(s, {}), **overrides.get(s, {})} for s in sections}).validate()

    return make


@pytest.fixture
def tiny_split() -> Callable[..., Split]:
    """Returns a maker of splits a linear model can learn: noise, and one bright quarter per class of three."""

    def make(count: int = 26, size: int = 8, channels: int = 1) -> Split:
        rng = np.random.default_rng(0)
        labels_N = rng.integers(0, 3, count).astype(np.int32)
        images_NHWC = rng.integers(0, 128, (count, size, size, channels)).astype(np.uint8)
        half = size // 2
        for image_HWC, label in zip(images_NHWC, labels_N, strict=True):
            row, column = half * (label // 2), half * (label % 2)
            image_HWC[row : row + half, column : column + half] += 100
        return Split(images_NHWC, labels_N)

    return make


@dataclasses.dataclass
class Training:
    """One run, set up as `jvitmoe.train` sets it up."""

    config: Config
    mesh: Mesh
    model: vit.ViT
    images: Images
    order: feed.TrainOrder
    step: TrainStep
    state: TrainState

    def run(self, steps: int) -> list[Metrics]:
        """Goes on for `steps` steps and returns the metrics of each, on the host."""
        metrics = []
        for number in range(int(self.state.step), int(self.state.step) + steps):
            index_SB = self.order.epoch(number // self.order.steps_per_epoch)
            # Waited for at every step: on JAX 0.10 collectives of two programs in flight can deadlock on a CPU.
            self.state, last = jax.block_until_ready(self.step(self.state, self.images, index_SB))
            metrics.append(jax.device_get(last))
        return metrics


@pytest.fixture
def training() -> Callable[[Config, Split], Training]:
    """Returns a maker of runs: training(config, split).run(5)."""

    def make(config: Config, split: Split) -> Training:
        mesh = step.make_mesh(config.train)
        key = routing.address(jax.random.key(config.train.seed), Purpose.ORDER)
        order = feed.TrainOrder(len(split), config.train.batch_size, key, mesh)
        model = vit.build(config.model, config.routing.experts, config.routing.init)
        return Training(
            config,
            mesh,
            model,
            feed.put(split, mesh),
            order,
            step.make_train_step(config, model, mesh, order.steps_per_epoch),
            step.make_state(config, model, mesh),
        )

    return make
