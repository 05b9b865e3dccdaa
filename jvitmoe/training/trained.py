"""Which parameters are trained.

L layers
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe import routing
from jvitmoe.config import Config
from jvitmoe.experts import trees
from jvitmoe.models import adapters

AFTER_BLOCKS = ("norm", "pool", "head")  # first keys of the parameters that follow the blocks


def frozen(config: Config) -> Callable[[Sequence[Any]], bool] | None:
    """Returns a function that is True for the key path of a parameter that is not trained; None if all are trained.

    These are not trained: a router, if it says so; with LoRA or adapters, all except these and the head; with
    optim.freeze_layers, the embeddings, and the blocks if all of them are frozen. If some layers are frozen,
    `trained_layers` tells which layers of a block's leaf are trained.
    """
    fixed, rules = routing.find(config).untrained, list[Callable[[Sequence[Any]], bool]]()
    if fixed:
        rules.append(lambda path: any(entry.key == fixed for entry in path))
    if config.trains_adapters_only:
        rules.append(lambda path: path[0].key != "head" and path[-1].key not in (*adapters.LORA, *adapters.ADAPTER))
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
    return trees.of_group(path, trained_L, leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))


def stop_others(config: Config, params: Any) -> Any:
    """Returns the parameters, with no gradient for those that are not trained: they cost none and count in no norm."""
    is_frozen = frozen(config)
    if not is_frozen:
        return params

    def stop(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        if is_frozen(path):
            return jax.lax.stop_gradient(leaf)
        trained = trained_layers(config, path, leaf)
        return leaf if trained.all() else jnp.where(trained, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map_with_path(stop, params)


def count(config: Config, params: Any) -> int:
    """Returns the number of parameters that training may change, all experts together. `params` may be shapes."""
    is_frozen, total = frozen(config), 0
    for path, leaf in jax.tree.leaves_with_path(params):
        if is_frozen is None or not is_frozen(path):
            trained = trained_layers(config, path, leaf)
            total += leaf.size // trained.size * int(trained.sum())
    return total
