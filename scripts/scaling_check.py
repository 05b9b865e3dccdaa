"""Holds scripts/scaling_model.py against this machine: bytes reduced on 1, 2, 4, 8 devices, and step times of as many
processes, each on a core of its own as far as there are cores.

    python scripts/scaling_check.py            # writes results/scaling/{check.json,check.md}; a few minutes
"""

# ruff: noqa: E402
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
RANK = int(os.environ.get("SCALING_RANK", -1))
if RANK >= 0 and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[RANK % len(os.sched_getaffinity(0))]})
else:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

sys.path.insert(0, str(Path(__file__).parent))
import scaling_model

from jvitmoe import checkpoint, distributed, routing, step
from jvitmoe.config import Config, ModelConfig, RoutingConfig, TrainConfig
from jvitmoe.data import feed, sources
from jvitmoe.routing import Purpose

COUNTS, EXPERTS, IMAGES, STEPS = (1, 2, 4, 8), 8, 16, 25
MODEL = ModelConfig(patch=1, width=64, hidden=256, depth=2, heads=4, pool="mean")
TIMED = ("dense", "random, batch", "random, sample, expert axis")
RESULT = "SCALING "  # what the line of a worker's result starts with


def config(name: str, devices: int) -> tuple[Config, str, int]:
    """Returns (config, variant, devices that experts are spread over) of a variant of the model on CPU devices."""
    variant, spreads = scaling_model.VARIANTS[name]
    spread = devices if spreads and variant == "sample" else 1
    routed = {
        "dense": RoutingConfig(),
        "batch": RoutingConfig(experts=EXPERTS),
        "sample": RoutingConfig(experts=EXPERTS, granularity="sample"),
        "learned": RoutingConfig(experts=EXPERTS, router="switch"),
    }[variant]
    train = TrainConfig(batch_size=IMAGES * devices, devices=devices, platform="cpu", expert_devices=spread)
    return Config(model=MODEL, routing=routed, train=train).validate(), variant, spread


def build(config: Config):
    """Returns (step, state, images, order), as training sets them up."""
    mesh = step.make_mesh(config.train)
    split = sources.load(config.data, config.model).train
    key = routing.address(jax.random.key(0), Purpose.ORDER)
    order = feed.TrainOrder(len(split), config.train.batch_size, key, mesh, config.slots)
    model = step.make_model(config, "cpu")
    train_step = step.make_train_step(config, model, mesh, order.steps_per_epoch)
    return train_step, step.make_state(config, model, mesh), feed.put(split, mesh), order


def collective_bytes(text: str) -> dict[str, int]:
    """Returns bytes that each kind of collective in an HLO text takes in on one device, groups of one left out."""
    found: dict[str, int] = {}
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    for line in text.splitlines():
        match = re.search(rf"= (.+?) ({kinds})(?:-start)?\(", line)
        if not match or re.search(r"replica_groups=(\[\d+,1\]|\{\{\d+\}(,\{\d+\})*\})", line):
            continue
        for kind, bits, sizes in re.findall(r"\b(f|bf|s|u|pred)(\d*)\[([\d,]*)\]", match.group(1)):
            size = int(np.prod([int(n) for n in sizes.split(",") if n], dtype=int))
            size *= 1 if kind == "pred" else int(bits) // 8
            found[match.group(2)] = found.get(match.group(2), 0) + size
    return found


def check_bytes() -> list[dict]:
    w, rows = scaling_model.work(MODEL, EXPERTS, IMAGES), []
    for name in scaling_model.VARIANTS:
        for devices in COUNTS[1:]:
            chosen, variant, spread = config(name, devices)
            train_step, state, images, order = build(chosen)
            text = train_step.lower(state, images, order.epoch(0)).compile().as_text()
            predicted = scaling_model.reduced_bytes(w, variant, devices, spread)
            found = collective_bytes(text)
            rows.append({"variant": name, "devices": devices, "predicted": predicted, **found})
            print(rows[-1], flush=True)
    return rows


def worker(values: flags.FlagValues) -> None:
    """Times every variant in this process, one of several."""
    distributed.join(values)
    for name in TIMED:
        train_step, state, images, order = build(config(name, jax.device_count())[0])
        index_SB, seconds = order.epoch(0), []
        for _ in range(STEPS):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(train_step(state, images, index_SB))
            seconds.append(time.perf_counter() - began)
        slowest = multihost_utils.process_allgather(np.asarray(seconds[5:])).reshape(-1, STEPS - 5).max(0)
        if distributed.first():
            best, median = float(slowest.min()), float(np.median(slowest))
            print(RESULT + json.dumps({"variant": name, "best": best, "median": median}), flush=True)


def check_times() -> list[dict]:
    cores, rows = len(os.sched_getaffinity(0)), []
    for count in COUNTS:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        joined = []
        for rank in range(count):
            command = [sys.executable, __file__, "--worker"]
            if count > 1:
                command += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={rank}"]
            env = {**os.environ, "SCALING_RANK": str(rank), "XLA_FLAGS": ""}
            joined.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in joined]
        if any(process.returncode for process in joined):
            raise SystemExit(f"{count} processes ended with {[process.returncode for process in joined]}")
        for line in outputs[0].splitlines():
            if line.startswith(RESULT):
                rows.append({"processes": count, "cores": min(count, cores), **json.loads(line[len(RESULT) :])})
                print(rows[-1], flush=True)
    return rows


def markdown(byte_rows: list[dict], time_rows: list[dict]) -> str:
    lines = [
        "| variant | devices | predicted bytes | all-reduced | other collectives |",
        "| :-- | --: | --: | --: | :-- |",
    ]
    for row in byte_rows:
        others = {k: v for k, v in row.items() if k not in ("variant", "devices", "predicted", "all-reduce")}
        told = ", ".join(f"{kind} {size:,}" for kind, size in others.items()) or "none"
        cells = [row["variant"], row["devices"], f"{row['predicted']:,}", f"{row.get('all-reduce', 0):,}", told]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    head = " | ".join(f"{count} ms (ratio)" for count in COUNTS)
    lines += ["", f"| variant, processes: | {head} |", "| :-- |" + " --: |" * len(COUNTS)]
    for name in TIMED:
        mine = {row["processes"]: row["best"] for row in time_rows if row["variant"] == name}
        lines.append(
            f"| {name} | " + " | ".join(f"{1e3 * mine[n]:.1f} ({mine[n] / mine[1]:.2f})" for n in COUNTS) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    values = flags.FlagValues()
    distributed.define_flags(values)
    flags.DEFINE_bool("worker", False, "Time in this process.", flag_values=values)
    values(sys.argv)
    if values.worker:
        distributed.guard(lambda: worker(values))
        return
    byte_rows = check_bytes()
    time_rows = check_times()
    scaling_model.OUT.mkdir(parents=True, exist_ok=True)
    about = {
        "hardware": step.describe(step.make_mesh(TrainConfig(devices=1, platform="cpu"))),
        "versions": checkpoint.versions(),
        "images_per_device": IMAGES,
        "experts": EXPERTS,
    }
    found = {**about, "bytes": byte_rows, "times": time_rows}
    (scaling_model.OUT / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    (scaling_model.OUT / "check.md").write_text(markdown(byte_rows, time_rows))
    print(markdown(byte_rows, time_rows))


if __name__ == "__main__":
    main()
