"""Tests a run from its own folder: `python -m jvitmoe.evaluate --workdir runs/X [--checkpoint latest|best|STEP]`.
With --verify it only says which parts of the folder are sound, and exits with 1 where one is not.

Needs no training flags, and any number of devices will do. For a run of experts it also measures why averaging them
works or fails, and draws it as mergeability.png.
"""

import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from jax.sharding import Mesh

from jvitmoe import cli
from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.data import datasets, stream
from jvitmoe.data.batches import eval_batches, put
from jvitmoe.data.splits import Records, Split, decode
from jvitmoe.errors import UserError
from jvitmoe.evaluation import mergeability, metrics, models
from jvitmoe.evaluation.metrics import Evaluator
from jvitmoe.experts import build, cost
from jvitmoe.runs import files, plots, results, verify
from jvitmoe.runs.checkpoints import Checkpoints, place, versions
from jvitmoe.runs.console import console, warnings_as_lines
from jvitmoe.runtime import compilation, devices
from jvitmoe.training import state


def main(argv: list[str]) -> None:
    """Prints the table of every dense tree the run is tested as, and writes result.json and report.md."""
    values = cli.parse(argv, _define_flags)
    compilation.use_cache()
    workdir = cli.run_folder(values)
    if values.paths < 0:
        raise UserError(f"--paths is {values.paths}; it must be the number of random paths, 0 or more")
    if values.verify:
        _verify(workdir)
        return
    files.refuse_links(workdir)
    began = time.monotonic()
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    with warnings_as_lines():
        saved = checkpoints.read(values.checkpoint)
    checkpoints.close()
    config = config_lib.from_dict(saved.meta["config"])
    config.data.dir = values.data_dir or config.data.dir
    config.train.devices, config.train.platform = values.devices, values.platform
    config.validate()

    mesh = devices.make_mesh(config.train)
    find = datasets.browse if config.data.stream else datasets.load
    test: Split | Records = find(config.data, config.model).test
    model = build.make_model(config, mesh.devices.flat[0].platform)
    active, total = cost.count_parameters(config)
    hardware = devices.describe(mesh)
    console.print(f"run         {workdir}, checkpoint at step {saved.step:,}")
    console.print(f"devices     {hardware}")
    console.print(f"parameters  {active:,} active, {total:,} total ({model.dtype.name} compute)")
    abstract = state.abstract_state(config, model, mesh)
    params = place(saved.params, abstract.params)
    ema = place(saved.ema, abstract.ema) if saved.ema else None

    evaluate = metrics.make_evaluate(model, mesh)
    batches = eval_batches(len(test), config.train.batch_size, mesh)
    images: metrics.Shown
    images = put(test, mesh) if isinstance(test, Split) else stream.EvalImages(test, batches, config, mesh)
    before = results.read_result(workdir)  # what only training can measure is kept
    result = {
        "rows": models.evaluate_run(config, params, ema, evaluate, images, batches, values.paths),
        **_mergeability(config, params, evaluate, test, mesh),
        "data": config.data.name,
        "step": saved.step,
        "seed": config.train.seed,
        "active_parameters": active,
        "total_parameters": total,
        "images_per_second": before.get("images_per_second"),
        "trained_on": before.get("trained_on") or before.get("hardware"),
        "seconds": time.monotonic() - began,
        "hardware": hardware,
        "versions": versions(),
    }
    if "mergeability" in result:
        plots.mergeability(result, workdir / files.MERGEABILITY)
    results.write_result(workdir, result)


def _verify(workdir: Path) -> None:
    """Prints each part of the run and whether it is sound. Exits with 1 where one is not."""
    every = True
    for part, sound, known in verify.verify(workdir):
        console.print(f"{part:<16} {known}")
        every = every and sound
    if not every:
        sys.exit(1)


def _mergeability(
    config: Config, params: Any, evaluate: Evaluator, test: Split | Records, mesh: Mesh
) -> dict[str, Any]:
    """Returns {"mergeability": its numbers}, measured on a fixed part of the test split; {} for a dense run."""
    experts = config.routing.experts
    if experts == 1:
        return {}
    part = (
        mergeability.subset(test)
        if isinstance(test, Split)
        else decode(mergeability.subset(test), config.data, config.model)
    )
    images, batches = put(part, mesh), eval_batches(len(part), config.train.batch_size, mesh)
    route_PL = models.path_routes(config, 0)

    def losses(params: Any) -> list[float]:
        return [result.nll for result in evaluate.paths(params, route_PL, experts, images, batches)[0]]

    return {
        "mergeability": {
            "images": len(part),
            "layers": list(config.expert_layers),
            **mergeability.weight_geometry(params),
            "gap": mergeability.layer_gap(
                build.make_model(config, "cpu"), params, images, batches, config.expert_layers
            ),
            "barrier": mergeability.barrier(params, losses),
        }
    }


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder that training wrote.", flag_values=values)
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on validation) or a step.", flag_values=values)
    flags.DEFINE_bool("verify", False, "Only say which parts of the folder are sound.", flag_values=values)
    flags.DEFINE_integer("paths", 8, "Random paths to test: a fresh expert per layer.", flag_values=values)
    flags.DEFINE_string("data_dir", "", "Where the data lie, if not where training found them.", flag_values=values)
    flags.DEFINE_integer("devices", 0, "Devices to use; 0 is all local ones.", flag_values=values)
    flags.DEFINE_string("platform", "", "cpu, gpu or tpu; '' takes what JAX finds.", flag_values=values)


if __name__ == "__main__":
    cli.run(main)
