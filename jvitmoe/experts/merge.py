"""From expert-stacked trees to dense ones and back: every function here reduces, selects or fills the expert axis.

A leaf is stacked if it has one axis more than the same leaf of the dense model: [L, E, ...] instead of [L, ...]. With a
pattern of n layers each of its positions has its own tree, with leaves [L / n, ...] (`vit.ViT`).

L layers · E experts · X layers that have experts
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jvitmoe.experts.slices import EXPERT_AXIS, Tree, join, of_group, split, stacked, take
from jvitmoe.models import adapters, vit


def average_experts(params: Tree) -> Tree:
    """Returns the dense tree: every stacked leaf averaged over its E axis. Source: AdaMix, arXiv 2205.12410, eq. 5.

    LoRA and adapters are averaged, each matrix by itself as in AdaMix, and then folded into the MLP.
    """
    return _to_dense(params, lambda experts: jax.tree.map(lambda leaf: leaf.mean(EXPERT_AXIS), experts))


def take_path(params: Tree, route_L: jax.Array) -> Tree:
    """Returns the dense tree of one path: from every stacked leaf, expert route[l] of layer l."""
    return _to_dense(params, lambda experts: take(experts, route_L))


def expert_layers(params: Tree) -> Tree:
    """Returns the experts alone, {"mlp": …}: stacked leaves [X, E, ...]; None in place of other leaves."""
    return vit.in_layers(split(params, stacked(params))[1]["blocks"])


def pull(params: Tree, rate: jax.Array | float) -> Tree:
    """Returns the tree with every expert moved the share `rate` of the way to the mean of experts, which does not move.
    At rate 1 every expert is the mean, bit for bit.

    Sources: EWA, arXiv 2308.06093; PAPA, arXiv 2304.03094 (there 0.01 every 10 steps).
    """

    def move(leaf: jax.Array, is_stacked: bool) -> jax.Array:
        if not is_stacked:
            return leaf
        mean = leaf.mean(EXPERT_AXIS, keepdims=True)
        return jnp.where(rate == 1, mean, leaf + rate * (mean - leaf))  # the sum alone rounds, differently per expert

    return jax.tree.map(move, params, stacked(params))


def upcycle(dense: Tree, like: Tree) -> Tree:
    """Returns the stacked tree shaped as `like` whose experts are all copies of the dense MLP (arXiv 2212.05055).
    Routers, LoRA and adapters, which the dense tree does not have, are those of `like`."""
    groups = like["blocks"].keys() - dense["blocks"].keys()

    def fill(path: tuple[Any, ...], wanted: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if "router" in names or names[-1] in (*adapters.LORA, *adapters.ADAPTER):
            return wanted
        leaf = functools.reduce(operator.getitem, (name for name in names if name not in groups), dense)
        if names[0] == "blocks":
            leaf = of_group(path, leaf, wanted.shape[0])
        return leaf if leaf.ndim == wanted.ndim else jnp.broadcast_to(jnp.expand_dims(leaf, EXPERT_AXIS), wanted.shape)

    return jax.tree.map_with_path(fill, like)


def add_noise(params: Tree, key: jax.Array, noise: float) -> Tree:
    """Returns the tree with normal noise on every stacked leaf, so that copies of one MLP differ: `noise` times the
    standard deviation of the leaf."""
    numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))

    def add(leaf: jax.Array, is_stacked: bool, number: int) -> jax.Array:
        if not is_stacked:
            return leaf
        draw = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
        return leaf + noise * leaf.std() * draw

    return jax.tree.map(add, params, stacked(params), numbers)


def _to_dense(params: Tree, reduce: Callable[[Tree], Tree]) -> Tree:
    """Returns the dense tree with the experts reduced, and without a router, which one expert does not need."""
    trunk, experts = split(params, stacked(params))
    tree = _without_router(join(trunk, reduce(experts)))
    blocks = vit.in_layers(tree["blocks"])
    return tree | {"blocks": blocks | {"mlp": adapters.fold(blocks["mlp"])}}


def _without_router(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {name: _without_router(branch) for name, branch in tree.items() if name != "router"}
