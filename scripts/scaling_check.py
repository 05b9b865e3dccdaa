"""Holds scripts/scaling_model.py against 1, 2, 4 and 8 processes on this machine: the bytes that they reduce exactly,
their times as far as its cores allow.

    python scripts/scaling_check.py            # writes results/scaling/{check.json,check.md,check.png}; minutes

Every process has one device and is held to one core, in turn. It times three things: sums of known sizes, for the two
numbers that describe a link; the work of each variant on its own images beside the other processes', with nothing to
reduce; and the training step itself. The predicted time of a step is the second plus its all-reduces, which follow from
the first.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scaling_model
import timed_step
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from scipy import optimize

from jvitmoe import rules
from jvitmoe.commands import train
from jvitmoe.config import Config, ModelConfig, RoutingConfig, TrainConfig
from jvitmoe.data.batches import Batch
from jvitmoe.machine import processes, programs
from jvitmoe.machine.devices import AXES, describe, make_mesh, to_devices
from jvitmoe.reports import figures
from jvitmoe.runs import checkpoints
from jvitmoe.training.state import TrainState

EXPERTS, IMAGES = 8, 16  # experts in all; images of one device
MODEL = ModelConfig(patch=2, width=128, hidden=512, depth=2, heads=4, pool="mean")
CHECKED = [  # see docs/scaling.md
    name for name, (variant, _, pulled) in scaling_model.VARIANTS.items() if variant != "learned" and not pulled
]
PROBES = ((1, 1), (32, 1), (1, 2**18), (32, 2**13), (1, 2**21))  # (arrays, floats in each) of a timed sum
WARM = 5
RESULT = "SCALING "  # what the line of a worker's result starts with


def config(name: str, devices: int) -> Config:
    """Returns the experiment of a variant of the model on that many CPU devices."""
    variant, spreads, pulled = scaling_model.VARIANTS[name]
    routed = {
        "dense": RoutingConfig(),
        "batch": RoutingConfig(experts=EXPERTS),
        "sample": RoutingConfig(experts=EXPERTS, kind="sample", pull=float(pulled)),
    }[variant]
    train = TrainConfig(batch_size=IMAGES * devices, devices=devices, expert_devices=devices if spreads else 1)
    return rules.check(Config(model=MODEL, routing=routed, train=train))


def alone(name: str, devices: int) -> Config:
    """Returns the experiment in which one device does what each of `devices` does of a variant: with its share of
    experts, on its own images, and nothing to reduce."""
    mine = config(name, 1)
    if scaling_model.VARIANTS[name][1]:
        mine.routing.experts = EXPERTS // devices
        mine.routing.kind = "sample" if mine.routing.experts > 1 else "batch"
    return rules.check(mine)


def predicted_bytes(name: str, devices: int) -> int:
    """Returns the bytes that a device reduces in a step by the model: parameters, and what a step says of itself.

    That is loss and accuracy, and with an expert axis, for the norm, a sum of squares of each array of experts.
    """
    variant, spreads, pulled = scaling_model.VARIANTS[name]
    work = scaling_model.work(MODEL, EXPERTS, IMAGES)
    parameters = scaling_model.reduced_bytes(work, variant, devices, devices if spreads else 1, pulled)
    return parameters + scaling_model.FLOAT * ((2 + 4 * spreads) if devices > 1 else 0)


# one of the processes


def worker(values: flags.FlagValues) -> None:
    """Times sums, work and steps, all processes at once, and prints what was found."""
    processes.join(train.join_of(values))
    count = jax.process_count()
    local = jax.make_mesh((1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.local_devices())

    def say(**found: Any) -> None:
        if processes.is_first():
            print(RESULT + json.dumps({"processes": count, **found}), flush=True)

    if count > 1:
        for arrays, floats in PROBES:
            seconds = _timed(_sums(arrays, floats), values.worker_steps)
            say(kind="sum", arrays=arrays, bytes=4 * arrays * floats, seconds=seconds)
    for name in CHECKED:
        lowered, state, batches = timed_step.lower(alone(name, count), local)
        say(kind="work", variant=name, seconds=_timed(_steps(lowered.compile(), state, batches), values.worker_steps))
        if count == 1:
            continue
        chosen = config(name, count)
        mesh = make_mesh(chosen.train)
        lowered, state, batches = timed_step.lower(chosen, mesh)
        compiled = lowered.compile()
        found = programs.collectives(compiled.as_text(), mesh.shape)
        seconds = _timed(_steps(compiled, state, batches), values.worker_steps)
        sums = {"arrays": sum(one.arrays for one in found), "bytes": sum(one.bytes for one in found)}
        say(kind="step", variant=name, **sums, seconds=seconds)


def _sums(arrays: int, floats: int) -> Callable[[], Any]:
    mesh = make_mesh(TrainConfig())
    here = NamedSharding(mesh, PartitionSpec(AXES))
    given = [to_devices(np.ones((mesh.size, floats), np.float32), here)] * arrays

    def on_device(parts: list[jax.Array]) -> list[jax.Array]:
        return [jax.lax.psum(part + number, AXES) for number, part in enumerate(parts)]

    summed = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(PartitionSpec(AXES),), out_specs=PartitionSpec()))
    return lambda: summed(given)


def _steps(compiled: Any, state: TrainState, batches: Iterator[Batch]) -> Callable[[], Any]:
    def go_on() -> Any:
        nonlocal state
        state, metrics = compiled(state, next(batches))
        return state, metrics

    return go_on


def _timed(work: Callable[[], Any], times: int) -> float:
    """Returns the median time in seconds of one call, the mean over all processes: they start together."""
    for _ in range(WARM):
        jax.block_until_ready(work())
    processes.barrier()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - began)
    median = np.float32(np.median(seconds))
    return float(np.mean(multihost_utils.process_allgather(median))) if jax.process_count() > 1 else float(median)


# all of them


def measure(counts: list[int], steps: int) -> list[dict[str, Any]]:
    """Returns what the processes say, for each number of them."""
    found: list[dict[str, Any]] = []
    for count in counts:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"--coordinator=127.0.0.1:{listener.getsockname()[1]}"
        joined = []
        for rank in range(count):
            command = [sys.executable, __file__, f"--worker_steps={steps}"]
            if count > 1:
                command += [address, f"--processes={count}", f"--process={rank}", "--join_seconds=120"]
            with _held_to_core(rank):
                joined.append(subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in joined]
        if any(process.returncode for process in joined):
            raise SystemExit(f"{count} processes ended with {[process.returncode for process in joined]}")
        lines = [line[len(RESULT) :] for line in outputs[0].splitlines() if line.startswith(RESULT)]
        found += map(json.loads, lines)
        print(f"{count} processes: {len(lines)} figures", flush=True)
    return found


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}


@contextmanager
def _held_to_core(number: int) -> Iterator[None]:
    """Holds what is started in it to one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def link(sums: list[dict[str, Any]]) -> tuple[float, float]:
    """Returns (seconds per array, seconds per byte), neither negative, that fit timed sums best by relative error."""
    rows = np.array([[row["arrays"], row["bytes"]] for row in sums], float)
    seconds = np.array([row["seconds"] for row in sums])
    (per_array, per_byte), _ = optimize.nnls(rows / seconds[:, None], np.ones(len(sums)))
    return float(per_array), float(per_byte)


def compare(found: list[dict[str, Any]]) -> tuple[dict[int, tuple[float, float]], list[dict[str, Any]]]:
    """Returns (link of each number of processes, rows of what the model says and what was measured)."""
    counts = sorted({row["processes"] for row in found})
    links = {n: link([r for r in found if r["kind"] == "sum" and r["processes"] == n]) for n in counts if n > 1}
    work = {(row["variant"], row["processes"]): row["seconds"] for row in found if row["kind"] == "work"}
    rows = []
    for row in found:
        if row["kind"] != "step":
            continue
        name, count = row["variant"], row["processes"]
        per_array, per_byte = links[count]
        reducing = row["arrays"] * per_array + predicted_bytes(name, count) * per_byte
        rows.append(
            {
                **{"variant": name, "processes": count, "arrays": row["arrays"]},
                **{"predicted_bytes": predicted_bytes(name, count), "bytes": row["bytes"]},
                **{"work": work[name, count], "reducing": reducing, "predicted": work[name, count] + reducing},
                "measured": row["seconds"],
            }
        )
    return links, rows


def markdown(links: dict[int, tuple[float, float]], rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    head = "processes | bytes by the model | in the program | work | reducing | step | measured | off by"
    lines = [f"| variant | {head} |", "| :-- |" + " --: |" * 8]
    for name in CHECKED:
        for row in (row for row in found if (row["kind"], row.get("variant"), row["processes"]) == ("work", name, 1)):
            lines.append(f"| {name} | 1 | 0 | 0 | {1e3 * row['seconds']:.1f} ms | | | | |")
        for row in (row for row in rows if row["variant"] == name):
            cells = [name, row["processes"], f"{row['predicted_bytes']:,}", f"{row['bytes']:,}"]
            cells += [f"{1e3 * row[part]:.1f} ms" for part in ("work", "reducing", "predicted", "measured")]
            cells.append(f"{100 * (row['measured'] / row['predicted'] - 1):+.0f} %")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| loopback between | per array | per byte | per byte, by the ring from the first row |"]
    lines.append("| :-- | --: | --: | --: |")
    for count, (per_array, per_byte) in links.items():
        cells = [f"{1e3 * per_array:.2f} ms", f"{1e9 * per_byte:.2f} ns", f"{1e9 * ring(links, count):.2f} ns"]
        lines.append(f"| {count} processes | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ring(links: dict[int, tuple[float, float]], count: int) -> float:
    """Returns the seconds per byte that the formula for a ring makes of what the fewest processes showed: each moves
    2 (n - 1) / n of its bytes, and processes that share a core share what it copies in a second."""
    cores, fewest = len(os.sched_getaffinity(0)), min(links)

    def share(n: int) -> float:
        return 2 * (n - 1) / n * max(1.0, n / cores)

    return links[fewest][1] * share(count) / share(fewest)


@figures.in_style
def draw(rows: list[dict[str, Any]], path: Path) -> None:
    counts = sorted({row["processes"] for row in rows})
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, grid = figures.subplots(1, len(counts), (11, 3.6), sharey=True)
    for axes, count in zip(grid[0], counts, strict=True):
        mine = [row for row in rows if row["processes"] == count]
        work, reducing, measured = ([1e3 * row[part] for row in mine] for part in ("work", "reducing", "measured"))
        y = [names.index(row["variant"]) for row in mine]
        axes.barh(y, work, color="0.75", label="predicted: work on shared cores")
        axes.barh(y, reducing, left=work, color=figures.COLOURS[4], label="predicted: all-reduces over loopback")
        axes.plot(measured, y, "D", color="black", label="measured")
        axes.set(title=f"{count} processes", xlabel="time of a step, ms", xlim=(0, 1.1 * max(measured)))
        axes.grid(axis="y", visible=False)
    grid[0, 0].set_yticks(range(len(names)), [name.replace(", experts", ",\nexperts") for name in names])
    grid[0, 0].invert_yaxis()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figures.save(figure, path)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    if any(argument.startswith("--worker_steps") for argument in sys.argv):
        values = flags.FlagValues()
        train.define_flags(values)
        flags.DEFINE_integer("worker_steps", 0, "Steps to time.", flag_values=values)
        values(sys.argv)
        processes.guard(lambda: worker(values))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--counts", default="1,2,4,8", help="numbers of processes")
    parser.add_argument("--steps", type=int, default=25, help="steps timed, of which the median counts")
    parser.add_argument("--out", type=Path, default=scaling_model.OUT)
    chosen = parser.parse_args()
    counts = [int(count) for count in chosen.counts.split(",")]
    found = measure(counts, chosen.steps)
    links, rows = compare(found)
    about = {
        "hardware": describe(make_mesh(TrainConfig(devices=1))),
        "cores_used": len(os.sched_getaffinity(0)),
        "versions": checkpoints.versions(),
        "images_per_device": IMAGES,
        "experts": EXPERTS,
        "steps_timed": chosen.steps,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "check.json").write_text(
        json.dumps({**about, "rows": rows, "found": found, "links": links}, indent=1) + "\n"
    )
    text = markdown(links, rows, found)
    (chosen.out / "check.md").write_text(text)
    if rows:
        draw(rows, chosen.out / "check.png")
    print(text)


if __name__ == "__main__":
    main()
