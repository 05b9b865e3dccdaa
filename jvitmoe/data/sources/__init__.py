"""Data sets by name (digits, image folders, sets of Hugging Face and of TFDS), and validation images held out.

N images · H rows · W columns · c channels
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from jvitmoe import config as config_lib
from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.data.pictures import Crop, DataError
from jvitmoe.data.sources.folder import ImageFolder
from jvitmoe.data.sources.hugging_face import HuggingFace
from jvitmoe.data.sources.tfds import Tfds
from jvitmoe.data.splits import Dataset, Record, Records, S, Source, Split, check_fit, decode, in_memory


class Digits(Source):
    """scikit-learn's handwritten digits."""

    def browse(self) -> Dataset[Records]:
        side = 8 if self.data.crop == "exact" else self.model.image_size
        check_fit("digits", (side, side, 1), 10, self.model)
        # The file that `sklearn.datasets.load_digits` reads. Importing that function takes as long as importing JAX.
        path = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        table = np.loadtxt(str(path), delimiter=",")
        images_NHWc = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        train, test = hold_out(Split(images_NHWc, table[:, -1].astype(np.int32)), 360)
        return Dataset(in_memory(train), in_memory(test), tuple("0123456789"))


# By `data.name` up to a colon; any other name is a TFDS set's.
SOURCES: dict[str, type[Source]] = {"digits": Digits, "folder": ImageFolder, "hf:": HuggingFace}
OURS = dict(SOURCES)  # which an experiment file may not replace


def load(data: DataConfig, model: ModelConfig) -> Dataset[Split]:
    """Returns the splits of `browse` with all images in memory. Raises DataError."""
    return read(browse(data, model))


def read(records: Dataset[Records]) -> Dataset[Split]:
    """Returns the set with all images in memory. Raises DataError."""
    return Dataset(decode(records.train), decode(records.test), records.class_names, records.note)


def browse(data: DataConfig, model: ModelConfig) -> Dataset[Records]:
    """Returns the splits of `data.name`; no picture is read yet.

    Downloads a TFDS set into `data.dir` and prepares it there if it is absent. Raises DataError if the data are absent
    or damaged, or their size or number of classes is not the model's.
    """
    return _with_crop(_kind(data)(data, model).browse(), data, model)


def _with_crop(found: Dataset[Records], data: DataConfig, model: ModelConfig) -> Dataset[Records]:
    crop = Crop(data.crop, model.image_size, model.channels, data.crop_area)
    train, test = (dataclasses.replace(split, crop=crop) for split in (found.train, found.test))
    return dataclasses.replace(found, train=train, test=test)


def labelled(data: DataConfig, model: ModelConfig, names: Sequence[str], split: str) -> Records:
    """Returns a split of a set that may lack some of the classes `names`. The folder of data.name=folder may hold the
    class folders themselves, which are then one split. Raises DataError."""

    def find(data: DataConfig, model: ModelConfig) -> Dataset[Records]:
        is_folder = data.name == "folder"
        return _with_crop(ImageFolder(data, model).labelled(), data, model) if is_folder else browse(data, model)

    found: Records = getattr(with_classes(find, data, model, names, may_lack=True), split)
    return found


def with_classes(
    find: Callable[[DataConfig, ModelConfig], Dataset[S]],
    data: DataConfig,
    model: ModelConfig,
    names: Sequence[str],
    may_lack: bool = False,
) -> Dataset[S]:
    """Returns the set that `find` (`browse` or `load`) gives. Raises DataError as it does, and where the classes are
    not `names`, those of a run; with no names only their number counts. A set that `may_lack` some of them gets their
    labels."""
    if not names:
        return find(data, model)
    found = find(data, dataclasses.replace(model, classes=0))
    if may_lack:
        return _relabelled(found, tuple(names))
    for label, (now, then) in enumerate(itertools.zip_longest(found.class_names, names)):
        if now != then:
            fault = f"the data have other classes than the run: number {label} is {now!r}, and was {then!r}"
            raise DataError(f"{fault}; set --config.data.dir to data of the run's classes")
    return found


def _relabelled(found: Dataset[S], names: tuple[str, ...]) -> Dataset[S]:
    """Returns the set with the labels of `names`. Raises DataError for a class that is none of them."""
    if strange := [name for name in found.class_names if name not in names]:
        known = f"{', '.join(names[:5])}{', …' * (len(names) > 5)}"
        remedy = "rename or remove it, or make a start that names it"
        raise DataError(f"the data have the class {strange[0]!r}, which is none of the start's ({known}); {remedy}")
    label_C = np.array([names.index(name) for name in found.class_names], np.int32)

    def relabelled(split: S) -> S:
        labels_N = None if split.labels_N is None else label_C[split.labels_N]
        if isinstance(split, Split):
            return dataclasses.replace(split, labels_N=labels_N)
        before = split.read

        def read(numbers: Sequence[int]) -> list[Record]:
            return [(picture, int(label_C[label])) for picture, label in before(numbers)]

        return dataclasses.replace(split, read=read, labels_N=labels_N)

    return Dataset(relabelled(found.train), relabelled(found.test), names, found.note)


def _kind(data: DataConfig) -> type[Source]:
    kind, colon, _ = data.name.partition(":")
    return SOURCES.get(kind + colon, Tfds)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {"section.field": (old, new)} for the fields that would change a run's numbers.

    `data.stream` is one of them if validation images are held out of a source that learns labels only from reading
    records: streaming then holds out other images.
    """
    changed, streams = config_lib.differences(old, new), (old.data.stream, new.data.stream)
    if streams[0] != streams[1] and old.data.validation and not _kind(old.data).knows_labels:
        changed["data.stream"] = streams
    return changed


def training_images(split: S, data: DataConfig) -> tuple[S, S]:
    """Returns (train, validation) of a training split: the images of `data.part`, `data.validation` of them held out.

    The N parts of a split are disjoint and cover it, and each is a function of the number of images alone. Raises
    DataError for more parts than images.
    """
    if data.part:
        number, count = map(int, data.part.split("/"))
        if count > len(split):
            raise DataError(f"config.data.part is {data.part!r}; there are {len(split):,} training images to part")
        order_N = np.random.RandomState(0).permutation(len(split))
        split = split.select(np.sort(np.array_split(order_N, count)[number - 1]))
    return hold_out(split, data.validation)


def hold_out(split: S, count: int) -> tuple[S, S]:
    """Returns (train, validation): `count` images, every class in proportion, moved to validation; order is kept.

    The choice is a function of the labels and `count`; of `count` alone if labels are unknown. Raises DataError unless
    0 <= count < len(split).
    """
    if not 0 <= count < len(split):
        rule = f"it must be at least 0 and below the number of training images, which is {len(split)}"
        raise DataError(f"config.data.validation is {count}; {rule}")
    labels_N = np.zeros(len(split), np.int32) if split.labels_N is None else split.labels_N
    classes, sizes = np.unique(labels_N, return_counts=True)
    shares, remainders = np.divmod(sizes * count, len(split))
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    random = np.random.RandomState(0)  # unlike Generator's, its numbers are the same in every version of NumPy
    held_N = np.zeros(len(split), bool)
    for label, share in zip(classes, shares, strict=True):
        held_N[random.permutation(np.flatnonzero(labels_N == label))[:share]] = True
    return (split.select(~held_N), split.select(held_N)) if count else (split, split.select(held_N))
