"""Splits on the devices, and the order of their images.

N images · P = H * W * c numbers of an image · S steps of one epoch · B global batch
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvitmoe.data.splits import Split
from jvitmoe.errors import ConfigError
from jvitmoe.runtime.devices import DATA, REPLICATED, to_devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """A split, replicated on every device; or one batch of a stream, its rows split over the mesh."""

    pixels_NP: jax.Array  # uint8, each image one row: of [N, H, W, c] a TPU makes a copy in every step, to read a batch
    labels_N: jax.Array  # int32
    shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})  # H, W, c

    def rows(self, index: Any) -> tuple[jax.Array, jax.Array]:
        """Returns (images_BHWc, labels_B) of some rows."""
        return self.pixels_NP[index].reshape(-1, *self.shape), self.labels_N[index]


class Batches(NamedTuple):
    """Padded batches that visit every image exactly once; the mask is False on padding. Columns are split over the
    mesh."""

    index_SB: jax.Array  # int32
    mask_SB: jax.Array  # bool


def on_devices(split: Split, mesh: Mesh) -> Images:
    """Returns the split on every device of the mesh."""
    sharding = NamedSharding(mesh, REPLICATED)
    pixels_NP = split.images_NHWc.reshape(len(split), -1)
    return Images(to_devices(pixels_NP, sharding), to_devices(split.labels_N, sharding), split.images_NHWc.shape[1:])


def on_host(draw: Callable[[jax.Array], jax.Array], mesh: Mesh) -> Callable[[int], np.ndarray]:
    """Returns `draw` of an epoch's number, on the host; two epochs are kept. Any thread may call it; it waits for
    no other process."""
    lock, compiled = threading.Lock(), jax.jit(draw)

    @functools.lru_cache(maxsize=2)
    def compute(number: int) -> np.ndarray:
        with jax.default_device(mesh.local_devices[0]):
            return np.asarray(compiled(jnp.int32(number)))

    def locked(number: int) -> np.ndarray:
        with lock:
            return compute(number)

    return locked


def divisor(mesh: Mesh, slots: int, parts: int) -> tuple[int, str]:
    """Returns what a batch must be a multiple of, and how that comes about in words; see `TrainOrder`."""
    count, rule = mesh.size, f"{mesh.size} devices"
    if slots > 1:
        count, rule = mesh.shape[DATA] * slots, f"{mesh.shape[DATA]} data devices x {slots} experts"
    if parts > 1:
        count, rule = count * parts, f"{rule} x {parts} parts of train.accumulate"
    return count, rule


class TrainOrder:
    """Order of the training images: a new permutation in every epoch, without the images that fill no batch.

    `slots` are the equal parts of a data device's images: E for routing.kind=sample, else 1. `parts` are the
    parts of train.accumulate, which run in turn.
    Raises ConfigError if the batch does not divide into all of them, or is larger than the split.
    """

    def __init__(self, count: int, batch_size: int, key: jax.Array, mesh: Mesh, slots: int = 1, parts: int = 1) -> None:
        unit, rule = divisor(mesh, slots, parts)
        fits = max(min(batch_size, count) // unit, 1) * unit
        remedy = f"set --config.train.batch_size={fits}" if fits <= count else "set fewer --config.train.devices"
        if batch_size % unit:
            rule = f"it must be a multiple of the {rule}; {remedy}"
            raise ConfigError(f"config.train.batch_size is {batch_size}; {rule}")
        if batch_size > count:
            rule = f"it must be at most the {count} training images; {remedy}"
            raise ConfigError(f"config.train.batch_size is {batch_size}; {rule}")
        self.steps_per_epoch = steps = count // batch_size

        def order(epoch: jax.Array) -> jax.Array:
            permutation_N = jax.random.permutation(jax.random.fold_in(key, epoch), count)
            return permutation_N[: steps * batch_size].reshape(steps, batch_size)

        self.on_host = on_host(order, mesh)  # the same index_SB, on the host
        self._order = jax.jit(order, out_shardings=NamedSharding(mesh, REPLICATED))

    def epoch(self, number: int) -> jax.Array:
        """Returns index_SB of an epoch, on every device. It is a pure function of (seed, epoch)."""
        return self._order(jnp.int32(number))


def resident_batches(
    images: Images, order: TrainOrder, start: int, total: int
) -> Generator[tuple[Images, jax.Array | None], None, None]:
    """Yields (images, index_SB of the epoch) for every step from `start` to before `total`."""
    epoch, index_SB = -1, None
    for step in range(start, total):
        if epoch != step // order.steps_per_epoch:
            epoch = step // order.steps_per_epoch
            index_SB = order.epoch(epoch)
        yield images, index_SB


def eval_batches(count: int, batch_size: int, mesh: Mesh) -> Batches:
    """Returns batches over `count` images in order. The batch size is rounded up to a multiple of the devices."""
    size = -(-batch_size // mesh.size) * mesh.size
    number_SB = np.arange(-(-count // size) * size).reshape(-1, size)
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    mask_SB = number_SB < count
    index_SB = np.where(mask_SB, number_SB, 0).astype(np.int32)
    return Batches(to_devices(index_SB, sharding), to_devices(mask_SB, sharding))
