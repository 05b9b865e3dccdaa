"""Tests the models of a run: `jvitmoe evaluate --workdir runs/X [--checkpoint latest|best|STEP]`.

Prints one row per model, writes result.json and report.md, and draws what the dense or merged model says: of all images
in confusion.png, of 15 in samples.png, of the 12 with the highest loss in mistakes.png. For a run with experts it also
measures why averaging works or fails, and draws it in mergeability.png; for a learned router it draws which expert
takes which patch, in experts.png. Takes the config from the run folder; any number of devices will do.
With --few_shot it also probes the features of the dense or merged model, and of the EMA; the shots are drawn with the
fixed seeds 0, 1 and 2.
With --verify it only reports which files of the run folder are sound, and exits with 1 if one is not.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags

from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.commands import cli
from jvitmoe.config import Config
from jvitmoe.errors import UserError
from jvitmoe.reports import results
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import console, progress, warnings_as_lines

MOST_SAMPLES = 15  # images of samples.png
MOST_MISTAKES = 12  # images of mistakes.png
MAPPED = 8  # images whose routes are drawn in experts.png
KEPT = 16  # images whose routes result.json keeps, to compare seeds


def _refuse_negative(**flags_given: int) -> None:
    for name, value in flags_given.items():
        if value < 0:
            raise UserError(f"--{name} is {value}; it must be at least 0")


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError for a flag, a run folder or data that do not fit."""
    values = cli.parse(argv, _define_flags)
    workdir = cli.run_folder(values.workdir)
    if not values.verify:
        evaluate(workdir, values.checkpoint, values.paths, values.few_shot, values.data_dir, values.devices)
    elif not verify(workdir):
        sys.exit(1)


def verify(workdir: Path) -> bool:
    """Prints which files of a run folder are sound, and returns whether all are."""
    from jvitmoe.runs import folder  # imports JAX

    faults = dict(folder.verify(workdir))
    for name, fault in faults.items():
        console.print(f"{name:<16} {fault or 'sound'}")
    return not any(faults.values())


def evaluate(
    workdir: Path,
    checkpoint: str | int = "latest",
    paths: int = 8,
    few_shot: int = 0,
    data_dir: str = "",
    devices: int = 0,
) -> None:
    """Tests the models of a run, and writes result.json, report.md and the pictures into its folder. The arguments are
    the flags of the command. Raises UserError."""
    _refuse_negative(paths=paths, few_shot=few_shot, devices=devices)
    cli.run_folder(workdir)
    safe_io.refuse_links(workdir)
    console.print(f"reading     {workdir}")
    # Not above: these import JAX and matplotlib, and --help need not wait for that.
    from jvitmoe.data import sources, stream
    from jvitmoe.data.batches import Resident
    from jvitmoe.data.splits import some
    from jvitmoe.evaluation import evaluator, mergeability, mistakes, probes
    from jvitmoe.experts import merge
    from jvitmoe.reports import figures, run_figures

    with cli.naming_plugin(workdir):
        config, routing, mesh, params, ema, meta = _restore(workdir, checkpoint, data_dir, devices)
        console.print(f"reading     {config.data.name} {config.data.dir}".rstrip())
        data = _data(config, workdir, few_shot > 0)
    dense, at_once = merge.dense_tree(params), config.train.images_at_once
    with progress("testing") as batch_done:
        tester = evaluator.make_evaluate(routing.model(mesh), mesh, config.data, batch_done)
        shown = stream.eval_batches(data.test, at_once, mesh)
        known = results.of_training(workdir, meta["versions"])
        result: dict[str, Any] = {}
        if few_shot:  # first, because it refuses more images than there are
            trees = {"dense" if routing.experts == 1 else "merged": dense}
            trees |= {"EMA": ema} if ema is not None else {}
            # Not on validation images: they chose the run's checkpoint.
            kept = dataclasses.replace(data, train=sources.training_images(data.train, config.data)[0])
            result["probes"] = probes.measure(tester.net, trees, kept, config.data, at_once, mesh, few_shot)
        gate_X, few = None, None
        if routing.experts > 1:
            few = some(data.test, mergeability.IMAGES)
        if tester.routed:
            seen = some(data.train, mergeability.IMAGES, skipped=console.print)  # as training may have
            gate_X, result["routes"] = _routes(routing, params, tester.routed, seen, few, workdir)
        seed = config.train.seed
        result["rows"] = evaluator.evaluate_run(routing, seed, params, ema, tester, shown, paths, gate_X)
        result |= evaluator.facts(routing, mesh, config.data.name, seed, meta["step"]) | known
        result["files"] = meta["files"]
        if few is not None:
            batches = Resident(few, at_once, mesh)
            result["mergeability"] = mergeability.measure(routing, params, tester, batches)
        worst = mistakes.measure(tester.net, dense, shown, tester.normalize, MOST_MISTAKES)
    _draw_samples(tester, dense, some(data.test, MOST_SAMPLES), workdir)
    _draw_mistakes(worst, workdir)
    drawn = run_figures.of_run(result, workdir)
    for name, figure in drawn.items():
        figures.save(figure, workdir / name)
    results.write_result(workdir, result, safe_io.CONFUSION in drawn)
    pictures = [safe_io.SAMPLES, safe_io.MISTAKES, *drawn, *[safe_io.EXPERTS] * bool(tester.routed)]
    console.print(f"written     {', '.join([safe_io.RESULT, results.REPORT, *pictures])} in {workdir}")


def _restore(
    workdir: Path, checkpoint: str | int, data_dir: str, count: int
) -> tuple[Config, Any, Any, Any, Any, dict[str, Any]]:
    """Returns (config, routing, mesh, parameters, EMA or None, meta) of a checkpoint, its arrays on the devices, and
    prints what it is."""
    import jax
    from jax.sharding import NamedSharding

    from jvitmoe import routing
    from jvitmoe.experts.params import from_dict
    from jvitmoe.machine import compilation, devices
    from jvitmoe.runs.checkpoints import Checkpoints

    compilation.use_cache()
    with warnings_as_lines():
        saved = Checkpoints(workdir / safe_io.CHECKPOINTS).read(checkpoint)
    config = config_lib.from_dict(saved.meta["config"])
    config.data.dir = data_dir or config.data.dir
    rules.check(config)
    # Evaluation has no expert axis, and fills up its batches, so any number of devices will do.
    train = dataclasses.replace(config.train, devices=count, expert_devices=1)
    mesh = devices.make_mesh(train, settings="--")
    routed = routing.find(config)
    active, total = routed.count_parameters()
    console.print(f"run         {workdir}, checkpoint at step {saved.step:,}")
    console.print(f"devices     {devices.describe(mesh)}")
    console.print(f"parameters  {active:,} active, {total:,} total ({routed.model(mesh).dtype.name} compute)")
    params, ema = jax.device_put((from_dict(saved.params), saved.ema), NamedSharding(mesh, devices.REPLICATED))
    return config, routed, mesh, params, ema, saved.meta


def _data(config: Config, workdir: Path, probed: bool) -> Any:
    """Returns the run's data set. Only a probe needs all training images in memory."""
    from jvitmoe.data import sources
    from jvitmoe.data.splits import decode

    find = sources.load if probed and not config.data.stream else sources.browse
    names, may_lack = safe_io.read_classes(workdir), bool(config.init.start)
    with cli.data_dir_flag():
        data: Any = sources.with_classes(find, config.data, config.model, names, may_lack)
        if not (probed or config.data.stream):
            data = dataclasses.replace(data, test=decode(data.test))
    return data


def _routes(routing: Any, params: Any, routed: Any, seen: Any, few: Any, workdir: Path) -> tuple[Any, dict[str, Any]]:
    """Returns (the mean gate of each layer, from the training images `seen`; figures of the test images `few`), and
    draws what the router does."""
    import jax.numpy as jnp
    import numpy as np

    from jvitmoe.data.splits import evenly_spaced
    from jvitmoe.evaluation import expert_maps
    from jvitmoe.reports import figures, run_figures

    def measured(split: Any) -> Any:
        return expert_maps.measure(routed.net, params, split.images_NHWc, split.labels_N, routed.normalize)

    layers, model = np.array(routing.layers_with_experts), routing.model_settings
    gate_X = jnp.asarray(measured(seen).gate_X)
    found = measured(few)
    names = results.class_names(workdir, model.classes)
    shown = evenly_spaced(len(few), MAPPED)
    pictures = [(few.images_NHWc[n], names[few.labels_N[n]], found.expert_XBP[:, n]) for n in shown]
    figures.save(run_figures.experts(found, pictures, layers.tolist(), names), workdir / safe_io.EXPERTS)
    kept = [[" ".join(map(str, expert_P)) for expert_P in expert_BP[:KEPT]] for expert_BP in found.expert_XBP]
    figures_of = {"load": found.load_XE.tolist(), "gate": found.gate_X.tolist(), "images": len(few.labels_N)}
    return gate_X, figures_of | {"experts": kept}


def _draw_samples(evaluate: Any, params: Any, few: Any, workdir: Path) -> None:
    """Draws what the dense or merged model says of some images."""
    import jax
    import jax.numpy as jnp

    from jvitmoe.machine import compilation
    from jvitmoe.models import vit
    from jvitmoe.reports import figures, run_figures

    run = compilation.jit(lambda params, images: vit.logits(evaluate.net, params, evaluate.normalize(images)))
    logits_NC = run(params, jnp.asarray(few.images_NHWc))
    share_NC = jax.device_get(jax.nn.softmax(logits_NC))
    cells = _cells(few.images_NHWc, few.labels_N, share_NC, workdir)
    figures.save(run_figures.samples(cells), workdir / safe_io.SAMPLES)


def _draw_mistakes(found: Any, workdir: Path) -> None:
    """Draws the images of `mistakes.measure`, each beside where the model looked."""
    from jvitmoe.reports import figures, run_figures

    cells = _cells(found.images_KHWc, found.labels_K, found.share_KC, workdir)
    figures.save(run_figures.mistakes(cells, found.rollout_KP), workdir / safe_io.MISTAKES)


def _cells(images_NHWc: Any, labels_N: Any, share_NC: Any, workdir: Path) -> list[Any]:
    """Returns what `run_figures.samples` draws: each image, its class, and the classes by their probability."""
    names, cells = results.class_names(workdir, share_NC.shape[1]), []
    for image_HWc, label, share_C in zip(images_NHWc, labels_N, share_NC, strict=True):
        cells.append((image_HWc, names[label], [(names[c], float(share_C[c])) for c in (-share_C).argsort()]))
    return cells


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder that training wrote.", flag_values=values)
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on validation) or a step.", flag_values=values)
    flags.DEFINE_bool("verify", False, "Only report which files of the folder are sound.", flag_values=values)
    flags.DEFINE_integer("paths", 8, "Random paths to test: an expert drawn per layer.", 0, flag_values=values)
    flags.DEFINE_integer("few_shot", 0, "Linear probe on this many images per class; 0 is none.", 0, flag_values=values)
    flags.DEFINE_string("data_dir", "", "Where the data are, if not where training found them.", flag_values=values)
    flags.DEFINE_integer("devices", 0, "Devices to use; 0 is all local ones.", 0, flag_values=values)
    cli.define_plugin(values)
