"""What a step and an evaluation see: batches, laid out over the devices; their order, and those of a set in memory.

N images · P = H * W * c numbers of an image · S steps of one epoch · B global batch
"""

import abc
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jvitmoe.config import ModelConfig
from jvitmoe.data.splits import Split
from jvitmoe.errors import ConfigError
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.machine.devices import BY_DEVICE, DATA, REPLICATED, to_devices


class Batch(NamedTuple):
    """The images of one step, or some of an evaluation; rows are split over all devices of the mesh."""

    pixels_BP: jax.Array  # uint8, each image one row: a TPU would pad the colours of [B, H, W, c] to 128
    labels_B: jax.Array  # int32; -1 for a row without an image, which evaluation leaves out
    index_B: jax.Array  # int32, the place of each image in the global batch, which its random numbers follow from

    def images(self, model: ModelConfig) -> jax.Array:
        """Returns images_BHWc."""
        return self.pixels_BP.reshape(-1, model.image_size, model.image_size, model.channels)


class Images(NamedTuple):
    """A split on every device."""

    pixels_NP: jax.Array  # uint8
    labels_N: jax.Array  # int32


class Rows(NamedTuple):
    """The images of an epoch's batches, in the order in which they lie on the devices."""

    row_SB: Any  # int32, which image of the split
    index_SB: Any  # int32, its place in the global batch


def on_devices(split: Split, mesh: Mesh) -> Images:
    """Returns the split on every device of the mesh."""
    sharding = NamedSharding(mesh, REPLICATED)
    return Images(to_devices(split.images_NHWc.reshape(len(split), -1), sharding), to_devices(split.labels_N, sharding))


def gather(mesh: Mesh, images: Images, row_B: jax.Array, index_B: jax.Array) -> Batch:
    """Returns these rows of a split as a batch; -1 is no image. Every device copies its own part."""
    row_B = jax.lax.with_sharding_constraint(row_B, NamedSharding(mesh, BY_DEVICE))
    return Batch(images.pixels_NP[row_B], jnp.where(row_B < 0, -1, images.labels_N[row_B]), index_B)


def fitting(count: int, unit: int = 1) -> int:
    """Returns the batch size for `train.batch_size=0`: of the multiples of `unit` (`divisor`) among the powers of two
    from 8 to 256, the largest with which an epoch of `count` images has 30 steps; without one, the least from 8 on."""
    sizes = (size for size in (2**n for n in range(3, 9)) if size % unit == 0 and count // size >= 30)
    return max(sizes, default=-(-8 // unit) * unit)


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

    The images of a data device lie in `slots` equal parts, E for routing.kind=sample, else 1: those of the slot that
    the first expert sees come first, so experts may have devices of their own. `parts` are the parts of
    train.accumulate, which run in turn. `slot_of_expert` maps a step to its slots in the order of the experts; image n
    of the global batch is in slot n modulo `slots`.
    Raises ConfigError if the batch does not divide into all of them, or is larger than the split.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        slots: int = 1,
        parts: int = 1,
        slot_of_expert: Callable[[jax.Array], jax.Array] | None = None,
    ) -> None:
        unit, rule = divisor(mesh, slots, parts)
        fits = max(min(batch_size, count) // unit, 1) * unit
        remedy = f"set --config.train.batch_size={fits}" if fits <= count else "set fewer --config.train.devices"
        if batch_size % unit:
            rule = f"it must be a multiple of the {rule}; {remedy}"
            raise ConfigError(f"config.train.batch_size is {batch_size}; {rule}")
        if batch_size > count:
            rule = f"it must be at most the {count} training images; {remedy}"
            raise ConfigError(f"config.train.batch_size is {batch_size}; {rule}")
        self.batch_size, self.seed, self.mesh = batch_size, seed, mesh
        self.steps_per_epoch = steps = count // batch_size
        key = address(jax.random.key(seed), Purpose.ORDER)
        share = batch_size // mesh.shape[DATA]
        start_D, number_B = share * np.arange(mesh.shape[DATA]), slots * np.arange(share // slots)

        def places(step: jax.Array) -> jax.Array:
            """Returns index_B of a step."""
            slot_E = slot_of_expert(step) if slot_of_expert else jnp.arange(slots)
            return (start_D[:, None, None] + slot_E[None, :, None] + number_B[None, None]).reshape(-1)

        def epoch(number: jax.Array) -> jax.Array:
            permutation_N = jax.random.permutation(jax.random.fold_in(key, number), count)
            return permutation_N[: steps * batch_size].reshape(steps, batch_size)

        def rows(number: jax.Array) -> Rows:
            index_SB = jax.vmap(places)(number * steps + jnp.arange(steps)).astype(jnp.int32)
            return Rows(jnp.take_along_axis(epoch(number), index_SB, 1), index_SB)

        whole = NamedSharding(mesh, REPLICATED)
        self._epoch, self._rows = (jax.jit(draw, out_shardings=whole) for draw in (epoch, rows))
        self._compiled, self._lock, self._device = jax.jit(rows), threading.Lock(), mesh.local_devices[0]
        self._kept = functools.lru_cache(maxsize=2)(self._on_host)

    def epoch(self, number: int) -> jax.Array:
        """Returns which images are the batches of an epoch, [S, B], on every device: a function of (seed, epoch)."""
        return self._epoch(jnp.int32(number))

    def rows(self, number: int) -> Rows:
        """Returns the rows of an epoch on every device: a function of (seed, epoch)."""
        return self._rows(jnp.int32(number))

    def rows_on_host(self, number: int) -> Rows:
        """Returns the rows of an epoch as NumPy arrays. Any thread may call it; it waits for no other process."""
        with self._lock:
            return self._kept(number)

    def _on_host(self, number: int) -> Rows:
        with jax.default_device(self._device):
            return jax.device_get(self._compiled(jnp.int32(number)))


def resident_batches(split: Split, order: TrainOrder, start: int, total: int) -> Generator[Batch]:
    """Yields the batch of every step from `start` to before `total`, of a split that stays on the devices."""
    mesh, epoch, rows = order.mesh, -1, None
    images = on_devices(split, mesh)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, BY_DEVICE))
    def batch(images: Images, rows: Rows, s: jax.Array) -> Batch:
        return gather(mesh, images, rows.row_SB[s], rows.index_SB[s])

    for step in range(start, total):
        if epoch != step // order.steps_per_epoch:
            epoch = step // order.steps_per_epoch
            rows = order.rows(epoch)
        yield batch(images, rows, np.int32(step % order.steps_per_epoch))


class EvalBatches(abc.ABC):
    """The batches of a split in order, as often as they are iterated. The batch size is rounded up to a multiple of the
    devices; the last batch is filled up with rows without an image.

    Attributes:
        count: N.
        batch_size: B.
    """

    def __init__(self, count: int, batch_size: int, mesh: Mesh) -> None:
        self.count, self.mesh = count, mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...


class Resident(EvalBatches):
    """Those of a split that stays on the devices."""

    def __init__(self, split: Split, batch_size: int, mesh: Mesh) -> None:
        super().__init__(len(split), batch_size, mesh)
        self._images = on_devices(split, mesh)
        self._gather = jax.jit(functools.partial(gather, mesh), out_shardings=NamedSharding(mesh, BY_DEVICE))

    def __iter__(self) -> Iterator[Batch]:
        index_B = np.arange(self.batch_size, dtype=np.int32)
        for s in range(len(self)):
            row_B = s * self.batch_size + index_B
            yield self._gather(self._images, np.where(row_B < self.count, row_B, -1), index_B)
