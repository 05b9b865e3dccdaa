"""Addresses of randomness, and random routes. Every draw on the devices is `address(root, purpose, number, …)`;
the crops of a stream are drawn on the host from (seed, step, row).

L layers · E experts · T tokens of one image, CLS included
"""

import enum

import jax
import jax.numpy as jnp

from jvitmoe.config import Config, RoutingConfig


class Purpose(enum.IntEnum):
    """What a key is for. Values are part of a run's identity: add at the end, never renumber."""

    INIT = 0  # parameters
    ORDER = 1  # order of the training images; numbered by epoch
    AUGMENT = 2  # numbered by step, then by index in the global batch; index B is the key of the batch
    DROPOUT = 3  # numbered by step, then by index in the global batch plus B times the number of the pass
    ROUTE = 4  # numbered by step
    PATH = 5  # random paths at evaluation; numbered by path
    SECOND_ROUTE = 6  # of the second forward pass; numbered by step
    NOISE = 7  # on copies of a source's MLPs


TRAINED = {  # granularity -> what an expert is trained on
    "batch": "one is drawn for each batch",
    "sample": "each gets a random share of every batch's images",
    "token": "each gets a random share of the tokens",
}


def address(root: jax.Array, purpose: Purpose, *numbers: int | jax.Array) -> jax.Array:
    """Returns the key at (purpose, *numbers): a pure function, so a resumed run draws the same numbers."""
    key = jax.random.fold_in(root, purpose)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def describe(config: Config) -> str:
    """Returns what the first lines of a run with experts say of its routing."""
    routing = config.routing
    random = routing.router == "random"
    trained = TRAINED[routing.granularity] if random else f"{routing.router} routes the tokens"
    if routing.pull == routing.pull_every == 1 and routing.pull_schedule == "constant":
        pull = "averaged after every step, so all are equal"
    elif routing.pull:
        pull = f"pulled together by {routing.pull:g} ({routing.pull_schedule})"
    else:
        pull = "never pulled together"
    tied = f"; all equal in the last {config.tied_last:.0%} of training" if config.tied_last else ""
    return f"{routing.experts} experts per MLP: {trained}; {pull}{tied}"


def draw_route(key: jax.Array, routing: RoutingConfig, depth: int, tokens: int) -> jax.Array:
    """Returns the experts of one step, int32 in [0, E).

    granularity "batch" (the original, AdaMix, THOR): [L], uniform, one expert for the whole batch.
    granularity "sample": [L, E], the expert of each slot of images, a uniform permutation: every expert runs on an
        equal share of the images, nothing is dropped.
    granularity "token" (the random uniform partition of EWA, arXiv 2308.06093): [L, T, E], one such permutation for
        each token index.

    scope "shared" repeats one draw in all layers (the original); "layer" draws for each (AdaMix, arXiv 2205.12410).
    """
    layers, experts = (1 if routing.scope == "shared" else depth), routing.experts
    if routing.granularity == "batch":
        route = jax.random.randint(key, (layers,), 0, experts)
    else:
        shape = (layers, experts) if routing.granularity == "sample" else (layers, tokens, experts)
        route = jnp.argsort(jax.random.uniform(key, shape), axis=-1)
    return jnp.broadcast_to(route, (depth, *route.shape[1:])).astype(jnp.int32)


def distinct_route(key: jax.Array, route: jax.Array, routing: RoutingConfig) -> jax.Array:
    """Returns a second route of the same shape that differs from the first in every layer, slot and token index.

    The experts of a layer are shifted cyclically by a uniform draw from 1 .. E - 1. A permutation stays one, and every
    other expert is equally likely in each slot. For E >= 4 most permutations that differ everywhere never occur.
    Scope "shared" shifts all layers by the same draw.
    """
    layers = 1 if routing.scope == "shared" else route.shape[0]
    shift = jax.random.randint(key, (layers, *[1] * (route.ndim - 1)), 1, routing.experts)
    return (route + shift) % routing.experts


def constant_route(expert: int | jax.Array, depth: int) -> jax.Array:
    """Returns route_L of the path with the same expert in every layer."""
    return jnp.full((depth,), expert, jnp.int32)
