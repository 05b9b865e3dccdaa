"""The model of a config, which of its parameters are not trained, and its dense tree.

L layers
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jvitmoe.config import Config
from jvitmoe.errors import ConfigError
from jvitmoe.experts import merge, slices
from jvitmoe.models import adapters, routers, vit
from jvitmoe.models.routers import Router, RouterSettings

AFTER_BLOCKS = ("norm", "pool", "head")  # first keys of the parameters that follow the blocks


def find_router(config: Config) -> type[Router] | None:
    """Returns the router of the model, or None for random routes. Raises ConfigError for an unknown name or a broken
    rule; they are checked here because `config` does not import the routers."""
    routed, accumulate = config.routing, config.train.accumulate
    if routed.router == "random":
        return None
    router = routers.find(routed.router)
    if router.uses_top_k and routed.top_k > routed.experts:
        raise ConfigError(
            f"config.routing.top_k is {routed.top_k}; it must be at most routing.experts, which is {routed.experts}"
        )
    if accumulate > 1 and routed.balance_loss and router.loss is not Router.loss:
        raise ConfigError(
            f"config.train.accumulate is {accumulate}; it must be 1 for a router with a balance loss, which needs the "
            "whole batch at once"
        )
    return router


def frozen(config: Config) -> Callable[[Sequence[Any]], bool] | None:
    """Returns a function that is True for the key path of a parameter that is not trained; None if all are trained.

    These are not trained: the router, if it says so; with LoRA or adapters, all except these and the head; with
    optim.freeze_layers, the embeddings, and the blocks if all of them are frozen. If some layers are frozen,
    `trained_layers` tells which layers of a block's leaf are trained.
    """
    rules: list[Callable[[Sequence[Any]], bool]] = []
    if config.tuned:
        rules.append(lambda path: path[0].key != "head" and path[-1].key not in (*adapters.LORA, *adapters.ADAPTER))
    router = find_router(config)
    if router and not router.is_trained:
        rules.append(lambda path: any(entry.key == "router" for entry in path))
    if config.optim.freeze_layers:
        blocks = () if config.optim.freeze_layers == config.model.depth else ("blocks",)
        rules.append(lambda path: path[0].key not in (*AFTER_BLOCKS, *blocks))
    return (lambda path: any(rule(path) for rule in rules)) if rules else None


def trained_layers(config: Config, path: Sequence[Any], leaf: Any) -> np.ndarray:
    """Returns which parts of a leaf optim.freeze_layers leaves trained, to broadcast to the leaf: bool [L, 1, ...] in
    blocks, else True."""
    if path[0].key != "blocks":
        return np.array(True)
    trained_L = np.arange(config.model.depth) >= config.optim.freeze_layers
    return slices.of_group(path, trained_L, leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))


def make_model(config: Config, platform_name: str) -> vit.ViT:
    """Returns the model that training initialises, with its experts stacked, for "cpu", "gpu" or "tpu".

    Raises ConfigError as `find_router`.
    """
    routed, router, settings = config.routing, find_router(config), None
    if router:
        top_k = router.most_experts(routed.top_k, routed.experts)
        settings = RouterSettings(routed.router, top_k, routed.capacity, routed.eval_capacity)
    pattern = routed.pattern if routed.experts > 1 else ("experts",)
    experts = routed.experts, routed.init, routed.shared_layer
    fused = platform_name == "gpu" and _fuses_attention()
    return vit.build(config.model, *experts, settings, platform_name, pattern, fused)


def _fuses_attention() -> bool:
    """True if the local GPUs have compute capability 8.0 (A100) or more, which cuDNN's fused attention needs."""
    capability = str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", ""))
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8.0


def dense_tree(config: Config, params: Any) -> Any:
    """Returns the dense tree of a run: the merged model, or the parameters themselves of a dense run."""
    plain = config.routing.experts == 1 and not config.tuned
    return params if plain else jax.jit(merge.average_experts)(params)
