"""How a step uses experts: one class for each way of routing. To add one: a class, and a line in ROUTINGS."""

from jvitmoe import rules
from jvitmoe.config import Config
from jvitmoe.errors import ConfigError, did_you_mean
from jvitmoe.models.routers import ROUTERS
from jvitmoe.routing.base import Routing, StepInfo
from jvitmoe.routing.batch import Batch, Layer
from jvitmoe.routing.in_model import InModel
from jvitmoe.routing.sample import Sample

__all__ = ["ROUTINGS", "Routing", "StepInfo", "find"]

# The names of `routing.kind`, besides those of ROUTERS. With one expert a run is dense, and its routing is `Routing`.
ROUTINGS: dict[str, type[Routing]] = {"batch": Batch, "layer": Layer, "sample": Sample}


def find(config: Config) -> Routing:
    """Returns the routing of a checked config. Raises ConfigError for an unknown name, and for a rule of its class that
    is broken."""
    kind, names = config.routing.kind, (*ROUTINGS, *ROUTERS)
    if kind not in names:
        rule = f"it must be one of {', '.join(map(repr, names))}{did_you_mean(kind, names)}"
        raise ConfigError(f"config.routing.kind is {kind!r}; {rule}")
    chosen = ROUTINGS.get(kind, InModel) if config.routing.experts > 1 else Routing
    rules.refuse(config, rules.of_router(config, ROUTERS[kind]) if chosen is InModel else chosen.faults(config))
    return chosen(config)
