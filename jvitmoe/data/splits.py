"""What a data set is: splits in memory, records on disk, the class of sources, and the checks that they share."""

import abc
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data.images import DataError, Picture, exact

GROUP = 64  # images per thread task: one by one, hand-over costs more than decoding


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    images_NHWC: np.ndarray  # uint8, C-contiguous
    labels_N: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.labels_N)

    def part(self, chosen_N: np.ndarray) -> "Split":
        """Returns the images that a mask or numbers choose."""
        return Split(self.images_NHWC[chosen_N], self.labels_N[chosen_N])


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A split that stays where it is: pictures are read by number, in any order, from any thread."""

    read: Callable[[int], tuple[Picture, int]]  # number in the source -> (picture, label)
    number_N: np.ndarray
    labels_N: np.ndarray | None  # None where a label is known only once its picture is read

    def __len__(self) -> int:
        return len(self.number_N)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return self.read(int(self.number_N[index]))

    def part(self, chosen_N: np.ndarray) -> "Records":
        """Returns the pictures that a mask or numbers choose."""
        labels_N = None if self.labels_N is None else self.labels_N[chosen_N]
        return Records(self.read, self.number_N[chosen_N], labels_N)


S = TypeVar("S", Split, Records)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(Generic[S]):
    train: S
    test: S
    class_names: tuple[str, ...]


class Source(abc.ABC):
    """A kind of data set. A new one defines `load` and gets a line in `datasets.SOURCES`.

    Its methods return and raise what the functions of that name in `datasets` do.
    """

    knows_labels = True  # before it reads a picture; if not, a stream holds out other validation images than a set

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.data, self.model = data, model

    @abc.abstractmethod
    def load(self) -> Dataset[Split]: ...

    def browse(self) -> Dataset[Records]:
        found = self.load()
        return Dataset(in_memory(found.train), in_memory(found.test), found.class_names)


def check_fit(name: str, shape_HWC: Sequence[int], classes: int, model: ModelConfig) -> None:
    height, width, channels = shape_HWC
    if tuple(shape_HWC) != (model.image_size, model.image_size, model.channels):
        wanted = f"{model.image_size}x{model.image_size}x{model.channels}"
        flags = [f"--config.model.image_size={height}"] * (height != model.image_size)
        flags += [f"--config.model.channels={channels}"] * (channels != model.channels)
        remedy = f"set {' '.join(flags)}" if height == width else "only square images fit"
        raise DataError(f"images of {name} are {height}x{width}x{channels} but config.model expects {wanted}; {remedy}")
    if classes != model.classes:
        raise DataError(
            f"{name} has {classes} classes but config.model.classes is {model.classes}; "
            f"set --config.model.classes={classes}"
        )


def in_memory(split: Split) -> Records:
    def read(number: int) -> tuple[Picture, int]:
        return Picture(f"image {number}", split.images_NHWC[number]), int(split.labels_N[number])

    return Records(read, np.arange(len(split)), split.labels_N)


def size_rule(model: ModelConfig) -> str:
    """Returns the rule on the size of a picture, with its remedies, for messages."""
    return (
        f"config.model.image_size is {model.image_size}; resize the image, set --config.model.image_size, "
        "or set --config.data.stream --config.data.crop=resized"
    )


def decode(records: Records, model: ModelConfig) -> Split:
    """Returns the records with all pictures decoded; their labels must be known. Raises DataError."""
    assert records.labels_N is not None
    images_NHWC = np.empty((len(records), model.image_size, model.image_size, model.channels), np.uint8)
    decode_into(images_NHWC, [records[index][0] for index in range(len(records))], size_rule(model))
    return Split(images_NHWC, records.labels_N)


def decode_into(images_NHWC: np.ndarray, pictures: Sequence[Picture], rule: str) -> None:
    """Decodes the n-th picture into the n-th image. Raises DataError with its name and, on another size, `rule`."""
    from PIL import Image

    def decode(start: int) -> None:
        for index, picture in enumerate(pictures[start : start + GROUP], start):
            images_NHWC[index] = exact(picture, images_NHWC.shape[1:], rule)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(decode, range(0, len(pictures), GROUP)):
            pass
