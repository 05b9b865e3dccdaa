"""Experiment files: found by path or by the name of one of ours, and run for the Config that they return."""

import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.errors import UserError, did_you_mean, one_line
from jvitmoe.runs import safe_io

REGISTRIES = {  # to which a file may add, and the module of each
    "ROUTINGS": "routing",
    "ROUTERS": "models.routers",
    "AUGMENTATIONS": "data.augment",
    "OPTIMIZERS": "training.optimizer",
    "SOURCES": "data.sources",
}


def ours() -> Path:
    """Returns the folder of jvitmoe's own experiments: beside this file in a wheel, else in the checkout."""
    installed = Path(__file__).parent / "experiments"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def split_variant(name: str) -> tuple[str, str]:
    """Returns (path, VARIANT) of `FILE.py:VARIANT` and `NAME:VARIANT`; the variant is "" without one. A FILE ends in
    .py or has a separator; a NAME is that of an experiment of ours, whatever lies in the working folder."""
    if _is_file_name(name) and os.path.isfile(name):  # its path may have a colon
        return name, ""
    path, mark, variant = name.partition(".py:") if ".py:" in name else name.partition(":")
    path += mark.removesuffix(":")
    named = ours() / f"{path}.py"
    return str(named) if not _is_file_name(path) and named.is_file() else path, variant


def _is_file_name(path: str) -> bool:
    return path.endswith(".py") or os.path.basename(path) != path


def load(name: str | Path) -> Config:
    """Returns the Config of an experiment, `FILE.py` or NAME; with `:VARIANT` after it, of that variant, a text for its
    get_config. Raises UserError with the line that fails."""
    path, variant = split_variant(os.path.expanduser(name))
    if not os.path.isfile(path) or not _is_file_name(path):
        problem = "is a folder" if os.path.isdir(path) else "does not exist"
        names = [file.stem for file in ours().glob("*.py")]
        hint = did_you_mean(Path(path).stem, names) or "; give a file, or a name that jvitmoe configs lists"
        if os.path.isfile(path):
            problem, hint = "is no name of an experiment", f"; for the file give --config=./{path}"
        raise UserError(f"config file {path!r} {problem}{hint}")

    def get_config(module: Any) -> Any:
        if variant and not inspect.signature(module.get_config).parameters:
            raise UserError(f"config file {path!r} has no variants, such as {variant!r}; give --config={path}")
        return module.get_config(variant) if variant else module.get_config()

    config = _run(path, get_config)
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f"get_config() of {path!r} returns {kind}; it must return jvitmoe.config.Config")
    return config


def register(path: str | Path) -> None:
    """Executes a file for what it adds to registries; it needs no get_config. Raises UserError as `load` does."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UserError(f"--plugin is {path!r}, which is no file; give the experiment file of the run")
    _run(path, lambda module: None)


def text(name: str | Path) -> bytes:
    """Returns the text of a user's experiment, named as for `load`; b"" for "" and for an experiment of ours."""
    path = Path(split_variant(os.path.expanduser(name))[0]) if name else None
    return path.read_bytes() if path and path.resolve().parent != ours().resolve() else b""


class _Text(SourceFileLoader):
    """Runs what the file says, never __pycache__ beside it, which may hold another program."""

    def path_stats(self, path: Any) -> Any:
        raise OSError


def _run(path: str, then: Callable[[Any], Any]) -> Any:
    """Executes a file, and returns what `then` makes of its module. Raises UserError with the line that fails."""
    folder, module, before = str(Path(path).parent), types.ModuleType(path), set(sys.modules)
    module.__file__ = path
    sys.modules[path] = module  # dataclasses look up the module that defines them
    # An experiment may import files of its folder, whatever else has their names; but a run folder may be a stranger's,
    # and of its files only the one that was named is executed.
    found = [] if os.path.isdir(os.path.join(folder, safe_io.CHECKPOINTS)) else [folder]
    sys.path[:0] = found
    inside = {file.stem for place in found for file in Path(place).glob("*.py")} - sys.stdlib_module_names
    others = {imported: sys.modules.pop(imported) for imported in inside & sys.modules.keys()}
    try:
        _Text(path, path).exec_module(module)
        made = then(module)
        _refuse_replaced(path)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{_where(error, path)}; correct the config file") from error
    finally:
        for place in found:
            sys.path.remove(place)
        for imported in sys.modules.keys() - before:  # else a later experiment would get these, edited or not
            file = getattr(sys.modules[imported], "__file__", None)
            if file and Path(file).resolve().parent == Path(folder).resolve():
                del sys.modules[imported]
        sys.modules.update(others)
    return made


def _refuse_replaced(path: str) -> None:
    """Puts back what a file has replaced of ours in a registry, and raises UserError where it has."""
    for name, file in REGISTRIES.items():
        if module := sys.modules.get(f"jvitmoe.{file}"):  # not imported here: some import JAX
            registry, ours = getattr(module, name), module.OURS
            replaced = [key for key, entry in ours.items() if registry.get(key) is not entry]
            registry.update(ours)
            if replaced:
                raise UserError(f"{path} replaces {replaced[0]!r} in {name}, which is ours; give yours another name")


def of_start(folder: Path | str) -> Config:
    """Returns the settings that a start (`jvitmoe start`) holds, with it as their source. Raises UserError."""
    path = Path(folder := os.path.expanduser(folder)) / safe_io.CONFIG

    def holds_settings(about: object) -> bool:
        return isinstance(about, dict) and isinstance(about.get("settings"), dict)

    about = safe_io.read_json(path, holds_settings, "the settings of a start", "give a folder of jvitmoe start")
    if about is None:
        raise UserError(f"--start is {str(folder)!r}, which holds no {path.name}; give a folder of jvitmoe start")
    config = config_lib.loads(json.dumps(about["settings"]), str(path))
    config.init.source = folder
    return config


def _where(error: BaseException, path: str) -> str:
    """Returns file, number, error and text of the line that fails, in the experiment or a file of its folder."""
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
        kind, text = type(error).__name__, (error.text or "").strip()
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg} in {text[:100]!r}"
    folder = Path(path).resolve().parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve().parent == folder]
    if not frames:
        return f"{path}: {one_line(error)}"
    return f"{frames[-1].filename}:{frames[-1].lineno}: {one_line(error)} in {(frames[-1].line or '')[:100]!r}"
