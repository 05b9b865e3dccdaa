"""A start: one model, with settings and names of classes, that runs at several places begin from, so that their weights
can be averaged. It is an export of ours whose config.json also has the settings.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvitmoe import config as config_lib
from jvitmoe.config import NEUTRAL, Config
from jvitmoe.errors import ConfigError
from jvitmoe.interop import load, pretrained, weight_names
from jvitmoe.interop.load import Source
from jvitmoe.runs import checkpoints, safe_io


def make(config: Config, classes: tuple[str, ...]) -> tuple[Source, list[str]]:
    """Returns (the start of an experiment for the named classes, lines that say what was loaded of `init.source`).

    Its weights are those of `init.source`, with a new head if it has more or fewer classes, or a new model. Raises
    UserError.
    """
    for field in ("expert_hidden", "shared_hidden"):
        if size := getattr(config.model, field):
            rule = "it must be 0 for a start, whose MLPs have model.hidden units; leave it out"
            raise ConfigError(f"config.model.{field} is {size}; {rule}")
    if not config.init.source:
        params, lines = pretrained.fresh(config), ["no init.source: a new model, which no site has trained yet"]
    else:
        tree, lines = pretrained.start(config)
        params = weight_names.flatten(jax.device_get(tree))
    settings = config_lib.from_dict(config_lib.to_dict(config))
    settings.init.source = settings.data.dir = ""  # of this machine
    model = dataclasses.replace(config.model, lora=0, adapter=0)
    params["positions"] = load.positions(model, params)
    data = config.data
    pixels = data.crop, data.mean, data.std
    return Source(Path(), load.OURS, params, model.plain(), classes, (), settings, *pixels), lines


def begin(config: Config, folder: Path | str) -> None:
    """Lets a run of these settings begin from a start: sets `init.start` to its hash. Raises ConfigError for a folder
    that is none, and where the settings describe another model than that of the start."""
    folder = os.path.expanduser(folder)
    source = load.read(folder)
    if source.config is None:
        raise ConfigError(f"--start is {folder!r}, which is no start; make one with jvitmoe start")
    if config.init.source != folder:
        raise ConfigError(f"config.init.source is {config.init.source!r}; with --start it is the start; leave it out")
    ours = facts(config)
    for path, theirs in facts(source).items():
        if ours[path] != theirs:
            raise ConfigError(f"config.{path} is {ours[path]!r}; the start has {theirs!r}; leave it out")
    config.init.start = digest(source)


def digest(source: Source) -> str:
    """Returns the hash of a model: its weights, classes, architecture and preprocessing."""
    about = json.dumps([facts(source), source.classes], sort_keys=True).encode()
    found = hashlib.sha256(about)
    for name, leaf in sorted(source.params.items()):
        found.update(f"{name} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf, np.float32).data)
    return found.hexdigest()[:16]


def facts(of: Source | Config) -> dict[str, Any]:
    """Returns {"section.field": value} of all that models must have in common to be averaged, besides classes: of a
    model that was read, or of the one that a run of these settings makes."""
    pixels: Any = of.data if isinstance(of, Config) else of
    model = dataclasses.replace(of.model, lora=0, adapter=0).plain() if isinstance(of, Config) else of.model
    found = {f"model.{name}": value for name, value in dataclasses.asdict(model).items() if name not in NEUTRAL}
    for name in ("mean", "std"):  # one number stands for all channels
        found[f"data.{name}"] = tuple(np.broadcast_to(getattr(pixels, name), model.channels).tolist())
    return found | {"data.crop": pixels.crop}


def class_names(config: Config, workdir: Path) -> tuple[str, ...]:
    """Returns the classes of the start of a run, which its data may lack: those kept in the run folder, if the run goes
    on; () without a start. Raises UserError where the start cannot be read."""
    if not config.init.start:
        return ()
    if checkpoints.list_steps(workdir / safe_io.CHECKPOINTS) and (saved := safe_io.read_classes(workdir)):
        return saved
    source = load.read(config.init.source)
    if (found := digest(source)) != config.init.start:
        raise ConfigError(f"config.init.start is {config.init.start!r}; {config.init.source} has {found}; give --start")
    return source.classes
