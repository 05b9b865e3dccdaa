"""Every rule of the settings that needs no data and no device.

`config` has the bounds of a single setting, beside its description. Rules that need the number of images or devices are
in `training.build`, where a run is made of its settings.
"""

import dataclasses
import math
import operator
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from jvitmoe.config import BOUNDS, LARGEST, SETTINGS, Config
from jvitmoe.errors import ConfigError, did_you_mean

LARGEST_FLOAT = 3e38  # float32
MOST_PARAMETERS = 10**13
MOST_POSITIONS = 2**27  # numbers in a table of fixed positions, which is computed wherever the model is built
SMALLEST_STD = 1e-3  # of pixels from 0 to 1: a quarter of their smallest difference


def check(config: Config) -> Config:
    """Returns the config if every rule holds. Raises ConfigError naming the first setting that breaks one.

    The rules of a router are `of_router`, which `routing.find` asks for, because they depend on its class.
    """
    for path, field in SETTINGS.items():
        value = operator.attrgetter(path)(config)
        if rule := broken_rule(field, value):
            raise ConfigError(f"config.{path} is {value!r}; it must be {rule}")
        if field.type is float:  # 2 and 2.0 are one setting, also where they are compared as text
            section, _, name = path.partition(".")
            setattr(getattr(config, section), name, float(value))
    if not config.model.width and config.init.source:
        return config  # `pretrained.complete` fills the model in and checks the rest
    for faults in (_data_faults, _model_faults, _train_faults, _routing_faults, _kind_faults):
        refuse(config, faults(config))
    return config


def refuse(config: Config, faults: Iterable[tuple[str, str]]) -> None:
    """Raises ConfigError for the first fault: (setting, the rule that it breaks)."""
    for path, rule in faults:
        raise ConfigError(f"config.{path} is {operator.attrgetter(path)(config)!r}; it {rule}")


def values(field: dataclasses.Field) -> str:
    """Returns the values that a setting allows, such as "int, greater than 0; free on resume"."""
    about = field.metadata
    allowed = about["rule"] if about["choices"] else ", ".join(filter(None, (_type_name(field), about["rule"])))
    return f"{allowed}; free on resume" if about["free"] else allowed


def broken_rule(field: dataclasses.Field, value: Any) -> str:
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


def _data_faults(config: Config) -> Iterator[tuple[str, str]]:
    data, model = config.data, config.model
    if data.crop == "resized" and not data.stream:
        yield "data.crop", "must be 'exact', 'centre' or 'whole' without data.stream=True"
    for path, values, least in (("data.mean", data.mean, 0.0), ("data.std", data.std, SMALLEST_STD)):
        if len(values) not in (1, model.channels) or not all(least <= value <= 1 for value in values):
            yield path, f"must be one number or {model.channels}, one per channel, each from {least:g} to 1"
    if data.part and not re.fullmatch(r"[1-9]\d{0,8}/[1-9]\d{0,8}", data.part):
        yield "data.part", "must be K/N, such as 2/8, or ''"
    elif data.part and operator.gt(*map(int, data.part.split("/"))):
        yield "data.part", "must be K/N with K at most N"
    if data.crop_padding > model.image_size:
        yield "data.crop_padding", f"must be at most model.image_size, which is {model.image_size}"


def _model_faults(config: Config) -> Iterator[tuple[str, str]]:
    model, parameters = config.model, _about_parameters(config)
    if not model.width:
        yield "model.width", "must be above 0 without init.source"
    if parameters > MOST_PARAMETERS:
        yield "model.width", f"makes about {parameters:.1e} parameters; they must be at most {MOST_PARAMETERS:.1e}"
    if model.width % model.heads:
        yield "model.width", f"must be a multiple of model.heads, which is {model.heads}"
    if model.positions == "sincos2d" and model.width % 4:
        yield "model.width", "must be a multiple of 4 for model.positions=sincos2d"
    if model.positions == "sincos2d" and (made := model.patches * model.width) > MOST_POSITIONS:
        yield "model.image_size", f"makes {made:,} fixed positions; at most {MOST_POSITIONS:,}: raise model.patch"
    if model.image_size % model.patch:
        yield "model.patch", f"must divide model.image_size, which is {model.image_size}"
    if model.stem != "patch" and (model.patch < 2 or model.patch & (model.patch - 1)):
        yield "model.patch", f"must be a power of two for model.stem={model.stem}"
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
        example = """--config.routing.pattern='("dense","experts")'"""
        yield "routing.pattern", f"must be a tuple of 'experts' and 'dense', with 'experts' in it, such as {example}"
    elif model.depth % len(routing.pattern):
        yield "routing.pattern", f"must have a length that divides model.depth, which is {model.depth}"
    if routing.consistency and routing.experts == 1 and not model.drops:
        yield "routing.consistency", "must be 0 with one expert, without model.dropout and model.drop_path"
    if routing.consistency > 1 and routing.consistency_loss == "cosub":
        yield "routing.consistency", "must be at most 1 for consistency_loss=cosub: it is a share of the loss"
    if config.trains_adapters_only and not init.source:
        yield "init.source", "must name a trained ViT for model.lora and model.adapter, which keep it frozen"
    for part in ("expert_hidden", "shared_hidden"):
        if getattr(model, part) and (routing.pattern != ("experts",) or config.trains_adapters_only):
            yield f"model.{part}", "must be 0 with a routing.pattern, model.lora and model.adapter"
    if routing.part == "model" and routing.pattern != ("experts",):
        yield "routing.pattern", "must be ('experts',) for routing.part=model"
    if config.trains_adapters_only and (routing.pattern != ("experts",) or routing.part == "model"):
        yield "routing.pattern", "must be ('experts',), with a part of the MLP, for model.lora and model.adapter"


def _kind_faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the broken rules of a dense run and of random routing."""
    routing, train = config.routing, config.train
    kind, experts = routing.kind, routing.experts
    if kind not in ("batch", "layer", "sample"):
        return
    yield from of_route(config)
    if kind == "layer":
        if routing.pattern.count("experts") > 1:  # the layers of one optimiser state must have one route
            yield "routing.pattern", "must have one 'experts', for routing.kind=layer"
        if routing.part == "model":
            yield "routing.part", "must not be 'model' for routing.kind=layer, which draws an expert in each layer"
    if kind == "sample":
        if train.batch_size % experts:
            yield "train.batch_size", f"must be a multiple of routing.experts, {experts}, for routing.kind=sample"
        if train.expert_devices > 1 and (experts % train.expert_devices or routing.consistency):
            yield "train.expert_devices", "must be 1, or divide routing.experts without routing.consistency"


def of_route(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the broken rules of every way of routing without a router in the model, those of others included."""
    kind = config.routing.kind
    if config.routing.experts == 1 and kind != "batch":
        yield "routing.experts", f"must be above 1 for routing.kind={kind}"
    if kind != "sample" and config.train.expert_devices > 1:
        yield "train.expert_devices", f"must be 1 for routing.kind={kind}; experts have devices with 'sample'"
    for path in ("model.expert_hidden", "model.shared_hidden", "routing.balance_bias"):
        if operator.attrgetter(path)(config):
            yield path, "must be 0 without a router in the model, such as routing.kind=topk"


def of_router(config: Config, router: Any) -> Iterator[tuple[str, str]]:
    """Yields the broken rules of a router, a class derived from `models.routers.Router`."""
    routing, train = config.routing, config.train
    if train.expert_devices > 1:
        yield "train.expert_devices", f"must be 1 for routing.kind={routing.kind}; experts have devices with 'sample'"
    if routing.balance_bias and not router.uses_bias:
        yield "routing.balance_bias", f"must be 0 for routing.kind={routing.kind}; switch and topk have such a bias"
    if router.uses_top_k and routing.top_k > routing.experts:
        yield "routing.top_k", f"must be at most routing.experts, which is {routing.experts}"
    if train.accumulate > 1 and routing.balance_loss and router.has_loss():
        yield "train.accumulate", "must be 1 for a router with a balance loss, which needs the whole batch at once"
    if routing.consistency:
        yield "routing.consistency", f"must be 0 for routing.kind={routing.kind}, which is no random route"
    if routing.part != "mlp" or config.trains_adapters_only:
        yield "routing.part", f"must be 'mlp', without LoRA and adapters, for routing.kind={routing.kind}"
    if routing.averages_every_step and router.is_tested:
        yield (
            "routing.pull",
            "must be below 1 with a learned router, or experts are equal after every step; set it to 0",
        )


def _about_parameters(config: Config) -> int:
    """Returns the approximate number of parameters, to refuse sizes that no machine holds."""
    model = config.model
    block = 4 * model.width + 2 * config.routing.experts * (model.hidden + model.lora + model.adapter)
    head = (model.width + model.classes) * model.head_hidden or model.width * model.classes
    tables = model.patches + model.patch**2 * model.channels
    return model.width * (model.depth * block + tables) + head
