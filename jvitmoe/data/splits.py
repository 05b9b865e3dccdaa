"""What a data set is: splits in memory, records on disk, the base class of sources, and decoding records.

N images · H rows · W columns · c channels
"""

import abc
import contextlib
import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data.pictures import MODES, Crop, DataError, Picture
from jvitmoe.machine import memory

GROUP = 64  # records per thread task: one record per task costs more in overhead than in decoding
SAMPLED = 64  # records of a split, evenly spaced, whose contents are part of its fingerprint
MOST_SAMPLED = 2**26  # bytes of each: a file may be of any size
Record = tuple[Picture, int]  # a picture and its label
UNSET = Crop("exact", 0, 0)  # no picture has this size


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images of one size in memory."""

    images_NHWc: np.ndarray  # uint8, C-contiguous
    labels_N: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.labels_N)

    def select(self, chosen_N: np.ndarray) -> "Split":
        """Returns the images that a mask or indices choose."""
        return Split(self.images_NHWc[chosen_N], self.labels_N[chosen_N])


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A split on disk. Any thread may read any records, in any order."""

    read: Callable[[Sequence[int]], list[Record]]  # numbers in the source -> records
    number_N: np.ndarray
    labels_N: np.ndarray | None  # None if only reading a record gives its label
    about: Callable[[], Iterable[str]] = tuple  # what is known of the source without reading records
    crop: Crop = UNSET  # which `sources.browse` sets

    def __len__(self) -> int:
        return len(self.number_N)

    def __getitem__(self, index: int) -> Record:
        return self.read([int(self.number_N[index])])[0]

    def select(self, chosen_N: np.ndarray) -> "Records":
        """Returns the records that a mask or indices choose."""
        labels_N = None if self.labels_N is None else self.labels_N[chosen_N]
        return dataclasses.replace(self, number_N=self.number_N[chosen_N], labels_N=labels_N)

    def fingerprint(self) -> str:
        """Returns a hash of what is known without reading records (`about`, and labels if known), and of SAMPLED
        records, the first and the last among them: other pictures may have the same sizes. Raises DataError."""
        known = "\n".join(self.about()).encode(errors="surrogateescape")
        known += b"" if self.labels_N is None else self.labels_N.tobytes()
        places = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).round().astype(int)
        crc = 0
        for picture, label in self.read(self.number_N[places].tolist()):
            crc = zlib.crc32(b"%d" % label, zlib.crc32(_content(picture), crc))
        return hashlib.sha256(known + b"%d" % crc).hexdigest()[:12]


def _content(picture: Picture) -> bytes:
    """Returns the encoded bytes of a picture, of a file at most MOST_SAMPLED. A file that cannot be read has none:
    training skips it or names it."""
    if isinstance(picture.encoded, Path):
        with contextlib.suppress(OSError):
            if picture.encoded.is_file():  # reading a pipe or a device might never end
                with picture.encoded.open("rb") as file:
                    return file.read(MOST_SAMPLED)
        return b""
    return bytes(picture.encoded)


S = TypeVar("S", Split, Records)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(Generic[S]):
    """The splits of a set, and the names of its classes in the order of their labels."""

    train: S
    test: S
    class_names: tuple[str, ...]
    note: str = ""  # what was made of the source, to be printed

    def facts(self: "Dataset[Records]") -> dict[str, object]:
        """Returns what the processes of one run compare, and a run that goes on with its start. Raises DataError."""
        splits = {"train": self.train, "test": self.test}
        facts: dict[str, object] = {f"class {label}": name for label, name in enumerate(self.class_names)}
        facts |= {f"number of {name} images": len(split) for name, split in splits.items()}
        return facts | {f"hash of {name} images and labels": split.fingerprint() for name, split in splits.items()}


class Source(abc.ABC):
    """A kind of data set. A new one defines `browse` and gets a line in `sources.SOURCES`."""

    knows_labels = True  # without reading records; if False, data.stream changes which images are held out

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.data, self.model = data, model

    @abc.abstractmethod
    def browse(self) -> Dataset[Records]:
        """Returns what `sources.browse` returns. Raises DataError."""


def check_fit(name: str, shape_HWc: Sequence[int], classes: int, model: ModelConfig) -> None:
    """Raises DataError, with the settings to change, if images or classes of a set do not fit the model. A model of 0
    classes, used for its features only, fits any number of classes."""
    height, width, channels = shape_HWc
    if channels not in MODES:
        raise DataError(f"images of {name} have {channels} channels (config.model.channels); they must have 1, 3 or 4")
    if tuple(shape_HWc) != (model.image_size, model.image_size, model.channels):
        wanted = f"{model.image_size}x{model.image_size}x{model.channels}"
        flags = [f"--config.model.image_size={height}"] * (height != model.image_size)
        flags += [f"--config.model.channels={channels}"] * (channels != model.channels)
        remedy = f"set {' '.join(flags)}" if height == width else "set --config.data.crop=centre, which cuts squares"
        fault = f"images of {name} are {height}x{width}x{channels} but config.model expects {wanted}"
        raise DataError(f"{fault}; {remedy}")
    if model.classes and classes != model.classes:
        rule = f"config.model.classes is {model.classes}; set --config.model.classes={classes}"
        raise DataError(f"{name} has {classes} classes but {rule}")


def in_memory(split: Split) -> Records:
    """Returns a split as records."""

    def read(numbers: Sequence[int]) -> list[Record]:
        return [(Picture(f"image {n}", split.images_NHWc[n]), int(split.labels_N[n])) for n in numbers]

    def about() -> list[str]:
        return [hashlib.sha256(split.images_NHWc.data).hexdigest()]

    crop = Crop("exact", *split.images_NHWc.shape[2:])
    return Records(read, np.arange(len(split)), split.labels_N, about, crop)


def evenly_spaced(images: int, most: int) -> np.ndarray:
    """Returns the indices of at most `most` images, evenly spaced over a split of `images`."""
    return np.linspace(0, images - 1, min(images, most)).astype(int)


def some(split: "Split | Records", most: int, skipped: Callable[[str], object] | None = None) -> Split:
    """Returns at most that many images of a split, evenly spaced, in memory; on `skipped` see `decode`."""
    chosen = split.select(evenly_spaced(len(split), most))
    return chosen if isinstance(chosen, Split) else decode(chosen, skipped)


def decode(records: Records, skipped: Callable[[str], object] | None = None) -> Split:
    """Returns all records in memory, as evaluation sees them. Raises DataError; if `skipped` is given, it gets the line
    about a picture that cannot be read, which is left out."""
    shape = len(records), *records.crop.shape
    if math.prod(shape) > (installed := memory.installed()):
        raise DataError(
            f"{len(records):,} images need {math.prod(shape) / 2**30:,.1f} GiB of a machine that has "
            f"{installed / 2**30:,.1f} GiB; take a larger machine, or train with --config.data.stream=true or a "
            "smaller model.image_size"
        )
    images_NHWc, labels_N = np.empty(shape, np.uint8), np.empty(len(records), np.int32)
    absent = []

    def decode_group(start: int) -> None:
        for index, record in enumerate(records.read(records.number_N[start : start + GROUP].tolist()), start):
            picture, labels_N[index] = record
            try:
                images_NHWc[index] = records.crop(picture)
            except DataError as error:
                if skipped is None:
                    raise
                absent.append(index)
                skipped(f"skipped     {error}")

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_group, range(0, len(records), GROUP)):
            pass
    return (
        Split(np.delete(images_NHWc, absent, 0), np.delete(labels_N, absent))
        if absent
        else Split(images_NHWc, labels_N)
    )
