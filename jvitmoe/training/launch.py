"""Starts a run: connects its processes, checks the folder, and trains until the end, a signal or an error."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import jax

from jvitmoe.config import Config, flatten
from jvitmoe.errors import UserError
from jvitmoe.interop import pretrained, starts
from jvitmoe.machine import compilation, processes
from jvitmoe.machine.processes import Join
from jvitmoe.machine.signals import Stop
from jvitmoe.reports import comparison
from jvitmoe.routing import Routing
from jvitmoe.runs import checkpoints, safe_io
from jvitmoe.runs.console import console
from jvitmoe.runs.folder import check_folder
from jvitmoe.runs.safe_io import crc32
from jvitmoe.runs.trackers import DEFAULT
from jvitmoe.runs.trackers import check as check_trackers
from jvitmoe.training import build
from jvitmoe.training.loop import fit
from jvitmoe.training.optimizer import Optimizer


def launch(
    config: Config,
    workdir: Path,
    join: Join | None = None,
    stop: Stop | None = None,
    trackers: Sequence[str] = DEFAULT,
    experiment: bytes = b"",
) -> None:
    """Trains a run. Raises UserError.

    Args:
        config: checked (`rules.check`).
        workdir: the run folder.
        join: how to join other processes; None: processes, if several, are connected already.
        stop: what asks the run to stop; None: signals, which may end the process.
        trackers: names in `runs.trackers.TRACKERS`.
        experiment: text of the user's experiment file, to be kept in the run folder.
    """
    processes.guard(lambda: _launch(config, workdir, join, stop, trackers, experiment))


def _saved(workdir: Path) -> Config | None:
    """Returns the settings of the run that goes on in the folder; None if there is none."""
    has_saved = checkpoints.list_steps(workdir / safe_io.CHECKPOINTS)
    return comparison.read_config(workdir) if has_saved else None


def _launch(
    config: Config, workdir: Path, join: Join | None, stop: Stop | None, trackers: Sequence[str], experiment: bytes
) -> None:
    if join:
        processes.join(join)
    compilation.use_cache(alone=processes.is_single())
    console.quiet = not processes.is_first()

    def choose() -> tuple[Routing, Optimizer]:
        check_trackers(trackers)
        return build.choose(config)

    def check_workdir() -> None:
        if processes.is_first():  # where others look before it is there, a network disk may hide it for a minute
            check_folder(workdir, config)

    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(stop or Stop())
        if not processes.is_single():
            code = checkpoints.versions() | {
                "source code": processes.source_hash(),
                "experiment file": crc32(experiment),
            }
            processes.agree({"workdir": workdir} | flatten(config) | code)
        if not config.model.width:
            processes.together(lambda: pretrained.complete(config, _saved(workdir)))
        chosen = processes.together(choose)
        records = None
        classes = processes.together(lambda: starts.class_names(config, workdir))
        if classes or not (config.model.classes and config.train.batch_size):
            records = build.browse(config, classes)
            processes.together(lambda: build.complete(config, chosen[0], records, _saved(workdir)))
        processes.together(check_workdir)
        try:
            fit(build.build(config, chosen, records), workdir, stop, cleanup, trackers, experiment)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"the memory of a device is too small ({str(error).splitlines()[0][:200]}); end other programs on it, "
                "or set a smaller --config.train.batch_size or a larger --config.train.accumulate"
            ) from error
