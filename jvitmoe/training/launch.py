"""Starts a run: connects its processes, checks the folder, and trains until the end, a signal or an error."""

import contextlib
from pathlib import Path

import jax
from absl import flags

from jvitmoe.config import Config
from jvitmoe.errors import UserError
from jvitmoe.experts import build
from jvitmoe.runs import checkpoints
from jvitmoe.runs.console import console
from jvitmoe.runs.folder import check_folder
from jvitmoe.runtime import compilation, processes
from jvitmoe.runtime.signals import Stop
from jvitmoe.training.loop import train


def launch(values: flags.FlagValues, config: Config, workdir: Path) -> None:
    """Trains a run. Raises UserError.

    Args:
        values: the flags of `rendezvous.define_flags`.
        config: validated.
        workdir: the run folder.
    """
    processes.guard(lambda: _launch(values, config, workdir))


def _launch(values: flags.FlagValues, config: Config, workdir: Path) -> None:
    compilation.use_cache()
    processes.join(values, checkpoints.versions)
    console.quiet = not processes.first()

    def check() -> None:
        build.find_router(config)  # raises ConfigError before any data are read
        check_folder(workdir, config)

    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(Stop())
        processes.together(check, f"{workdir} {config}")
        try:
            train(config, workdir, stop, cleanup)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"the memory of a device is too small ({str(error).splitlines()[0][:200]}); "
                "set a smaller --config.train.batch_size or a larger --config.train.accumulate"
            ) from error
