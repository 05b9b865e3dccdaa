"""Trains one experiment: `python -m jvitmoe.train --config configs/digits_random.py [--workdir runs/x]`.

Run again with the same folder it goes on from the newest sound checkpoint, to the same bits as a run that was never
interrupted. SIGTERM and SIGINT finish the step, save and exit; a second signal exits at once.

Several processes, joined by --distributed or --coordinator, are one run: the first prints and writes, any one that is
asked to stop stops all after the same step, and one that fails ends all.
"""

import contextlib
from pathlib import Path

import jax
from absl import flags

from jvitmoe import cli
from jvitmoe.config import Config
from jvitmoe.errors import UserError
from jvitmoe.experts import build
from jvitmoe.runs import checkpoints
from jvitmoe.runs.console import console
from jvitmoe.runs.folder import claim
from jvitmoe.runtime import compilation, processes
from jvitmoe.runtime.signals import Stop
from jvitmoe.training.loop import train


def main(argv: list[str]) -> None:
    """Trains to the end, tests, and leaves result.json and report.md in the run folder."""
    values = cli.parse(argv, _define_flags, config=True)
    compilation.use_cache()
    processes.join(values, checkpoints.versions)
    console.quiet = not processes.first()
    workdir = Path(values.workdir or Path("runs") / Path(cli.config_path(argv)).stem)

    def prepare() -> Config:
        config = cli.experiment(values)
        build.find_router(config)  # refuses a name or setting before any data are read
        claim(workdir, config)
        return config

    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(Stop())
        config = processes.together(prepare, f"{workdir} {values.config}")
        try:
            train(config, workdir, stop, cleanup)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"the memory of a device is too small ({str(error).splitlines()[0][:200]}); "
                "set a smaller --config.train.batch_size or a larger --config.train.accumulate"
            ) from error


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder; by default runs/<name of the config file>.", flag_values=values)
    processes.define_flags(values)


if __name__ == "__main__":
    cli.run(lambda argv: processes.guard(lambda: main(argv)))
