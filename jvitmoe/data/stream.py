"""Batches read from disk as they are needed, through Grain, for sets larger than a device's memory.

Row n of step s is the image that `TrainOrder` names, and its random crop is drawn from (seed, s, n): so a streamed run
is the run that holds its set on the device, and one that is taken up at any step reads nothing twice. Each process
reads the rows of its own devices. Pictures are decoded in threads, and batches put on the devices ahead of the step.

B global batch · N images · S steps · H rows · W columns · C channels
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvitmoe.config import Config, ModelConfig
from jvitmoe.data.batches import Batches, Images, TrainOrder
from jvitmoe.data.images import Picture, centre_crop, exact, random_crop
from jvitmoe.data.splits import Records, Split, size_rule

AHEAD = 2  # batches that wait on the devices; as many again wait decoded on the host
CROP = 0x43726F70  # what the host draws for: keeps its numbers apart from anything else of (seed, step, place)
Row = tuple[np.ndarray, np.int32]  # image_HWC and its label


class Rows:
    """What Grain reads from: a table of rows that are decoded when asked for."""

    def __init__(self, count: int, read: Callable[[int], Row]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Row:
        return self._read(int(number))


def train_batches(
    records: Records, order: TrainOrder, config: Config, mesh: Mesh, start: int, total: int
) -> Generator[Images, None, None]:
    """Yields the batch of every step from `start` to before `total`, its rows along the data axis. Raises DataError."""
    model, side = config.model, config.model.image_size
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    place_b = _rows_here(config.train.batch_size, sharding)

    def read(number: int) -> Row:
        step, row = divmod(number, len(place_b))
        step, place = start + step, int(place_b[row])
        epoch, step_of_epoch = divmod(step, order.steps_per_epoch)
        picture, label = records[order.on_host(epoch)[step_of_epoch, place]]
        if config.data.crop == "resized":
            low, high = config.train.seed & 0xFFFFFFFF, config.train.seed >> 32
            random = np.random.RandomState([CROP, low, high, step, place])
            return random_crop(picture, side, model.channels, random), np.int32(label)
        return _exact(picture, model), np.int32(label)

    return _batches(Rows((total - start) * len(place_b), read), place_b, config.train.batch_size, sharding)


class EvalImages(Iterable[Images]):
    """The batches of `eval_batches`, in their order, rows along the whole mesh; anew each time they are gone through.

    Padded rows are zeros: the masks of `eval_batches` leave them out.
    """

    def __init__(self, records: Records, batches: Batches, config: Config, mesh: Mesh) -> None:
        self._records, self._config, self._mesh = records, config, mesh
        self._steps, self._batch = batches.index_SB.shape

    def __iter__(self) -> Iterator[Images]:
        model, side = self._config.model, self._config.model.image_size
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        place_b = _rows_here(self._batch, sharding)
        padding = np.zeros((side, side, model.channels), np.uint8), np.int32(0)

        def read(number: int) -> Row:
            step, row = divmod(number, len(place_b))
            index = step * self._batch + int(place_b[row])
            return _evaluated(self._records, index, self._config) if index < len(self._records) else padding

        return _batches(Rows(self._steps * len(place_b), read), place_b, self._batch, sharding)


def read(records: Records, config: Config) -> Split:
    """Returns all pictures of the records in memory, as they are evaluated. Raises DataError."""
    rows = Rows(len(records), lambda number: _evaluated(records, number, config))
    images, labels = zip(*_read_ahead(rows, len(records)), strict=True)
    return Split(np.stack(images), np.asarray(labels, np.int32))


def _evaluated(records: Records, index: int, config: Config) -> Row:
    picture, label = records[index]
    if config.data.crop == "resized":
        return centre_crop(picture, config.model.image_size, config.model.channels), np.int32(label)
    return _exact(picture, config.model), np.int32(label)


def _exact(picture: Picture, model: ModelConfig) -> np.ndarray:
    return exact(picture, (model.image_size, model.image_size, model.channels), size_rule(model))


def _rows_here(batch: int, sharding: NamedSharding) -> np.ndarray:
    """Returns the rows of a batch, ascending, that lie on devices of this process."""
    parts = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[part] for part in parts]))


def _read_ahead(rows: Rows, buffered: int) -> grain.IterDataset:
    threads = min(16, 2 * (os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, buffered))
    return grain.MapDataset.source(rows).to_iter_dataset(options)


def _batches(rows: Rows, place_b: np.ndarray, batch: int, sharding: NamedSharding) -> Generator[Images, None, None]:
    def put(here: tuple[np.ndarray, np.ndarray]) -> Images:
        def part(array_b: np.ndarray) -> jax.Array:
            def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "every process holds a part of every batch"
                first, last, _ = index[0].indices(batch)
                return array_b[np.searchsorted(place_b, first) : np.searchsorted(place_b, last)]

            return jax.make_array_from_callback((batch, *array_b.shape[1:]), sharding, of_device)

        return Images(*map(part, here))

    dataset = _read_ahead(rows, AHEAD * len(place_b)).batch(len(place_b)).map(put)
    # Closed and not left to the end of the process, which its threads might otherwise find half gone.
    with contextlib.closing(
        iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=AHEAD))
    ) as iterator:
        yield from iterator
