"""One run: restore or make the state, train, evaluate, save, and test."""

import contextlib
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from jvitmoe.config import Config, flatten
from jvitmoe.data import stream
from jvitmoe.data.batches import Batch
from jvitmoe.errors import UserError
from jvitmoe.evaluation import evaluator
from jvitmoe.evaluation.evaluator import Result, make_evaluate
from jvitmoe.interop import pretrained
from jvitmoe.machine import devices, processes
from jvitmoe.machine.signals import Stop
from jvitmoe.machine.watchdog import Watchdog
from jvitmoe.reports import results
from jvitmoe.runs import safe_io
from jvitmoe.runs.checkpoint_writer import CheckpointWriter
from jvitmoe.runs.checkpoints import Meta, list_steps
from jvitmoe.runs.console import console, progress, warnings_as_lines
from jvitmoe.runs.folder import check_shared, open_run_folder
from jvitmoe.runs.metrics_log import MetricsLog
from jvitmoe.training import setup, step, update
from jvitmoe.training.build import Run, RunData
from jvitmoe.training.state import Plan, TrainState, abstract_state, make_state
from jvitmoe.training.step import Metrics

STALL_MINUTES = 30.0  # without progress until the run ends: longer than any program takes to compile
KEEP = 2  # newest checkpoints kept, besides the best on validation images
SLOW_SECONDS = 0.1  # a step that takes longer is waited for, so that at most one is queued


class TrainingError(UserError):
    """A loss or gradient norm is not finite. The message names the step, the value and the last good checkpoint."""


def fit(
    run: Run,
    workdir: Path,
    stop: Stop,
    cleanup: contextlib.ExitStack,
    trackers: Sequence[str] = (),
    experiment: bytes = b"",
) -> None:
    """Trains from the newest sound checkpoint, or from the initial state, to the last step, and then tests. The run
    folder keeps the text of an experiment file.

    The lock of the run folder and the watchdog are entered into `cleanup`, which the caller closes. Raises UserError.
    """
    plan, data, config = run
    dense, init_notes = _source(config, workdir)
    images = data.counts | data.hashes
    cleanup.enter_context(
        processes.together(lambda: open_run_folder(workdir, config, data.classes, images, experiment))
    )
    processes.together(lambda: check_shared(workdir))
    setup.print_setup(run, workdir, init_notes)

    watchdog = Watchdog(STALL_MINUTES)
    evaluation = _Evaluation(plan, data, watchdog)
    damaged = stream.Damaged(len(data.train), _say_skipped)
    if plan.data.stream and _is_new(workdir):
        _look_at_pictures(data.train, damaged, evaluation)
    checkpoints = CheckpointWriter(workdir / safe_io.CHECKPOINTS, KEEP)
    state, meta = _initial_or_restored(checkpoints, plan, dense)
    start, total = int(state.step), plan.total
    if start:
        setup.print_resumed(workdir, start, meta, plan.train.epochs)
    if start == total and _was_tested(workdir, total):
        checkpoints.close()
        return
    cleanup.enter_context(watchdog)
    log_folder = workdir if processes.is_first() else None
    with (
        contextlib.closing(stream.train_batches(data.train, plan.order, start, total, damaged)) as batches,
        MetricsLog(log_folder, start, total, plan.train.batch_size, trackers, flatten(config)) as log,
    ):
        loop = _Loop(run, checkpoints, evaluation, log, stop, watchdog)
        state = loop.run_or_save(state, batches)
        rate = log.images_per_second(total)
        checkpoints.close()
        stop.unsaved = False
        if stop.signal is not None and processes.is_single():  # others would wait for it
            _exit(total, stop.signal)
        log.testing()
        rows = evaluation.test(state)
        log.tested(total, rows)
        shipped: Any = next((row["confusion"] for row in rows if "confusion" in row), [])
        _say_if_guessing(shipped, "train longer or on more pictures, or start from a trained ViT (init.source)")
        if processes.is_first():  # here, because the log waits for trackers at its end
            facts = evaluator.facts(plan.routing, plan.mesh, plan.data.name, plan.train.seed, total)
            tested = {"rows": rows, "files": log.sync() if start < total else meta["files"]}
            _write_result(workdir, facts | tested, rate, meta)


def _write_result(workdir: Path, result: dict[str, Any], rate: float, meta: Meta) -> None:
    """Writes the test results and how fast the run was trained; a command of rate 0 timed no step, and earlier ones
    did."""
    known = {} if rate else results.of_training(workdir, meta.get("versions"))
    results.write_result(workdir, result | {"images_per_second": rate} | known)


def _was_tested(workdir: Path, total: int) -> bool:
    """Tells all processes whether the last step was tested before; shows its results."""
    tested = results.of_step(workdir, total)
    if not processes.broadcast_from_first(bool(tested)):
        return False
    console.print("ended       the run was trained and tested before; jvitmoe evaluate tests it again")
    if processes.is_first():
        results.show_models(workdir, tested)
    return True


def _source(config: Config, workdir: Path) -> tuple[Any, list[str]]:
    """Returns the dense parameters of `init.source` and notes on them; (None, []) without one and for a run that
    resumes, whose checkpoint includes them."""
    if config.init.source and _is_new(workdir):
        return processes.together(lambda: pretrained.start(config))
    return None, []


def _is_new(workdir: Path) -> bool:
    """Tells all processes whether the first one sees no checkpoint: on a network disk they may not see the same."""
    steps = processes.together(lambda: list_steps(workdir / safe_io.CHECKPOINTS))
    return processes.broadcast_from_first(not steps)


def _say_skipped(text: str) -> None:
    line = f"skipped     {text}"
    if processes.is_first():
        console.print(line)
    else:  # whose console is quiet
        print(line, file=sys.stderr)


def _say_if_guessing(confusion: list[list[int]], remedy: str) -> None:
    if note := evaluator.not_above_guessing(confusion):
        console.print(f"note: {note}; {remedy}")


def _look_at_pictures(train: Any, damaged: stream.Damaged, evaluation: "_Evaluation") -> None:
    """Before a run that streams starts, looks at the headers of all training images and reads those of evaluations
    once: a damaged one must not end a long run."""
    with progress("checking    the headers of all training images") as checked:
        processes.together(lambda: damaged.check(train, checked))
    with progress("checking    the images of evaluations") as checked:
        processes.together(lambda: evaluation.read_once(checked))


def _exit(done: int, number: int) -> NoReturn:
    """Ends the process after a step that is saved, because of a signal."""
    console.print(f"stopped at step {done} by {signal.Signals(number).name}; the same command goes on")
    sys.exit(128 + number)


class _Evaluation:
    """Evaluates one split while training and the test split after it.

    Without validation images the test split is watched. It then selects nothing: the last checkpoint is the result.
    """

    def __init__(self, plan: Plan, data: RunData, watchdog: Watchdog) -> None:
        progress = functools.partial(watchdog.progress, "a batch of an evaluation")
        self._plan, self._evaluate = plan, make_evaluate(plan.model, plan.mesh, plan.data, progress)
        settings = plan.train.images_at_once, plan.mesh
        self._test = stream.eval_batches(data.test, *settings)
        self.watched, self._watched = "test", self._test
        if len(data.validation):
            self.watched, self._watched = "validation", stream.eval_batches(data.validation, *settings)

    def read_once(self, checked: Callable[[], object]) -> None:
        """Reads all images and calls `checked` after each batch. Raises DataError."""
        for batches in dict.fromkeys((self._watched, self._test)):
            for _ in batches:
                checked()

    def watch(self, state: TrainState) -> Result:
        return evaluator.evaluate_main(state.params, self._evaluate, self._watched)

    def test(self, state: TrainState) -> list[dict[str, Any]]:
        """Returns the rows of the result table (`results.write_result`)."""
        return evaluator.evaluate_run(
            self._plan.routing, self._plan.train.seed, state.params, state.ema, self._evaluate, self._test
        )


def _initial_or_restored(checkpoints: CheckpointWriter, plan: Plan, dense: Any) -> tuple[TrainState, Meta]:
    """Returns the state that training starts from, and the `meta` of its checkpoint; {} for a new run."""
    with warnings_as_lines():
        restored = checkpoints.restore(abstract_state(plan))
    return restored or (make_state(plan, dense), {})


class _Loop:
    """The loop over steps, and what it keeps between them."""

    def __init__(
        self,
        run: Run,
        checkpoints: CheckpointWriter,
        evaluation: _Evaluation,
        log: MetricsLog,
        stop: Stop,
        watchdog: Watchdog,
    ) -> None:
        plan, _, self._config = run
        self._train, self._total, self._mesh = plan.train, plan.total, plan.mesh
        self._expert_layers = plan.routing.layers_with_experts
        self._train_step = step.make_train_step(plan)
        self._steps_per_epoch, self._reduced_bytes = plan.steps_per_epoch, update.bytes_reduced(plan)
        self._checkpoints, self._evaluation, self._log = checkpoints, evaluation, log
        self._stop, self._watchdog = stop, watchdog
        self._unread: list[tuple[int, Metrics]] = []  # metrics that are still on the device
        self._saved = 0  # step of the newest checkpoint
        self._rated: tuple[int, float | None] = 0, None  # step and validation NLL of the newest evaluation
        self._slow = self._evaluating = self._has_evaluated = False

    def run(self, state: TrainState, batches: Iterator[Batch]) -> TrainState:
        """Returns the state after the last step. On a signal it saves the state and exits with 128 + signal."""
        train, start = self._train, int(state.step)
        self._state, self._saved, self._done = state, start, start
        self._stop.announce = self._say_that_it_stops
        for done in range(start + 1, self._total + 1):
            batch = next(batches)
            if done == start + 1:
                # Apart, to time the first step alone.
                compiled = self._train_step.lower(self._state, batch).compile()
                began = time.monotonic()
            self._done = done
            self._state, metrics = compiled(self._state, batch)
            devices.wait_on_cpu(self._mesh, metrics)
            if self._slow:  # with more than one step queued, progress and a stop would have to wait for all of them
                jax.block_until_ready(self._unread)
            # By the clock only if this process is the only one: each has its own, and reading may end the run together.
            try:
                if (done - 1) % train.log_every == 0 or (processes.is_single() and self._log.is_due()):
                    self._read()  # reads the steps before this one, which runs meanwhile
            finally:  # also before an error, for the history of the save that follows it
                self._unread.append((done, metrics))
            if done == start + 1:
                jax.block_until_ready(metrics)
                self._log.started(done, time.monotonic() - began)
                self._stop.unsaved = True  # before the step is shown: a signal may come at once
                self._read()
            self._watchdog.progress(f"step {done}")
            stop = self._stop.asked()
            evaluates = done == self._total or done % (train.eval_every * self._steps_per_epoch) == 0
            if stop or evaluates or (train.checkpoint_every and done % train.checkpoint_every == 0):
                self._save(done, evaluates)
                if processes.is_single():
                    stop = self._stop.signal  # which may have come in the evaluation; all is saved now
            if stop and done < self._total:
                self._checkpoints.close()
                _exit(done, stop)
        return self._state

    def _say_that_it_stops(self) -> None:
        seconds = max(1, round(self._log.step_seconds(self._done)))
        until = "this evaluation" if self._evaluating else f"this step (about {seconds} s)"
        with contextlib.suppress(Exception):  # the terminal may have closed
            console.print(f"stopping after {until}; again to stop now")

    def run_or_save(self, state: TrainState, batches: Iterator[Batch]) -> TrainState:
        """As `run`; before an error it saves what it can (`_save_before`), and waits until that is written."""
        try:
            return self.run(state, batches)
        except BaseException as error:
            if processes.is_single():  # of several, both would wait for the others, and they for this one
                self._save_before(error)
                self._checkpoints.close()
            raise

    def _save_before(self, error: BaseException) -> None:
        """Saves the last step if the run ends for what a user can mend; a failure to save is ignored."""
        if not isinstance(error, UserError) or isinstance(error, TrainingError):
            return
        with contextlib.suppress(UserError):
            if int(self._state.step) != self._saved:
                self._save(int(self._state.step), evaluates=False)

    def _save(self, done: int, evaluates: bool) -> None:
        """Saves a checkpoint, after an evaluation if asked for."""
        self._read()
        began = time.monotonic()
        if evaluates:
            self._evaluating = True
            result, watched = self._evaluation.watch(self._state), self._evaluation.watched
            # Kept before it is shown: if that fails, `_save_before` saves it.
            self._rated = done, result.nll if watched == "validation" else None
            self._log.evaluation(done, watched, {"accuracy": result.accuracy, "nll": result.nll})
            if not self._has_evaluated:
                _say_if_guessing(result.confusion, "it may rise later")
            self._has_evaluated = True
        self._watchdog.progress(f"the evaluation at step {done}")
        rated, nll = self._rated
        self._checkpoints.save(self._state, self._config, nll if rated == done else None, self._log.sync())
        self._saved, self._evaluating = done, False
        self._log.paused(time.monotonic() - began)

    def _read(self) -> None:
        """Fetches the metrics of all steps not read yet, checks them, and records those that are due."""
        log = self._log
        if not self._unread:
            return
        steps, metrics = zip(*self._unread, strict=True)
        for done, values in zip(steps, jax.device_get(metrics), strict=True):
            del self._unread[0]  # here: if it cannot be shown, those after it are recorded before the last save
            self._check_finite(done, values)
            logs = done % self._train.log_every == 0
            if logs or (done == steps[-1] and log.is_due()):
                numbers = step.as_floats(values, self._expert_layers)
                numbers["reduced_bytes"] = self._reduced_bytes(done)
                log.train(done, numbers) if logs else log.show(done, numbers)
        self._slow = log.step_seconds(steps[-1]) > SLOW_SECONDS

    def _check_finite(self, done: int, values: Metrics) -> None:
        """Raises TrainingError if a loss or gradient norm is not finite."""
        numbers = [(name, float(getattr(values, name))) for name in ("loss", "grad_norm")]
        nonfinite = [(name, value) for name, value in numbers if not math.isfinite(value)]
        if not nonfinite:
            return
        name, value = nonfinite[0]
        self._checkpoints.close()  # waits for the last save
        # Whether the parameters of a checkpoint are good shows in the loss of the step that follows it.
        steps = [s for s in self._checkpoints.steps() if s < done - 1]
        good = f"the last good checkpoint is step {steps[-1]}" if steps else "no good checkpoint was saved yet"
        error = TrainingError(
            f"{name} is {value} at step {done}; it must be finite; {good}; "
            "try a lower --config.optim.learning_rate or --config.optim.clip_norm=1 in a new --workdir"
        )
        processes.all_raise(error)  # all have read the same value
