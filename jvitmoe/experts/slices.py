"""Expert-stacked trees: which leaves are stacked, and slices of them: split and join, take and put.

L layers · E experts · P paths: experts taken per layer
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.models import adapters, vit

Tree = Any
Array = TypeVar("Array", jax.Array, np.ndarray)

# Rank of each MLP leaf in the dense tree, its leading L axis included (models/mlp.py).
DENSE_RANK = {
    name: 2 if name.endswith("bias") else 3
    for name in ("up", "up_bias", "down", "down_bias", *adapters.LORA, *adapters.ADAPTER)
}
EXPERT_AXIS = 1


def stacked(params: Tree) -> Tree:
    """Returns the tree of bools that says which leaves have an expert axis."""
    return jax.tree.map_with_path(lambda path, x: x.ndim == DENSE_RANK.get(path[-1].key, x.ndim) + 1, params)


def split(tree: Tree, stacked: Tree) -> tuple[Tree, Tree]:
    """Returns (trunk, experts): the tree twice, each with None where the other has its leaves."""
    trunk = jax.tree.map(lambda x, is_stacked: None if is_stacked else x, tree, stacked)
    experts = jax.tree.map(lambda x, is_stacked: x if is_stacked else None, tree, stacked)
    return trunk, experts


def join(trunk: Tree, experts: Tree) -> Tree:
    """Returns the tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trunk, experts, is_leaf=lambda x: x is None)


def take(experts: Tree, route: jax.Array) -> Tree:
    """Returns expert route[l] of each layer l: leaves [L, ...] from [L, E, ...]; with a route [L, P], [L, P, ...]."""
    index = functools.partial(_index, experts, route)
    return jax.tree.map_with_path(lambda path, leaf: leaf[index(path, leaf)], experts)


def put(experts: Tree, taken: Tree, route: jax.Array) -> Tree:
    """Returns the experts with those that `take` returns replaced by `taken`; in place if donated.

    The experts of one layer's route must differ.
    """

    def write(path: tuple[Any, ...], leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[_index(experts, route, path, leaf)].set(new, unique_indices=True)

    return jax.tree.map_with_path(write, experts, taken)


def _index(experts: Tree, route: jax.Array, path: Sequence[Any], leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (layer, expert) that index the leaf, in the shape of its part of the route."""
    groups = leaf.shape[0]
    if route.shape[0] > groups and vit.position_in_group(path) is None:
        # With a pattern, a step count lies outside the blocks, so its path has no position: it takes that of the other
        # leaves. If no leaf has one (a state of counts only, as for frozen layers), any index in range will do.
        positioned = (path for path, _ in jax.tree.leaves_with_path(experts) if vit.position_in_group(path) is not None)
        path = next(positioned, path)
    route = of_group(path, route, groups)
    return jnp.arange(leaf.shape[0]).reshape(-1, *[1] * (route.ndim - 1)), route


def of_group(path: Sequence[Any], x_L: Array, groups: int) -> Array:
    """Returns the layers of x_L that the leaf at this path has; with a pattern, those of its position in each group."""
    return x_L[vit.position_in_group(path) or 0 :: x_L.shape[0] // groups]
