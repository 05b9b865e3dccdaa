"""Compiles a training step for TPUs or GPUs that are not here: `jvitmoe compile --config imagenet --target v5e:4x4`.

    jvitmoe compile --config imagenet:random --target h100:8 --fit --config.train.expert_devices=4

It is the program that `train` would run there, compiled by the same compiler, from shapes only. It proves that the step
compiles, fits and moves so many bytes. It says nothing of time (no kernel is tuned without a device) or of numbers.
"""

import copy
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from jvitmoe import rules
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
FIT_TRIES, FIT_SHARE = 7, 0.03  # of --fit: programs compiled, and the share of the batch that it may miss


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("target", "", "v5e:4x4, v6e:4x4, v5p:2x2x2, h100:8, h200:8, h100:8x8, …", flag_values=values)
    flags.DEFINE_integer("images", 0, "Training images; 0: those of data.name, if known.", 0, flag_values=values)
    flags.DEFINE_bool("fit", False, "Find the largest train.batch_size that fits.", flag_values=values)
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
    found: dict[str, Any] = {"experiment": cli.experiment_name(argv)}
    try:
        found |= measure(config, target, count)
        show(found)
    except TooLargeError as error:  # a TPU's compiler refuses it, and --fit goes on from there
        if not values.fit:
            raise
        console.print(f"tried       {error}")
    if values.fit:
        batch = _fit(config, target, count, found.get("peak_bytes", float("inf")), console.print)
        found["largest_batch"] = batch
        fits = f"--config.train.batch_size={batch}" if batch else "no batch"
        console.print(f"largest     {fits} fits in {target}")
    if values.out:
        safe_io.write_text(Path(values.out), json.dumps(found, indent=1) + "\n")
        console.print(f"written     {values.out}")
    if found.get("largest_batch") == 0:
        remedy = "set --config.train.shard=parameters, or take a smaller model"
        raise TooLargeError(f"no config.train.batch_size fits in {target}; {remedy}")
    if not values.fit and found["peak_bytes"] > target.memory:
        needs = f"{found['peak_bytes'] / GIB:.2f} of {target.memory / GIB:.2f} GiB"
        raise TooLargeError(_too_large(needs, found["batch_size"], target))


class TooLargeError(UserError):
    """The step needs more memory than a device has."""


def _count(config: Config) -> int:
    if not (count := COUNTS.get(config.data.name)):
        raise UserError(f"the number of images of {config.data.name!r} is not known; give --images, training images")
    if (held_out := config.data.validation) >= count:
        raise ConfigError(f"config.data.validation is {held_out}; it must be below the {count:,} training images")
    return count - held_out


def measure(config: Config, target: Target, count: int) -> dict[str, Any]:
    """Returns what the step of a run on `count` images takes on the devices of a target, after `targets.prepare`.

    Raises UserError where XLA cannot compile it, and ConfigError where the settings do not fit the devices.
    """
    from jvitmoe.machine import devices, programs
    from jvitmoe.training import build, step

    mesh = devices.make_mesh(config.train, found=targets.devices(target))
    plan = build.plan_for(config, mesh, count)
    began = time.monotonic()
    try:
        compiled = step.lower(plan).compile()
    except Exception as error:  # of the compiler, which raises several kinds
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLargeError(_too_large(one_line(error)[:200], config.train.batch_size, target)) from error
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
        "custom_calls": programs.custom_calls(text),
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
    for name, number in found["custom_calls"].items():
        console.print(f"call        {name}, {number} times")


def _too_large(needs: str, batch: int, target: Target) -> str:
    remedy = "lower it (--fit finds the largest), or set --config.train.accumulate or --config.train.shard=parameters"
    return f"config.train.batch_size is {batch}; it does not fit in {target} ({needs}); {remedy}"


def _fit(config: Config, target: Target, count: int, peak: float, show: Callable[[str], object]) -> int:
    """Returns the largest batch that fits, to FIT_SHARE: memory grows nearly linearly with it. `show` gets a line for
    each batch that is tried, and `peak` is what the batch of the config needs."""
    from jvitmoe import routing
    from jvitmoe.data import batches
    from jvitmoe.machine import devices

    mesh = devices.make_mesh(config.train, found=targets.devices(target))
    unit, _ = batches.divisor(mesh, routing.find(config).slots, config.train.accumulate)

    def needed(batch: int) -> float:
        other = copy.deepcopy(config)
        other.train.batch_size = batch
        try:
            size = measure(rules.check(other), target, max(count, batch))["peak_bytes"]
        except TooLargeError as error:
            show(f"tried       {batch:,}: {str(error).partition('; lower')[0]}")
            return float("inf")
        show(f"tried       {batch:,}: {size / GIB:.2f} of {target.memory / GIB:.2f} GiB")
        return size

    start = max(config.train.batch_size // unit, 1)
    found = largest(lambda n: needed(n * unit), start, peak, target.memory)
    if found > (most := count // unit):
        show(f"limited     to the {count:,} training images")
    return unit * min(found, most)


def largest(needed: Callable[[int], float], start: int, at_start: float, limit: int) -> int:
    """Returns the largest n with needed(n) <= limit, of a function that grows: to FIT_SHARE of it if linearly, else as
    near as FIT_TRIES come; 0 if there is none."""
    known, low, high, missed = {start: at_start}, 0, 0, 0
    for _ in range(FIT_TRIES):
        low = max((n for n, size in known.items() if size <= limit), default=0)
        high = min((n for n, size in known.items() if size > limit), default=0)
        if high and high - low <= max(1, FIT_SHARE * low):
            break
        finite = sorted(n for n, size in known.items() if size < float("inf"))
        if len(finite) > 1:
            slope = (known[finite[-1]] - known[finite[0]]) / (finite[-1] - finite[0])
            guess = int(finite[-1] + (limit - known[finite[-1]]) / max(slope, 1e-9))
        else:
            guess = 2 * low if low else high // 2
        guess = max(guess, low + 1)
        if high and guess >= high:
            guess = max(int(high * (1 - min(FIT_SHARE * 4**missed, 0.5))), low + 1)
        if guess in known or guess < 1:
            break
        known[guess] = needed(guess)
        missed = missed + 1 if known[guess] > limit else 0  # a TPU's compiler also packs less well when memory is short
    return max((n for n, size in known.items() if size <= limit), default=0)
