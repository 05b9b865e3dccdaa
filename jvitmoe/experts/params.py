"""The parameters of a run are two trees: the trunk, and what experts own, with the axis E first.

An expert is a dense model. Experts that are MLPs, or parts of them, are the tree {"mlp": …} with leaves [E, X, ...] for
the X layers that have experts; experts that are whole models (`routing.part=model`) are dense trees with leaves
[E, ...], and their trunk is empty. `join` makes the tree that a model is called with.

L layers · X layers that have experts · E experts · R experts that run
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jvitmoe.config import RoutingConfig
from jvitmoe.models import mlp, vit

Tree = Any

MLP = ("up", "up_bias", "down", "down_bias")
TUNED = (*mlp.LORA, *mlp.ADAPTER)
SECOND = mlp.START_AT_ZERO  # AdaMix shares the second matrix of each pair
# routing.part -> the leaves of an MLP that each expert owns; and of LoRA and adapters, if these are what is trained
PARTS = {"mlp": MLP, "up": MLP[:2], "down": MLP[2:]}
TUNED_PARTS = {"mlp": TUNED, "up": tuple(name for name in TUNED if name not in SECOND), "down": SECOND}


class Params(NamedTuple):
    """The parameters of a run, or gradients and other trees in their shape."""

    trunk: Tree  # what all experts share; all of a dense model
    experts: Tree  # {} in a dense run


def from_dict(tree: Tree) -> Params:
    """Returns the parameters of a checkpoint, which leaves out a tree without leaves."""
    return Params(tree.get("trunk", {}), tree.get("experts", {}))


def divide(params: Tree, copies: Tree, routing: RoutingConfig, adapters_only: bool) -> Params:
    """Returns the trunk of `params`, and what each of `copies`, dense trees with leaves [E, ...], owns: the leaves of
    `routing.part`, of LoRA and adapters if only they are trained, in the layers that `routing.pattern` marks."""
    if routing.part == "model":
        return Params({}, copies)
    names = (TUNED_PARTS if adapters_only else PARTS)[routing.part]
    marked: list[str] = []  # the positions of a pattern that have experts
    if len(routing.pattern) > 1:
        marked = [f"{vit.BLOCK}{place}" for place, kind in enumerate(routing.pattern) if kind == "experts"]
    of_copies = [copies["blocks"][name]["mlp"] for name in marked] or [copies["blocks"]["mlp"]]
    experts = {}
    for name in [name for name in names if name in of_copies[0]]:
        leaves = [leaves[name] for leaves in of_copies]
        experts[name] = jnp.stack(leaves, 2).reshape(len(leaves[0]), -1, *leaves[0].shape[2:])

    def rest(block: Tree) -> Tree:
        return block | {"mlp": {name: leaf for name, leaf in block["mlp"].items() if name not in experts}}

    blocks = params["blocks"]
    blocks = blocks | {name: rest(blocks[name]) for name in marked} if marked else rest(blocks)
    return Params(params | {"blocks": blocks}, {"mlp": experts})


def join(trunk: Tree, expert: Tree) -> Tree:
    """Returns the tree that a model is called with; `expert` has leaves [X, ...], or of a whole model as in a dense
    tree. With a pattern, the positions of the trunk that lack the leaves get them."""
    if "mlp" not in expert:
        return trunk | expert
    blocks, leaves = trunk["blocks"], expert["mlp"]

    def fill(block: Tree, part: Tree) -> Tree:
        return block | {"mlp": block["mlp"] | part}

    if not (positions := vit.positions(blocks)):
        return trunk | {"blocks": fill(blocks, leaves)}
    places = [name for name in positions if not leaves.keys() <= blocks[name]["mlp"].keys()]
    parts = (jax.tree.map(lambda leaf, n=n: leaf[n :: len(places)], leaves) for n in range(len(places)))
    return trunk | {"blocks": blocks | {p: fill(blocks[p], part) for p, part in zip(places, parts, strict=True)}}


def join_all(params: Params) -> Tree:
    """Returns the tree that a model with a router is called with: the leaves of its experts are [X, E, ...]."""
    return join(params.trunk, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), params.experts))


def one(experts: Tree, number: int = 0) -> Tree:
    """Returns one expert, without the axis E."""
    return jax.tree.map(lambda leaf: leaf[number], experts)


def each(function: Callable[..., Any], experts: Tree) -> Any:
    """Returns `function` of each expert, stacked; {} stays."""
    return jax.vmap(function)(experts) if experts else experts


def take(experts: Tree, route: jax.Array) -> Tree:
    """Returns the expert that runs, leaves [1, X, ...]: route[0] in all layers, or of a route [X], route[x] in the
    x-th layer that has experts."""

    def read(leaf: jax.Array) -> jax.Array:
        if len(route) == 1:
            return jax.lax.dynamic_slice_in_dim(leaf, route[0], 1)
        return leaf[route, jnp.arange(len(route))][None]

    return jax.tree.map(read, experts)


def put(experts: Tree, taken: Tree, route: jax.Array) -> Tree:
    """Returns the experts with the one that `take` returns replaced by `taken`; in place if donated."""

    def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
        if len(route) == 1:  # one slice: a scatter takes minutes to compile for a TPU
            return jax.lax.dynamic_update_slice_in_dim(leaf, new, route[0], 0)
        return leaf.at[route, jnp.arange(len(route))].set(new[0], unique_indices=True)

    return jax.tree.map(write, experts, taken)
