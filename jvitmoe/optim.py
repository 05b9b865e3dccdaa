"""Learning-rate schedules and the optimiser: Adam with L2 in the gradient (the original) or AdamW."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jvitmoe.config import Config, OptimConfig
from jvitmoe.models import mlp

DECAYED = ("kernel", "up", "down")  # matrices; biases, norms, positions and CLS are left alone by AdamW


def schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Returns step -> learning rate: cosine to 0 over train.epochs.

    "step": linear warm-up from 0, then moving every step. "epoch": moving at each epoch's start only, as PyTorch's
    CosineAnnealingLR stepped once per epoch does; the original's recipe.
    """
    optim, epochs = config.optim, config.train.epochs
    if optim.schedule == "epoch":
        by_epoch = optax.cosine_decay_schedule(optim.learning_rate, epochs)
        return lambda step: by_epoch(step // steps_per_epoch)
    warmup = warmup_steps(config, steps_per_epoch)
    start = 0.0 if warmup else optim.learning_rate
    return optax.warmup_cosine_decay_schedule(start, optim.learning_rate, warmup, epochs * steps_per_epoch)


def warmup_steps(config: Config, steps_per_epoch: int) -> int:
    """Returns the number of warm-up steps: those of optim.warmup_epochs, at most half of all, so that a short run
    reaches the peak of the learning rate."""
    return min(round(config.optim.warmup_epochs * steps_per_epoch), config.train.epochs * steps_per_epoch // 2)


def frozen(config: Config) -> Callable[[Sequence[Any]], bool] | None:
    """Returns whether the parameter at a path stays as it is, or None where all are trained: a frozen router; with LoRA
    or adapters, everything but these and the head."""
    if config.tuned:
        return lambda path: path[0].key != "head" and path[-1].key not in (*mlp.LORA, *mlp.ADAPTER)
    if config.routing.router == "frozen":
        return lambda path: any(entry.key == "router" for entry in path)
    return None


def direction(
    optim: OptimConfig, frozen: Callable[[Sequence[Any]], bool] | None = None
) -> optax.GradientTransformation:
    """Returns the transformation from gradients to the direction that the learning rate multiplies.

    Parameters whose path is `frozen` have no direction, no decay and no moments.

    "adam" adds weight_decay * parameter to the gradient of every parameter before Adam sees it (PyTorch's Adam).
    "adamw" adds it after, to matrices only (Loshchilov and Hutter, arXiv 1711.05101).
    """
    adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    if optim.name == "adam":
        tx = optax.chain(optax.add_decayed_weights(optim.weight_decay), adam)
    else:
        tx = optax.chain(adam, optax.add_decayed_weights(optim.weight_decay, mask=_decay_mask))
    if frozen is None:
        return tx

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "frozen" if frozen(path) else "trained", params)

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def _decay_mask(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, params)
