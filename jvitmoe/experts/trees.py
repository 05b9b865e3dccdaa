"""E experts are one tree in which some leaves have an axis E more: split and join, take and put.

In the blocks a dense leaf is [L, ...] and a stacked one [L, E, ...]. With a pattern of n layers each of its positions
has its own tree, with leaves [L / n, ...] (`vit.ViT`). Experts that are whole models (`routing.part=model`) are E dense
trees: every leaf is stacked, and E is its first axis.

L layers · E experts
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.config import RoutingConfig
from jvitmoe.models import mlp, vit

Tree = Any
Array = TypeVar("Array", jax.Array, np.ndarray)

MLP = ("up", "up_bias", "down", "down_bias")
TUNED = (*mlp.LORA, *mlp.ADAPTER)
SECOND = mlp.START_AT_ZERO  # AdaMix shares the second matrix of each pair
# routing.part -> the leaves of an MLP that each expert owns; and of LoRA and adapters, if these are what is trained
PARTS = {"mlp": MLP, "up": MLP[:2], "down": MLP[2:]}
TUNED_PARTS = {"mlp": TUNED, "up": tuple(name for name in TUNED if name not in SECOND), "down": SECOND}
# Rank of each MLP leaf in the dense tree, its leading L axis included (models/mlp.py).
DENSE_RANK = {name: 2 if name.endswith("bias") else 3 for name in (*MLP, *TUNED)}
EXPERT_AXIS = 1  # of the leaves of an MLP, after L


def is_whole(params: Tree) -> bool:
    """True if each expert of a tree of parameters is a whole model. Blocks alone are taken to have experts in MLPs."""
    return "norm" in params and bool(params["norm"]["scale"].ndim == 2)  # [E, D], in a dense tree [D]


def expert_axis(params: Tree) -> int:
    """Returns the expert axis of the stacked leaves of a tree of parameters."""
    return 0 if is_whole(params) else EXPERT_AXIS


def one(params: Tree) -> Tree:
    """Returns the shapes of one expert if experts are whole models, else `params` themselves."""
    if not is_whole(params):
        return params
    return jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), params)


def owned(routing: RoutingConfig, adapters_only: bool) -> Callable[[Sequence[Any]], bool]:
    """Returns a function that is True for the key path of a parameter that each expert has its own copy of: those of
    `routing.part`, of LoRA and adapters if only they are trained, in the layers that `routing.pattern` marks."""
    pattern = routing.pattern
    names = (TUNED_PARTS if adapters_only else PARTS)[routing.part]
    return lambda path: path[-1].key in names and pattern[vit.position_in_group(path) or 0] == "experts"


def stack(params: Tree, copies: Tree, owns: Callable[[Sequence[Any]], bool]) -> Tree:
    """Returns the stacked tree: the leaves that experts own come from `copies`, E dense trees with leaves [E, ...]; the
    others, the trunk, are those of `params`."""
    copy_of: dict[Any, jax.Array] = dict(jax.tree.leaves_with_path(copies))

    def choose(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(copy_of[path], 0, EXPERT_AXIS) if owns(path) else leaf

    return jax.tree.map_with_path(choose, params)


def stacked(params: Tree) -> Tree:
    """Returns the tree of bools that says which leaves of parameters have an expert axis."""
    whole = is_whole(params)
    return jax.tree.map_with_path(lambda path, leaf: whole or is_stacked(path, leaf), params)


def is_stacked(path: Sequence[Any], leaf: Any) -> bool:
    """True for a parameter of an MLP, by its key path and rank, that has an expert axis."""
    return leaf.ndim == DENSE_RANK.get(path[-1].key, leaf.ndim) + 1


def split(tree: Tree, stacked: Tree) -> tuple[Tree, Tree]:
    """Returns (trunk, experts): the tree twice, each with None where the other has its leaves."""
    trunk = jax.tree.map(lambda x, is_stacked: None if is_stacked else x, tree, stacked)
    experts = jax.tree.map(lambda x, is_stacked: x if is_stacked else None, tree, stacked)
    return trunk, experts


def join(trunk: Tree, experts: Tree) -> Tree:
    """Returns the tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trunk, experts, is_leaf=lambda x: x is None)


def take(experts: Tree, route: jax.Array | int, axis: int = EXPERT_AXIS) -> Tree:
    """Returns one expert, leaves [L, ...] from [L, E, ...]: expert `route` in all layers, or route[l] in layer l.
    `axis` is that of E."""

    def read(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        if isinstance(route, int) or route.ndim == 0:
            return jax.lax.dynamic_index_in_dim(leaf, route, axis, keepdims=False)
        return leaf[jnp.arange(leaf.shape[0]), _of_leaf(experts, route, path, leaf)]

    return jax.tree.map_with_path(read, experts)


def put(experts: Tree, taken: Tree, route: jax.Array | int, axis: int = EXPERT_AXIS) -> Tree:
    """Returns the experts with the one that `take` returns replaced by `taken`; in place if donated."""

    def write(path: Sequence[Any], leaf: jax.Array, new: jax.Array) -> jax.Array:
        if isinstance(route, int) or route.ndim == 0:  # one slice: a scatter takes minutes to compile for a TPU
            return jax.lax.dynamic_update_index_in_dim(leaf, new, route, axis)
        index = jnp.arange(leaf.shape[0]), _of_leaf(experts, route, path, leaf)
        return leaf.at[index].set(new, unique_indices=True)

    return jax.tree.map_with_path(write, experts, taken)


def _of_leaf(experts: Tree, route_L: jax.Array, path: Sequence[Any], leaf: jax.Array) -> jax.Array:
    """Returns the experts of the layers that a leaf has."""
    groups = leaf.shape[0]
    if route_L.shape[0] > groups and vit.position_in_group(path) is None:
        # With a pattern, a step count lies outside the blocks, so its path has no position: it takes that of the other
        # leaves. If no leaf has one (a state of counts only, as for frozen layers), any index in range will do.
        positioned = (path for path, _ in jax.tree.leaves_with_path(experts) if vit.position_in_group(path) is not None)
        path = next(positioned, path)
    return of_group(path, route_L, groups)


def of_group(path: Sequence[Any], x_L: Array, groups: int) -> Array:
    """Returns the layers of x_L that the leaf at this path has; with a pattern, those of its position in each group."""
    return x_L[vit.position_in_group(path) or 0 :: x_L.shape[0] // groups]
