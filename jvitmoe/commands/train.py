"""Trains one experiment: `jvitmoe train --config digits_random [--workdir runs/x]`.

Repeat the command to resume from the newest sound checkpoint; on a CPU the result is bit-identical to that of an
uninterrupted run. SIGTERM, SIGINT and SIGHUP finish the step, save and exit; a second signal exits at once.

A run may use several processes, connected by --distributed or --coordinator. Process 0 prints, and all write their
parts of a checkpoint. A signal to one process stops all after the same step. If one is lost or fails, all end; start
all again to go on.
"""

from pathlib import Path
from typing import Any

from absl import flags

from jvitmoe import experiments
from jvitmoe.commands import cli
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import console


def main(argv: list[str]) -> None:
    """Trains to the end, tests, and writes result.json and report.md in the run folder."""
    values = cli.parse(argv, define_flags, config=True)
    config = cli.experiment(values)
    workdir = safe_io.run_folder(values.workdir or Path("runs") / cli.experiment_name(argv))
    if not (values.coordinator or values.distributed):  # only the first of several processes prints
        console.print("starting    JAX")
    # Not above: these import JAX.
    from jvitmoe.interop import starts
    from jvitmoe.training.launch import launch

    if values.start:
        starts.begin(config, values.start)
    experiment = experiments.text(cli.config_path(argv) or values.plugin)
    with cli.naming_plugin(workdir):
        launch(config, workdir, join_of(values), trackers=values.trackers, experiment=experiment)


def join_of(values: flags.FlagValues) -> Any:
    """Returns the `processes.Join` of the flags."""
    from jvitmoe.machine.processes import Join  # not above: it imports JAX

    return Join(values.distributed, values.coordinator, values.processes, values.process, values.join_seconds)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder; by default runs/NAME of the experiment.", flag_values=values)
    flags.DEFINE_string("start", "", "Start folder (jvitmoe start), instead of --config.", flag_values=values)
    about = "Where figures go beside metrics.jsonl: tensorboard, wandb; empty: nowhere."
    flags.DEFINE_list("trackers", ["tensorboard"], about, flag_values=values)
    cli.define_plugin(values)
    flags.DEFINE_bool("distributed", False, "Join what Slurm, Open MPI or Kubernetes started.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, to join processes by hand.", flag_values=values)
    flags.DEFINE_integer("processes", 1, "Number of processes, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("process", 0, "Number of this one, from 0, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("join_seconds", 20, "How long to wait for the other processes.", flag_values=values)
