"""Says where the time of a training step goes, by kind of operation, from a trace of `jax.profiler`:

    python scripts/profile_step.py --config configs/cifar10_dense.py --config.train.batch_size=64 \\
        --config.model.dtype=bfloat16 --config.routing.experts=4

Images are random numbers. A kind is the primitive of JAX that XLA's instruction comes from (of a fusion, the one that
its result comes from), apart for the forward pass, the backward pass, and what follows them.
"""

import collections
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.profiler import ProfileData

from jvitmoe import benchmark, cli, step, tracking
from jvitmoe.config import Config
from jvitmoe.data import feed
from jvitmoe.data.sources import Split
from jvitmoe.tracking import console

HOLDERS = ("while", "call", "conditional")  # whose time is that of what they hold


def main(argv: list[str]) -> None:
    values = cli.parse(argv, define_flags, config=True)
    config = cli.experiment(values)
    case = benchmark.Case("step", config, *_images(config))
    case.seconds(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = case.seconds(values.steps)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        spent = _spent(ProfileData.from_file(str(trace)), _origins(case.text()))
    milliseconds = collections.Counter({kind: value / values.steps / 1e6 for kind, value in spent.items()})
    console.print(f"{step.describe(step.make_mesh(config.train))}: {seconds * 1e3:.0f} ms a step, {case.dtype}")
    rows = [
        {"part": part, "kind": kind, "ms": f"{value:.1f}", "share": f"{value / seconds / 10:.1f}%"}
        for (part, kind), value in milliseconds.most_common(values.rows)
    ]
    rest = seconds * 1e3 - sum(value for _, value in milliseconds.most_common(values.rows))
    rows.append({"part": "", "kind": "all else", "ms": f"{rest:.1f}", "share": f"{rest / seconds / 10:.1f}%"})
    print(tracking.markdown(rows))


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("steps", 5, "Steps to trace.", flag_values=values)
    flags.DEFINE_integer("rows", 24, "Kinds to print.", flag_values=values)


def _images(config: Config) -> tuple[jax.sharding.Mesh, feed.Images]:
    mesh, rng, model = step.make_mesh(config.train), np.random.default_rng(0), config.model
    shape = 10 * config.train.batch_size, model.image_size, model.image_size, model.channels
    pixels, labels = rng.integers(0, 256, shape, np.uint8), rng.integers(0, model.classes, shape[:1], np.int32)
    return mesh, feed.put(Split(pixels, labels), mesh)


def _origins(text: str) -> dict[str, tuple[str, str]]:
    """Returns instruction -> (part of the step, kind) from a compiled program's HLO text."""
    found = {}
    for name, opcode, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = \S+ ([\w-]+)\((.*)$", text, re.MULTILINE):
        origin = re.search(r'op_name="([^"]*)"', rest)
        path = origin[1] if origin else ""
        part = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "around"
        primitive = path.rsplit("/", 1)[-1] if path else ""
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        kind = target[1] if target else opcode
        found[name] = part, f"{kind}: {primitive}" if primitive else kind
    return found


def _spent(trace: ProfileData, origins: dict[str, tuple[str, str]]) -> collections.Counter[tuple[str, str]]:
    """Returns (part, kind) -> nanoseconds."""
    spent: collections.Counter[tuple[str, str]] = collections.Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                origin = origins.get(event.name)
                if origin and not origin[1].startswith(HOLDERS):
                    spent[origin] += event.duration_ns
    return spent


if __name__ == "__main__":
    cli.run(main)
