"""Addresses of randomness, and random routes. Every draw of a run is `address(root, purpose, number, …)`.

L layers · E experts
"""

import enum

import jax
import jax.numpy as jnp

from jvitmoe.config import RoutingConfig


class Purpose(enum.IntEnum):
    """What a key is for. Values are part of a run's identity: add at the end, never renumber."""

    INIT = 0  # parameters
    ORDER = 1  # order of the training images; numbered by epoch
    AUGMENT = 2  # numbered by step, then by place in the global batch
    DROPOUT = 3  # numbered by step, then by place in the global batch
    ROUTE = 4  # numbered by step
    PATH = 5  # random paths at evaluation; numbered by path


def address(root: jax.Array, purpose: Purpose, *numbers: int | jax.Array) -> jax.Array:
    """Returns the key at (purpose, *numbers): a pure function, so a resumed run draws what the first one drew."""
    key = jax.random.fold_in(root, purpose)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def draw_route(key: jax.Array, routing: RoutingConfig, depth: int) -> jax.Array:
    """Returns route_L, int32 in [0, E): uniform, one draw for all layers (scope "shared", the original) or one for
    each ("layer", AdaMix, arXiv 2205.12410)."""
    shape = () if routing.scope == "shared" else (depth,)
    return jnp.broadcast_to(jax.random.randint(key, shape, 0, routing.experts), (depth,))


def constant_route(expert: int, depth: int) -> jax.Array:
    """Returns route_L of the path that runs the same expert in every layer."""
    return jnp.full((depth,), expert, jnp.int32)
