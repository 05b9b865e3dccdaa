"""Training from Python or a notebook: `run = jvitmoe.train("digits_random", workdir="runs/x")`, and what it returns."""

import copy
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from absl import logging

from jvitmoe import experiments, rules
from jvitmoe.commands import cli, evaluate, export, report
from jvitmoe.config import SETTINGS, Config, unknown_field
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.interop import classifier, starts
from jvitmoe.machine import compilation
from jvitmoe.machine.signals import Stop
from jvitmoe.reports import comparison
from jvitmoe.runs import safe_io
from jvitmoe.runs.trackers import DEFAULT
from jvitmoe.training import launch

_TRAINS = threading.Lock()  # held by the thread that trains


class Run:
    """A run folder."""

    def __init__(self, workdir: Path | str) -> None:
        self.workdir = safe_io.run_folder(workdir)

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r})"

    @property
    def config(self) -> Config:
        """The settings of the run, also before its end. Raises UserError where the folder holds none."""
        return comparison.read_config(self.workdir)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl: step, kind ("train", "validation" or "test"), and its figures."""
        return safe_io.read_metrics(self.workdir / safe_io.METRICS)

    @property
    def results(self) -> dict[str, Any]:
        """result.json: a row per model, hardware, versions; {} before the end. Raises UserError if it is damaged."""
        return safe_io.read_result(self.workdir)

    def accuracy(self, model: str = "") -> float:
        """Returns the test accuracy of a model, such as "merged"; by default that of the first row: dense, merged or
        routed. Raises UserError before the end, and for a model that was not tested."""
        rows = {row["model"]: row["accuracy"] for row in comparison.read_run(self.workdir).result["rows"]}
        if model and model not in rows:
            raise UserError(f"{model!r} was not tested; the models are {', '.join(rows)}")
        return rows[model] if model else next(iter(rows.values()))

    def classifier(self, checkpoint: str | int = "latest", ema: bool = False) -> classifier.Classifier:
        """Returns the dense or merged model, or its EMA, for pictures and arrays (`jvitmoe.load`)."""
        return classifier.load(self.workdir, checkpoint, ema)

    @compilation.cache_as_before()
    def evaluate(
        self,
        checkpoint: str | int = "latest",
        paths: int = 8,
        few_shot: int = 0,
        data_dir: str = "",
        devices: int = 0,
    ) -> dict[str, Any]:
        """Tests the run again, draws the pictures of `jvitmoe evaluate` into its folder, and returns the results. The
        arguments are its flags. Raises UserError."""
        evaluate.evaluate(self.workdir, checkpoint, paths, few_shot, data_dir, devices)
        return self.results

    def verify(self) -> bool:
        """Prints which files of the folder are sound, and returns whether all are."""
        return evaluate.verify(self.workdir)

    @compilation.cache_as_before()
    def export(self, to: str, out: Path | str, ema: bool = False) -> Path:
        """Writes the dense or merged model, or its EMA, for another library, as `jvitmoe export`, and returns the
        folder."""
        folder = Path(out).expanduser()
        export.export(self.workdir, to, folder, ema=ema)
        return folder

    def report(self, *others: "Run | Path | str", out: Path | str = "") -> Path:
        """Compares this run with others: writes report.md and its pictures into `out`, by default `<workdir>/report`,
        and returns that folder. Raises UserError as `jvitmoe report` does."""
        folder = Path(out or self.workdir / "report").expanduser()
        report.report([str((run if isinstance(run, Run) else Run(run)).workdir) for run in (self, *others)], folder)
        return folder


@compilation.cache_as_before()
def train(
    config: Config | Path | str = "",
    workdir: Path | str = "",
    overrides: Mapping[str, object] | None = None,
    trackers: Sequence[str] = DEFAULT,
    start: Path | str = "",
) -> Run:
    """Trains an experiment to its end, tests it, and returns the run. Called again it resumes.

    A first interrupt (Ctrl-C, or a notebook's stop button) ends the current step, saves and raises KeyboardInterrupt; a
    second one raises it at once.

    Args:
        config: the settings, or an experiment as the command line takes it: "digits_random", "my_images.py".
        workdir: the run folder; by default `runs/<name of the experiment>`, "runs/run" for settings.
        overrides: other values of settings, such as {"train.epochs": 30}.
        trackers: where figures go beside metrics.jsonl: "tensorboard", "wandb".
        start: the folder of a start (`jvitmoe start`), in place of `config`.

    Raises UserError, in one line, for what a user can correct.
    """
    if bool(start) == bool(config):
        raise UserError("give config or start, and not both")
    if start:
        name, settings, experiment = Path(start).name, experiments.of_start(start), b""
    elif isinstance(config, Config):
        name, settings, experiment = "run", copy.deepcopy(config), b""
    else:
        name, settings = cli.experiment_name(["", f"--config={config}"]), experiments.load(config)
        experiment = experiments.text(config)
    run = Run(workdir or Path("runs") / name)
    for path, value in (overrides or {}).items():
        if path not in SETTINGS:
            raise ConfigError(unknown_field(path))
        section, _, field = path.partition(".")
        setattr(getattr(settings, section), field, value)
    if start:
        starts.begin(settings, start)
    if not _TRAINS.acquire(blocking=False):  # Orbax writes the checkpoints of one run at a time
        raise UserError("another thread trains; wait for it, or train in a process of its own")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # Orbax logs a lot
    asked = [trackers] if isinstance(trackers, str) else trackers
    try:
        launch.launch(rules.check(settings), run.workdir, None, _Interrupts(), asked, experiment)
    except SystemExit as error:
        raise KeyboardInterrupt("stopped and saved; train again to go on") from error
    finally:
        logging.set_verbosity(verbosity)
        _TRAINS.release()
    return run


class _Interrupts(Stop):
    """Stop for a process that goes on after the run: interrupts only, and they raise. Outside the main thread, where
    Python handles no signals, none."""

    def __enter__(self) -> "_Interrupts":
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or not self.unsaved:
            raise KeyboardInterrupt
        self.signal = number
        self._tell_others()
