"""Batches read from disk when they are needed, through Grain, for sets larger than a device's memory.

Row n of step s is the image that `TrainOrder` names, and its random crop is drawn from (seed, s, n). So a streamed run
equals a run with its set on the device, and a resumed run reads no earlier image. Each process reads only the rows that
its own devices use. Threads decode pictures, and batches are put on the devices before their step.

B global batch, b the rows of it in this process · H, W image rows and columns · c channels
"""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jvitmoe.config import DataConfig, ModelConfig, TrainConfig
from jvitmoe.data.batches import Batches, Images, TrainOrder, eval_batches, on_devices
from jvitmoe.data.images import DataError, opened
from jvitmoe.data.splits import GROUP, Records, Split, read_pixels
from jvitmoe.runtime.devices import BY_DEVICE

MOST_DAMAGED = 0.01  # of the pictures of a training split
AHEAD = 2  # batches that wait on the devices; as many wait decoded on the host
CROP = 0x43726F70  # distinguishes these random numbers from others that depend on (seed, step, row)
Row = tuple[np.ndarray, np.int32]  # image_HWc and its label


class Damaged:
    """The pictures of a training split that cannot be read. In training the next one takes their place, so that a batch
    still follows from seed and step; probes leave them out.

    Args:
        count: of the split's pictures.
        say: gets a line about each damaged one.
    """

    def __init__(self, count: int, say: Callable[[str], object]) -> None:
        self._count, self._say, self._found, self._lock = count, say, set[str](), threading.Lock()

    def add(self, name: str, error: DataError) -> None:
        """Counts a picture once. Raises DataError where more than MOST_DAMAGED of all are damaged."""
        with self._lock:
            if name in self._found:
                return
            self._found.add(name)
            found = f"{len(self._found):,} of {self._count:,} training images"
            if len(self._found) > MOST_DAMAGED * self._count:
                raise DataError(f"{found} cannot be read, which is more than {MOST_DAMAGED:.0%}; the last: {error}")
            self._say(f"{found}: {error}")

    def check(self, records: Records, data: DataConfig, model: ModelConfig, checked: Callable[[], object]) -> None:
        """Adds the files whose headers cannot be read; of other records the headers are inside, and are not read.
        `checked` is called after each GROUP. Raises DataError, also for another size than data.crop=exact allows."""
        side = model.image_size

        def check(start: int) -> None:
            for picture, _ in records.read(records.number_N[start : start + GROUP].tolist()):
                try:
                    with opened(picture) as image:
                        is_other = data.crop == "exact" and image.size != (side, side)
                except DataError as error:
                    self.add(picture.name, error)
                else:
                    if is_other:
                        read_pixels(picture, data, model)  # says what to set
            checked()

        if isinstance(records[0][0].encoded, Path):
            with ThreadPoolExecutor() as pool:
                for _ in pool.map(check, range(0, len(records), GROUP)):
                    pass


def train_batches(
    records: Records,
    order: TrainOrder,
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    mesh: Mesh,
    start: int,
    total: int,
    rows: Callable[[int], np.ndarray] | None = None,
    damaged: Damaged | None = None,
) -> Generator[Images, None, None]:
    """Yields the batch of every step from `start` to before `total`, split over the whole mesh. Raises DataError.

    `rows` maps an epoch to row_SB, the rows of each batch in the order of the devices. None: ascending. `damaged`
    counts the pictures that are skipped; None skips none.
    """
    seed = train.seed & 0xFFFFFFFF, train.seed >> 32

    def read(step: int, place: int) -> Row:
        epoch, step_of_epoch = divmod(step, order.steps_per_epoch)
        row = int(rows(epoch)[step_of_epoch, place]) if rows else place
        index = int(order.on_host(epoch)[step_of_epoch, row])
        while True:
            picture, label = records[index]
            try:
                return read_pixels(picture, data, model, (CROP, *seed, step, row)), np.int32(label)
            except DataError as error:
                if damaged is None:
                    raise
                damaged.add(picture.name, error)
                index = (index + 1) % len(records)

    sharding = NamedSharding(mesh, BY_DEVICE)
    return _batches(read, range(start, total), train.batch_size, sharding)


def eval_images(
    split: Split | Records,
    batch_size: int,
    data: DataConfig,
    model: ModelConfig,
    mesh: Mesh,
    damaged: Damaged | None = None,
) -> "tuple[Images | EvalImages, Batches]":
    """Returns (images, batches) to evaluate a split: whole on the devices, or read from disk batch by batch."""
    batches = eval_batches(len(split), batch_size, mesh)
    if isinstance(split, Split):
        return on_devices(split, mesh), batches
    return EvalImages(split, batches, data, model, mesh, damaged), batches


def read_once(
    records: Records,
    batch_size: int,
    data: DataConfig,
    model: ModelConfig,
    mesh: Mesh,
    checked: Callable[[], object],
) -> None:
    """Reads this process's part of a split. `checked` is called after each batch. Raises DataError."""
    if len(records):
        for _ in EvalImages(records, eval_batches(len(records), batch_size, mesh), data, model, mesh):
            checked()


class EvalImages(Iterable[Images]):
    """The batches of `eval_batches` in order, rows split over the whole mesh; each iteration reads them again.

    Padded rows are zeros: the masks of `eval_batches` leave them out. Pictures that `damaged` counts are zeros with the
    label -1; without it they raise DataError.
    """

    def __init__(
        self,
        records: Records,
        batches: Batches,
        data: DataConfig,
        model: ModelConfig,
        mesh: Mesh,
        damaged: Damaged | None = None,
    ) -> None:
        self._records, self._data, self._model, self._damaged = records, data, model, damaged
        self._steps, self._batch = batches.index_SB.shape
        self._sharding = NamedSharding(mesh, BY_DEVICE)

    def __iter__(self) -> Iterator[Images]:
        return _batches(self._read, range(self._steps), self._batch, self._sharding)

    def _read(self, step: int, row: int) -> Row:
        model, index = self._model, step * self._batch + row
        empty = (model.image_size, model.image_size, model.channels)
        if index >= len(self._records):
            return np.zeros(empty, np.uint8), np.int32(0)
        picture, label = self._records[index]
        try:
            return read_pixels(picture, self._data, model), np.int32(label)
        except DataError as error:
            if self._damaged is None:
                raise
            self._damaged.add(picture.name, error)
            return np.zeros(empty, np.uint8), np.int32(-1)


def _rows_here(batch: int, sharding: NamedSharding) -> np.ndarray:
    """Returns the rows of a batch, ascending, that lie on devices of this process."""
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices]))


def _batches(
    read: Callable[[int, int], Row], steps: range, batch: int, sharding: NamedSharding
) -> Generator[Images, None, None]:
    """Yields the batch of each step on the devices. `read` maps step and row of the batch to a Row."""
    import grain  # not above: it takes as long as half of JAX, which sets on the devices do without
    from PIL import Image

    Image.core.set_blocks_max(16)  # Pillow reuses the memory of pictures: new pages took about a tenth of the time
    row_b = _rows_here(batch, sharding)

    def read_at(number: int) -> Row:
        step, local = divmod(int(number), len(row_b))
        return read(steps[step], int(row_b[local]))

    def to_devices(array_b: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array_b, (batch, *array_b.shape[1:]))

    # Slurm lets a task use some of the cores. macOS cannot say which a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(16, 2 * cores)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, AHEAD * len(row_b)))
    rows = grain.MapDataset.range(len(steps) * len(row_b)).map(read_at).to_iter_dataset(options)

    def put(arrays: tuple[np.ndarray, np.ndarray]) -> Images:
        images_bHWc, labels_b = arrays
        pixels_bP = images_bHWc.reshape(len(images_bHWc), -1)
        return Images(to_devices(pixels_bP), to_devices(labels_b), images_bHWc.shape[1:])

    batches = rows.batch(len(row_b)).map(put)
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=AHEAD)
    with contextlib.closing(iter(ahead)) as iterator:  # ends its threads before the interpreter is torn down
        yield from iterator
