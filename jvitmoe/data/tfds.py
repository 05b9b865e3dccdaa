"""Image classification sets of TensorFlow Datasets (TFDS)."""

import contextlib
import importlib.util
import os
import queue
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data.images import MODES, DataError, Picture
from jvitmoe.data.splits import Dataset, Record, Records, Source, check_fit
from jvitmoe.errors import did_you_mean, one_line

PROBE_SECONDS = 6.0


class Tfds(Source):
    """A set of TFDS, downloaded and prepared in `data.dir` if it is absent there.

    Args:
        others: names of other sources, for the message on an unknown name.
    """

    knows_labels = False

    def __init__(self, data: DataConfig, model: ModelConfig, others: Sequence[str] = ()) -> None:
        super().__init__(data, model)
        self._builder = builder = _builder(data, others)
        self._image_key, self._label_key = _supervised_keys(data.name, builder)
        image, label = builder.info.features[self._image_key], builder.info.features[self._label_key]
        any_size = data.crop != "exact"
        if None in image.shape[:2] and not any_size:
            raise DataError(
                f"images of {data.name} vary in size; set --config.data.crop=centre, or --config.data.stream "
                "--config.data.crop=resized"
            )
        if image.np_dtype != np.uint8 or image.shape[-1] not in MODES:
            kind = f"{image.np_dtype} {image.shape}"
            raise DataError(
                f"images of {data.name} are {kind}; they must have 1, 3 or 4 channels of 8 bits; use another set"
            )
        shape_HWc = (model.image_size, model.image_size, image.shape[-1]) if any_size else image.shape
        check_fit(data.name, shape_HWc, label.num_classes or model.classes, model)  # before a download of hours
        _prepare(data.name, builder)
        self._class_names = tuple(builder.info.features[self._label_key].names)
        check_fit(data.name, shape_HWc, len(self._class_names), model)

    def browse(self) -> Dataset[Records]:
        splits = self._builder.info.splits
        tests = [name for name in ("test", "validation") if name in splits]
        if "train" not in splits or not tests:
            rule = "it must have train and test or validation"
            raise DataError(f"{self.data.name} has the splits {', '.join(splits)}; {rule}")
        train = self._records("train")
        test = next(filter(None, map(self._records, tests)), None)  # ImageNet's test split has no labels
        if not train or not test:
            split = self._describe("train" if test else "test")
            raise DataError(f"{split} is empty or holds no labels; use another set")
        return Dataset(train, test, self._class_names)

    def _records(self, split: str) -> Records | None:
        """Returns a split, its images still encoded; None if it is empty or holds no labels."""
        import tensorflow_datasets as tfds

        with self._reading(split):
            source = self._builder.as_data_source(split, decoders={self._image_key: tfds.decode.SkipDecoding()})
            if not len(source) or source[0][self._label_key] < 0:
                return None

        def read(numbers: Sequence[int]) -> list[Record]:
            with self._reading(split):
                examples = source.__getitems__(numbers)
            records = []
            for number, example in zip(numbers, examples, strict=True):
                name, label = f"image {number} of {self._describe(split)}", int(example[self._label_key])
                if not 0 <= label < len(self._class_names):
                    raise DataError(f"{name} has no label; use another set")
                records.append((Picture(name, example[self._image_key]), label))
            return records

        return Records(read, np.arange(len(source)), None)

    def _describe(self, split: str) -> str:
        return f"the {split} split of {self.data.name} in {self._builder.data_dir}"

    @contextlib.contextmanager
    def _reading(self, split: str) -> Iterator[None]:
        """Turns any error inside into a DataError."""
        try:
            yield
        except NotImplementedError as error:
            stored = f"{self._describe(split)} is stored as {self._builder.info.file_format.value}"
            remedy = "set --config.data.dir to another folder to prepare it again"
            raise DataError(f"{stored}, and only array_record allows random access; {remedy}") from error
        except Exception as error:
            remedy = "if it is damaged, remove that folder"
            raise DataError(f"cannot read {self._describe(split)} ({one_line(error)}); {remedy}") from error


def _builder(data: DataConfig, others: Sequence[str]) -> Any:
    import tensorflow_datasets as tfds

    # A name with a namespace (huggingface:x) would search the network. The installed package knows all other names.
    base, _, version = data.name.partition("/")[0].partition(":")
    try:
        if version and not version[0].isdigit():
            raise tfds.core.DatasetNotFoundError
        return tfds.builder(data.name, data_dir=os.path.expanduser(data.dir) or None)
    except tfds.core.DatasetNotFoundError as error:
        names = [*others, *tfds.list_builders(with_community_datasets=False)]
        hint = did_you_mean(base.lower(), names) or "; names are in the catalogue of TensorFlow Datasets"
        rule = f"it must be {', '.join(others)} or the name of a TFDS set"
        raise DataError(f"config.data.name is {data.name!r}; {rule}{hint}") from error
    except Exception as error:
        problem = (
            f"TFDS cannot open it in config.data.dir={data.dir!r}: {error}; set --config.data.dir to another folder"
        )
        raise DataError(f"config.data.name is {data.name!r}; {problem}") from error


def _supervised_keys(name: str, builder: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    keys, features = builder.info.supervised_keys, builder.info.features
    kinds = [type(features[key]) if isinstance(key, str) else None for key in keys or ()]
    if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
        raise DataError(
            f"{name} is not a set for image classification; it must pair one image with one class label; use another"
        )
    return keys


def _prepare(name: str, builder: Any) -> None:
    """Downloads the set and writes it as ArrayRecord, unless it is there: TFDS renames a folder only when complete."""
    folder = builder.data_path
    if (folder / "dataset_info.json").exists():
        return
    if folder.exists():  # TFDS would read it as a prepared set
        raise DataError(f"{folder} lacks dataset_info.json, so it is not a complete TFDS set; remove that folder")
    root = Path(builder.data_dir_root)
    remedies = "set --config.data.dir to a folder with the prepared set"
    if importlib.util.find_spec("tensorflow") is None:
        remedies = f"pip install 'jvitmoe[prepare]', or {remedies}"
        raise DataError(f"{name} is not prepared in {root}, and preparing {name} needs TensorFlow: {remedies}")
    missing = {url: info for url, info in (builder.url_infos or {}).items() if not _on_disk(builder, url, info)}
    if missing and not _any_reachable(missing):
        hosts = sorted({urllib.parse.urlsplit(url).netloc for url in missing})
        files = sorted({named for url, info in missing.items() if (named := _manual_name(builder, url, info))})
        if files:
            remedies += f", put {', '.join(files[:3])} into {root / 'downloads' / 'manual'}"
        remedies += ", or train without a download: --config configs/digits_random.py"
        raise DataError(f"{name} is not prepared in {root} and {', '.join(hosts[:3])} cannot be reached; {remedies}")
    import tensorflow_datasets as tfds

    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:
        raise DataError(f"cannot prepare {name} in {root}: {error}; {remedies}") from error


def _on_disk(builder: Any, url: str, info: Any) -> bool:
    """True if TFDS will use a file in its download folders instead of `url` (it verifies the checksum)."""
    from tensorflow_datasets.core.download import resource

    downloads, cached = Path(builder.data_dir_root) / "downloads", resource.get_dl_fname(url, info.checksum)
    return (
        ((name := _manual_name(builder, url, info)) is not None and (downloads / "manual" / name).is_file())
        or resource.is_locally_cached(downloads / builder.name / cached)
        or resource.is_locally_cached(downloads / cached)
    )


def _manual_name(builder: Any, url: str, info: Any) -> str | None:
    """Returns the name by which TFDS knows a download that the user puts into the folder `manual`, or None if it asks
    for none. Sets that are downloaded by hand, such as ImageNet, look for the last part of the URL."""
    by_hand = bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    name: str | None = info.filename or (Path(urllib.parse.urlsplit(url).path).name if by_hand else None)
    return name


def _any_reachable(urls: Iterable[str]) -> bool:
    """True if a server of `urls` accepts a connection in PROBE_SECONDS: offline, TFDS retries silently for minutes."""
    endpoints = {endpoint for endpoint in map(_endpoint, urls) if endpoint}
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def probe(endpoint: tuple[str, int]) -> None:
        try:
            socket.create_connection(endpoint, timeout=PROBE_SECONDS).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    for endpoint in endpoints:  # daemon threads, because resolving a host name ignores timeouts
        threading.Thread(target=probe, args=(endpoint,), daemon=True).start()
    deadline = time.monotonic() + PROBE_SECONDS
    try:
        return not endpoints or any(answers.get(timeout=max(0, deadline - time.monotonic())) for _ in endpoints)
    except queue.Empty:
        return False


def _endpoint(url: str) -> tuple[str, int] | None:
    """Returns the (host, port) that a download of `url` connects to: the proxy's if there is one."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "ftp") or not parts.hostname:
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return parts.hostname or "", parts.port or {"https": 443, "ftp": 21}.get(parts.scheme, 80)
