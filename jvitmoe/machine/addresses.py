"""Addresses of randomness. Every draw on the devices is `address(root, purpose, number, …)`; the crops of a stream are
drawn on the host from (seed, step, row)."""

import enum

import jax


class Purpose(enum.IntEnum):
    """What a key is for. Values are part of a run's identity: add at the end, never renumber."""

    INIT = 0  # parameters
    ORDER = 1  # order of the training images; numbered by epoch
    AUGMENT = 2  # numbered by step, then by index in the global batch; index B is the key of the batch
    DROPOUT = 3  # numbered by step, then by index in the global batch plus B times the number of the pass
    ROUTE = 4  # numbered by step
    PATH = 5  # random paths at evaluation; numbered by path
    SECOND_ROUTE = 6  # of the second forward pass; numbered by step


def address(root: jax.Array, purpose: Purpose, *numbers: int | jax.Array) -> jax.Array:
    """Returns the key at (purpose, *numbers): a pure function, so a resumed run draws the same numbers."""
    key = jax.random.fold_in(root, purpose)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
