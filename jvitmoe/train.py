"""Trains one experiment: `python -m jvitmoe.train --config configs/digits_random.py [--workdir runs/x]`.

Run again with the same folder it goes on from the newest sound checkpoint, to the same bits as a run that was never
interrupted. SIGTERM and SIGINT finish the step, save and exit; a second signal exits at once.

Several processes, joined by --distributed or --coordinator, are one run: the first prints and writes, any one that is
asked to stop stops all after the same step, and one that fails ends all.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from jvitmoe import checkpoint, cli, compilation, distributed, evaluation, lock, pretrained, routing, step, tracking
from jvitmoe import config as config_lib
from jvitmoe.checkpoint import Checkpoints
from jvitmoe.config import Config, ConfigError, UserError
from jvitmoe.data import feed, sources, stream
from jvitmoe.data.sources import Dataset, Records, Split
from jvitmoe.evaluation import Result
from jvitmoe.models import vit
from jvitmoe.optim import warmup_steps
from jvitmoe.routing import Purpose
from jvitmoe.state import TrainState
from jvitmoe.step import Metrics
from jvitmoe.stop import Stop
from jvitmoe.tracking import Tracker, console
from jvitmoe.watchdog import Watchdog

SHARED_SECONDS = 8.0
SLOW_SECONDS = 0.1  # of a step

Batch = tuple[feed.Images, jax.Array | None]  # what a step takes


class TrainingError(UserError):
    """The run cannot go on; the message names the step, the value and the last good checkpoint."""

    everywhere = known = True


def main(argv: list[str]) -> None:
    """Trains to the end, tests, and leaves result.json and report.md in the run folder."""
    values = cli.parse(argv, _define_flags, config=True)
    compilation.use_cache()
    distributed.join(values, checkpoint.versions)
    tracking.console.quiet = not distributed.first()
    workdir = Path(values.workdir or Path("runs") / Path(cli.config_path(argv)).stem)

    def prepare() -> Config:
        config = cli.experiment(values)
        claim(workdir, config)
        return config

    with contextlib.ExitStack() as held:
        stop = held.enter_context(Stop())
        config = distributed.together(prepare, f"{workdir} {values.config}")
        try:
            train(config, workdir, stop, held)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"the memory of a device is too small ({str(error).splitlines()[0][:200]}); "
                "set a smaller --config.train.batch_size or a larger --config.train.accumulate"
            ) from error


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder; by default runs/<name of the config file>.", flag_values=values)
    distributed.define_flags(values)


def claim(workdir: Path, config: Config) -> None:
    """Raises ConfigError where the folder holds another experiment, or things that are no run. Writes nothing."""
    saved = workdir / "config.json"
    try:
        if not workdir.exists():
            return
        if not workdir.is_dir():
            raise ConfigError(f"workdir {str(workdir)!r} is a file; it must be a folder; set --workdir")
        tracking.own(workdir)
        if not saved.is_file():
            # A run that was killed at its very start has left these.
            if any(path.name not in (lock.NAME, saved.name + tracking.PART) for path in workdir.iterdir()):
                raise ConfigError(
                    f"workdir {str(workdir)!r} holds other things than a run; set --workdir to a new folder"
                )
            return
        text = saved.read_text()
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, in the file or the name
        raise ConfigError(f"workdir {str(workdir)!r} cannot be read: {error}; set --workdir to another") from error
    changed = config_lib.differences(config_lib.loads(text, str(saved)), config)
    if changed:
        listed = ", ".join(f"{name} was {old!r} and is {new!r} now" for name, (old, new) in changed.items())
        raise ConfigError(f"workdir {str(workdir)!r} holds another experiment: {listed}; set --workdir to a new folder")


def train(config: Config, workdir: Path, stop: Stop, held: contextlib.ExitStack) -> None:
    """Trains from the newest sound checkpoint or from scratch to the end, and tests. Raises UserError.

    `held` takes what must be let go of when the run has ended, however it ends: the lock of the folder, the watchdog.
    """
    began = time.monotonic()
    mesh = distributed.together(lambda: step.make_mesh(config.train))
    hardware = step.describe(mesh)
    find = sources.browse if config.data.stream else sources.load
    dataset: Dataset[Any] = distributed.one_first(lambda: find(config.data, config.model))
    order_key = routing.address(jax.random.key(config.train.seed), Purpose.ORDER)

    def arrange() -> tuple[Any, Any, feed.TrainOrder]:
        train_split, validation = sources.hold_out(dataset.train, config.data.validation)
        order = feed.TrainOrder(len(train_split), config.train.batch_size, order_key, mesh, config.slots)
        if config.train.epochs * order.steps_per_epoch > config_lib.LARGEST:
            raise ConfigError(
                f"config.train.epochs is {config.train.epochs}; it must make at most {config_lib.LARGEST:,} steps, "
                f"and an epoch has {order.steps_per_epoch}"
            )
        _check_memory(config, mesh)
        return train_split, validation, order

    train_split, validation, order = distributed.together(arrange)
    total = config.train.epochs * order.steps_per_epoch
    model = step.make_model(config, mesh.devices.flat[0].platform)
    resumes = bool(checkpoint.list_steps(workdir / "checkpoints"))
    starts = config.init.source and not resumes  # a checkpoint holds all that the source gave
    dense, told = distributed.together(lambda: pretrained.start(config)) if starts else (None, [])
    active, everything = evaluation.count_parameters(config)

    counts = {"train": len(train_split), "validation": len(validation), "test": len(dataset.test)}
    held.enter_context(distributed.together(lambda: _occupy(workdir, config, dataset.class_names, counts)))
    distributed.together(lambda: _check_shared(workdir))
    console.print(f"run         {workdir}")
    console.print(f"devices     {hardware}")
    console.print(f"parameters  {active:,} active, {everything:,} total ({model.dtype.name} compute)")
    if (trained := evaluation.count_trained(config)) < everything:
        console.print(f"trained     {trained:,} of {everything:,} parameters")
    for line in told:
        console.print(f"source      {line}")
    console.print(f"images      {', '.join(f'{count:,} {split}' for split, count in counts.items())}")
    console.print(f"steps       {total:,} ({config.train.epochs} epochs of {order.steps_per_epoch})")
    if config.optim.warmup_epochs > config.train.epochs / 2:
        warmup, asked = warmup_steps(config, order.steps_per_epoch), config.optim.warmup_epochs
        console.print(f"warm-up     {warmup:,} steps: at most half of them; config.optim.warmup_epochs is {asked:g}")

    def show(split: Split | Records) -> tuple[evaluation.Shown, feed.Batches]:
        batches = feed.eval_batches(len(split), config.train.batch_size, mesh)
        if isinstance(split, Split):
            return feed.put(split, mesh), batches
        return stream.EvalImages(split, batches, config, mesh), batches

    # Watching the test split chooses nothing: without a validation split the last checkpoint is the result.
    watched = "validation" if len(validation) else "test"
    evaluate = evaluation.make_evaluate(model, mesh)
    test = show(dataset.test)
    watch_on = show(validation) if len(validation) else test

    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep)
    state, files = _resume(checkpoints, config, model, mesh, dense)
    start = int(state.step)
    if start:
        console.print(f"resuming    from step {start:,}")
    if start and distributed.first():
        found = tracking.checksums(workdir, start).get(tracking.METRICS)
        if not found or found != files.get(tracking.METRICS, found):
            console.print(f"warning: {tracking.METRICS} does not hold all that was recorded up to step {start}")
    watchdog = held.enter_context(Watchdog(config.train.stall_minutes))
    run = _Run(config, checkpoints, stop, watchdog, mesh, order)

    if isinstance(train_split, Records):
        batches = _streamed(stream.train_batches(train_split, order, config, mesh, start, total))
    else:
        batches = feed.resident_batches(feed.put(train_split, mesh), order, start, total)

    def watch(state: TrainState) -> Result:
        return evaluation.evaluate_main(config, state.params, evaluate, *watch_on)

    train_step = step.make_train_step(config, model, mesh, order.steps_per_epoch)
    with (
        contextlib.closing(batches),
        Tracker(workdir if distributed.first() else None, start, total, config.train.batch_size) as tracker,
    ):
        try:
            state = run.loop(state, batches, train_step, tracker, watch, watched)
        except BaseException:
            if distributed.alone():  # otherwise it would wait for the others, and they for this one's part of a step
                checkpoints.close()
            raise
        checkpoints.close()
        stop.unsaved = False
        rate = tracker.images_per_second(total)
        tracker.testing()
        rows = evaluation.evaluate_run(config, state.params, state.ema, evaluate, *test)
    if not distributed.first():
        return
    tracking.write_result(
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
            "versions": checkpoint.versions(),
        },
    )


def _earlier_rate(workdir: Path) -> float | None:
    try:
        return tracking.read_result(workdir).get("images_per_second")
    except UserError:
        console.print(f"warning: {tracking.RESULT} is damaged; it is written anew, without images/s")
        return None


def _check_memory(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where a device cannot even hold its share of parameters and moments."""
    _, everything = evaluation.count_parameters(config)
    needed = (4 * everything + 8 * evaluation.count_trained(config)) // mesh.size
    statistics = mesh.local_devices[0].memory_stats() or {}  # a CPU has none
    there = statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"config.model has {everything:,} parameters; with their moments they take {needed / 2**30:,.1f} GiB of a "
            f"device that has {there / 2**30:,.1f} GiB; set a smaller model.width, model.hidden or routing.experts"
        )


def _occupy(
    workdir: Path, config: Config, class_names: Sequence[str], counts: Mapping[str, int]
) -> contextlib.AbstractContextManager[object]:
    """Makes the run folder, locks it and writes its config and what its data are, by process 0; returns the lock.

    Raises UserError where that cannot be, and ConfigError where another experiment has moved in since `claim`, or the
    data are no longer those that the folder's checkpoints were trained on.
    """
    if not distributed.first():
        return contextlib.nullcontext()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be made: {error.strerror}; set --workdir") from error
    held = lock.Lock(workdir)
    try:
        claim(workdir, config)
        if checkpoint.list_steps(workdir / "checkpoints"):
            _check_data(workdir, class_names, counts)
        tracking.write_text(workdir / "config.json", config_lib.dumps(config))
        tracking.write_classes(workdir, class_names)
        tracking.write_images(workdir, counts)
    except UserError:
        with held:
            raise
    return held


def _check_data(workdir: Path, class_names: Sequence[str], counts: Mapping[str, int]) -> None:
    """Raises ConfigError where the data have other images or classes than when the run in the folder started: it would
    go on in another order. `data.dir` may change on resuming, so this is all that tells."""
    were, names = tracking.read_images(workdir) or counts, tracking.read_classes(workdir)
    changed = [
        f"{were.get(name, 0):,} {name} images, {count:,} now"
        for name, count in counts.items()
        if were.get(name) != count
    ]
    if names and names != tuple(class_names):
        changed.append("other classes")
    if changed:
        raise ConfigError(
            f"workdir {str(workdir)!r} holds a run on other data: {'; '.join(changed)}; "
            "set --config.data.dir to what it was, or --workdir to a new folder"
        )


def _check_shared(workdir: Path) -> None:
    """Raises UserError where a process cannot see the run folder that process 0 made."""
    saved = workdir / "config.json"
    deadline = time.monotonic() + SHARED_SECONDS  # a shared disk may take a moment to show a new file
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if not saved.exists():
        raise UserError(f"workdir {str(workdir)!r} is not on a disk that all processes see; set --workdir to one")


def _streamed(batches: Generator[feed.Images, None, None]) -> Generator[Batch, None, None]:
    with contextlib.closing(batches):
        for images in batches:
            yield images, None


def _resume(
    checkpoints: Checkpoints, config: Config, model: vit.ViT, mesh: Mesh, dense: Any
) -> tuple[TrainState, dict[str, str]]:
    """Returns the state to go on from, and the checksums that the run folder's files had there."""
    with tracking.warnings_as_lines():
        found = checkpoints.restore(step.abstract_state(config, model, mesh))
    return (found[0], found[1].get("files", {})) if found else (step.make_state(config, model, mesh, dense), {})


class _Run:
    """The loop and what it needs between steps."""

    def __init__(
        self,
        config: Config,
        checkpoints: Checkpoints,
        stop: Stop,
        watchdog: Watchdog,
        mesh: Mesh,
        order: feed.TrainOrder,
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
            step.settle(self._mesh, metrics)
            if self._slow:  # with more than one step queued, progress and a stop would have to wait for all of them
                jax.block_until_ready(self._unread)
            if (done - 1) % train.log_every == 0 or tracker.is_due():
                self._read(tracker)  # the steps before: this one is running meanwhile
            self._unread.append((done, metrics))
            if done == start + 1:
                jax.block_until_ready(metrics)
                tracker.started(done, time.monotonic() - began)
                self._read(tracker)
                self._stop.unsaved = True
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


if __name__ == "__main__":
    cli.run(lambda argv: distributed.guard(lambda: main(argv)))
