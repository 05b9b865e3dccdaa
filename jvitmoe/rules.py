"""The rules that join several settings. Those of one setting stand beside it (`config`), those of a way of routing in
its class (`routing`)."""

from collections.abc import Iterator
from typing import Any

Config = Any  # of `config`, which imports this file

MOST_PARAMETERS = 10**13
SMALLEST_STD = 1e-3  # of pixels from 0 to 1: a quarter of their smallest difference


def faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (setting, the rule that it breaks) for each broken rule."""
    for find in (_data_faults, _model_faults, _train_faults, _routing_faults):
        yield from find(config)


def _data_faults(config: Config) -> Iterator[tuple[str, str]]:
    data, model = config.data, config.model
    if data.crop == "resized" and not data.stream:
        yield (
            "data.crop",
            "must be 'exact' or 'centre' for sets that live on the device; 'resized' needs data.stream=True",
        )
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
    if train.expert_devices > 1 and routing.kind != "sample":
        yield "train.expert_devices", f"must be 1 for routing.kind={routing.kind}; experts have devices with 'sample'"
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
    if routing.experts == 1 and routing.kind != "batch":
        yield "routing.experts", f"must be above 1 for routing.kind={routing.kind}"
    if routing.consistency and routing.experts == 1 and not model.drops:
        rule = "must be 0 with one expert, without model.dropout and model.drop_path: both passes are equal"
        yield "routing.consistency", rule
    if routing.consistency > 1 and routing.consistency_loss == "cosub":
        yield "routing.consistency", "must be at most 1 for consistency_loss=cosub: it is a share of the loss"
    if routing.pull_schedule == "qsr" and config.optim.schedule == "epoch":
        yield "routing.pull_schedule", "must not be 'qsr' for optim.schedule=epoch; it needs the rate of every step"
    if config.trains_adapters_only and not init.source:
        yield "init.source", "must name a trained ViT for model.lora and model.adapter, which keep it frozen"
    if config.trains_adapters_only and (routing.pattern, routing.part) != (("experts",), "mlp"):
        yield "routing.pattern", "must be ('experts',), with part 'mlp', for model.lora and model.adapter"


def _about_parameters(config: Config) -> int:
    """Returns the approximate number of parameters, to refuse sizes that no machine holds."""
    model = config.model
    block = 4 * model.width + 2 * config.routing.experts * (model.hidden + model.lora + model.adapter)
    head = (model.width + model.classes) * model.head_hidden or model.width * model.classes
    tables = max(model.patches, model.position_rows) + model.patch**2 * model.channels
    return model.width * (model.depth * block + tables) + head
