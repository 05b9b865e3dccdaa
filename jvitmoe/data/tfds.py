"""Image classification sets of TensorFlow Datasets."""

import contextlib
import difflib
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
from jvitmoe.data.images import MODES, DataError, Picture, cause
from jvitmoe.data.splits import Dataset, Records, Source, Split, check_fit, decode_into

CHUNK = 1024  # records of a TFDS set held at once
PROBE_SECONDS = 6.0


class Tfds(Source):
    """A set of TFDS, opened, and downloaded and prepared in `data.dir` if it is not there yet.

    Args:
        others: names of other sources, for the message on an unknown name.
    """

    knows_labels = False

    def __init__(self, data: DataConfig, model: ModelConfig, others: Sequence[str] = ()) -> None:
        super().__init__(data, model)
        self._builder = builder = _builder(data, others)
        self._image_key, self._label_key = _supervised_keys(data.name, builder)
        image, label = builder.info.features[self._image_key], builder.info.features[self._label_key]
        any_size = data.stream and data.crop == "resized"
        if None in image.shape[:2] and not any_size:
            raise DataError(
                f"images of {data.name} vary in size; set --config.data.stream --config.data.crop=resized, "
                "or resize them into an image folder and set --config.data.name=folder"
            )
        if image.np_dtype != np.uint8 or image.shape[-1] not in MODES:
            raise DataError(
                f"images of {data.name} are {image.np_dtype} {image.shape}; they must have 8 bits per channel"
            )
        shape_HWC = (model.image_size, model.image_size, image.shape[-1]) if any_size else image.shape
        check_fit(data.name, shape_HWC, label.num_classes or model.classes, model)  # before a download of hours
        _prepare(data.name, builder)
        self._class_names = tuple(builder.info.features[self._label_key].names)
        check_fit(data.name, shape_HWC, len(self._class_names), model)

    def load(self) -> Dataset[Split]:
        test, *_ = self._tests()
        return Dataset(self._read("train"), self._read(test), self._class_names)

    def browse(self) -> Dataset[Records]:
        tests = [split for split in self._tests() if self._labelled(split)]  # ImageNet's test split has no labels
        if not tests or not self._labelled("train"):
            where = self._where("train" if tests else "test")
            raise DataError(f"{where} is empty or holds no labels; use another set")
        return Dataset(self._records("train"), self._records(tests[0]), self._class_names)

    def _read(self, split: str) -> Split:
        shape_HWC = self._builder.info.features[self._image_key].shape
        where, rule = self._where(split), f"the set says {shape_HWC[0]}x{shape_HWC[1]}"
        source = self._open(split)
        with self._reading(split):
            labels_N = np.empty(len(source), np.int32)
            images_NHWC = np.empty((len(source), *shape_HWC), np.uint8)
            for start in range(0, len(source), CHUNK):
                examples = source.__getitems__(list(range(start, min(start + CHUNK, len(source)))))
                labels_N[start : start + len(examples)] = [example[self._label_key] for example in examples]
                encoded = (example[self._image_key] for example in examples)
                pictures = [Picture(f"image {n} of {where}", image) for n, image in enumerate(encoded, start)]
                decode_into(images_NHWC[start:], pictures, rule)
        if not len(labels_N) or np.any((labels_N < 0) | (labels_N >= len(self._class_names))):
            raise DataError(f"{where} is empty or holds images without a label; use another set")
        return Split(images_NHWC, labels_N)

    def _records(self, split: str) -> Records:
        source = self._open(split)

        def read(number: int) -> tuple[Picture, int]:
            with self._reading(split):
                example = source[number]
            name, label = f"image {number} of {self._where(split)}", int(example[self._label_key])
            if not 0 <= label < len(self._class_names):
                raise DataError(f"{name} has no label; use another set")
            return Picture(name, example[self._image_key]), label

        return Records(read, np.arange(len(source)), None)

    def _labelled(self, split: str) -> bool:
        source = self._open(split)
        with self._reading(split):
            return len(source) > 0 and source[0][self._label_key] >= 0

    def _where(self, split: str) -> str:
        return f"the {split} split of {self.data.name} in {self._builder.data_dir}"

    def _open(self, split: str) -> Any:
        """Returns the random access reader of a split, its images still encoded."""
        import tensorflow_datasets as tfds

        with self._reading(split):
            return self._builder.as_data_source(split, decoders={self._image_key: tfds.decode.SkipDecoding()})

    def _tests(self) -> list[str]:
        """Returns the splits to test on, the first choice first."""
        splits = self._builder.info.splits
        tests = [name for name in ("test", "validation") if name in splits]
        if "train" not in splits or not tests:
            raise DataError(
                f"{self.data.name} has the splits {', '.join(splits)}; it must have train and test or validation"
            )
        return tests

    @contextlib.contextmanager
    def _reading(self, split: str) -> Iterator[None]:
        """Raises DataError for any error inside."""
        where = self._where(split)
        try:
            yield
        except DataError:
            raise
        except NotImplementedError as error:
            found = self._builder.info.file_format.value
            raise DataError(
                f"{where} is stored as {found}, and only array_record can be read at random; "
                "set --config.data.dir to another folder to prepare it anew"
            ) from error
        except Exception as error:
            raise DataError(f"cannot read {where} ({cause(error)}); if it is damaged, remove that folder") from error


def _builder(data: DataConfig, others: Sequence[str]) -> Any:
    import tensorflow_datasets as tfds

    # Names with a namespace (huggingface:x) would search the network; the others are known from the installed package.
    base, _, version = data.name.partition("/")[0].partition(":")
    try:
        if version and not version[0].isdigit():
            raise tfds.core.DatasetNotFoundError
        return tfds.builder(data.name, data_dir=os.path.expanduser(data.dir) or None)
    except tfds.core.DatasetNotFoundError as error:
        names = [*others, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(base.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "names are in the catalogue of TensorFlow Datasets"
        raise DataError(
            f"config.data.name is {data.name!r}; it must be {', '.join(others)} or the name of a TFDS set; {hint}"
        ) from error
    except Exception as error:
        raise DataError(
            f"config.data.name is {data.name!r} with config.data.dir {data.dir!r}; TFDS cannot open it: {cause(error)}"
        ) from error


def _supervised_keys(name: str, builder: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    keys, features = builder.info.supervised_keys, builder.info.features
    kinds = [type(features[key]) if isinstance(key, str) else None for key in keys or ()]
    if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
        raise DataError(f"{name} is not a set for image classification; it must pair one image with one class label")
    return keys


def _prepare(name: str, builder: Any) -> None:
    """Downloads the set and writes it as ArrayRecord, unless that is done. TFDS renames a folder only once complete."""
    folder = builder.data_path
    if (folder / "dataset_info.json").exists():
        return
    if folder.exists():  # TFDS would take it for a prepared set
        raise DataError(f"{folder} lacks dataset_info.json, so it is not a whole TFDS set; remove that folder")
    root = Path(builder.data_dir_root)
    remedies = "set --config.data.dir to a folder with the prepared set"
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"{name} is not prepared in {root}, and preparing {name} needs TensorFlow: "
            f"pip install 'jvitmoe[prepare]', or {remedies}"
        )
    missing = {url: info for url, info in (builder.url_infos or {}).items() if not _on_disk(builder, url, info)}
    if missing and not _any_reachable(missing):
        hosts = sorted({urllib.parse.urlsplit(url).netloc for url in missing})
        files = sorted({info.filename for info in missing.values() if info.filename})
        if files:
            remedies += f", put {', '.join(files[:3])} into {root / 'downloads' / 'manual'}"
        raise DataError(
            f"{name} is not prepared in {root} and {', '.join(hosts[:3])} cannot be reached; {remedies}, "
            "or train without a download: --config configs/digits_random.py"
        )
    import tensorflow_datasets as tfds

    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:
        raise DataError(f"cannot prepare {name} in {root}: {cause(error)}; or {remedies}") from error


def _on_disk(builder: Any, url: str, info: Any) -> bool:
    """Whether TFDS will take the file of `url` from its download folders (it verifies the checksum itself)."""
    from tensorflow_datasets.core.download import resource

    downloads, cached = Path(builder.data_dir_root) / "downloads", resource.get_dl_fname(url, info.checksum)
    return (
        (info.filename is not None and (downloads / "manual" / info.filename).is_file())
        or resource.is_locally_cached(downloads / builder.name / cached)
        or resource.is_locally_cached(downloads / cached)
    )


def _any_reachable(urls: Iterable[str]) -> bool:
    """Whether a server of `urls` takes a connection in PROBE_SECONDS: offline, TFDS retries silently for minutes."""
    endpoints = {endpoint for endpoint in map(_endpoint, urls) if endpoint}
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def probe(endpoint: tuple[str, int]) -> None:
        try:
            socket.create_connection(endpoint, timeout=PROBE_SECONDS).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    for endpoint in endpoints:  # in daemon threads, because looking up a name ignores timeouts
        threading.Thread(target=probe, args=(endpoint,), daemon=True).start()
    deadline = time.monotonic() + PROBE_SECONDS
    try:
        return not endpoints or any(answers.get(timeout=max(0, deadline - time.monotonic())) for _ in endpoints)
    except queue.Empty:
        return False


def _endpoint(url: str) -> tuple[str, int] | None:
    """Returns the (host, port) that a download of `url` connects to, a proxy's if there is one."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "ftp") or not parts.hostname:
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return parts.hostname or "", parts.port or {"https": 443, "ftp": 21}.get(parts.scheme, 80)
