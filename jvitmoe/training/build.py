"""Makes a run of its settings. What follows gets the `Plan`; only the loop asks the settings again, for `init.source`.

The rules that need the number of images or the devices are here; those that need neither are in `rules`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jvitmoe import routing
from jvitmoe.config import LARGEST, Config
from jvitmoe.data import sources
from jvitmoe.data.batches import TrainOrder, divisor, fitting
from jvitmoe.data.splits import Dataset, Records
from jvitmoe.errors import ConfigError
from jvitmoe.experts import cost
from jvitmoe.machine import devices, memory, processes
from jvitmoe.routing import Routing
from jvitmoe.runs.console import console
from jvitmoe.training.optimizer import Optimizer
from jvitmoe.training.state import Plan, abstract_state


class RunData(NamedTuple):
    """The splits of a run. All of them are `Records` if `data.stream` is set, otherwise `Split`."""

    train: Any
    validation: Any
    test: Any
    classes: tuple[str, ...]
    hashes: dict[str, str]  # of the data (`Dataset.facts`)

    @property
    def counts(self) -> dict[str, int]:
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


class Run(NamedTuple):
    """What `loop.fit` trains."""

    plan: Plan
    data: RunData
    config: Config  # to be written beside the results


def choose(config: Config) -> tuple[Routing, Optimizer]:
    """Returns what the settings name. Raises ConfigError for what no registry has, before any data are read."""
    chosen = routing.find(config)
    return chosen, Optimizer(config, chosen)


def browse(config: Config, classes: tuple[str, ...] = ()) -> Dataset[Records]:
    """Returns the set of a run, whose pictures are not read yet. The first process may download it for all. `classes`
    are those of the run's start, of which the set may lack some."""
    console.print(f"reading     {config.data.name} {config.data.dir}".rstrip())

    def find() -> Dataset[Records]:
        return sources.with_classes(sources.browse, config.data, config.model, classes, may_lack=True)

    found = processes.first_process_then_others(find)
    if found.note:
        console.print(f"split       {found.note}")
    return found


def complete(config: Config, routed: Routing, records: Dataset[Records], saved: Config | None) -> None:
    """Fills in number of classes and batch size where they are 0, from the data and the devices. A run that goes
    on, with the settings `saved`, keeps its batch size, because its devices may be others now."""
    config.model.classes = config.model.classes or len(records.class_names)
    if not config.train.batch_size and saved:
        config.train.batch_size = saved.train.batch_size
    elif not config.train.batch_size:
        train, _ = sources.training_images(records.train, config.data)
        unit, _ = divisor(devices.make_mesh(config.train), routed.slots, config.train.accumulate)
        config.train.batch_size = fitting(len(train), unit)
        console.print(f"batch       {config.train.batch_size} of {len(train):,} training images, by train.batch_size=0")


def build(config: Config, chosen: tuple[Routing, Optimizer], records: Dataset[Records] | None = None) -> Run:
    """Returns the run of a checked config on the devices that there are. All processes call it.

    `chosen` is what `choose` returned, and `records` the set if the caller has browsed it, because a listing of a large
    folder takes minutes. Raises UserError for devices or data that do not fit the settings.
    """
    mesh = processes.together(lambda: devices.make_mesh(config.train))
    records = records or browse(config)
    facts = processes.together(records.facts)
    if not processes.is_single():  # on other data one would mislabel its part of each batch, or wait for ever
        processes.agree(facts, "give all the same data")
    hashes = {name: str(value) for name, value in facts.items() if name.startswith("hash of ")}

    def read() -> Run:
        dataset: Dataset[Any] = records
        if not config.data.stream:
            dataset = sources.read(records)
        train, validation = sources.training_images(dataset.train, config.data)
        plan = make_plan(config, chosen, mesh, len(train))
        if config.train.class_weights == "balanced":
            plan = dataclasses.replace(plan, weight_C=balanced(train.labels_N, plan.model.config.classes))
        check_memory(plan, dataset)
        return Run(plan, RunData(train, validation, dataset.test, dataset.class_names, hashes), config)

    return processes.together(read)


def balanced(labels_N: np.ndarray | None, classes: int) -> np.ndarray:
    """Returns weights [C] that give each class that has images the same sum, with a mean of 1 over the images. Raises
    ConfigError where only reading an image gives its label."""
    if labels_N is None:
        raise ConfigError(
            "config.train.class_weights is 'balanced'; it needs labels, which this set has in its "
            "pictures only: set --config.data.stream=false"
        )
    count_C = np.bincount(labels_N, minlength=classes)
    return (len(labels_N) / (count_C > 0).sum() / np.maximum(count_C, 1)).astype(np.float32)


def plan_for(config: Config, mesh: Mesh, count: int) -> Plan:
    """Returns the plan of a run on `count` training images, from shapes only. Raises ConfigError."""
    return make_plan(config, choose(config), mesh, count)


def make_plan(config: Config, chosen: tuple[Routing, Optimizer], mesh: Mesh, count: int) -> Plan:
    """Returns the plan. Raises ConfigError for a batch that `count` images or the devices do not allow."""
    (routed, optimizer), data, train = chosen, config.data, config.train
    root = jax.random.key(train.seed)

    def slot_of_expert(step: jax.Array) -> jax.Array:
        return routed.slot_of_expert(routed.draw(root, step))

    order = TrainOrder(count, train.batch_size, train.seed, mesh, routed.slots, train.accumulate, slot_of_expert)
    plan = Plan(routed, optimizer, routed.model(mesh), mesh, order, data, train)
    if plan.total > LARGEST:
        raise ConfigError(
            f"config.train.epochs is {train.epochs}; it must make at most {LARGEST:,} steps, "
            f"and an epoch has {plan.steps_per_epoch}"
        )
    return plan


def check_memory(plan: Plan, dataset: Dataset[Any]) -> None:
    """Raises ConfigError if the state, or the state and the images that stay on each device, exceed its memory."""
    everything = cost.tree_size(plan.routing.shapes())
    leaves = jax.tree.leaves(abstract_state(plan))
    needed = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    statistics = plan.mesh.local_devices[0].memory_stats() or {}  # None on a CPU
    available = statistics.get("bytes_limit") or memory.installed()
    if needed > available:
        raise ConfigError(
            f"config.model has {everything:,} parameters; the state of training needs {needed / 2**30:,.1f} GiB of "
            f"a device that has {available / 2**30:,.1f} GiB; lower model.width, model.hidden or routing.experts"
        )
    images = 0 if plan.data.stream else dataset.train.images_NHWc.nbytes + dataset.test.images_NHWc.nbytes
    if needed + images > available:
        raise ConfigError(
            f"the images need {images / 2**30:,.1f} GiB beside the {needed / 2**30:,.1f} GiB of training's state, of a "
            f"device that has {available / 2**30:,.1f} GiB; set --config.data.stream=true"
        )
