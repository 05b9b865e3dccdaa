"""Routers, which select the expert of each token inside the model. To add one: a class, and a line in ROUTERS."""

import jax

from jvitmoe.errors import ConfigError, did_you_mean
from jvitmoe.models.routers.dispatch import Router, RouterSettings, Statistics
from jvitmoe.models.routers.expert_choice import ExpertChoice
from jvitmoe.models.routers.frozen import Frozen
from jvitmoe.models.routers.hash import Hash
from jvitmoe.models.routers.soft import Soft
from jvitmoe.models.routers.switch import Switch
from jvitmoe.models.routers.topk import TopK

__all__ = ["ROUTERS", "Router", "RouterSettings", "Statistics", "find", "z_loss"]

# The names of `routing.router` besides "random", where the training step draws a route (experts.routes).
ROUTERS: dict[str, type[Router]] = {
    "switch": Switch,
    "topk": TopK,
    "expert_choice": ExpertChoice,
    "soft": Soft,
    "hash": Hash,
    "frozen": Frozen,
}


def find(name: str) -> type[Router]:
    """Returns the router of this name. Raises ConfigError if there is none."""
    if name not in ROUTERS:
        names = "random", *ROUTERS
        rule = f"it must be one of {', '.join(map(repr, names))}{did_you_mean(name, names)}"
        raise ConfigError(f"config.routing.router is {name!r}; {rule}")
    return ROUTERS[name]


def z_loss(statistics: Statistics) -> jax.Array:
    """Returns the mean of z over layers; this loss keeps logits small. Source: ST-MoE, arXiv 2202.08906, eq. 5."""
    return statistics.z.mean()
