"""Routers, which select the expert of each token inside the model. To add one: a class, and a line in ROUTERS."""

from jvitmoe.models.routers.dispatch import SELECTION_BIAS, Router, RouterSettings, Statistics
from jvitmoe.models.routers.expert_choice import ExpertChoice
from jvitmoe.models.routers.hash import Hash
from jvitmoe.models.routers.random_tokens import RandomTokens
from jvitmoe.models.routers.soft import Soft
from jvitmoe.models.routers.switch import Switch
from jvitmoe.models.routers.topk import TopK

__all__ = ["ROUTERS", "SELECTION_BIAS", "Router", "RouterSettings", "Statistics", "find"]

# The names of `routing.kind` that choose experts inside the model.
ROUTERS: dict[str, type[Router]] = {
    "switch": Switch,
    "topk": TopK,
    "expert_choice": ExpertChoice,
    "soft": Soft,
    "hash": Hash,
    "token": RandomTokens,
}
OURS = dict(ROUTERS)  # which an experiment file may not replace


def find(name: str) -> type[Router]:
    """Returns the router of this name."""
    return ROUTERS[name]
