"""Trains one experiment: `python -m jvitmoe.train --config configs/digits_random.py [--workdir runs/x]`.

Repeat the command to resume from the newest sound checkpoint; on a CPU the result is bit-identical to that of an
uninterrupted run. SIGTERM, SIGINT and SIGHUP finish the step, save and exit; a second signal exits at once.

A run may use several processes, connected by --distributed or --coordinator. Process 0 prints and writes. A signal to
one process stops all after the same step, and a failure of one ends all.
"""

import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from jvitmoe import cli
from jvitmoe.config import Config
from jvitmoe.runtime import memory, rendezvous

if TYPE_CHECKING:
    from jvitmoe.api import Run


def main(argv: list[str]) -> None:
    """Trains to the end, tests, and writes result.json and report.md in the run folder."""
    values = cli.parse(argv, define_flags, config=True)
    config = cli.experiment(values)
    workdir = Path(values.workdir or Path("runs") / cli.experiment_name(argv))
    from jvitmoe.training.launch import launch  # not above: it imports JAX, and --help need not wait for that

    launch(config, workdir, values, trackers=values.trackers)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder; by default runs/<name of the config file>.", flag_values=values)
    about = "Where figures go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio; empty: nowhere."
    flags.DEFINE_list("trackers", ["tensorboard"], about, flag_values=values)
    rendezvous.define_flags(values)


class _Callable(types.ModuleType):
    """This module, so that `jvitmoe.train("digits_random")` trains whether or not the module has been imported."""

    def __call__(
        self,
        config: Config | Path | str,
        workdir: Path | str = "",
        overrides: Mapping[str, object] | None = None,
        trackers: Sequence[str] = ("tensorboard",),
    ) -> "Run":
        from jvitmoe.api import train

        return train(config, workdir, overrides, trackers)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    memory.use_huge_pages()
    cli.run(main)
