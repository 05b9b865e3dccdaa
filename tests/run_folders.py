"""Tiny experiments, and what their run folders hold."""

import json
import shutil
from pathlib import Path

import chex
import jax

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.machine import devices
from jvitmoe.runs.checkpoints import Checkpoints
from jvitmoe.training import build, state
from jvitmoe.training.state import TrainState

# Three epochs of five steps on digits.
TINY = {
    "data": {"crop_padding": 1, "flip": True, "validation": 100},
    "model": {"width": 8, "hidden": 12, "depth": 2, "heads": 2, "patch": 4, "dropout": 0.1},
    "routing": {"experts": 3, "kind": "layer", "init": "shared"},
    "train": {"epochs": 3, "batch_size": 256, "log_every": 1, "devices": 1},
}


def tiny(**overrides: dict) -> Config:
    """Returns the config of TINY with other settings by section."""
    return config_lib.from_dict({s: TINY.get(s, {}) | overrides.get(s, {}) for s in {*TINY, *overrides}})


def write_experiment(path: Path, config: Config, code: str = "") -> Path:
    """Writes an experiment file of that config, with code that runs when the file is read."""
    path.write_text(f"from jvitmoe.config import *\n\n\ndef get_config():\n    return {config!r}\n{code}")
    return path


def saved_config(workdir: Path) -> Config:
    return config_lib.loads((workdir / "config.json").read_text(), "config.json")


def saved(workdir: Path) -> list[Path]:
    """Returns the folders of the saved steps, oldest first."""
    return sorted((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))


def final_state(workdir: Path) -> TrainState:
    """Returns the newest sound checkpoint's state, on the host."""
    config = saved_config(workdir)
    given = state.abstract_state(build.plan_for(config, devices.make_mesh(config.train), config.train.batch_size))
    return jax.device_get(Checkpoints(workdir / "checkpoints").restore(given)[0])


def history(workdir: Path) -> list[dict]:
    """Returns the lines of the history, without the clock's."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def losses(workdir: Path) -> dict[int, float]:
    """Returns the loss of each logged training step."""
    return {line["step"]: line["loss"] for line in history(workdir) if line["kind"] == "train"}


def rows(workdir: Path) -> list[dict]:
    """Returns the rows of the result."""
    return json.loads((workdir / "result.json").read_text())["rows"]


def lose_newest(workdir: Path) -> None:
    """Deletes the newest checkpoint and the result, so that the run goes on from the checkpoint before."""
    shutil.rmtree(saved(workdir)[-1])
    (workdir / "result.json").unlink()


def assert_same_run(workdir: Path, uninterrupted: Path) -> None:
    """Compares two finished runs: state, history and result, to the bit."""
    chex.assert_trees_all_equal(final_state(workdir), final_state(uninterrupted))
    assert history(workdir) == history(uninterrupted)
    assert rows(workdir) == rows(uninterrupted)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
