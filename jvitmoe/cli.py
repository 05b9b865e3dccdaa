"""What every command shares: flags in, one line and exit code 2 out when the user can mend the cause."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from jvitmoe.config import Config, UserError, unknown_field


def parse(argv: list[str], define: Callable[[flags.FlagValues], None], config: bool = False) -> flags.FlagValues:
    """Returns the parsed flags of one command.

    Args:
        argv: the command line, program name first.
        define: adds the command's own flags.
        config: whether the command takes `--config=FILE.py` and `--config.a.b=value`.

    Raises UserError for a flag, field or value that does not exist or does not parse, and for a missing config file.
    """
    values = flags.FlagValues()
    define(values)
    if config:
        config_flags.DEFINE_config_file("config", None, "Experiment file.", flag_values=values, sys_argv=argv)
    flags.DEFINE_bool("help", False, "Shows this help.", short_name="h", flag_values=values)
    try:
        rest = values(argv)[1:]
        if values.help:
            print(f"usage: python -m jvitmoe.{Path(argv[0]).stem} [flags]\n{values.main_module_help()}")
            sys.exit(0)
        if rest:
            raise UserError(f"{rest[0]!r} is not a flag; write --name=value")
        if config:
            _ = values.config  # a missing file fails only when it is first read
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from error
    except (KeyError, AttributeError) as error:
        raise UserError(_explain_field(argv, error)) from error
    except OSError as error:
        path = next((a.partition("=")[2] or "?" for a in argv if a.startswith("--config=")), "?")
        raise UserError(f"config file {path!r} cannot be read; give the path of a file such as configs/digits_random.py") from error
    return values


def experiment(values: flags.FlagValues) -> Config:
    """Returns the validated Config behind `--config`. Raises UserError where it is missing or is no Config."""
    config = values.config
    if config is None:
        raise UserError("--config is missing; give an experiment file, such as --config=configs/digits_random.py")
    if not isinstance(config, Config):
        raise UserError(f"get_config() of the config file returns {type(config).__name__}; it must return jvitmoe.config.Config")
    return config.validate()


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Runs a command on sys.argv and exits: 0, or 2 with one line on standard error when the user can mend the cause."""
    try:
        main(sys.argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _explain_field(argv: list[str], error: Exception) -> str:
    """config_flags names only the last part of a field that is missing; the command line has all of it."""
    for argument in argv:
        match = re.match(r"--(?:no)?config\.([\w.]+)", argument)
        if match:
            section, _, name = match.group(1).partition(".")
            if not hasattr(getattr(Config(), section, None), name or "?"):
                return unknown_field(match.group(1))
    return f"the config file cannot be used: {error}"
