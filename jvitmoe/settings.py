"""Rules of settings: that of one beside its field and description, those that join several, and the checks and texts
made from these. Those of a way of routing are in its class (`routing`)."""

import dataclasses
import itertools
import math
import operator
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from jvitmoe.errors import ConfigError, did_you_mean

Config = Any  # of `config`, which imports this file
LARGEST = 2**31 - 1  # sizes, steps and seeds are int32 on the devices
LARGEST_FLOAT = 3e38  # float32
MOST_PARAMETERS = 10**13
MOST_POSITIONS = 2**27  # numbers in a table of fixed positions, which is computed wherever the model is built
SMALLEST_STD = 1e-3  # of pixels from 0 to 1: a quarter of their smallest difference
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
TFDS set are held out: a stream holds out other images. Rules that join several fields are in `jvitmoe/settings.py`;
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


def joint_faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (setting, the rule that it breaks) for each broken rule."""
    for find in (_data_faults, _model_faults, _train_faults, _routing_faults):
        yield from find(config)


def _data_faults(config: Config) -> Iterator[tuple[str, str]]:
    data, model = config.data, config.model
    if data.crop == "resized" and not data.stream:
        rule = "must be 'exact' or 'centre' for sets that live on the device; 'resized' needs data.stream=True"
        yield "data.crop", rule
    for path, values, least in (("data.mean", data.mean, 0.0), ("data.std", data.std, SMALLEST_STD)):
        if len(values) not in (1, model.channels) or not all(least <= value <= 1 for value in values):
            yield path, f"must be one number or {model.channels}, one per channel, each from {least:g} to 1"
    if data.crop_padding > model.image_size:
        yield "data.crop_padding", f"must be at most model.image_size, which is {model.image_size}"


def _model_faults(config: Config) -> Iterator[tuple[str, str]]:
    model, parameters = config.model, _about_parameters(config)
    if parameters > MOST_PARAMETERS:
        about = f"makes about {parameters:.1e} parameters with the other sizes"
        yield "model.width", f"{about}; they must be at most {MOST_PARAMETERS:.1e}"
    if model.width % model.heads:
        yield "model.width", f"must be a multiple of model.heads, which is {model.heads}"
    if model.positions == "sincos2d" and model.width % 4:
        yield "model.width", "must be a multiple of 4 for model.positions=sincos2d"
    if model.positions == "sincos2d" and (made := model.patches * model.width) > MOST_POSITIONS:
        rule = f"they must be at most {MOST_POSITIONS:,}: lower it, or raise model.patch"
        yield "model.image_size", f"makes {made:,} fixed positions with model.patch and model.width; {rule}"
    if model.image_size % model.patch:
        yield "model.patch", f"must divide model.image_size, which is {model.image_size}"
    if 0 < model.position_rows < model.patches:
        yield "model.position_rows", f"must be 0 or at least the number of patches, which is {model.patches}"
    if model.stem != "patch" and (model.patch < 2 or model.patch & (model.patch - 1)):
        halves = f"model.stem={model.stem}, which halves the image at each convolution"
        yield "model.patch", f"must be a power of two for {halves}"
    if model.cls_position and not model.has_cls:
        yield "model.cls_position", f"must be False for model.pool={model.pool}, which has no CLS token"


def _train_faults(config: Config) -> Iterator[tuple[str, str]]:
    optim, routing, train = config.optim, config.routing, config.train
    if train.devices and train.batch_size % train.devices:
        yield "train.batch_size", f"must be a multiple of train.devices, which is {train.devices}"
    if train.devices % train.expert_devices:
        yield "train.expert_devices", f"must divide train.devices, which is {train.devices}"
    if optim.schedule == "epoch" and optim.warmup_epochs:
        yield "optim.warmup_epochs", "must be 0 for optim.schedule=epoch; warm-up needs optim.schedule=step"
    if optim.freeze_layers > config.model.depth:
        yield "optim.freeze_layers", f"must be at most model.depth, which is {config.model.depth}"
    if optim.freeze_layers and routing.experts > 1 and routing.pull:
        yield "optim.freeze_layers", "must be 0 with routing.pull, which moves experts of all layers"


def _routing_faults(config: Config) -> Iterator[tuple[str, str]]:
    model, routing, init = config.model, config.routing, config.init
    if "experts" not in routing.pattern or not {*routing.pattern} <= {"experts", "dense"}:
        rule = "must be a tuple of 'experts' and 'dense', with 'experts' in it, such as "
        yield "routing.pattern", rule + """--config.routing.pattern='("dense","experts")'"""
    elif model.depth % len(routing.pattern):
        yield "routing.pattern", f"must have a length that divides model.depth, which is {model.depth}"
    if routing.consistency and routing.experts == 1 and not model.drops:
        rule = "must be 0 with one expert, without model.dropout and model.drop_path: both passes are equal"
        yield "routing.consistency", rule
    if routing.consistency > 1 and routing.consistency_loss == "cosub":
        yield "routing.consistency", "must be at most 1 for consistency_loss=cosub: it is a share of the loss"
    if config.trains_adapters_only and not init.source:
        yield "init.source", "must name a trained ViT for model.lora and model.adapter, which keep it frozen"
    if model.expert_hidden or model.shared_hidden:
        part = "expert_hidden" if model.expert_hidden else "shared_hidden"
        if routing.pattern != ("experts",):
            yield f"model.{part}", "must be 0 with a routing.pattern: layers without experts would have another width"
        if config.trains_adapters_only:
            yield f"model.{part}", "must be 0 with model.lora and model.adapter"
    if routing.part == "model" and routing.pattern != ("experts",):
        yield "routing.pattern", "must be ('experts',) for routing.part=model"
    if config.trains_adapters_only and (routing.pattern != ("experts",) or routing.part == "model"):
        yield "routing.pattern", "must be ('experts',), with a part of the MLP, for model.lora and model.adapter"


def _about_parameters(config: Config) -> int:
    """Returns the approximate number of parameters, to refuse sizes that no machine holds."""
    model = config.model
    block = 4 * model.width + 2 * config.routing.experts * (model.hidden + model.lora + model.adapter)
    head = (model.width + model.classes) * model.head_hidden or model.width * model.classes
    tables = max(model.patches, model.position_rows) + model.patch**2 * model.channels
    return model.width * (model.depth * block + tables) + head


def help_text(settings: dict[str, dataclasses.Field], config: Config, width: int) -> str:
    """Returns the part of `--help` about {"section.name": field}, with the values of a config, wrapped at `width`."""
    lines = []
    for section, fields in itertools.groupby(settings.items(), _section):
        lines += ["", f"{section}:"]
        for path, field in fields:
            flag = f"--config.{path}={operator.attrgetter(path)(config)!r}"
            lines += help_lines(flag, f"{field.metadata['doc']} ({values(field)})", width)
    return "\n".join(lines)


def help_lines(flag: str, about: str, width: int) -> Iterator[str]:
    """Yields the lines of `--help` about a flag, wrapped at `width` columns."""
    for text, indent in ((flag, "  "), (about, "      ")):
        yield from textwrap.TextWrapper(max(width, 20), indent, indent, break_on_hyphens=False).wrap(text)


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
