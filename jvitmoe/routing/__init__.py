"""How a step uses experts: one class for each way of routing. To add one: a class, and a line in ROUTINGS."""

from jvitmoe import rules
from jvitmoe.config import Config
from jvitmoe.errors import ConfigError, UnknownNameError, did_you_mean
from jvitmoe.models.routers import ROUTERS
from jvitmoe.routing.base import Routing, StepInfo
from jvitmoe.routing.batch import Batch, Layer
from jvitmoe.routing.in_model import InModel
from jvitmoe.routing.sample import Sample

__all__ = ["ROUTINGS", "Routing", "StepInfo", "find"]

# The names of `routing.kind`, besides those of ROUTERS. With one expert a run is dense, and its routing is `Routing`.
ROUTINGS: dict[str, type[Routing]] = {"batch": Batch, "layer": Layer, "sample": Sample}
OURS = dict(ROUTINGS)  # which an experiment file may not replace


def find(config: Config) -> Routing:
    """Returns the routing of a checked config. Raises UnknownNameError for a name that no registry has, and ConfigError
    for one that two have and for a broken rule of its class."""
    kind, names = config.routing.kind, (*ROUTINGS, *ROUTERS)
    if kind not in names:
        rule = f"it must be one of {', '.join(map(repr, names))}{did_you_mean(kind, names)}"
        raise UnknownNameError(f"config.routing.kind is {kind!r}; {rule}")
    if kind in ROUTINGS and kind in ROUTERS:
        raise ConfigError(f"config.routing.kind is {kind!r}, a name in ROUTINGS and in ROUTERS; give one another name")
    chosen = ROUTINGS.get(kind, InModel) if config.routing.experts > 1 else Routing
    rules.refuse(config, rules.of_router(config, ROUTERS[kind]) if chosen is InModel else chosen.faults(config))
    return chosen(config)
