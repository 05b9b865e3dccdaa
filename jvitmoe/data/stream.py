"""Batches read from disk when they are needed, through Grain, for sets larger than a device's memory.

Row n of step s is the image that `TrainOrder` names, and its random crop is drawn from (seed, s, n). So a streamed run
equals a run with its set on the device, and a resumed run reads no earlier image. Each process reads only the rows that
its own devices use. Threads decode pictures, and batches are put on the devices before their step.

B global batch, b the rows of it in this process · H, W image rows and columns · c channels
"""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jvitmoe.data.batches import Batch, EvalBatches, Resident, TrainOrder, resident_batches
from jvitmoe.data.pictures import DataError, opened
from jvitmoe.data.splits import GROUP, Records, Split
from jvitmoe.machine.devices import BY_DEVICE

MOST_DAMAGED = 0.01  # of the pictures of a training split
AHEAD = 2  # batches that wait on the devices; as many wait decoded on the host
CROP = 0x43726F70  # distinguishes these random numbers from others that depend on (seed, step, row)
Row = tuple[np.ndarray, np.int32, np.int32]  # image_HWc, its label, and its place in the global batch


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

    def check(self, records: Records, checked: Callable[[], object]) -> None:
        """Adds the files whose headers cannot be read; of other records the headers are inside, and are not read.
        `checked` is called after each GROUP. Raises DataError, also for another size than data.crop=exact allows."""
        crop = records.crop

        def check(start: int) -> None:
            for picture, _ in records.read(records.number_N[start : start + GROUP].tolist()):
                try:
                    with opened(picture) as image:
                        is_other = crop.kind == "exact" and image.size != (crop.side, crop.side)
                except DataError as error:
                    self.add(picture.name, error)
                else:
                    if is_other:
                        crop(picture)  # says what to set
            checked()

        if isinstance(records[0][0].encoded, Path):
            with ThreadPoolExecutor() as pool:
                for _ in pool.map(check, range(0, len(records), GROUP)):
                    pass


def train_batches(
    split: Split | Records, order: TrainOrder, start: int, total: int, damaged: Damaged | None = None
) -> Generator[Batch]:
    """Yields the batch of every step from `start` to before `total`: from the devices, where all of the split lies, or
    read from disk. Raises DataError. `damaged` counts the pictures that are skipped; None skips none."""
    if isinstance(split, Split):
        return resident_batches(split, order, start, total)
    records, seed = split, (order.seed, 0)

    def read(step: int, place: int) -> Row:
        epoch, s = divmod(step, order.steps_per_epoch)
        row, index = (int(array_SB[s, place]) for array_SB in order.rows_on_host(epoch))
        while True:
            picture, label = records[row]
            try:
                return records.crop(picture, (CROP, *seed, step, index)), np.int32(label), np.int32(index)
            except DataError as error:
                if damaged is None:
                    raise
                damaged.add(picture.name, error)
                row = (row + 1) % len(records)

    return _batches(read, range(start, total), order.batch_size, order.mesh)


def eval_batches(split: Split | Records, batch_size: int, mesh: Mesh, damaged: Damaged | None = None) -> EvalBatches:
    """Returns the batches to evaluate a split: from the devices, where all of it lies, or read from disk each time."""
    if isinstance(split, Split):
        return Resident(split, batch_size, mesh)
    return Streamed(split, batch_size, mesh, damaged)


class Streamed(EvalBatches):
    """Those of a split on disk. Pictures that `damaged` counts are rows without an image; without it they raise
    DataError."""

    def __init__(self, records: Records, batch_size: int, mesh: Mesh, damaged: Damaged | None = None) -> None:
        super().__init__(len(records), batch_size, mesh)
        self._records, self._damaged = records, damaged

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self._read, range(len(self)), self.batch_size, self.mesh)

    def _read(self, step: int, index: int) -> Row:
        crop, row = self._records.crop, step * self.batch_size + index
        empty = np.zeros(crop.shape, np.uint8), np.int32(-1), np.int32(index)
        if row >= self.count:
            return empty
        picture, label = self._records[row]
        try:
            return crop(picture), np.int32(label), np.int32(index)
        except DataError as error:
            if self._damaged is None:
                raise
            self._damaged.add(picture.name, error)
            return empty


def _rows_here(batch: int, sharding: NamedSharding) -> np.ndarray:
    """Returns the rows of a batch, ascending, that lie on devices of this process."""
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices]))


def _batches(read: Callable[[int, int], Row], steps: range, batch: int, mesh: Mesh) -> Generator[Batch]:
    """Yields the batch of each step on the devices. `read` maps step and place in the batch to a Row."""
    import grain  # not above: it takes as long as half of JAX, which sets on the devices do without
    from PIL import Image

    Image.core.set_blocks_max(16)  # Pillow reuses the memory of pictures: new pages took about a tenth of the time
    sharding = NamedSharding(mesh, BY_DEVICE)
    place_b = _rows_here(batch, sharding)

    def read_at(number: int) -> Row:
        step, local = divmod(int(number), len(place_b))
        return read(steps[step], int(place_b[local]))

    def to_devices(array_b: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array_b, (batch, *array_b.shape[1:]))

    # Slurm lets a task use some of the cores. macOS cannot say which a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(16, 2 * cores)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, AHEAD * len(place_b)))
    rows = grain.MapDataset.range(len(steps) * len(place_b)).map(read_at).to_iter_dataset(options)

    def put(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Batch:
        images_bHWc, labels_b, index_b = arrays
        return Batch(*map(to_devices, (images_bHWc.reshape(len(images_bHWc), -1), labels_b, index_b)))

    batches = rows.batch(len(place_b)).map(put)
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=AHEAD)
    with contextlib.closing(iter(ahead)) as iterator:  # ends its threads before the interpreter is torn down
        yield from iterator
