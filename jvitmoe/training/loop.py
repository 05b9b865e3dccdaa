"""The training loop: from a run folder to the end of training, and its tests."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jvitmoe.config import Config
from jvitmoe.data import datasets, stream
from jvitmoe.data.batches import Batches, Images, TrainOrder, eval_batches, put, resident_batches
from jvitmoe.data.splits import Dataset, Records, Split
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.evaluation import models
from jvitmoe.evaluation.metrics import Result, Shown, make_evaluate
from jvitmoe.experts import build, cost, routes
from jvitmoe.experts.routes import Purpose
from jvitmoe.interop import load
from jvitmoe.models import vit
from jvitmoe.runs import history, results
from jvitmoe.runs.checkpoint_writer import CheckpointWriter
from jvitmoe.runs.checkpoints import list_steps, versions
from jvitmoe.runs.console import console, warnings_as_lines
from jvitmoe.runs.files import METRICS, RESULT
from jvitmoe.runs.folder import check_shared, open_run_folder
from jvitmoe.runs.metrics_log import Tracker
from jvitmoe.runtime import devices, processes
from jvitmoe.runtime.signals import Stop
from jvitmoe.runtime.watchdog import Watchdog
from jvitmoe.settings import LARGEST
from jvitmoe.training import step
from jvitmoe.training.optimizer import make_direction, warmup_steps
from jvitmoe.training.state import TrainState, abstract_state, make_state
from jvitmoe.training.step import Metrics

SLOW_SECONDS = 0.1  # of a step
Batch = tuple[Images, jax.Array | None]  # what a step takes


class TrainingError(UserError):
    """The run cannot go on; the message names the step, the value and the last good checkpoint."""

    everywhere = known = True


def train(config: Config, workdir: Path, stop: Stop, cleanup: contextlib.ExitStack) -> None:
    """Trains from the newest sound checkpoint or from scratch to the end, and tests. Raises UserError.

    `cleanup` gets the lock of the folder and the watchdog, which must be released however the run ends.
    """
    began = time.monotonic()
    mesh = processes.together(lambda: devices.make_mesh(config.train))
    hardware = devices.describe(mesh)
    find = datasets.browse if config.data.stream else datasets.load
    dataset: Dataset[Any] = processes.one_first(lambda: find(config.data, config.model))
    order_key = routes.address(jax.random.key(config.train.seed), Purpose.ORDER)

    def arrange() -> tuple[Any, Any, TrainOrder]:
        train_split, validation = datasets.hold_out(dataset.train, config.data.validation)
        order = TrainOrder(len(train_split), config.train.batch_size, order_key, mesh, config.slots)
        if config.train.epochs * order.steps_per_epoch > LARGEST:
            raise ConfigError(
                f"config.train.epochs is {config.train.epochs}; it must make at most {LARGEST:,} steps, "
                f"and an epoch has {order.steps_per_epoch}"
            )
        _check_memory(config, mesh)
        make_direction(config)  # for its ConfigError, before the run folder is made
        return train_split, validation, order

    train_split, validation, order = processes.together(arrange)
    total = config.train.epochs * order.steps_per_epoch
    model = build.make_model(config, mesh.devices.flat[0].platform)
    resumes = bool(list_steps(workdir / "checkpoints"))
    starts = config.init.source and not resumes  # a checkpoint holds all that the source gave
    dense, init_notes = processes.together(lambda: load.start(config)) if starts else (None, [])
    active, everything = cost.count_parameters(config)

    counts = {"train": len(train_split), "validation": len(validation), "test": len(dataset.test)}
    cleanup.enter_context(processes.together(lambda: open_run_folder(workdir, config, dataset.class_names, counts)))
    processes.together(lambda: check_shared(workdir))
    console.print(f"run         {workdir}")
    console.print(f"devices     {hardware}")
    console.print(f"parameters  {active:,} active, {everything:,} total ({model.dtype.name} compute)")
    if (trained := cost.count_trained(config)) < everything:
        console.print(f"trained     {trained:,} of {everything:,} parameters")
    for line in init_notes:
        console.print(f"source      {line}")
    console.print(f"images      {', '.join(f'{count:,} {split}' for split, count in counts.items())}")
    console.print(f"steps       {total:,} ({config.train.epochs} epochs of {order.steps_per_epoch})")
    if config.optim.warmup_epochs > config.train.epochs / 2:
        warmup, asked = warmup_steps(config, order.steps_per_epoch), config.optim.warmup_epochs
        console.print(f"warm-up     {warmup:,} steps: at most half of them; config.optim.warmup_epochs is {asked:g}")

    def show(split: Split | Records) -> tuple[Shown, Batches]:
        batches = eval_batches(len(split), config.train.batch_size, mesh)
        if isinstance(split, Split):
            return put(split, mesh), batches
        return stream.EvalImages(split, batches, config, mesh), batches

    # Watching the test split chooses nothing: without a validation split the last checkpoint is the result.
    watched = "validation" if len(validation) else "test"
    evaluate = make_evaluate(model, mesh)
    test = show(dataset.test)
    watch_on = show(validation) if len(validation) else test

    checkpoints = CheckpointWriter(workdir / "checkpoints", config.train.keep)
    state, files = _resume(checkpoints, config, model, mesh, dense)
    start = int(state.step)
    if start:
        console.print(f"resuming    from step {start:,}")
    if start and processes.first():
        found = history.checksums(workdir, start).get(METRICS)
        if not found or found != files.get(METRICS, found):
            console.print(f"warning: {METRICS} does not hold all that was recorded up to step {start}")
    watchdog = cleanup.enter_context(Watchdog(config.train.stall_minutes))
    run = _Run(config, checkpoints, stop, watchdog, mesh, order)

    if isinstance(train_split, Records):
        batches = _streamed(stream.train_batches(train_split, order, config, mesh, start, total))
    else:
        batches = resident_batches(put(train_split, mesh), order, start, total)

    def watch(state: TrainState) -> Result:
        return models.evaluate_main(config, state.params, evaluate, *watch_on)

    train_step = step.make_train_step(config, model, mesh, order.steps_per_epoch)
    with (
        contextlib.closing(batches),
        Tracker(workdir if processes.first() else None, start, total, config.train.batch_size) as tracker,
    ):
        try:
            state = run.loop(state, batches, train_step, tracker, watch, watched)
        except BaseException:
            if processes.alone():  # otherwise it would wait for the others, and they for this one's part of a step
                checkpoints.close()
            raise
        checkpoints.close()
        stop.unsaved = False
        rate = tracker.images_per_second(total)
        tracker.testing()
        rows = models.evaluate_run(config, state.params, state.ema, evaluate, *test)
    if not processes.first():
        return
    results.write_result(
        workdir,
        {
            "rows": rows,
            "data": config.data.name,
            "step": total,
            "seed": config.train.seed,
            "active_parameters": active,
            "total_parameters": everything,
            # A finished run that is started again trains nothing, and keeps the rate it had.
            "images_per_second": rate or _earlier_rate(workdir),
            "seconds": time.monotonic() - began,
            "hardware": hardware,
            "versions": versions(),
        },
    )


def _earlier_rate(workdir: Path) -> float | None:
    try:
        return results.read_result(workdir).get("images_per_second")
    except UserError:
        console.print(f"warning: {RESULT} is damaged; it is written anew, without images/s")
        return None


def _check_memory(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where a device cannot even hold its share of parameters and moments."""
    _, everything = cost.count_parameters(config)
    needed = (4 * everything + 8 * cost.count_trained(config)) // mesh.size
    statistics = mesh.local_devices[0].memory_stats() or {}  # a CPU has none
    there = statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"config.model has {everything:,} parameters; with their moments they take {needed / 2**30:,.1f} GiB of a "
            f"device that has {there / 2**30:,.1f} GiB; set a smaller model.width, model.hidden or routing.experts"
        )


def _streamed(batches: Generator[Images, None, None]) -> Generator[Batch, None, None]:
    with contextlib.closing(batches):
        for images in batches:
            yield images, None


def _resume(
    checkpoints: CheckpointWriter, config: Config, model: vit.ViT, mesh: Mesh, dense: Any
) -> tuple[TrainState, dict[str, str]]:
    """Returns the state to go on from, and the checksums that the run folder's files had there."""
    with warnings_as_lines():
        found = checkpoints.restore(abstract_state(config, model, mesh))
    return (found[0], found[1].get("files", {})) if found else (make_state(config, model, mesh, dense), {})


class _Run:
    """The loop and what it needs between steps."""

    def __init__(
        self,
        config: Config,
        checkpoints: CheckpointWriter,
        stop: Stop,
        watchdog: Watchdog,
        mesh: Mesh,
        order: TrainOrder,
    ) -> None:
        self._config, self._checkpoints, self._mesh, self._order = config, checkpoints, mesh, order
        self._stop, self._watchdog = stop, watchdog
        self._unread: list[tuple[int, Metrics]] = []  # still on the device
        self._saved: int | None = None
        self._slow = False

    def loop(
        self,
        state: TrainState,
        batches: Iterator[Batch],
        train_step: step.TrainStep,
        tracker: Tracker,
        watch: Callable[[TrainState], Result],
        watched: str,
    ) -> TrainState:
        """Returns the state after the last step. Exits with 128 + signal when asked to stop, the state saved."""
        train, steps_per_epoch = self._config.train, self._order.steps_per_epoch
        total, start = train.epochs * steps_per_epoch, int(state.step)
        self._saved = start or None
        # Updates done once this step has ended, and what it takes.
        for done, (images, index_SB) in zip(range(start + 1, total + 1), batches, strict=True):
            if done == start + 1:
                compiled = train_step.lower(state, images, index_SB).compile()  # by itself, to time the first step
                began = time.monotonic()
            state, metrics = compiled(state, images, index_SB)
            devices.settle(self._mesh, metrics)
            if self._slow:  # with more than one step queued, progress and a stop would have to wait for all of them
                jax.block_until_ready(self._unread)
            if (done - 1) % train.log_every == 0 or tracker.is_due():
                self._read(tracker)  # the steps before: this one is running meanwhile
            self._unread.append((done, metrics))
            if done == start + 1:
                jax.block_until_ready(metrics)
                tracker.started(done, time.monotonic() - began)
                self._stop.unsaved = True  # before the step is shown: a signal may come at once
                self._read(tracker)
            self._watchdog.progress(f"step {done}")
            stop = self._stop.asked(done)
            evaluates = done == total or done % (train.eval_every * steps_per_epoch) == 0
            saves = evaluates or (train.checkpoint_every and done % train.checkpoint_every == 0)
            if saves or stop:
                self._read(tracker)
                paused = time.monotonic()
                result = watch(state) if evaluates else None
                if result:
                    tracker.evaluation(done, watched, {"accuracy": result.accuracy, "nll": result.nll})
                self._watchdog.progress(f"the evaluation at step {done}")
                nll = result.nll if result and watched == "validation" else None
                self._checkpoints.save(state, self._config, nll, tracker.sync())
                self._saved = done
                tracker.paused(time.monotonic() - paused)
            if stop and done < total:
                self._checkpoints.close()
                console.print(f"stopped at step {done} by {signal.Signals(stop).name}; the same command goes on")
                sys.exit(128 + stop)
        return state

    def _read(self, tracker: Tracker) -> None:
        """Fetches the metrics of the steps since the last reading, checks each, and records those due."""
        if not self._unread:
            return
        steps, metrics = zip(*self._unread, strict=True)
        self._unread.clear()
        for done, values in zip(steps, jax.device_get(metrics), strict=True):
            self._check_finite(done, values)
            logs = done % self._config.train.log_every == 0
            if logs or (done == steps[-1] and tracker.is_due()):
                numbers = step.as_floats(values, self._config.expert_layers)
                tracker.train(done, numbers) if logs else tracker.show(done, numbers)
        self._slow = tracker.step_seconds(steps[-1]) > SLOW_SECONDS

    def _check_finite(self, done: int, values: Metrics) -> None:
        """Says so where a step was skipped; raises TrainingError where one may not be, with the last sound
        checkpoint."""
        sick = [(name, float(getattr(values, name))) for name in ("loss", "grad_norm")]
        sick = [(name, value) for name, value in sick if not math.isfinite(value)]
        if not sick:
            return
        (name, value), limit = sick[0], self._config.optim.skip_nonfinite
        in_a_row = int(values.skipped.in_a_row) if values.skipped else 1
        if in_a_row <= limit:
            console.print(f"warning: step {done} skipped: {name} is {value}")
            return
        self._checkpoints.close()  # reads the last one back, so that what is named is sound
        good = f"the last good checkpoint is step {self._saved}" if self._saved else "no checkpoint was saved yet"
        rule = f"it must be finite, but for {limit} steps in a row" if limit else "it must be finite"
        raise TrainingError(
            f"{name} is {value} at step {done}; {rule}; {good}; "
            "try a lower --config.optim.learning_rate or --config.optim.clip_norm=1 in a new --workdir"
        )
