"""Texts about the settings: those of `--help`, and the page docs/settings.md, which
`python -m jvitmoe.settings > docs/settings.md` writes."""

import dataclasses
import itertools
import operator
import textwrap
from collections.abc import Iterator

from jvitmoe.config import SETTINGS, Config
from jvitmoe.rules import values

PAGE_HEAD = """# Settings

Set a field in an experiment file (`config.model.width = 128`) or on the command line (`--config.model.width=128`).
The defaults below are those of `Config()`; an experiment file sets others, and the run's `config.json` has all values.
A resumed run may change only fields marked "free on resume"; one that has ended also takes a larger `train.epochs`.
`data.stream` is not free while validation images of a TFDS set are held out: a stream holds out other images. Rules
that join several fields are in `jvitmoe/rules.py`; those that need the data, the devices or a registry are checked
when a run starts.

`python -m jvitmoe.settings > docs/settings.md` writes this page."""


def help_text(config: Config, width: int) -> str:
    """Returns the part of `--help` about the settings, with the values of a config, wrapped at `width`."""
    lines = []
    for section, fields in itertools.groupby(SETTINGS.items(), _section):
        lines += ["", f"{section}:"]
        for path, field in fields:
            flag = f"--config.{path}={operator.attrgetter(path)(config)!r}"
            lines += help_lines(flag, f"{field.metadata['doc']} ({values(field)})", width)
    return "\n".join(lines)


def help_lines(flag: str, about: str, width: int) -> Iterator[str]:
    """Yields the lines of `--help` about a flag, wrapped at `width` columns."""
    for text, indent in ((flag, "  "), (about, "      ")):
        yield from textwrap.TextWrapper(max(width, 20), indent, indent, break_on_hyphens=False).wrap(text)


def page() -> str:
    """Returns the text of docs/settings.md: a table for each section."""
    lines = [PAGE_HEAD]
    for section, fields in itertools.groupby(SETTINGS.items(), _section):
        lines += ["", f"## {section}", "", "| setting | default | values | meaning |", "|---|---|---|---|"]
        for path, field in fields:
            lines.append(f"| `{path}` | `{field.default!r}` | {values(field)} | {field.metadata['doc']} |")
    return "\n".join(lines)


def _section(item: tuple[str, dataclasses.Field]) -> str:
    return item[0].partition(".")[0]


if __name__ == "__main__":
    print(page())
