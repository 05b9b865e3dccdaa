"""Learning-rate schedules and optimisers. To add an optimiser, append a line to OPTIMIZERS."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jvitmoe.config import Config, OptimConfig
from jvitmoe.errors import ConfigError
from jvitmoe.experts import build, slices

DECAYED = ("kernel", "up", "down")  # matrices; AdamW does not decay biases, norms, positions and CLS


def schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Returns step -> learning rate: cosine to 0 over train.epochs.

    "step": linear warm-up from 0; changes at every step. "epoch": changes only at the start of an epoch, as PyTorch's
    CosineAnnealingLR with one step per epoch; this is the recipe of the original.
    """
    optim, epochs = config.optim, config.train.epochs
    if optim.schedule == "epoch":
        by_epoch = optax.cosine_decay_schedule(optim.learning_rate, epochs)
        return lambda step: by_epoch(step // steps_per_epoch)
    warmup = warmup_steps(config, steps_per_epoch)
    start = 0.0 if warmup else optim.learning_rate
    return optax.warmup_cosine_decay_schedule(start, optim.learning_rate, warmup, epochs * steps_per_epoch)


def warmup_steps(config: Config, steps_per_epoch: int) -> int:
    """Returns the number of warm-up steps: optim.warmup_epochs, but at most half of all steps, so that a short run
    reaches the peak of the learning rate."""
    return min(round(config.optim.warmup_epochs * steps_per_epoch), config.train.epochs * steps_per_epoch // 2)


def adam(optim: OptimConfig) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the gradient of every parameter before Adam sees it (PyTorch's Adam)."""
    return optax.chain(
        optax.add_decayed_weights(optim.weight_decay), optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    )


def adamw(optim: OptimConfig) -> optax.GradientTransformation:
    """Adds weight_decay * parameter after Adam, to matrices only (Loshchilov and Hutter, arXiv 1711.05101)."""

    def decayed(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    decay = optax.add_decayed_weights(optim.weight_decay, mask=decayed)
    return optax.chain(optax.scale_by_adam(optim.b1, optim.b2, optim.eps), decay)


# optim.name -> the transformation from gradients to the direction that the learning rate multiplies. One that treats
# a leaf as a whole (its norm, its rank) is wrapped in `per_layer`.
OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {"adam": adam, "adamw": adamw}


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns tx with every layer's array as a leaf of its own, also where the model stacks layers in [L, ...].

    LAMB's norms and Muon's matrices are then those of one layer. Adam does not need it. Experts reach tx without their
    layer axis, because they have one optimiser state per layer.
    """

    def stacks_layers(path: Sequence[Any], leaf: jax.Array) -> bool:
        return path[0].key == "blocks" and leaf.ndim >= slices.DENSE_RANK.get(path[-1].key, 0)

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, x: "layers" if stacks_layers(path, x) else "whole", params)

    def init(params: Any) -> Any:
        return jax.vmap(tx.init)(params) if jax.tree.leaves(params) else tx.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return (jax.vmap(tx.update) if jax.tree.leaves(updates) else tx.update)(updates, state, params)

    return optax.partition({"layers": optax.GradientTransformation(init, update), "whole": tx}, labels)


def direction(
    optim: OptimConfig, frozen: Callable[[Sequence[Any]], bool] | None = None
) -> optax.GradientTransformation:
    """Returns the transformation that `optim.name` selects; the learning rate multiplies what it returns.

    Parameters whose path is `frozen` have no direction, no decay and no moments.
    Raises ConfigError for an unknown name.
    """
    if optim.name not in OPTIMIZERS:
        near = difflib.get_close_matches(optim.name, OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        names = ", ".join(map(repr, OPTIMIZERS))
        raise ConfigError(f"config.optim.name is {optim.name!r}; it must be one of {names}{hint}")
    tx = OPTIMIZERS[optim.name](optim)
    if frozen is None:
        return tx

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "frozen" if frozen(path) else "trained", params)

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def make_direction(config: Config) -> optax.GradientTransformation:
    """Returns the transformation from gradients to the direction that the learning rate multiplies."""
    return direction(config.optim, build.frozen(config))
