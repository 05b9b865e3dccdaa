"""Lists the experiments that come with jvitmoe: `jvitmoe configs [NAME[:VARIANT]]`.

Says what each experiment is and what to expect of it. With a name it prints the whole description, with the command;
with a variant also the settings that it changes.
"""

import ast
import shutil
import textwrap

from jvitmoe import config as config_lib
from jvitmoe import experiments
from jvitmoe.commands import cli
from jvitmoe.errors import UserError, did_you_mean

INDENT = 18  # columns of the names


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError for a name that is no experiment."""
    _, names = cli.parse_with_arguments(argv, lambda values: None, arguments="[NAME[:VARIANT]…]")
    folder = experiments.ours()
    about = {path.stem: ast.get_docstring(ast.parse(path.read_text())) or "" for path in sorted(folder.glob("*.py"))}
    for name, _, variant in (name.partition(":") for name in names):
        if name not in about:
            hint = did_you_mean(name, about) or "; jvitmoe configs lists them"
            raise UserError(f"{name!r} is not an experiment{hint}")
        print(f"{folder / name}.py\n\n{about[name]}\n")
        if variant:
            plain, other = (experiments.load(each) for each in (name, f"{name}:{variant}"))
            for path, (_, value) in config_lib.differences(plain, other).items():
                print(f"{variant}: --config.{path}={value!r}")
    if names:
        return
    width = shutil.get_terminal_size().columns - INDENT
    for name, text in about.items():
        first, *rest = textwrap.wrap(_summary(text), max(width, 40))
        print(f"{name:<{INDENT}}{first}", *(" " * INDENT + line for line in rest), sep="\n")


def _summary(text: str) -> str:
    """Returns the first paragraph of a description and the third, after the command: what to expect."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return " ".join([paragraphs[0], *paragraphs[2:3]])
