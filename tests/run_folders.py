"""What a run folder holds, to compare runs by."""

import json
from pathlib import Path

import chex
import jax

from jvitmoe import config as config_lib
from jvitmoe.experts import build
from jvitmoe.runs.checkpoints import Checkpoints
from jvitmoe.runtime import devices
from jvitmoe.training import state
from jvitmoe.training.state import TrainState


def final_state(workdir: Path) -> TrainState:
    """Returns the newest sound checkpoint's state, on the host."""
    config = config_lib.loads((workdir / "config.json").read_text(), "config.json")
    model, mesh = build.make_model(config, "cpu"), devices.make_mesh(config.train)
    return jax.device_get(Checkpoints(workdir / "checkpoints").restore(state.abstract_state(config, model, mesh))[0])


def history(workdir: Path) -> list[dict]:
    """Returns the lines of the history, without the clock's."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    """Holds two finished runs against each other: state, history and result, to the bit."""
    chex.assert_trees_all_equal(final_state(workdir), final_state(undisturbed))
    assert history(workdir) == history(undisturbed)
    rows = [json.loads((folder / "result.json").read_text())["rows"] for folder in (workdir, undisturbed)]
    assert rows[0] == rows[1]
