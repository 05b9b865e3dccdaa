"""Trains one experiment: `python -m jvitmoe.train --config configs/digits_random.py [--workdir runs/x]`.

Run again with the same folder it goes on from the newest sound checkpoint, to the same bits as a run that was never
interrupted. SIGTERM and SIGINT finish the step, save and exit; a second signal exits at once.
"""

import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from jvitmoe import checkpoint, cli, evaluation, pretrained, routing, step, tracking
from jvitmoe import config as config_lib
from jvitmoe.checkpoint import Checkpoints
from jvitmoe.config import Config, ConfigError, UserError
from jvitmoe.data import feed, sources
from jvitmoe.evaluation import Result
from jvitmoe.models import vit
from jvitmoe.routing import Purpose
from jvitmoe.state import TrainState
from jvitmoe.step import Metrics
from jvitmoe.tracking import Tracker, console


class TrainingError(UserError):
    """The run cannot go on; the message names the step, the value and the last good checkpoint."""


class Stop:
    """Whether a signal has asked the run to end. The first one asks; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


def main(argv: list[str]) -> None:
    """Trains to the end, tests, and leaves result.json and report.md in the run folder."""
    values = cli.parse(argv, _define_flags, config=True)
    config = cli.experiment(values)
    workdir = Path(values.workdir or Path("runs") / Path(cli.config_path(argv)).stem)
    claim(workdir, config)
    train(config, workdir, Stop())


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder; by default runs/<name of the config file>.", flag_values=values)


def claim(workdir: Path, config: Config) -> None:
    """Raises ConfigError where the folder holds another experiment, or things that are no run. Writes nothing."""
    saved = workdir / "config.json"
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise ConfigError(f"workdir {str(workdir)!r} is a file; it must be a folder; set --workdir")
    if not saved.exists():
        if any(workdir.iterdir()):
            raise ConfigError(f"workdir {str(workdir)!r} holds other things than a run; set --workdir to a new folder")
        return
    changed = config_lib.differences(config_lib.loads(saved.read_text(), str(saved)), config)
    if changed:
        listed = ", ".join(f"{name} was {old!r} and is {new!r} now" for name, (old, new) in changed.items())
        raise ConfigError(f"workdir {str(workdir)!r} holds another experiment: {listed}; set --workdir to a new folder")


def has_checkpoints(workdir: Path) -> bool:
    """Returns whether the folder holds a checkpoint, sound or not."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def train(config: Config, workdir: Path, stop: Stop) -> None:
    """Trains from the newest sound checkpoint or from scratch to the end, and tests. Raises UserError."""
    began = time.monotonic()
    mesh = step.make_mesh(config.train)
    hardware = step.describe(mesh)
    dataset = sources.load(config.data, config.model)
    train_split, validation = sources.hold_out(dataset.train, config.data.validation)
    order_key = routing.address(jax.random.key(config.train.seed), Purpose.ORDER)
    order = feed.TrainOrder(len(train_split), config.train.batch_size, order_key, mesh, config.slots)
    total = config.train.epochs * order.steps_per_epoch
    model = step.make_model(config, mesh.devices.flat[0].platform)
    starts = config.init.source and not has_checkpoints(workdir)  # a checkpoint holds all that the source gave
    dense, told = pretrained.start(config, mesh) if starts else (None, [])
    active, everything = evaluation.count_parameters(config)

    workdir.mkdir(parents=True, exist_ok=True)
    tracking.write_text(workdir / "config.json", config_lib.dumps(config))
    tracking.write_classes(workdir, dataset.class_names)
    console.print(f"run         {workdir}")
    console.print(f"devices     {hardware}")
    console.print(f"parameters  {active:,} active, {everything:,} total ({model.dtype.name} compute)")
    if (trained := evaluation.count_trained(config)) < everything:
        console.print(f"trained     {trained:,} of {everything:,} parameters")
    for line in told:
        console.print(f"source      {line}")
    console.print(f"images      {len(train_split):,} train, {len(validation):,} validation, {len(dataset.test):,} test")
    console.print(f"steps       {total:,} ({config.train.epochs} epochs of {order.steps_per_epoch})")

    images = feed.put(train_split, mesh)
    # Watching the test split chooses nothing: without a validation split the last checkpoint is the result.
    watched = "validation" if len(validation) else "test"
    evaluate = evaluation.make_evaluate(model, mesh)
    test_images = feed.put(dataset.test, mesh)
    test_batches = feed.eval_batches(len(dataset.test), config.train.batch_size, mesh)
    watch_images = feed.put(validation, mesh) if len(validation) else test_images
    watch_batches = feed.eval_batches(len(validation) or len(dataset.test), config.train.batch_size, mesh)

    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep, best=len(validation) > 0)
    state = _resume(checkpoints, config, model, mesh, dense)
    start = int(state.step)
    if start:
        console.print(f"resuming    from step {start:,}")
    run = _Run(config, checkpoints, stop, mesh, order)

    def watch(state: TrainState) -> Result:
        return evaluation.evaluate_main(config, state.params, evaluate, watch_images, watch_batches)

    with Tracker(workdir, start, total, config.train.batch_size) as tracker:
        try:
            state = run.loop(
                state, images, step.make_train_step(config, model, mesh, order.steps_per_epoch), tracker, watch, watched
            )
        finally:
            checkpoints.close()
        rate = tracker.images_per_second(total)
    rows = evaluation.evaluate_run(config, state.params, state.ema, evaluate, test_images, test_batches)
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
            "images_per_second": rate or tracking.read_result(workdir).get("images_per_second"),
            "seconds": time.monotonic() - began,
            "hardware": hardware,
            "versions": checkpoint.versions(),
        },
    )


def _resume(checkpoints: Checkpoints, config: Config, model: vit.ViT, mesh: Mesh, dense: Any) -> TrainState:
    abstract = step.abstract_state(config, model, mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        found = checkpoints.restore(abstract)
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            console.print(f"warning: {warning.message}")
    return found[0] if found else step.make_state(config, model, mesh, dense)


class _Run:
    """The loop and what it needs between steps."""

    def __init__(
        self, config: Config, checkpoints: Checkpoints, stop: Stop, mesh: Mesh, order: feed.TrainOrder
    ) -> None:
        self._config, self._checkpoints, self._stop, self._mesh, self._order = config, checkpoints, stop, mesh, order
        self._unread: list[tuple[int, Metrics]] = []  # still on the device
        self._saved: int | None = None

    def loop(
        self,
        state: TrainState,
        images: feed.Images,
        train_step: step.TrainStep,
        tracker: Tracker,
        watch: Callable[[TrainState], Result],
        watched: str,
    ) -> TrainState:
        """Returns the state after the last step. Exits with 128 + signal when asked to stop, the state saved."""
        train, steps_per_epoch = self._config.train, self._order.steps_per_epoch
        total, start = train.epochs * steps_per_epoch, int(state.step)
        self._saved = start or None
        for done in range(start + 1, total + 1):  # updates done once this step has ended
            epoch, place = divmod(done - 1, steps_per_epoch)
            if place == 0 or done == start + 1:
                index_SB = self._order.epoch(epoch)
            state, metrics = train_step(state, images, index_SB)
            step.settle(self._mesh, metrics)
            if (done - 1) % train.log_every == 0 and self._unread:
                self._read(tracker)  # the steps before: this one is running meanwhile
            self._unread.append((done, metrics))
            if done == start + 1:
                jax.block_until_ready(metrics)
                tracker.started(done)
            evaluates = done == total or done % (train.eval_every * steps_per_epoch) == 0
            saves = evaluates or (train.checkpoint_every and done % train.checkpoint_every == 0)
            if saves or self._stop.signal is not None:
                self._read(tracker)
                paused = time.monotonic()
                result = watch(state) if evaluates else None
                if result:
                    tracker.evaluation(done, watched, {"accuracy": result.accuracy, "nll": result.nll})
                self._checkpoints.save(state, self._config, result.nll if result and watched == "validation" else None)
                self._saved = done
                tracker.paused(time.monotonic() - paused)
            if self._stop.signal is not None and done < total:
                self._checkpoints.close()
                console.print(
                    f"stopped at step {done} by {signal.Signals(self._stop.signal).name}; the same command goes on"
                )
                sys.exit(128 + self._stop.signal)
        return state

    def _read(self, tracker: Tracker) -> None:
        """Fetches the metrics of the steps since the last reading, checks each, and records those due."""
        steps, metrics = zip(*self._unread, strict=True)
        self._unread.clear()
        for done, values in zip(steps, jax.device_get(metrics), strict=True):
            for name in ("loss", "grad_norm"):
                value = float(getattr(values, name))
                if not math.isfinite(value):
                    self._checkpoints.close()
                    good = (
                        f"the last good checkpoint is step {self._saved}"
                        if self._saved
                        else "no checkpoint was saved yet"
                    )
                    raise TrainingError(
                        f"{name} is {value} at step {done}; it must be finite; {good}; "
                        "try a lower --config.optim.learning_rate or --config.optim.clip_norm=1 in a new --workdir"
                    )
            if done % self._config.train.log_every == 0:
                tracker.train(done, step.as_floats(values, self._config.expert_layers))


if __name__ == "__main__":
    cli.run(main)
