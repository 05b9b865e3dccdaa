"""Learning rates, optimisers, and which parameters are trained. To add an optimiser, append a line to OPTIMIZERS.

L layers
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jvitmoe.config import Config, OptimConfig
from jvitmoe.errors import UnknownNameError, did_you_mean
from jvitmoe.experts.params import TUNED, Params, each, one
from jvitmoe.models import mlp, vit
from jvitmoe.routing import Routing

# Matrices; AdamW does not decay biases, norms, positions and CLS.
DECAYED = ("kernel", "up", "down", *mlp.LORA, "adapter_up", "adapter_down", "shared_up", "shared_down")
AFTER_BLOCKS = ("norm", "pool", "head")  # first keys of the parameters that follow the blocks
MUON_RMS = 0.2
# Axes of inputs and of outputs, counted from the last: all before them (layers, experts) count matrices. Attention has
# query, key and value [D, G, V] and out [G, V, D], each a matrix for all heads together.
MATRICES = {
    **dict.fromkeys(("query", "key", "value"), MuonDimensionNumbers((-3,), (-2, -1))),
    "out": MuonDimensionNumbers((-3, -2), (-1,)),
    **dict.fromkeys(("up", "down", "shared_up", "shared_down"), MuonDimensionNumbers((-2,), (-1,))),
}


def adam(optim: OptimConfig) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the gradient of every parameter before Adam sees it (PyTorch's Adam)."""
    return optax.chain(optax.add_decayed_weights(optim.weight_decay), optax.scale_by_adam(eps=optim.eps))


def adamw(optim: OptimConfig) -> optax.GradientTransformation:
    """Adds weight_decay * parameter after Adam, to matrices only (Loshchilov and Hutter, arXiv 1711.05101)."""
    return optax.chain(optax.scale_by_adam(eps=optim.eps), _decay_of_matrices(optim))


def muon(optim: OptimConfig) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) for the MATRICES, and AdamW for the rest.

    A layer's query, key, value, out, and each expert's up and down are one matrix each. The update is scaled to the RMS
    of AdamW's, 0.2, so both share optim.learning_rate and optim.weight_decay (Liu et al., arXiv 2502.16982).
    Momentum is 0.95 with Nesterov. optax corrects its bias, Jordan does not: for unrelated gradients the updates differ
    by 11 % at step 2 and 0.6 % at step 30; with `routing.kind=batch` each expert counts its own steps. The five
    Newton-Schulz iterations run in the parameters' float32, as optax has them (a GPU may round products to TF32). LoRA
    and adapters go with AdamW.
    """

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "muon" if is_matrix(path) else "adamw", params)

    def axes(updates: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: MATRICES[_name(path)], updates)

    def match_adam(path: Sequence[Any], update: jax.Array) -> jax.Array:
        fans = [math.prod(update.shape[n] for n in numbers) for numbers in MATRICES[_name(path)]]
        return MUON_RMS * math.sqrt(max(fans)) * update

    matrices = optax.chain(
        scale_by_muon(beta=0.95, nesterov=True, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(match_adam, updates)),
        _decay_of_matrices(optim),
    )
    return optax.partition({"muon": matrices, "adamw": adamw(optim)}, labels)


def is_matrix(path: Sequence[Any]) -> bool:
    """Returns True for the key path of a parameter, or its momentum, that Muon takes as matrices."""
    return isinstance(path[-1], jax.tree_util.DictKey) and _name(path) in MATRICES


def _name(path: Sequence[Any]) -> str:
    """Returns the name of a parameter by its key path; that of its layer for a kernel."""
    return str(path[-2:][0].key if path[-1].key == "kernel" else path[-1].key)


def _decay_of_matrices(optim: OptimConfig) -> optax.GradientTransformation:
    def decayed(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    return optax.add_decayed_weights(optim.weight_decay, mask=decayed)


# optim.name -> the transformation from gradients to the direction that the learning rate multiplies. One that treats
# a leaf as a whole (its norm, its rank) is wrapped in `per_layer`.
OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "adam": adam,
    "adamw": adamw,
    "muon": muon,
}
OURS = dict(OPTIMIZERS)  # which an experiment file may not replace


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns tx with every layer's array as a leaf of its own, also where the model stacks layers in [L, ...].

    LAMB's norms are then those of one layer. Adam does not need it. The MLPs of experts ("mlp", not "blocks") reach tx
    without their layer axis, because they have one optimiser state per layer.
    """

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "layers" if path[0].key == "blocks" else "whole", params)

    def init(params: Any) -> Any:
        return jax.vmap(tx.init)(params) if jax.tree.leaves(params) else tx.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return (jax.vmap(tx.update) if jax.tree.leaves(updates) else tx.update)(updates, state, params)

    return optax.partition({"layers": optax.GradientTransformation(init, update), "whole": tx}, labels)


def find(optim: OptimConfig) -> optax.GradientTransformation:
    """Returns the transformation from gradients to the direction that the learning rate multiplies, by `optim.name`.
    Raises UnknownNameError for a name that OPTIMIZERS lacks."""
    if optim.name not in OPTIMIZERS:
        rule = f"it must be one of {', '.join(map(repr, OPTIMIZERS))}{did_you_mean(optim.name, OPTIMIZERS)}"
        raise UnknownNameError(f"config.optim.name is {optim.name!r}; {rule}")
    return OPTIMIZERS[optim.name](optim)


class Optimizer:
    """How the parameters of a run are updated: direction, learning rate, its scale for each parameter, and what is not
    trained. Raises UnknownNameError for an unknown `optim.name`.

    Attributes:
        settings: `optim` of the run.
        tx: gradients -> directions. What is not trained has no direction, no decay and no moments.
    """

    def __init__(self, config: Config, routing: Routing) -> None:
        self.settings, self._epochs, self._experts = config.optim, config.train.epochs, routing.experts
        self._depth, self._pool = config.model.depth, config.model.pool
        self._expert_layers = np.array(routing.layers_with_experts)
        # No expert is an MLP if the model is dense, or if each expert is a whole model.
        self._mlps_are_trunk = routing.experts == 1 or routing.settings.part == "model"
        self._has_shared_expert = config.model.shared_hidden > 0
        self._rules = list[Callable[[Sequence[Any]], bool]]()  # True for the key path of what is not trained
        if fixed := routing.untrained:
            self._rules.append(lambda path: any(entry.key == fixed for entry in path))
        if config.trains_adapters_only:
            self._rules.append(lambda path: path[0].key != "head" and path[-1].key not in TUNED)
        if frozen := config.optim.freeze_layers:
            blocks = () if frozen == self._depth else ("blocks", "mlp")
            self._rules.append(lambda path: path[0].key not in (*AFTER_BLOCKS, *blocks))
        self.tx = find(config.optim)
        if self._rules:
            self.tx = optax.partition({"trained": self.tx, "frozen": optax.set_to_zero()}, self._labels)

    def _labels(self, params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "frozen" if self.is_frozen(path) else "trained", params)

    def schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """Returns step -> learning rate: cosine to 0 over train.epochs.

        "step": linear warm-up from 0; changes at every step. "epoch": changes only at the start of an epoch, as
        PyTorch's CosineAnnealingLR with one step per epoch; this is the recipe of the original.
        """
        optim = self.settings
        if optim.schedule == "epoch":
            by_epoch = optax.cosine_decay_schedule(optim.learning_rate, self._epochs)
            return lambda step: by_epoch(step // steps_per_epoch)
        warmup = self.warmup_steps(steps_per_epoch)
        start = 0.0 if warmup else optim.learning_rate
        return optax.warmup_cosine_decay_schedule(start, optim.learning_rate, warmup, self._epochs * steps_per_epoch)

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of warm-up steps: optim.warmup_epochs, but at most half of all steps, so that a short run
        reaches the peak of the learning rate."""
        return min(round(self.settings.warmup_epochs * steps_per_epoch), self._epochs * steps_per_epoch // 2)

    def multiplies_whole(self, path: Sequence[Any]) -> bool:
        """True for the key path of a parameter, or its momentum, that the optimiser multiplies as whole matrices."""
        return self.settings.name == "muon" and is_matrix(path)

    @property
    def scales_differ(self) -> bool:
        """True if some of `scales` is not 1."""
        optim, has_mlps = self.settings, self._mlps_are_trunk or self._has_shared_expert
        return optim.layer_decay < 1 or optim.freeze_layers > 0 or (has_mlps and optim.mlp_rate != 1)

    def scales(self, params: Params) -> Params:
        """Returns what multiplies the learning rate of each parameter, of the experts those of one: float32 [L, 1, ...]
        in blocks, else scalars.

        It is optim.layer_decay ** (L + 1 - n), where n is timm's layer (`param_groups_layer_decay`; BEiT, arXiv
        2106.08254): 0 for patches, positions, CLS and registers, l + 1 for block l, L + 1 for the head. The final norm
        has L, as has the last block; after a mean of tokens timm calls it fc_norm, and it has L + 1. Frozen layers have
        0. The MLPs of a dense model, or of each whole model, and shared experts have optim.mlp_rate times as much;
        other experts get theirs from `Routing.rate`. `params` may be shapes.
        """
        depth, optim = self._depth, self.settings
        is_fc_norm = self._pool in ("mean", "cls_mean")
        layers = {"norm": depth + is_fc_norm, "pool": depth + 1, "head": depth + 1}

        def scale(path: Sequence[Any], leaf: jax.Array) -> np.ndarray:
            layer = np.asarray(layers.get(path[0].key, 0))
            if (in_blocks := self._layers(path, leaf)) is not None:
                layer = 1 + in_blocks
            is_mlp = self._mlps_are_trunk and any(entry.key == "mlp" for entry in path)
            rate = optim.mlp_rate if is_mlp or path[-1].key in mlp.SHARED else 1.0
            return np.asarray(
                rate * optim.layer_decay ** (depth + 1.0 - layer) * self._trained_layers(path, leaf), np.float32
            )

        return Params(*(jax.tree.map_with_path(scale, tree) for tree in self._of_one(params)))

    def _of_one(self, params: Params) -> Params:
        """Returns the shapes of the trunk and of one expert."""
        return jax.eval_shape(lambda tree: Params(tree.trunk, one(tree.experts)), params)

    def _layers(self, path: Sequence[Any], leaf: Any) -> np.ndarray | None:
        """Returns which layers a leaf of the trunk or of one expert has, [L, 1, ...] to broadcast to it; None outside
        blocks."""
        if path[0].key not in ("blocks", "mlp"):
            return None
        layers = self._expert_layers  # the layers of {"mlp": ...}, what experts own
        if path[0].key == "blocks":
            layers = vit.of_group(path, np.arange(self._depth), leaf.shape[0])
        return layers.reshape(-1, *[1] * (leaf.ndim - 1))

    def groups(self, params: Params) -> list[str]:
        """Returns one line for each group of parameters with the same optimiser and weight decay, and one for those
        that are not trained. `params` may be shapes.

        Arrays of each layer and expert are counted. Learning rates are at the peak of the schedule. An optimiser that
        is new to this file is taken to decay matrices, as AdamW does.
        """
        optim = self.settings
        found: dict[str, list[tuple[float, int, int]]] = {}  # of each array: learning rate, arrays, parameters

        def add(copies: int, path: Sequence[Any], leaf: Any, scales: np.ndarray) -> None:
            name = "adamw" if optim.name == "muon" and not is_matrix(path) else optim.name
            decayed = optim.weight_decay and (name == "adam" or path[-1].key in DECAYED)
            name += f", weight decay {optim.weight_decay:g}" if decayed else ", no weight decay"
            rate = optim.learning_rate * (optim.mlp_rate if copies > 1 and not self._mlps_are_trunk else 1.0)
            for scale in scales.flat:
                stays = scale == 0 or self.is_frozen(path)
                count = copies, copies * leaf.size // scales.size
                found.setdefault("not trained" if stays else name, []).append((rate * scale, *count))

        for copies, tree, scales in zip((1, self._experts), self._of_one(params), self.scales(params), strict=True):
            jax.tree.map_with_path(functools.partial(add, copies), tree, scales)
        lines = []
        for name, members in found.items():
            rates, arrays, sizes = zip(*members, strict=True)
            line = f"{name}: {sum(arrays):,} arrays, {sum(sizes):,} parameters"
            ends = " to ".join(dict.fromkeys(f"{rate:g}" for rate in (min(rates), max(rates))))
            lines.append(line if name == "not trained" else f"{line}, learning rate {ends}")
        return lines

    def is_frozen(self, path: Sequence[Any]) -> bool:
        """True for the key path of a parameter that is not trained.

        These are not trained: the selection bias of a router; with LoRA or adapters, all except these and the head;
        with optim.freeze_layers, the embeddings, and the blocks if all of them are frozen. If some layers are frozen,
        `scales` and `stop_frozen` tell the layers of a block's leaf apart.
        """
        return any(rule(path) for rule in self._rules)

    def _trained_layers(self, path: Sequence[Any], leaf: Any) -> np.ndarray:
        """Returns which parts of a leaf optim.freeze_layers leaves trained, as `_layers`, else True."""
        layers = self._layers(path, leaf)
        return np.array(True) if layers is None else layers >= self.settings.freeze_layers

    def stop_frozen(self, params: Params) -> Params:
        """Returns the parameters, with no gradient for those that are not trained: they cost none and count in no
        norm."""
        if not self._rules:
            return params

        def stop(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
            if self.is_frozen(path):
                return jax.lax.stop_gradient(leaf)
            trained = self._trained_layers(path, leaf)
            return leaf if trained.all() else jnp.where(trained, leaf, jax.lax.stop_gradient(leaf))

        in_tree = functools.partial(jax.tree.map_with_path, stop)
        return Params(in_tree(params.trunk), each(in_tree, params.experts))

    def count_trained(self, params: Params) -> int:
        """Returns the number of parameters that training may change, all experts together. `params` may be shapes."""
        total = 0
        for copies, tree in zip((1, self._experts), self._of_one(params), strict=True):
            for path, leaf in jax.tree.leaves_with_path(tree):
                if not self.is_frozen(path):
                    trained = self._trained_layers(path, leaf)
                    total += copies * leaf.size // trained.size * int(trained.sum())
        return total
