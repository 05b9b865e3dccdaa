"""All commands under one name: `jvitmoe train …` is `python -m jvitmoe train …`, and so for the others."""

import ast
import importlib
import sys
from importlib import metadata
from pathlib import Path

from jvitmoe.commands import cli
from jvitmoe.errors import UserError, did_you_mean
from jvitmoe.machine import memory

COMMANDS = {
    "train": "--config digits_random",
    "evaluate": "--workdir runs/digits_random",
    "start": "--config finetune --classes classes.txt --out start",
    "average": "site_a site_b --start start --data_dir CHECK --out merged",
    "sweep": "my.py:dense my.py:mine --seeds 3 --out runs/sweep",
    "report": "runs/digits_dense runs/digits_random",
    "predict": "--workdir runs/digits_random IMAGE…",
    "serve": "--model cifar10_cct",
    "export": "--workdir runs/digits_random --to timm --out exports/digits",
    "compile": "--config imagenet --target h100:8",
    "configs": "",
}


def main() -> None:
    """Runs the command that the first argument names; without one, lists them."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        cli.run(_list)
    run(name, sys.argv[1:])


def run(name: str, argv: list[str]) -> None:
    """Runs a command on its command line, program name first."""
    if name == "train":  # its steps use much memory
        memory.use_huge_pages()
    sys.argv = argv
    cli.run(importlib.import_module(f"jvitmoe.commands.{name}").main)


def _list(argv: list[str]) -> None:
    """Prints the commands. Raises UserError for a name that is none of them."""
    if argv[1:] and argv[1] not in ("--help", "-h", "help", "--version"):
        hint = did_you_mean(argv[1], COMMANDS) or f"; they are {', '.join(COMMANDS)}"
        raise UserError(f"{argv[1]!r} is not a command{hint}")
    if argv[1:] == ["--version"]:
        print(f"jvitmoe {metadata.version('jvitmoe')}")
        return
    print("--help after a command lists its flags:")
    for name, arguments in COMMANDS.items():
        about = ast.get_docstring(ast.parse((Path(__file__).parent / "commands" / f"{name}.py").read_text())) or ""
        print(f"\n  {about.partition(': `')[0]}", f"  jvitmoe {name} {arguments}".rstrip(), sep="\n")


if __name__ == "__main__":
    main()
