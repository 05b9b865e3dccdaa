"""Settings: dataclass fields with a description and a rule, and the checks and texts made from these."""

import dataclasses
import itertools
import math
import operator
import textwrap
import typing
from typing import Any

from jvitmoe.errors import ConfigError, did_you_mean

LARGEST = 2**31 - 1  # sizes, steps and seeds are int32 on the devices
LARGEST_FLOAT = 3e38  # float32
BOUNDS = {
    "above": ("greater than", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "at_most": ("at most", operator.le),
}
PAGE_HEAD = """# Settings

Set a field in an experiment file (`config.model.width = 128`) or on the command line (`--config.model.width=128`).
The defaults below are those of `Config()`; an experiment file sets others, and the run's `config.json` has all values.
A resumed run may change only fields marked "free on resume". `data.stream` is not free while validation images of a
TFDS set are held out: a stream holds out other images. Rules that join several fields are in `jvitmoe/rules.py`;
those that need the data, the devices or a registry are checked when a run starts.

`python -m jvitmoe.config > docs/settings.md` writes this page."""


def setting(default: Any, doc: str, choices: tuple[str, ...] = (), free: bool = False, **bounds: float) -> Any:
    """Returns a dataclass field with all that is known about one setting.

    Args:
        doc: the description for `--help` and docs/settings.md.
        choices: the allowed values; empty allows all.
        free: True if a run may resume with another value, because it never changes a number of training.
        bounds: limits, by the names in BOUNDS.
    """
    limits = [f"{BOUNDS[name][0]} {limit:,}" for name, limit in bounds.items()]
    rule = f"one of {', '.join(map(repr, choices))}" if choices else " and ".join(limits)
    about = {"doc": doc, "choices": choices, "free": free, "bounds": bounds, "rule": rule}
    return dataclasses.field(default=default, metadata=about)


def values(field: dataclasses.Field) -> str:
    """Returns the values that a setting allows, such as "int, greater than 0; free on resume"."""
    about = field.metadata
    allowed = about["rule"] if about["choices"] else ", ".join(filter(None, (_type_name(field), about["rule"])))
    return f"{allowed}; free on resume" if about["free"] else allowed


def check(path: str, field: dataclasses.Field, value: Any) -> None:
    """Raises ConfigError if a value breaks the type, choices or bounds of its setting, or is too large."""
    if rule := _broken_rule(field, value):
        raise ConfigError(f"config.{path} is {value!r}; it must be {rule}")


def _broken_rule(field: dataclasses.Field, value: Any) -> str:
    """Returns the first rule of a setting that a value breaks, or ""."""
    choices, bounds, rule = (field.metadata[name] for name in ("choices", "bounds", "rule"))
    kind, *inside = _types(field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = is_number if kind is float else type(value) is kind
    if not fits or (inside and not all(type(entry) is inside[0] for entry in value)):
        return f"of type {_type_name(field)}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"at most {LARGEST:,} in size"
    if is_number and not math.isfinite(value):
        return "finite"
    if is_number and abs(value) > LARGEST_FLOAT:
        return f"at most {LARGEST_FLOAT} in size"
    if choices and value not in choices:
        return rule + did_you_mean(value, choices)
    return "" if all(BOUNDS[name][1](value, limit) for name, limit in bounds.items()) else rule


def _types(field: dataclasses.Field) -> tuple[Any, ...]:
    """Returns the type of a field and, if it is a tuple, the type of its entries and an ellipsis."""
    return (typing.get_origin(field.type) or field.type, *typing.get_args(field.type))


def _type_name(field: dataclasses.Field) -> str:
    return " of ".join(kind.__name__ for kind in _types(field)[:2])


def help_text(settings: dict[str, dataclasses.Field], width: int) -> str:
    """Returns the part of `--help` about {"section.name": field}, wrapped at `width` columns."""
    lines = ["", "Defaults of Config(); the experiment sets others:"]
    for section, fields in itertools.groupby(settings.items(), _section):
        lines += ["", f"{section}:"]
        for path, field in fields:
            flag = f"--config.{path}={field.default!r}"
            for text, indent in ((flag, "  "), (f"{field.metadata['doc']} ({values(field)})", "      ")):
                wrapper = textwrap.TextWrapper(max(width, 20), indent, indent, break_on_hyphens=False)
                lines += wrapper.wrap(text)
    return "\n".join(lines)


def page(settings: dict[str, dataclasses.Field]) -> str:
    """Returns the text of docs/settings.md: a table for each section of {"section.name": field}."""
    lines = [PAGE_HEAD]
    for section, fields in itertools.groupby(settings.items(), _section):
        lines += ["", f"## {section}", "", "| setting | default | values | meaning |", "|---|---|---|---|"]
        for path, field in fields:
            lines.append(f"| `{path}` | `{field.default!r}` | {values(field)} | {field.metadata['doc']} |")
    return "\n".join(lines)


def _section(item: tuple[str, dataclasses.Field]) -> str:
    return item[0].partition(".")[0]
