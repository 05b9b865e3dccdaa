"""From experts to one dense model: every function here reduces, selects or moves along the axis E.

L layers · X layers that have experts · E experts
"""

import jax
import jax.numpy as jnp

from jvitmoe.experts.params import Params, Tree, join, one, take
from jvitmoe.models import mlp, vit


def average_experts(params: Params) -> Tree:
    """Returns the dense tree: what experts own averaged over E. Source: AdaMix, arXiv 2205.12410, eq. 5.

    LoRA and adapters are averaged, each matrix by itself as in AdaMix, and then folded into the MLP.
    """
    return _to_dense(params.trunk, jax.tree.map(lambda leaf: leaf.mean(0), params.experts))


def dense_tree(params: Params) -> Tree:
    """Returns the dense tree of a run: `average_experts`, which of a dense run are its parameters."""
    return jax.jit(average_experts)(params)


def take_path(params: Params, route: jax.Array) -> Tree:
    """Returns the dense tree of one path; `route` as `params.take` has it."""
    return _to_dense(params.trunk, one(take(params.experts, route)))


def scale_by_gate(params: Params, gate_X: jax.Array) -> Params:
    """Returns the parameters with the outputs of all experts multiplied by a number per layer: a router's mean gate,
    without which the mean of experts is larger than what the router let through."""
    leaves = params.experts["mlp"]
    down, down_bias = leaves["down"] * gate_X[None, :, None, None], leaves["down_bias"] * gate_X[None, :, None]
    return params._replace(experts={"mlp": leaves | {"down": down, "down_bias": down_bias}})


def pull(params: Params, rate: jax.Array | float) -> Params:
    """Returns the parameters with every expert moved the share `rate` of the way to the mean of experts, which does not
    move. At rate 1 every expert is the mean, bit for bit.

    Sources: EWA, arXiv 2308.06093; PAPA, arXiv 2304.03094 (there 0.01 every 10 steps).
    """

    def move(leaf: jax.Array) -> jax.Array:
        mean = leaf.mean(0, keepdims=True)
        return jnp.where(rate == 1, mean, leaf + rate * (mean - leaf))  # the sum alone rounds, differently per expert

    return params._replace(experts=jax.tree.map(move, params.experts))


def _to_dense(trunk: Tree, expert: Tree) -> Tree:
    """Returns the dense tree of a trunk and one expert, without a router, which one expert does not need."""
    tree = _without_router(join(trunk, expert))
    blocks = vit.in_layers(tree["blocks"])
    return tree | {"blocks": blocks | {"mlp": mlp.fold(blocks["mlp"])}}


def _without_router(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {name: _without_router(branch) for name, branch in tree.items() if name != "router"}
