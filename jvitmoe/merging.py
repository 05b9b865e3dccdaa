"""From expert-stacked trees to dense ones and back: every function here reduces, selects or fills the expert axis.

A leaf is stacked when it has one axis more than the same leaf of the dense model: [L, E, ...] against [L, ...].

L layers · E experts
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

# Rank of each MLP leaf in the dense tree, its leading L axis included (models/mlp.py).
DENSE_RANK = {"up": 3, "up_bias": 2, "down": 3, "down_bias": 2}
EXPERT_AXIS = 1


def stacked(params: Tree) -> Tree:
    """Returns the tree of bools that says which leaves have an expert axis."""
    return jax.tree.map_with_path(lambda path, x: x.ndim == DENSE_RANK.get(path[-1].key, x.ndim) + 1, params)


def average_experts(params: Tree) -> Tree:
    """Returns the dense tree: every stacked leaf averaged over its E axis. Source: AdaMix, arXiv 2205.12410, eq. 5."""
    return _to_dense(lambda leaf: leaf.mean(EXPERT_AXIS), params)


def take_path(params: Tree, route: jax.Array) -> Tree:
    """Returns the dense tree of one path: from every stacked leaf, expert route[l] of layer l. A route [L, P] gives
    the tree of P experts instead."""
    return _to_dense(lambda leaf: take(leaf, route), params)


def pull(params: Tree, rate: jax.Array | float) -> Tree:
    """Returns the tree with every expert moved the share `rate` of the way to the mean of experts, which stays put.

    Sources: EWA, arXiv 2308.06093; PAPA, arXiv 2304.03094 (there 0.01 every 10 steps).
    """

    def move(leaf: jax.Array, is_stacked: bool) -> jax.Array:
        return leaf + rate * (leaf.mean(EXPERT_AXIS, keepdims=True) - leaf) if is_stacked else leaf

    return jax.tree.map(move, params, stacked(params))


def upcycle(dense: Tree, like: Tree) -> Tree:
    """Returns the stacked tree shaped as `like` whose experts are all copies of the dense MLP (arXiv 2212.05055)."""
    return jax.tree.map(
        lambda x, wanted: (
            jnp.broadcast_to(jnp.expand_dims(x, EXPERT_AXIS), wanted.shape) if x.ndim < wanted.ndim else x
        ),
        dense,
        like,
    )


def split(tree: Tree, stacked: Tree) -> tuple[Tree, Tree]:
    """Returns (trunk, experts): the tree twice, each with None where the other has its leaves."""
    trunk = jax.tree.map(lambda x, is_stacked: None if is_stacked else x, tree, stacked)
    experts = jax.tree.map(lambda x, is_stacked: x if is_stacked else None, tree, stacked)
    return trunk, experts


def join(trunk: Tree, experts: Tree) -> Tree:
    """Returns the tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trunk, experts, is_leaf=lambda x: x is None)


def take(leaf: jax.Array, route: jax.Array) -> jax.Array:
    """Returns expert route[l] of each layer l: [L, ...] from [L, E, ...]; with a route [L, P], a stack [L, P, ...]."""
    return leaf[_layers(leaf, route), route]


def put(leaf: jax.Array, part: jax.Array, route: jax.Array) -> jax.Array:
    """Returns the [L, E, ...] leaf with the experts that `take` picks replaced by `part`; in place when donated.

    The experts of one layer's route must differ.
    """
    return leaf.at[_layers(leaf, route), route].set(part, unique_indices=True)


def _layers(leaf: jax.Array, route: jax.Array) -> jax.Array:
    return jnp.arange(leaf.shape[0]).reshape(-1, *[1] * (route.ndim - 1))


def _to_dense(reduce: Callable[[jax.Array], jax.Array], params: Tree) -> Tree:
    """Returns the tree with every stacked leaf reduced, and without a learned router: one expert needs none."""
    return _without_router(jax.tree.map(lambda x, is_stacked: reduce(x) if is_stacked else x, params, stacked(params)))


def _without_router(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {name: _without_router(branch) for name, branch in tree.items() if name != "router"}
