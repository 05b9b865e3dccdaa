"""Compiles ViT-S/16 and ViT-B/16 for 8 GPUs (H100) and 16 TPUs (v5e), and compares the bytes that devices exchange with
the model of docs/scaling.md.

    pip install -e '.[tpu,gpu-compile]'
    python scripts/compile_table.py

Takes about 45 minutes on two cores; cases that results/compile/cases.json has are not compiled again. Nothing is run.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import sweep
from absl import app, flags

from jvitmoe import routing
from jvitmoe.config import Config
from jvitmoe.experts import cost
from jvitmoe.machine import programs
from jvitmoe.runs.console import markdown_table

TARGETS = {"h100:8": 8, "v5e:4x4": 16}
SIZES = {"ViT-S/16": [], "ViT-B/16": ["model.width=768", "model.hidden=3072", "model.heads=12"]}
SAMPLE = ["routing.kind=sample", "routing.init=shared", "routing.pull=1"]
PROGRAMS = {
    "dense": [],
    "`batch`, 4 experts": ["routing.experts=4"],
    "`sample`, 4 on the axis": ["routing.experts=4", "train.expert_devices=4", *SAMPLE],
    "`sample`, 8 on the axis": ["routing.experts=8", "train.expert_devices=8", *SAMPLE],
    "Switch, 4 experts": ["routing.experts=4", "routing.kind=switch"],
}
SHARDS = ("none", "optimizer", "parameters")
Case = tuple[str, str, str, str]  # target, size, program, shard

OUT = flags.DEFINE_string("out", "results/compile", "Folder of cases.json and table.md.")


def is_left_out(target: str, size: str, program: str, shard: str) -> bool:
    """True for ViT-B/16 with train.shard on TPUs: its collectives are those of ViT-S/16, and a case takes a minute."""
    return target.startswith("v5e") and size == "ViT-B/16" and shard != "none"


def flags_of(case: Case) -> list[str]:
    _, size, program, shard = case
    settings = [*SIZES[size], *PROGRAMS[program], f"train.shard={shard}"]
    return ["--config=imagenet", *(f"--config.{setting}" for setting in settings)]


def config_of(case: Case) -> Config:
    """Returns the Config of a case, as its flags make it."""
    return sweep.config_of(flags_of(case))


def predicted(case: Case) -> int:
    """Returns the bytes that a device exchanges in a step, as docs/scaling.md counts them: the gradients, once if they
    are reduced whole; with train.shard, gradients are scattered and parameters gathered; and a pull at every step."""
    config, devices = config_of(case), TARGETS[case[0]]
    way, train = routing.find(config), config.train
    trunk, experts = (4 * cost.tree_size(tree) for tree in way.shapes())
    data = devices // train.expert_devices
    one = experts // config.routing.experts
    scattered = (trunk + one * way.reduced_experts) if way.slots == 1 else trunk + experts // train.expert_devices
    # For TPUs XLA gathers parameters in the dtype of the products, bfloat16.
    gathered = scattered // 2 if case[0].startswith("v5e") and train.shard == "parameters" else scattered
    if way.slots == 1:
        return scattered + (0 if train.shard == "none" else gathered)
    own = experts // train.expert_devices
    if train.shard == "none" or data == 1:
        return trunk + (own if data > 1 else 0) + one
    # Each device sums its part of the trunk, and of the mean of experts, over the expert axis.
    return scattered + gathered + (trunk + one) // data


def measure(case: Case) -> dict[str, Any]:
    """Returns what `jvitmoe compile` found, in a process of its own: a compiler keeps the memory that it took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "jvitmoe", "compile", *flags_of(case), f"--target={case[0]}", f"--out={out}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' | '.join(case)}: {done.stderr}")
        return json.loads(out.read_text())


def table(found: dict[str, Any]) -> str:
    """Returns the cases as Markdown, a table for each target and size."""
    parts = []
    for target, size in itertools.product(TARGETS, SIZES):
        rows = []
        for program, shard in itertools.product(PROGRAMS, SHARDS):
            case = (target, size, program, shard)
            if (one := found.get(" | ".join(case))) is None:
                continue
            expected, kinds = predicted(case), Counter[str]()
            for moved in one["collectives"]:
                kinds[moved["kind"]] += moved["bytes"]
            rows.append(
                {
                    "program": program,
                    "shard": shard,
                    "state, GiB": f"{(one['bytes']['parameters'] + one['bytes']['optimiser']) / 2**30:.2f}",
                    "temporaries, GiB": f"{one['bytes']['temporaries'] / 2**30:.2f}",
                    "peak, GiB": f"{one['peak_bytes'] / 2**30:.2f}",
                    **{f"{kind}, MB": f"{kinds[kind] / 1e6:.1f}" for kind in programs.KINDS[:3]},
                    "all, MB": f"{sum(kinds.values()) / 1e6:.1f}",
                    "by the model, MB": f"{expected / 1e6:.1f}",
                    "off": f"{100 * (sum(kinds.values()) / expected - 1):+.2f} %",
                }
            )
        if rows:
            parts.append(f"**{size} on {target}**, a batch of 1,024\n\n{markdown_table(rows)}")
    return "\n".join(parts)


def main(argv: list[str]) -> None:
    folder = Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cases.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    cases = [case for case in itertools.product(TARGETS, SIZES, PROGRAMS, SHARDS) if not is_left_out(*case)]
    for number, case in enumerate(cases, 1):
        name = " | ".join(case)
        if name not in found:
            print(f"{number} of {len(cases)}: {name}", flush=True)
            found[name] = measure(case)
            path.write_text(json.dumps(found, indent=1) + "\n")
        (folder / "table.md").write_text(table(found))


if __name__ == "__main__":
    app.run(main)
