"""Run folders that hold what a report reads, made without training."""

import json
from pathlib import Path

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.runs import safe_io

MODELS = ("merged", "expert 0", "2 random paths", "ensemble")  # of a run that `write_tested_run` makes


def write_tested_run(folder, accuracy=0.5, rate=None, models=MODELS, step=2, records=2, **fields) -> Path:
    """Writes what a report reads of a run: config.json with fields such as train__seed, result.json, and metrics.jsonl
    with so many records. Returns the folder."""
    config = Config()
    for path, value in fields.items():
        section, field = path.split("__")
        setattr(getattr(config, section), field, value)
    folder.mkdir()
    (folder / "config.json").write_text(config_lib.dumps(config))
    numbers = {"accuracy": accuracy, "nll": 2 * accuracy, "ece": 0.1, "images": 10, "parameters": 5}
    rows = [{"model": model, **numbers} for model in models]
    if "2 random paths" in models:
        rows[2] |= {"accuracy_std": 0.25, "flops_per_image": 2.5e6}
    result = {"rows": rows, "step": step, "seed": config.train.seed, "images_per_second": rate, "data": "digits"}
    result |= {"active_parameters": 5, "total_parameters": 9, "hardware": "1 x cpu"}
    safe_io.save_result(folder, result)
    steps = [(step, kind) for step in range(1, records + 1) for kind in ("train", "test")]
    lines = [{"step": step, "kind": kind, "loss": 2.0 / step, "accuracy": step / 9} for step, kind in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
