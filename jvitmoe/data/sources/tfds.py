"""Image classification sets of TensorFlow Datasets (TFDS)."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.data.pictures import DataError, Picture
from jvitmoe.data.splits import Dataset, Record, Records, Source, check_fit
from jvitmoe.errors import UnknownNameError, did_you_mean, one_line
from jvitmoe.extras import is_installed

OTHERS = ("digits", "folder", "hf:NAME")  # what data.name may be besides
CONNECT_SECONDS = 10.0
ELSEWHERE = "set --config.data.dir to a folder with the prepared set"


class UnknownSetError(DataError, UnknownNameError):
    """`data.name` is neither in `sources.SOURCES` nor, as far as is known here, that of a set of TFDS."""


class Tfds(Source):
    """A set of TFDS, downloaded and prepared in `data.dir` if it is absent there."""

    knows_labels = False

    def browse(self) -> Dataset[Records]:
        name, builder = self.data.name, self._builder()
        image_key, label_key = _supervised_keys(name, builder)
        image, label = builder.info.features[image_key], builder.info.features[label_key]
        shape_HWc, any_size = image.shape, self.data.crop != "exact"
        if image.np_dtype != np.uint8 or (None in shape_HWc and not any_size):
            rule = "they must have 8 bits and one size, or any size with --config.data.crop=centre"
            raise DataError(f"images of {name} are {image.np_dtype} {shape_HWc}; {rule}")
        if any_size:
            shape_HWc = self.model.image_size, self.model.image_size, shape_HWc[-1]
        check_fit(name, shape_HWc, label.num_classes or self.model.classes, self.model)  # before hours of downloading
        if not builder.is_prepared():
            _prepare(name, builder)
        classes, splits = tuple(builder.info.features[label_key].names), builder.info.splits
        check_fit(name, shape_HWc, len(classes), self.model)

        def records(split: str) -> Records | None:
            """Returns a split, its images still encoded; None if it is absent, empty or holds no labels."""
            if split not in splits:
                return None
            import tensorflow_datasets as tfds

            about = f"the {split} split of {name} in {builder.data_dir}"
            with _reading(about):
                source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
                if not len(source) or source[0][label_key] < 0:
                    return None

            def read(numbers: Sequence[int]) -> list[Record]:
                with _reading(about):
                    found = [(example[image_key], int(example[label_key])) for example in source.__getitems__(numbers)]
                for number, (_, label) in zip(numbers, found, strict=True):
                    if not 0 <= label < len(classes):
                        raise DataError(f"the label of image {number} of {about} is {label}; use another set")
                names = (f"image {number} of {about}" for number in numbers)
                return [(Picture(n, encoded), label) for n, (encoded, label) in zip(names, found, strict=True)]

            known = f"{builder.info.full_name} {splits[split].shard_lengths}"  # the lengths decide on the order
            return Records(read, np.arange(len(source)), None, lambda: (known,))

        train, test = records("train"), records("test") or records("validation")  # ImageNet's test has no labels
        if not train or not test:
            rule = "train, and test or validation, must hold images with labels"
            raise DataError(f"{name} has the splits {', '.join(splits)}; {rule}; use another set")
        return Dataset(train, test, classes)

    def _builder(self) -> Any:
        name, place = self.data.name, self.data.dir
        if not is_installed("tensorflow_datasets"):
            remedy = "pip install 'jvitmoe[prepare]', or 'jvitmoe[tfds]' to read what is prepared"
            raise UnknownSetError(
                f"config.data.name is {name!r}; other sets than {', '.join(OTHERS)} need TFDS: {remedy}"
            )
        import tensorflow_datasets as tfds

        base, _, version = name.partition("/")[0].partition(":")
        try:
            if version and not version[0].isdigit():  # a name with a namespace would search the network
                raise tfds.core.DatasetNotFoundError
            return tfds.builder(name, data_dir=os.path.expanduser(place) or None)
        except tfds.core.DatasetNotFoundError as error:
            hint = did_you_mean(base.lower(), [*OTHERS, *tfds.list_builders(with_community_datasets=False)])
            rule = f"it must be {', '.join(OTHERS)} or the name of a TFDS set{hint}"
            raise UnknownSetError(f"config.data.name is {name!r}; {rule}") from error
        except Exception as error:
            remedy = "set --config.data.name or --config.data.dir to another"
            raise DataError(f"TFDS cannot open {name!r} in {place!r} ({error}); {remedy}") from error


@contextlib.contextmanager
def _reading(about: str) -> Iterator[None]:
    """Turns any error inside into a DataError."""
    try:
        yield
    except Exception as error:
        remedy = "it must be a whole set in array_record: remove that folder, or set --config.data.dir to another"
        raise DataError(f"cannot read {about} ({one_line(error)}); {remedy}") from error


def _supervised_keys(name: str, builder: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    keys, features = builder.info.supervised_keys, builder.info.features
    kinds = [type(features[key]) if isinstance(key, str) else None for key in keys or ()]
    if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
        raise DataError(f"{name} is not a set of images; it must pair one image with one class label; use another")
    return keys


def _prepare(name: str, builder: Any) -> None:
    """Downloads the set and writes it as ArrayRecord; TFDS renames its folder only when it is complete."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import resource

    if builder.data_path.exists():  # TFDS would take it for a prepared set
        raise DataError(f"{builder.data_path} is not a complete TFDS set; remove that folder")
    downloads = Path(builder.data_dir_root) / "downloads"
    absent = f"{name} is not prepared in {builder.data_dir_root}"
    if not is_installed("tensorflow"):
        raise DataError(f"{absent}, and preparing it needs TensorFlow: pip install 'jvitmoe[prepare]', or {ELSEWHERE}")
    here = {path.name for pattern in ("*", "*/*") for path in downloads.glob(pattern)}
    for url, info in () if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else (builder.url_infos or {}).items():
        files = {info.filename, resource.get_dl_fname(url, info.checksum)}
        if not url.startswith("http") or files & here:
            continue
        try:  # offline, TFDS retries silently for minutes
            requests.head(url, timeout=CONNECT_SECONDS)
            break
        except requests.RequestException as error:
            remedy = f"{ELSEWHERE}, or put {info.filename or 'its files'} into {downloads / 'manual'}"
            raise DataError(f"{absent} and {url} cannot be reached ({type(error).__name__}); {remedy}") from error
    download = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(file_format="array_record", download_config=download)
    except Exception as error:
        raise DataError(f"cannot prepare {name} in {builder.data_dir_root}: {error}; {ELSEWHERE}") from error
