"""Data sets by name: digits, an image folder, or a set of TFDS; and validation images held out of one."""

from typing import Any

import numpy as np

from jvitmoe import config as config_lib
from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.data.folder import ImageFolder
from jvitmoe.data.images import DataError
from jvitmoe.data.splits import Dataset, Records, S, Source, Split, check_fit
from jvitmoe.data.tfds import Tfds


class Digits(Source):
    """scikit-learn's handwritten digits."""

    def load(self) -> Dataset[Split]:
        check_fit("digits", (8, 8, 1), 10, self.model)
        from sklearn.datasets import load_digits

        values_ND, labels_N = load_digits(return_X_y=True)
        images_NHWC = np.rint(values_ND * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        train, test = hold_out(Split(images_NHWC, labels_N.astype(np.int32)), 360)
        return Dataset(train, test, tuple("0123456789"))


SOURCES: dict[str, type[Source]] = {"digits": Digits, "folder": ImageFolder}  # any other name is a TFDS set's


def load(data: DataConfig, model: ModelConfig) -> Dataset[Split]:
    """Returns all images of `data.name`, each image_size x image_size x channels, with labels below `model.classes`.

    A TFDS set that is not yet in `data.dir` is downloaded and prepared there. Raises DataError if the data are absent,
    damaged, or of another shape or number of classes than `model` expects.
    """
    return _source(data, model).load()


def browse(data: DataConfig, model: ModelConfig) -> Dataset[Records]:
    """Returns the splits of `load` in the same order, their pictures unread. Raises DataError as `load` does, except
    for errors that only reading a picture shows."""
    return _source(data, model).browse()


def _source(data: DataConfig, model: ModelConfig) -> Source:
    return SOURCES[data.name](data, model) if data.name in SOURCES else Tfds(data, model, tuple(SOURCES))


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {"section.field": (old, new)} for the fields that would change a run's numbers.

    `data.stream` is one of them if validation images are held out of a source that does not know labels before it
    reads: streaming then holds out other images.
    """
    changed, streams = config_lib.differences(old, new), (old.data.stream, new.data.stream)
    knows_labels = SOURCES.get(old.data.name, Tfds).knows_labels
    if streams[0] != streams[1] and old.data.validation and not knows_labels:
        changed["data.stream"] = streams
    return changed


def hold_out(split: S, count: int) -> tuple[S, S]:
    """Returns (train, validation): `count` images, every class in proportion, moved to validation; order is kept.

    The choice depends on nothing but the labels and `count`; where labels are not known yet, on `count` alone. Raises
    DataError unless 0 <= count < len(split).
    """
    if not 0 <= count < len(split):
        raise DataError(
            f"config.data.validation is {count}; it must be at least 0 and below the number of training images, "
            f"which is {len(split)}"
        )
    if count == 0:
        return split, split.part(np.zeros(len(split), bool))
    labels_N = np.zeros(len(split), np.int32) if split.labels_N is None else split.labels_N
    classes, sizes = np.unique(labels_N, return_counts=True)
    shares, remainders = np.divmod(sizes * count, len(split))
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    random = np.random.RandomState(0)  # unlike Generator's, its stream is frozen: every NumPy holds out the same images
    held_N = np.zeros(len(split), bool)
    for label, share in zip(classes, shares, strict=True):
        held_N[random.permutation(np.flatnonzero(labels_N == label))[:share]] = True
    return split.part(~held_N), split.part(held_N)
