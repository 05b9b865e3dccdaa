"""Shared by all commands: flags and exit codes. A UserError is one line with exit code 2."""

import contextlib
import errno
import inspect
import io
import logging as standard_logging
import os
import re
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from jvitmoe import experiments, rules
from jvitmoe.config import SETTINGS, Config, unknown_field
from jvitmoe.errors import UnknownNameError, UserError, did_you_mean, one_line
from jvitmoe.runs import safe_io
from jvitmoe.settings import help_lines, help_text


def parse(argv: list[str], define: Callable[[flags.FlagValues], None], config: bool = False) -> flags.FlagValues:
    """As `parse_with_arguments`, for a command that takes only flags and, if `config`, needs `--config`."""
    values, others = parse_with_arguments(argv, define, config)
    if others:
        as_flag = f"--config={others[0]}" if config and not config_path(argv) else "--name=value"
        raise UserError(f"{others[0]!r} is not a flag; write {as_flag}")
    if config and not config_path(argv) and not start_folder(argv) and not _saved_config(argv):
        raise UserError("--config is missing; give an experiment, such as --config=digits_random, or a file, my.py")
    return values


def parse_with_arguments(
    argv: list[str], define: Callable[[flags.FlagValues], None], config: bool = False, arguments: str = ""
) -> tuple[flags.FlagValues, list[str]]:
    """Returns the parsed flags of a command, which `define` adds, and its other arguments; prints the help, which calls
    the latter `arguments`, and exits for --help. With `config` it takes `--config=NAME[:VARIANT]` and
    `--config.a.b=value`.

    Raises UserError for an unknown flag or field, a value of the wrong type, and an experiment file that fails.
    """
    # ~ in a setting stays as it is: each process of a run may have another home.
    argv = [re.sub(r"^(?!--config\.)(.+?=)~(?=/|$)", lambda m: m[1] + os.path.expanduser("~"), part) for part in argv]
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_bool("help", False, "Shows this help.", short_name="h", flag_values=values)
    try:
        if config:
            path, argv = _take("config", argv)
            folder = start_folder(argv)
            if path and folder:
                raise UserError(f"--config is {path!r} and --start is {folder!r}; give one of them")
            loaded = experiments.of_start(folder) if folder else None
            loaded = experiments.load(path) if path else loaded or _saved_config(argv) or Config()
            config_flags.DEFINE_config_dataclass("config", loaded, "Experiment file.", values, sys_argv=argv)
            values["config"].default_as_str = None  # --help would print all fields on one line
        others = values(argv)[1:]
    except UserError:
        raise
    except Exception as error:  # config_flags raises several types for a field that does not exist
        raise UserError(_explain(error, values, argv)) from error
    if values.help:
        width = shutil.get_terminal_size().columns
        print(f"usage: jvitmoe {Path(argv[0]).stem} [flags] {arguments}".rstrip(), "", sep="\n")
        print(*textwrap.wrap((sys.modules[define.__module__].__doc__ or "").partition("\n\n")[0], width), "", sep="\n")
        if config:
            about = "An experiment that jvitmoe configs lists, or a file."
            print(*help_lines("--config=NAME[:VARIANT]", about, width), sep="\n")
        # In the order of their definitions: those that most people need come first.
        names = [name for name in values.flag_values_dict() if "config" not in name]
        for flag in {id(values[name]): values[name] for name in names}.values():
            default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
            given = f"[no]{flag.name}" if flag.boolean else f"{flag.name}={default}"
            print(*help_lines(f"--{given}", flag.help, width), sep="\n")
        if config:
            known = path or folder or _saved_config(argv)
            whose = "this experiment" if known else "Config(); --config NAME shows those of NAME"
            print("", *textwrap.wrap(f"Settings, with the values of {whose}:", width), sep="\n")
            print(help_text(values.config, width))
        sys.exit(0)
    if "plugin" in values and values.plugin:
        experiments.register(values.plugin)
    return values, others


def config_path(argv: list[str]) -> str:
    """Returns the value of `--config=FILE` or `--config FILE`, or ""."""
    return _take("config", argv)[0]


def start_folder(argv: list[str]) -> str:
    """Returns the value of `--start`, or ""."""
    return _take("start", argv)[0]


def _saved_config(argv: list[str]) -> Config | None:
    """Returns the settings of the run in `--workdir`, with which its command goes on; None if there is none."""
    name, _ = _take("workdir", argv)
    workdir = safe_io.run_folder(name)
    if not name or not os.path.isfile(workdir / safe_io.CONFIG):
        return None
    from jvitmoe.reports import comparison  # not above: it imports NumPy

    return comparison.read_config(workdir)


def experiment_name(argv: list[str]) -> str:
    """Returns the name of the experiment or start without a suffix, and "_VARIANT" if one is given."""
    if folder := start_folder(argv):
        return Path(folder).name
    path, variant = experiments.split_variant(config_path(argv))
    return Path(path).stem + (f"_{variant}" if variant else "")


def _take(flag: str, argv: list[str]) -> tuple[str, list[str]]:
    """Returns the value of a flag, or "", and the other arguments."""
    path, others, arguments = "", [], iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            path = value if equals else next(arguments, "")
        else:
            others.append(argument)
    return path, others


@contextlib.contextmanager
def data_dir_flag() -> Iterator[None]:
    """In its body an error about data names --data_dir, not --config.data.dir."""
    from jvitmoe.data.pictures import DataError  # here, because it imports NumPy

    try:
        yield
    except DataError as error:
        error.args = (str(error).replace("--config.data.dir", "--data_dir"),)
        raise


def end_cleanly() -> None:
    """Lets SIGTERM end the process as an exception does, which deletes what is unfinished."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def define_model(values: flags.FlagValues) -> None:
    """Defines the flag of the model that is asked, under its two names."""
    where = "Run folder, a folder that jvitmoe export wrote, or cifar10_cct, which comes with jvitmoe."
    flags.DEFINE_string("workdir", "", where, flag_values=values)
    flags.DEFINE_alias("model", "workdir", flag_values=values)


def define_weights(values: flags.FlagValues) -> None:
    """Defines the flags that choose weights of a run folder."""
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on validation) or a step.", flag_values=values)
    flags.DEFINE_bool("ema", False, "The EMA of the weights (train.ema), not the last weights.", flag_values=values)


def define_plugin(values: flags.FlagValues) -> None:
    """Defines the flag for a file that registers what a run or a data set needs."""
    about = "Experiment file with the router, routing, optimiser or data source that is needed; it is executed."
    flags.DEFINE_string("plugin", "", about, flag_values=values)


@contextlib.contextmanager
def naming_plugin(workdir: Path) -> Iterator[None]:
    """In its body an error about a name that no registry has names the experiment file that the run keeps."""
    try:
        yield
    except UnknownNameError as error:
        if not os.path.isfile(kept := workdir / safe_io.EXPERIMENT):
            raise
        remedy = f"read {kept}, and give --plugin={kept}, which executes it"
        raise UserError(
            f"{error}; the run was trained with an experiment file that may register it: {remedy}"
        ) from error


def run_folder(name: Path | str) -> Path:
    """Returns a --workdir. Raises UserError where it is missing, does not exist or holds no checkpoints."""
    if not name:
        raise UserError("--workdir is missing; give a run folder, such as --workdir=runs/digits_random")
    workdir = safe_io.run_folder(name)
    if not os.path.isdir(workdir / safe_io.CHECKPOINTS):
        problem = "holds no checkpoints" if os.path.exists(workdir) else "does not exist"
        raise UserError(f"workdir {str(workdir)!r} {problem}; give the folder that training wrote")
    return workdir


def experiment(values: flags.FlagValues) -> Config:
    """Returns the validated Config of `--config`."""
    return rules.check(values.config)


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Runs a command on sys.argv and exits with 0, or with 2 and one line on standard error for a UserError or a device
    without memory."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    stdout = sys.__stdout__
    is_own = bool(stdout) and sys.stdout is stdout  # the process is this command's, and not a test runner's
    if stdout and is_own:
        raw = io.BufferedWriter(_Stdout(stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, stdout.encoding, stdout.errors, line_buffering=stdout.line_buffering)
    logging.set_verbosity(logging.FATAL)  # Orbax logs a lot, and commands report what matters themselves
    # If several files of a checkpoint fail, the first failure is raised; asyncio would log the others with stacks, and
    # Python would warn of the writes that were never begun.
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)
    if sys.unraisablehook is sys.__unraisablehook__:  # not replaced by a test runner
        sys.unraisablehook = _show_unraisable
    code: Any = 0
    try:
        try:
            main(sys.argv)
        except SystemExit as stopped:
            code = stopped.code
        finally:
            sys.stdout.flush()  # raises UserError here if the disk is full
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # JAX's, which is not imported here
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remedy = "end other programs on it, or set JAX_PLATFORMS=cpu"
        print(f"error: the memory of a device is too small ({one_line(error)}); {remedy}", file=sys.stderr)
        sys.exit(2)
    if is_own:
        _leave_trackers(code)
    sys.exit(code)


def _leave_trackers(code: Any) -> None:
    """Ends the process at once if a tracker hangs, whose package would wait for it at exit."""
    trackers, processes = (sys.modules.get(f"jvitmoe.{name}") for name in ("runs.trackers", "machine.processes"))
    if trackers and processes and trackers.are_hanging():  # a run has imported both
        processes.leave_last(int(code or 0))


class _Stdout(io.FileIO):
    """Standard output that raises UserError if it cannot be written, and drops later writes. On a terminal that has
    closed (EIO) nobody reads, so there the command goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno == errno.EIO:
                return len(data)
            message = f"standard output cannot be written: {error.strerror}; make room or send it elsewhere"
            raise UserError(message) from error


def _show_unraisable(unraisable: Any) -> None:
    """Shows an exception that could not be raised, except what follows a failure that was raised or reported: reads and
    writes that Orbax and TensorStore abandon, in a coroutine or without a Python object; and a file that a library
    leaves open after a write to it failed, as TensorBoard's on a full disk (Python 3.13 tells of it)."""
    of_a_failure = unraisable.object is None or inspect.iscoroutine(unraisable.object)
    is_unwritten = isinstance(unraisable.object, io.BufferedWriter) and isinstance(unraisable.exc_value, OSError)
    if not (of_a_failure or is_unwritten):
        sys.__unraisablehook__(unraisable)


def _explain(error: Exception, values: flags.FlagValues, argv: list[str]) -> str:
    """Returns the message for flags that cannot be parsed."""
    for argument in argv:
        field = re.match(r"--(?:no)?config\.([\w.]+)", argument)
        if field and field[1] not in SETTINGS:
            return unknown_field(field[1])
    if isinstance(error, flags.UnrecognizedFlagError):
        known = [f"--{flag}" for flag in values if "." not in flag and len(flag) > 1]
        known += [f"--config.{field}" for field in SETTINGS] if "config" in values else []
        return f"--{error.flagname} is not a flag{did_you_mean(error.flagname, known) or '; --help lists them'}"
    return f"{error}; --help lists the flags and what they take"
