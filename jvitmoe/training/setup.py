"""What a run needs before its first step: the data, the model, and what the first lines say of them."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jvitmoe.config import Config
from jvitmoe.data import datasets
from jvitmoe.data.batches import TrainOrder
from jvitmoe.data.splits import Dataset, Records
from jvitmoe.errors import ConfigError
from jvitmoe.experts import cost
from jvitmoe.routing import Routing
from jvitmoe.runs.checkpoints import Meta, versions
from jvitmoe.runs.console import console
from jvitmoe.runs.files import METRICS, checksums
from jvitmoe.runtime import devices, memory, processes
from jvitmoe.runtime.addresses import Purpose, address
from jvitmoe.settings import LARGEST
from jvitmoe.training import optimizer
from jvitmoe.training.state import StepPlan, abstract_state


class RunData(NamedTuple):
    """The splits of a run. All of them are `Records` if `data.stream` is set, otherwise `Split`."""

    train: Any
    validation: Any
    test: Any
    classes: tuple[str, ...]
    order: TrainOrder
    hashes: dict[str, str]  # of the data (`Dataset.facts`)

    @property
    def counts(self) -> dict[str, int]:
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def browse(config: Config) -> Dataset[Records]:
    """Returns the set of a run, whose pictures are not read yet. The first process may download it for all."""
    console.print(f"reading     {config.data.name} {config.data.dir}".rstrip())
    return processes.first_process_then_others(lambda: datasets.browse(config.data, config.model))


def load_data(config: Config, routing: Routing, mesh: Mesh, records: Dataset[Records]) -> RunData:
    """Returns the splits and the order of the training images. Raises ConfigError for settings that do not fit them."""
    facts = processes.together(records.facts)
    if not processes.is_single():  # on other data one would mislabel its part of each batch, or wait for ever
        processes.agree(facts, "give all the same data")
    hashes = {name: str(value) for name, value in facts.items() if name.startswith("hash of ")}

    def split() -> RunData:
        dataset: Dataset[Any] = records
        if not config.data.stream:
            dataset = datasets.read(records, config.data, config.model)
        train_split, validation = datasets.hold_out(dataset.train, config.data.validation)
        key = address(jax.random.key(config.train.seed), Purpose.ORDER)
        order = TrainOrder(len(train_split), config.train.batch_size, key, mesh, routing.slots, config.train.accumulate)
        if config.train.epochs * order.steps_per_epoch > LARGEST:
            raise ConfigError(
                f"config.train.epochs is {config.train.epochs}; it must make at most {LARGEST:,} steps, "
                f"and an epoch has {order.steps_per_epoch}"
            )
        check_memory(config, routing, mesh, dataset)
        return RunData(train_split, validation, dataset.test, dataset.class_names, order, hashes)

    return processes.together(split)


def print_setup(plan: StepPlan, workdir: Path, data: RunData, init_notes: list[str]) -> None:
    """Prints the first lines of a run. `init_notes` says what was loaded from `init.source`."""
    config, params = plan.config, plan.routing.shapes()
    active, everything = plan.routing.count_parameters()
    console.print(f"run         {workdir}")
    console.print(f"devices     {devices.describe(plan.mesh)}")
    console.print(f"parameters  {active:,} active, {everything:,} total ({plan.model.dtype.name} compute)")
    if (trained := optimizer.count_trained(config, params)) < everything:
        console.print(f"trained     {trained:,} of {everything:,} parameters")
    if config.routing.experts > 1:
        console.print(f"routing     {describe(plan.routing)}")
    console.print("optimizer   " + f"\n{'':12}".join(optimizer.groups(config, params)))
    for note in init_notes:
        console.print(f"source      {note}")
    console.print(f"images      {', '.join(f'{count:,} {name}' for name, count in data.counts.items())}")
    console.print(f"steps       {plan.total:,} ({config.train.epochs} epochs of {plan.steps_per_epoch})")
    if config.optim.warmup_epochs > config.train.epochs / 2:
        warmup, asked = optimizer.warmup_steps(config, plan.steps_per_epoch), config.optim.warmup_epochs
        console.print(f"warm-up     {warmup:,} steps: at most half of all; config.optim.warmup_epochs is {asked:g}")


def describe(routing: Routing) -> str:
    """Returns what the first lines of a run with experts say of its routing."""
    routed = routing.config.routing
    every = f" every {routed.pull_every} steps" if routed.pull_every > 1 else ""
    if routed.averages_every_step:
        pull = "averaged after every step, so all are equal"
    elif routed.pull:
        pull = f"pulled together by {routed.pull:g}{every}"
    else:
        pull = "never pulled together"
    what = "whole models" if routing.has_whole_models else "experts per MLP"
    return f"{routed.experts} {what}: {routing.meaning}; {pull}"


def print_resumed(workdir: Path, start: int, meta: Meta) -> None:
    """Prints the step that the run resumes from, notes on other versions, and a warning if metrics.jsonl has lost lines
    since its save."""
    console.print(f"resuming    from step {start:,}")
    installed, then = versions(), meta.get("versions", {})
    if changed := [f"{n} {then[n]} (now {installed.get(n)})" for n in then if then[n] != installed.get(n)]:
        console.print(f"note: this checkpoint was saved by {', '.join(changed)}")
    if processes.is_first():
        now = checksums(workdir, start).get(METRICS)
        if not now or now != meta.get("files", {}).get(METRICS, now):
            console.print(f"warning: {METRICS} does not hold all that was recorded up to step {start}")


def check_memory(config: Config, routing: Routing, mesh: Mesh, dataset: Dataset[Any]) -> None:
    """Raises ConfigError if the state, or the state and the images that stay on each device, exceed its memory."""
    everything = cost.tree_size(routing.shapes())
    leaves = jax.tree.leaves(abstract_state(config, routing, mesh))
    needed = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    statistics = mesh.local_devices[0].memory_stats() or {}  # None on a CPU
    available = statistics.get("bytes_limit") or memory.installed()
    if needed > available:
        raise ConfigError(
            f"config.model has {everything:,} parameters; the state of training needs {needed / 2**30:,.1f} GiB of "
            f"a device that has {available / 2**30:,.1f} GiB; lower model.width, model.hidden or routing.experts"
        )
    images = 0 if config.data.stream else dataset.train.images_NHWc.nbytes + dataset.test.images_NHWc.nbytes
    if needed + images > available:
        raise ConfigError(
            f"the images need {images / 2**30:,.1f} GiB beside the {needed / 2**30:,.1f} GiB of training's state, of a "
            f"device that has {available / 2**30:,.1f} GiB; set --config.data.stream=true"
        )
