"""What every command shares: flags in, one line and exit code 2 out when the user can mend the cause."""

import io
import logging as standard_logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from jvitmoe.config import Config, UserError, flatten, unknown_field

MISSING = "--config is missing; give an experiment file, such as --config=configs/digits_random.py"


def parse(argv: list[str], define: Callable[[flags.FlagValues], None], config: bool = False) -> flags.FlagValues:
    """Returns the parsed flags of a command that takes nothing but flags; otherwise as `parse_with_arguments`."""
    values, arguments = parse_with_arguments(argv, define, config)
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag; write --name=value")
    return values


def parse_with_arguments(
    argv: list[str], define: Callable[[flags.FlagValues], None], config: bool = False
) -> tuple[flags.FlagValues, list[str]]:
    """Returns the parsed flags of one command, and its other arguments.

    Args:
        argv: the command line, program name first.
        define: adds the command's own flags.
        config: whether the command takes `--config=FILE.py` and `--config.a.b=value`.

    Raises UserError for a flag, field or value that does not exist or does not parse, and for a config file that is
    missing or fails.
    """
    values = flags.FlagValues()
    define(values)
    path = config_path(argv) if config else ""
    if path and not Path(path).is_file():
        raise UserError(f"config file {path!r} does not exist; give one such as configs/digits_random.py")
    if config:
        config_flags.DEFINE_config_file("config", None, "Experiment file.", flag_values=values, sys_argv=argv)
        sys.path.insert(0, str(Path(path).parent))  # so that experiments may import their neighbours
    flags.DEFINE_bool("help", False, "Shows this help.", short_name="h", flag_values=values)
    try:
        arguments = values(argv)[1:]
        if values.help:
            fields = [f"  --config.{name}={value!r}" for name, value in flatten(Config()).items()] if config else []
            print(f"usage: python -m jvitmoe.{Path(argv[0]).stem} [flags]\n{values.get_help()}", *fields, sep="\n")
            sys.exit(0)
        if config:
            _ = values.config  # a file that fails to load says so only when it is first read
    except flags.Error as error:
        raise UserError(MISSING if config and not path else str(error).splitlines()[0]) from error
    except Exception as error:  # a config file is Python: anything may come out of it
        raise UserError(_unknown_override(argv) or f"config file {path!r} fails: {error!r}") from error
    finally:
        if config:
            sys.path.pop(0)
    return values, arguments


def config_path(argv: list[str]) -> str:
    """Returns what `--config=FILE` or `--config FILE` says, or ""."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-"):
            return value if equals else following
    return ""


def experiment(values: flags.FlagValues) -> Config:
    """Returns the validated Config behind `--config`. Raises UserError where it is missing or is no Config."""
    config = values.config
    if config is None:
        raise UserError(MISSING)
    if not isinstance(config, Config):
        raise UserError(
            f"get_config() of the config file returns {type(config).__name__}; it must return jvitmoe.config.Config"
        )
    return config.validate()


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Runs a command on sys.argv and exits: 0, or 2 and one line on standard error where the user can mend it."""
    before = sys.__stdout__
    if before and sys.stdout is before:  # no test runner's
        raw = io.BufferedWriter(_Stdout(before.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, before.encoding, before.errors, line_buffering=before.line_buffering)
    logging.set_verbosity(logging.FATAL)  # Orbax tells of its habits; what matters, commands say themselves
    # Where several files of a checkpoint fail, the first failure is raised; asyncio would show the others with stacks.
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:  # no test runner's
        sys.unraisablehook = _show_unraisable
    try:
        try:
            main(sys.argv)
        finally:
            if sys.stdout:
                sys.stdout.flush()  # here, where a full disk is one line
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


class _Stdout(io.FileIO):
    """Standard output that raises UserError if it cannot be written. What is written to it later is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise UserError(
                f"standard output cannot be written: {error.strerror}; make room or send it elsewhere"
            ) from error


def _show_unraisable(found: Any) -> None:
    """Shows an exception that could not be raised, but not those of C code that nobody waits for: TensorStore's threads
    have some after a failed write, which is raised to whoever waits for it besides."""
    if found.object is not None:
        sys.__unraisablehook__(found)


def _unknown_override(argv: list[str]) -> str | None:
    """Returns the message for an override of a field that does not exist; config_flags names only its last part."""
    for argument in argv:
        match = re.match(r"--(?:no)?config\.([\w.]+)", argument)
        if match and match.group(1) not in flatten(Config()):
            return unknown_field(match.group(1))
    return None
