"""Where a batch comes from: a split that lives on the devices, and an order of its images that epoch and seed fix.

N images · S steps of one epoch · B global batch
"""

import functools
import threading
from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvitmoe.data.splits import Split
from jvitmoe.errors import ConfigError


class Images(NamedTuple):
    """A split on the devices, whole on each of them; or one batch of a stream, its rows along the mesh."""

    images_NHWC: jax.Array  # uint8
    labels_N: jax.Array  # int32


class Batches(NamedTuple):
    """Padded batches that visit every image exactly once; padding is masked out. Columns lie along the mesh."""

    index_SB: jax.Array  # int32
    mask_SB: jax.Array  # bool


def put(split: Split, mesh: Mesh) -> Images:
    """Returns the split on every device of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return Images(place(split.images_NHWC, sharding), place(split.labels_N, sharding))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns the array on the devices; of several processes, each holds it whole and puts the parts of its devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class TrainOrder:
    """Order of the training images, whole on every device.

    Every epoch is a fresh permutation; what does not fill a batch waits for the next.

    `slots` are the equal parts of each data device's share: one per expert where all run.
    Raises ConfigError where the batch does not divide over devices and slots, or is larger than the split.
    """

    def __init__(self, count: int, batch_size: int, key: jax.Array, mesh: Mesh, slots: int = 1) -> None:
        parts = mesh.shape["data"] * slots if slots > 1 else mesh.size
        if batch_size % parts:
            which = f"{mesh.shape['data']} data devices x {slots} experts" if slots > 1 else f"{mesh.size} devices"
            raise ConfigError(
                f"config.train.batch_size is {batch_size}; it must be a multiple of the {which}; "
                "change it or set --config.train.devices"
            )
        if batch_size > count:
            raise ConfigError(
                f"config.train.batch_size is {batch_size}; it must be at most the {count} training images"
            )
        self.steps_per_epoch = steps = count // batch_size

        def order(epoch: jax.Array) -> jax.Array:
            permutation_N = jax.random.permutation(jax.random.fold_in(key, epoch), count)
            return permutation_N[: steps * batch_size].reshape(steps, batch_size)

        self._drawing, self._on_host = threading.Lock(), functools.lru_cache(maxsize=2)(self._draw_on_host)
        self._mesh, self._draw = mesh, jax.jit(order)
        self._order = jax.jit(order, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def epoch(self, number: int) -> jax.Array:
        """Returns index_SB of this epoch: a pure function of (seed, epoch), drawn on the devices."""
        return self._order(jnp.int32(number))

    def on_host(self, number: int) -> np.ndarray:
        """Returns the same index_SB on the host; from any thread, and without the other processes."""
        with self._drawing:
            return self._on_host(number)

    def _draw_on_host(self, number: int) -> np.ndarray:
        with jax.default_device(self._mesh.local_devices[0]):
            return np.asarray(self._draw(jnp.int32(number)))


def resident_batches(
    images: Images, order: TrainOrder, start: int, total: int
) -> Generator[tuple[Images, jax.Array | None], None, None]:
    """Yields (images, index_SB of its epoch) for every step from `start` to before `total`."""
    epoch, index_SB = -1, None
    for step in range(start, total):
        if epoch != step // order.steps_per_epoch:
            epoch = step // order.steps_per_epoch
            index_SB = order.epoch(epoch)
        yield images, index_SB


def eval_batches(count: int, batch_size: int, mesh: Mesh) -> Batches:
    """Returns batches over `count` images in their order, on any number of devices.

    The batch is rounded up to a multiple of the devices.
    """
    size = -(-batch_size // mesh.size) * mesh.size
    number = np.arange(-(-count // size) * size).reshape(-1, size)
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    mask = number < count
    index = np.where(mask, number, 0).astype(np.int32)
    return Batches(place(index, sharding), place(mask, sharding))
