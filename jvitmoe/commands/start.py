"""Makes a start that several runs begin from: `jvitmoe start --config finetune --classes classes.txt --out start`.

The start holds one model, the settings of the experiment, and the names of its classes. `jvitmoe train --start` trains
it at each place on the pictures that are there, and `jvitmoe average` makes one model of the results.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jvitmoe import rules
from jvitmoe.commands import cli, export
from jvitmoe.config import Config
from jvitmoe.errors import UserError, printable
from jvitmoe.runs.console import console


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError."""
    cli.end_cleanly()
    values = cli.parse(argv, _define_flags, config=True)
    if not values.classes or not values.out:
        raise UserError("--classes and --out are needed: a text file with a name of a class per line, and a new folder")
    try:
        lines = Path(values.classes).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--classes is {values.classes!r}, which is no text ({type(error).__name__})") from error
    start(values.config, [line.strip() for line in lines if line.strip()], Path(values.out))


def start(config: Config, classes: Sequence[str], out: Path) -> None:
    """Writes the start of an experiment. `classes` are the names of all classes that any of its runs may have. Raises
    UserError."""
    export.check_new(out)
    if len({*classes}) != len(classes) or not classes or not all(classes):
        raise UserError("the names of classes must be one or more, without an empty one and each once")
    config.model.classes = len(classes)
    rules.check(config)
    console.print("starting    JAX")
    from jvitmoe.interop import pretrained, starts  # not above: these import JAX
    from jvitmoe.interop.formats import TARGETS, base
    from jvitmoe.machine import compilation

    compilation.use_cache()
    pretrained.complete(config)
    source, lines = starts.make(config, tuple(classes))
    for line in lines:
        console.print(f"source      {line}")
    target = TARGETS["safetensors"]
    export.write(out, target, source, target.sample(source, base.noise(source.model)))
    console.print(f"start       {printable(str(out))}: {len(classes)} classes, hash {starts.digest(source)}")
    console.print(f"next        at each place: jvitmoe train --start {printable(str(out))} --config.data.dir=PICTURES")


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("classes", "", "Text file with the name of a class in each line.", flag_values=values)
    flags.DEFINE_string("out", "", "New folder to write to.", flag_values=values)
