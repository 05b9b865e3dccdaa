"""Trains one experiment with Ray: `python scripts/ray_train.py --workers 2 --config digits_random --workdir runs/x`.

Ray's JaxTrainer starts the workers and connects them by jax.distributed: on CPUs, or on GPUs with `--gpus`. On GPUs
start one worker per node, with all GPUs of the node: JaxTrainer gives each worker the devices from 0 on. Settings are
those of `jvitmoe train`: --config.train.seed=1. Repeat the command to resume. This has been run with two workers on the
CPUs of one machine, never on GPUs or several nodes.
"""

import argparse
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxConfig, JaxTrainer

from jvitmoe import config as config_lib
from jvitmoe import experiments
from jvitmoe.commands import cli


def train(run: dict[str, Any]) -> None:
    """Trains as one of the workers, which are connected already."""
    import jvitmoe  # here, so that the process that only starts the workers does not import JAX

    jvitmoe.train(**run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="name of an experiment, or a file")
    parser.add_argument("--workdir", required=True, type=Path, help="run folder, on a disk that all workers see")
    parser.add_argument("--workers", default=1, type=int)
    parser.add_argument("--gpus", default=0, type=int, help="GPUs of each worker")
    flags, settings = parser.parse_known_args()
    workdir = flags.workdir.resolve()  # workers have another current folder
    path, variant = experiments.split_variant(flags.config)
    config = f"{Path(path).resolve()}:{variant}".removesuffix(":")
    asked = ["train", f"--config={config}", *settings]
    given = cli.experiment(cli.parse(asked, lambda values: None, config=True))
    plain, changed = map(config_lib.flatten, (experiments.load(config), given))
    overrides = {path: value for path, value in changed.items() if plain[path] != value}
    # Without its dashboard Ray Train warns every second that it cannot ask it.
    ray.init(include_dashboard=False, logging_config=ray.LoggingConfig(log_level="ERROR"))
    JaxTrainer(
        train,
        train_loop_config={"config": config, "workdir": str(workdir), "overrides": overrides},
        # use_gpu connects the workers, on what JAX_PLATFORMS says. Without it Ray does not connect workers on CPUs.
        jax_config=JaxConfig(use_gpu=True),
        scaling_config=ScalingConfig(
            num_workers=flags.workers,
            use_gpu=flags.gpus > 0,
            resources_per_worker={"CPU": 1, "GPU": flags.gpus},
        ),
        run_config=RunConfig(
            name=f"{workdir.name}.ray",  # Ray's own files, beside the run folder
            storage_path=str(workdir.parent),
            failure_config=FailureConfig(max_failures=10),  # starts all workers again; the run goes on
            worker_runtime_env={"env_vars": {"JAX_PLATFORMS": "cuda" if flags.gpus else "cpu"}},
        ),
    ).fit()
