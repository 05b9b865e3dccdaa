"""From expert-stacked trees to dense ones and back: every function here reduces, selects or fills the expert axis.

L layers · E experts · X layers that have experts
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jvitmoe.experts.trees import EXPERT_AXIS, TUNED, Tree, expert_axis, is_whole, join, of_group, split, stacked, take
from jvitmoe.models import mlp, vit


def average_experts(params: Tree) -> Tree:
    """Returns the dense tree: every stacked leaf averaged over its E axis. Source: AdaMix, arXiv 2205.12410, eq. 5.

    LoRA and adapters are averaged, each matrix by itself as in AdaMix, and then folded into the MLP.
    """
    return _to_dense(params, mean)


def scale_by_gate(params: Tree, gate_L: jax.Array) -> Tree:
    """Returns the tree with the outputs of all experts multiplied by a number per layer: a router's mean gate, without
    which the mean of experts is larger than what the router let through."""

    def scale(path: tuple[Any, ...], leaf: jax.Array, is_stacked: bool) -> jax.Array:
        if not is_stacked or path[-1].key not in ("down", "down_bias"):
            return leaf
        return leaf * of_group(path, gate_L, leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree.map_with_path(scale, params, stacked(params))


def mean(experts: Tree, axis: int) -> Tree:
    """Returns the mean of experts; `axis` is that of E."""
    return jax.tree.map(lambda leaf: leaf.mean(axis), experts)


def dense_tree(params: Tree) -> Tree:
    """Returns the dense tree of a run: `average_experts`, which of a dense run are its parameters."""
    return jax.jit(average_experts)(params)


def take_path(params: Tree, route_L: jax.Array) -> Tree:
    """Returns the dense tree of one path: from every stacked leaf, expert route[l] of layer l. If experts are whole
    models, it is expert route[0]."""
    route = route_L[0] if is_whole(params) else route_L
    return _to_dense(params, lambda experts, axis: take(experts, route, axis))


def expert_layers(params: Tree) -> Tree:
    """Returns the experts' layers alone, stacked leaves [X, E, ...]; None in place of other leaves."""
    blocks = split(params, stacked(params))[1]["blocks"]
    if is_whole(params):
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, EXPERT_AXIS), blocks)
    return vit.in_layers(blocks)


def pull(params: Tree, rate: jax.Array | float) -> Tree:
    """Returns the tree with every expert moved the share `rate` of the way to the mean of experts, which does not move.
    At rate 1 every expert is the mean, bit for bit.

    Sources: EWA, arXiv 2308.06093; PAPA, arXiv 2304.03094 (there 0.01 every 10 steps).
    """

    axis = expert_axis(params)

    def move(leaf: jax.Array, is_stacked: bool) -> jax.Array:
        if not is_stacked:
            return leaf
        mean = leaf.mean(axis, keepdims=True)
        return jnp.where(rate == 1, mean, leaf + rate * (mean - leaf))  # the sum alone rounds, differently per expert

    return jax.tree.map(move, params, stacked(params))


def upcycle(dense: Tree, like: Tree) -> Tree:
    """Returns the stacked tree shaped as `like` whose experts are all copies of the dense model's (arXiv 2212.05055).
    Routers, LoRA and adapters, which the dense tree does not have, are those of `like`."""
    if is_whole(like):
        return jax.tree.map(lambda leaf, wanted: jnp.broadcast_to(leaf, wanted.shape), dense, like)
    groups = like["blocks"].keys() - dense["blocks"].keys()

    def fill(path: tuple[Any, ...], wanted: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if "router" in names or names[-1] in TUNED:
            return wanted
        leaf = functools.reduce(operator.getitem, (name for name in names if name not in groups), dense)
        if names[0] == "blocks":
            leaf = of_group(path, leaf, wanted.shape[0])
        return leaf if leaf.ndim == wanted.ndim else jnp.broadcast_to(jnp.expand_dims(leaf, EXPERT_AXIS), wanted.shape)

    return jax.tree.map_with_path(fill, like)


def _to_dense(params: Tree, reduce: Callable[[Tree, int], Tree]) -> Tree:
    """Returns the dense tree with the experts reduced over an axis, and without a router, which one expert does not
    need."""
    trunk, experts = split(params, stacked(params))
    tree = _without_router(join(trunk, reduce(experts, expert_axis(params))))
    blocks = vit.in_layers(tree["blocks"])
    return tree | {"blocks": blocks | {"mlp": mlp.fold(blocks["mlp"])}}


def _without_router(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {name: _without_router(branch) for name, branch in tree.items() if name != "router"}
