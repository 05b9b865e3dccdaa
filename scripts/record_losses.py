"""Records the losses of 20 steps of a small ViT under every kind of routing, to compare two versions of the code.

    python scripts/record_losses.py --out before.json
    …                                                   # change what must not change a number
    python scripts/record_losses.py --out after.json --against before.json

Each run is a process of its own on two CPU devices, seed 0. With `--against`, it prints the largest difference of each
run and exits with 1 if one exceeds `--atol`. Compare on one machine and one JAX: other ones round differently.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
COMMON: dict[str, Any] = {
    **{"train.epochs": 1, "optim.warmup_epochs": 0, "train.batch_size": 64, "train.seed": 0, "train.log_every": 1},
    **{"model.dropout": 0.1, "model.depth": 2, "model.width": 32, "model.hidden": 48, "data.flip": True},
}
EXPERTS: dict[str, Any] = {"routing.experts": 4, "routing.init": "independent", "train.devices": 2}
SLOTS = EXPERTS | {"routing.kind": "sample"}
FOLDER = {"data.name": "folder", "data.dir": "{images}", "data.crop_padding": 1}
RUNS = {
    "dense": {},
    "batch": EXPERTS,
    "batch_layer": EXPERTS | {"routing.kind": "layer", "optim.name": "adam"},
    "sample": SLOTS,
    "token": EXPERTS | {"routing.kind": "token"},
    **{name: EXPERTS | {"routing.kind": name} for name in ("switch", "topk", "expert_choice", "soft", "hash")},
    "consistency": EXPERTS | {"routing.consistency": 1.0},
    "thor": EXPERTS | {"routing.consistency": 1.0, "routing.consistency_loss": "thor", "routing.kind": "layer"},
    "expert_axis": SLOTS | {"train.expert_devices": 2},
    "sharded": EXPERTS | {"train.shard": "parameters", "train.ema": 0.9},
    "streamed": SLOTS | FOLDER | {"data.stream": True},
    "accumulated": SLOTS | {"train.accumulate": 2},
    "cosub": SLOTS | {"routing.consistency": 0.5, "routing.consistency_loss": "cosub"},
    "muon": SLOTS | {"optim.name": "muon", "optim.mlp_rate": 4.0, "routing.pull": 1.0, "routing.init": "shared"},
    "muon_batch": EXPERTS | {"optim.name": "muon", "optim.mlp_rate": 2.0, "routing.pull": 0.1, "train.ema": 0.9},
    "pull_constant": SLOTS | {"routing.pull": 0.1, "routing.pull_every": 2},
    "mlp_rate": {"optim.mlp_rate": 2.0, "optim.clip_norm": 0.5, "optim.layer_decay": 0.8, "train.ema": 0.9},
    "pattern_sample": SLOTS | {"routing.pattern": '("dense","experts")'},
    "rdrop": {"routing.consistency": 1.0, "routing.consistency_loss": "thor"},
    "whole": SLOTS | {"routing.part": "model", "routing.pull": 1.0, "routing.pull_every": 4, "optim.clip_norm": 0.5},
    "whole_axis": SLOTS | {"routing.part": "model", "train.expert_devices": 2, "optim.name": "muon"},
    "shared_expert": EXPERTS
    | {"routing.kind": "topk", "model.shared_hidden": 16, "model.expert_hidden": 16, "routing.balance_bias": 0.001},
    "pattern": EXPERTS | {"routing.pattern": '("dense","experts")', "routing.part": "down"},
}


def write_images(folder: Path) -> None:
    """Writes scikit-learn's digits as an image folder."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("test" if number % 5 == 0 else "train") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9375).astype(np.uint8)).save(path)


def losses(name: str, scratch: Path) -> list[float]:
    """Returns the loss of each of the first 20 steps of one run."""
    settings = COMMON | RUNS[name]
    overrides = [f"--config.{key}={value}".format(images=scratch / "images") for key, value in settings.items()]
    command = ["-m", "jvitmoe.train", "--config", "configs/digits_dense.py", f"--workdir={scratch / name}", *overrides]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip()}")
    lines = [json.loads(line) for line in (scratch / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"][:20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the losses go, as JSON")
    parser.add_argument("--against", type=Path, help="an earlier --out to compare with")
    parser.add_argument("--atol", type=float, default=0.0, help="largest difference allowed; by default none")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    options = parser.parse_args()
    before = json.loads(options.against.read_text()) if options.against else {}
    found, worst = {}, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch) / "images")
        for name in options.only:
            found[name] = losses(name, Path(scratch))
            text = f"{name}: {found[name][0]:.6f} to {found[name][-1]:.6f}"
            if name in before:
                difference = float(np.abs(np.subtract(found[name], before[name])).max())
                worst = max(worst, difference)
                text += f", largest difference {difference:.1e}"
            print(text, flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if worst > options.atol:
        sys.exit(f"the largest difference is {worst:.1e}; it must be at most {options.atol:.1e}")


if __name__ == "__main__":
    main()
