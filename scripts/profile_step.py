"""Says where the time of a training step goes, by kind of operation, from a trace of `jax.profiler`:

    python scripts/profile_step.py --config configs/cifar10_dense.py --config.train.batch_size=64 \\
        --config.model.dtype=bfloat16 --config.routing.experts=4

Images are random numbers. Time is added up by JAX primitive, module and pass: forward, backward, or around (neither).
A fusion counts under the primitive that produces its result. Instructions without a name are XLA's own, such as
filling buffers with zeros. Where instructions run beside each other, their times add up to more than the step.
"""

import collections
import re
import tempfile
from pathlib import Path

import jax
import timed_step
from absl import flags
from jax.profiler import ProfileData

from jvitmoe import routing
from jvitmoe.commands import cli
from jvitmoe.machine import devices
from jvitmoe.runs.console import console, markdown_table

HOLDERS = ("while", "call", "conditional")  # whose time is that of what they hold
Origin = tuple[str, str, str]  # pass, module, kind
MODULES = ("attention", "mlp", "norm1", "norm2", "patches", "head")


def main(argv: list[str]) -> None:
    values = cli.parse(argv, define_flags, config=True)
    config = cli.experiment(values)
    mesh = devices.make_mesh(config.train)
    case = timed_step.TimedStep(config, mesh)
    case.seconds(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = case.seconds(values.steps)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        spent = _spent(ProfileData.from_file(str(trace)), _origins(str(case.compiled.as_text())))
    milliseconds = {origin: value / values.steps / 1e6 for origin, value in spent.most_common()}
    dtype = routing.find(config).model(mesh).dtype.name
    console.print(f"{devices.describe(mesh)}: {seconds * 1e3:.1f} ms a step, {dtype}")
    shown = list(milliseconds.items())[: values.rows]
    shown.append((("", "", "all else"), sum(milliseconds.values()) - sum(value for _, value in shown)))
    rows = [
        {
            "pass": part,
            "module": module,
            "kind": kind,
            "ms": f"{value:.1f}",
            "of the step": f"{value / seconds / 10:.1f}%",
        }
        for (part, module, kind), value in shown
    ]
    print(markdown_table(rows))


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("steps", 5, "Steps to trace.", flag_values=values)
    flags.DEFINE_integer("rows", 24, "Rows to print.", flag_values=values)


def _origins(text: str) -> dict[str, Origin]:
    """Returns instruction -> origin from a compiled program's HLO text, but for those that only hold others."""
    found = {}
    for name, opcode, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\((.*)$", text, re.MULTILINE):
        if opcode in HOLDERS:
            continue
        origin = re.search(r'op_name="([^"]*)"', rest)
        path = origin[1] if origin else ""
        part = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "around"
        module = next((module for module in MODULES if f"/{module}/" in path), "")
        found[name.removesuffix(".clone")] = part, module, path.rsplit("/", 1)[-1] if path else f"unnamed {opcode}"
    return found


def _spent(trace: ProfileData, origins: dict[str, Origin]) -> collections.Counter[Origin]:
    """Returns origin -> nanoseconds."""
    spent: collections.Counter[Origin] = collections.Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                # Calls of a library have names such as custom-call.3.clone__onednn$matmul.
                name = event.name.partition("__onednn$")[0].removesuffix(".clone")
                if name in origins:
                    spent[origins[name]] += event.duration_ns
    return spent


if __name__ == "__main__":
    cli.run(main)
