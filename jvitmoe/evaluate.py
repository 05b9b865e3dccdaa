"""Tests a run from its own folder: `python -m jvitmoe.evaluate --workdir runs/X [--checkpoint latest|best|STEP]`.

Needs no training flags, and any number of devices will do.
"""

import time
from pathlib import Path

from absl import flags

from jvitmoe import checkpoint, cli, evaluation, step, tracking
from jvitmoe import config as config_lib
from jvitmoe.checkpoint import Checkpoints
from jvitmoe.config import UserError
from jvitmoe.data import feed, sources
from jvitmoe.tracking import console


def main(argv: list[str]) -> None:
    """Prints the table of every dense tree the run is tested as, and writes result.json and report.md."""
    values = cli.parse(argv, _define_flags)
    if not values.workdir:
        raise UserError("--workdir is missing; give a run folder, such as --workdir=runs/digits_random")
    workdir = Path(values.workdir)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"workdir {str(workdir)!r} holds no checkpoints; give the folder that training wrote")
    began = time.monotonic()
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    number = checkpoints.find(values.checkpoint)
    meta = checkpoints.read_meta(number)
    config = config_lib.from_dict(meta["config"])
    config.data.dir = values.data_dir or config.data.dir
    config.train.devices, config.train.platform = values.devices, values.platform
    config.validate()

    mesh = step.make_mesh(config.train)
    test = sources.load(config.data, config.model).test
    model = step.make_model(config, mesh.devices.flat[0].platform)
    active, total = evaluation.count_parameters(config)
    hardware = step.describe(mesh)
    console.print(f"run         {workdir}, checkpoint at step {number:,}")
    console.print(f"devices     {hardware}")
    console.print(f"parameters  {active:,} active, {total:,} total ({model.dtype.name} compute)")
    params, ema = checkpoints.read_params(number, step.abstract_state(config, model, mesh))
    checkpoints.close()

    evaluate = evaluation.make_evaluate(model, mesh)
    images, batches = feed.put(test, mesh), feed.eval_batches(len(test), config.train.batch_size, mesh)
    tracking.write_result(
        workdir,
        {
            "rows": evaluation.evaluate_run(config, params, ema, lambda tree: evaluate(tree, images, batches)),
            "data": config.data.name,
            "step": number,
            "seed": config.train.seed,
            "active_parameters": active,
            "total_parameters": total,
            "images_per_second": None,
            "seconds": time.monotonic() - began,
            "hardware": hardware,
            "versions": checkpoint.versions(),
        },
    )


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder that training wrote.", flag_values=values)
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on validation) or a step.", flag_values=values)
    flags.DEFINE_string("data_dir", "", "Where the data lie, if not where training found them.", flag_values=values)
    flags.DEFINE_integer("devices", 0, "Devices to use; 0 is all local ones.", flag_values=values)
    flags.DEFINE_string("platform", "", "cpu, gpu or tpu; '' takes what JAX finds.", flag_values=values)


if __name__ == "__main__":
    cli.run(main)
