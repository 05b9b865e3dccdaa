"""Compiles a training step for TPUs or GPUs that are not here: `jvitmoe compile --config imagenet --target v5e:4x4`.

    jvitmoe compile --config imagenet:random --target h100:8 --config.train.expert_devices=4

It is the program that `train` would run there, compiled by the same compiler, from shapes only. It proves that the step
compiles, fits and moves so many bytes. It says nothing of time (no kernel is tuned without a device) or of numbers.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from jvitmoe.commands import cli
from jvitmoe.config import Config
from jvitmoe.errors import ConfigError, UserError, one_line
from jvitmoe.machine import targets
from jvitmoe.machine.targets import GIB, Target
from jvitmoe.runs import safe_io

COUNTS = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "mnist": 60_000, "imagenet2012": 1_281_167}
PARTS = {  # what the names of arguments begin with -> what they are
    "before.params": "parameters",
    "before.opt_state": "optimiser",
    "before.ema": "average of the weights",
    "batch": "batch",
}
PLACES = {  # of collectives
    "step": "once a step",
    "loop": "in the loop over layers",
    "some": "in some steps (a pull; mixing before data.plain_at_end)",
}
WASTE, WORST = 1.05, 3  # padding that is worth a line, and how many arrays it names


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("target", "", "v5e:4x4, v6e:4x4, v5p:2x2x2, h100:8, h200:8, h100:8x8, …", flag_values=values)
    flags.DEFINE_integer("images", 0, "Training images; 0: those of data.name, if known.", 0, flag_values=values)
    flags.DEFINE_string("out", "", "JSON file to write.", flag_values=values)


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError where the step does not compile or does not fit."""
    values = cli.parse(argv, define_flags, config=True)
    config, target = cli.experiment(values), targets.parse(values.target)
    count = values.images or _count(config)
    if values.out and not os.path.isdir(Path(values.out).parent):  # unlike Path.is_dir, it raises for no name
        raise UserError(f"--out is {values.out!r}; it must be a file in a folder that exists")
    if not config.model.classes:
        raise ConfigError("config.model.classes is 0, and no data are read; set --config.model.classes to their number")
    targets.prepare(target)  # before the next lines, which import JAX
    from jvitmoe.runs.console import console

    console.print(f"compiling   {cli.experiment_name(argv)} for {target}; this takes half a minute or more")
    found = {"experiment": cli.experiment_name(argv), **measure(config, target, count)}
    show(found)
    if values.out:
        safe_io.write_text(Path(values.out), json.dumps(found, indent=1) + "\n")
        console.print(f"written     {values.out}")
    if found["peak_bytes"] > target.memory:
        needs = f"{found['peak_bytes'] / GIB:.2f} of {target.memory / GIB:.2f} GiB"
        raise UserError(_too_large(needs, found["batch_size"], target))


def _count(config: Config) -> int:
    if not (count := COUNTS.get(config.data.name)):
        raise UserError(f"the number of images of {config.data.name!r} is not known; give --images, training images")
    if config.data.part:
        number, parts = map(int, config.data.part.split("/"))
        count = count // parts + (number <= count % parts)
    if (held_out := config.data.validation) >= count:
        raise ConfigError(f"config.data.validation is {held_out}; it must be below the {count:,} training images")
    return count - held_out


def measure(config: Config, target: Target, count: int) -> dict[str, Any]:
    """Returns what the step of a run on `count` images takes on the devices of a target, after `targets.prepare`.

    Raises UserError where XLA cannot compile it, and ConfigError where the settings do not fit the devices.
    """
    from jvitmoe import routing
    from jvitmoe.data.batches import divisor, fitting
    from jvitmoe.interop import pretrained
    from jvitmoe.machine import devices, programs
    from jvitmoe.training import build, step

    pretrained.complete(config)

    mesh = devices.make_mesh(config.train, found=targets.devices(target))
    if not config.train.batch_size:
        config.train.batch_size = fitting(count, divisor(mesh, routing.find(config).slots, config.train.accumulate)[0])
    plan = build.plan_for(config, mesh, count)
    began = time.monotonic()
    try:
        compiled = step.lower(plan).compile()
    except Exception as error:  # of the compiler, which raises several kinds
        if "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(_too_large(one_line(error)[:200], config.train.batch_size, target)) from error
        why = f"{one_line(error)[:500]}; change the setting that it names"
        raise UserError(f"the step does not compile for {target}: {why}") from error
    seconds, text, memory = time.monotonic() - began, compiled.as_text(), compiled.memory_analysis()
    arguments = programs.arguments(text)
    sizes = Counter({name: 0 for name in PARTS.values()})
    for one in arguments:
        sizes[next((part for name, part in PARTS.items() if one.name.startswith(name)), "other inputs")] += one.padded
    model = plan.model.config
    sizes["images"] = 0 if plan.data.stream else count * (model.image_size**2 * model.channels + 4)  # and a label each
    sizes["temporaries"] = memory.temp_size_in_bytes
    sizes["results not in place"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
    collectives = Counter[tuple[str, str, str]]()
    for moved in programs.collectives(text, mesh.shape):
        collectives[moved.kind, moved.axis, moved.place] += moved.bytes * moved.times
    wasted = sorted(arguments, key=lambda one: one.bytes - one.padded)[:WORST]
    return {
        "target": str(target),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config.train.batch_size,
        "dtype": plan.model.dtype.name,
        "attention": plan.model.attention,
        "compile_seconds": seconds,
        "bytes": {name: size for name, size in sizes.items() if size},
        "peak_bytes": programs.planned_bytes(compiled) + sizes["images"],
        "available_bytes": target.memory,
        "collectives": [
            {"kind": kind, "axis": axis, "place": place, "bytes": size}
            for (kind, axis, place), size in sorted(collectives.items())
        ],
        "padding": sum(one.padded for one in arguments) / sum(one.bytes for one in arguments),
        "most_padded": {one.name: one.padded / one.bytes for one in wasted if one.padded > one.bytes},
        "float64": "f64[" in text,
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
    }


def show(found: Mapping[str, Any]) -> None:
    """Prints what `measure` returned."""
    from jvitmoe.runs.console import console, show_table

    mesh, attention = found["mesh"], {"cudnn": "cuDNN's attention", "xla": "XLA's attention"}[found["attention"]]
    console.print(f"devices     {found['devices']}, a mesh of {mesh['data']} x {mesh['expert']} (data x expert)")
    console.print(f"program     batch {found['batch_size']:,}, {found['dtype']}, {attention}")
    console.print(f"compiled    in {found['compile_seconds']:.0f} s, JAX {found['versions']['jax']}")
    sizes = {**found["bytes"], "peak": found["peak_bytes"], "available": found["available_bytes"]}
    rows = [{"memory of a device": name, "MiB": f"{size / 2**20:,.1f}"} for name, size in sizes.items()]
    show_table(rows, "")
    for one in found["collectives"]:
        console.print(f"moved       {one['kind']} over {one['axis']}: {one['bytes']:,} bytes, {PLACES[one['place']]}")
    if not found["collectives"]:
        console.print("moved       nothing: one device")
    if found["padding"] > WASTE:
        console.print(f"padded      what a step takes lies in {found['padding']:.2f} times its size; most is lost in")
        for name, ratio in found["most_padded"].items():
            console.print(f"            {name}: {ratio:.2f} times")


def _too_large(needs: str, batch: int, target: Target) -> str:
    remedy = "lower it, or set --config.train.accumulate or --config.train.shard=parameters"
    return f"config.train.batch_size is {batch}; it does not fit in {target} ({needs}); {remedy}"
