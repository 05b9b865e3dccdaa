"""Images and labels, from scikit-learn's digits, a TensorFlow Datasets (TFDS) set or an image folder: a whole set in
memory (`load`), or read picture by picture (`browse`).

Axes: N images, H rows, W columns, C channels.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import os
import queue
import socket
import threading
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data.decode import MODES, DataError, Picture, cause, exact

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CHUNK = 1024  # records of a TFDS set held at once
GROUP = 64  # images per thread task: one by one, hand-over costs more than decoding
PROBE_SECONDS = 6.0


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


def load(data: DataConfig, model: ModelConfig) -> Dataset[Split]:
    """Returns all images of `data.name`, each image_size x image_size x channels, with labels below `model.classes`.

    A TFDS set that is not yet in `data.dir` is downloaded and prepared there. Raises DataError if the data are absent,
    damaged, or of another shape or number of classes than `model` expects.
    """
    if data.name == "digits":
        return _load_digits(model)
    if data.name == "folder":
        train, test = _folder_files(data, model)
        return Dataset(_read_files(train, model), _read_files(test, model), tuple(train))
    return _load_tfds(data, model)


def browse(data: DataConfig, model: ModelConfig) -> Dataset[Records]:
    """Returns the same splits as `load`, in the same order, with no picture read yet. Raises DataError as `load` does,
    but for what only reading shows."""
    if data.name == "digits":
        digits = _load_digits(model)
        return Dataset(_in_memory(digits.train), _in_memory(digits.test), digits.class_names)
    if data.name == "folder":
        train, test = _folder_files(data, model)
        return Dataset(_on_disk_files(train), _on_disk_files(test), tuple(train))
    return _browse_tfds(data, model)


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


def _check_fit(name: str, shape_HWC: Sequence[int], classes: int, model: ModelConfig) -> None:
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


def _load_digits(model: ModelConfig) -> Dataset[Split]:
    _check_fit("digits", (8, 8, 1), 10, model)
    from sklearn.datasets import load_digits

    values_ND, labels_N = load_digits(return_X_y=True)
    images_NHWC = np.rint(values_ND * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = hold_out(Split(images_NHWC, labels_N.astype(np.int32)), 360)
    return Dataset(train, test, tuple("0123456789"))


def _in_memory(split: Split) -> Records:
    def read(number: int) -> tuple[Picture, int]:
        return Picture(f"image {number}", split.images_NHWC[number]), int(split.labels_N[number])

    return Records(read, np.arange(len(split)), split.labels_N)


def _folder_files(data: DataConfig, model: ModelConfig) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Returns the (train, test) files of each class."""
    if not data.dir:
        raise DataError("config.data.dir is ''; data.name=folder needs the folder: set --config.data.dir=...")
    if model.channels not in (1, 3):
        raise DataError(f"config.model.channels is {model.channels}; it must be 1 or 3 for data.name=folder")
    root = Path(data.dir).expanduser()
    tests = [root / name for name in ("test", "val", "validation") if (root / name).is_dir()]
    for part, found in (("train", (root / "train").is_dir()), ("test", bool(tests))):
        if not found:
            raise DataError(
                f"{root / part} is not a folder; an image folder holds train/<class>/*.png and test/<class>/*.png: "
                "set --config.data.dir=..."
            )
    train_files, test_files = _class_files(root / "train"), _class_files(tests[0])
    lacks = [
        f"{folder} lacks {', '.join(absent[:5])}{', …' * (len(absent) > 5)}"
        for folder, absent in (
            (root / "train", sorted(test_files.keys() - train_files.keys())),
            (tests[0], sorted(train_files.keys() - test_files.keys())),
        )
        if absent
    ]
    if lacks:
        raise DataError(f"{'; '.join(lacks)}; both must hold the same classes: add or remove their folders")
    _check_fit(str(root), (model.image_size, model.image_size, model.channels), len(train_files), model)
    return train_files, test_files


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Returns class -> its images. Raises DataError where an image is not directly in a class folder."""

    def visible(place: Path) -> list[Path]:
        return sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))

    def is_image(path: Path) -> bool:
        return path.suffix.lower() in IMAGE_SUFFIXES

    files: dict[str, list[Path]] = {}
    misplaced: list[Path] = []
    try:
        for entry in visible(folder):
            if entry.is_dir():
                inside = visible(entry)
                files[entry.name] = list(filter(is_image, inside))
                nested = (path for other in inside if not is_image(other) for path in other.rglob("*"))
                misplaced += itertools.islice(filter(is_image, nested), 1)
            elif is_image(entry):
                misplaced.append(entry)
    except OSError as error:
        raise DataError(f"cannot list {folder} ({cause(error)}); let it be read") from error
    if not files:
        raise DataError(f"{folder} holds no class folders; it must hold one folder of images for each class")
    if misplaced:
        raise DataError(
            f"{misplaced[0]} is not directly in a class folder, {folder}/<class>; move it there or elsewhere"
        )
    for name, paths in files.items():
        if not paths:
            raise DataError(f"class folder {folder / name} holds no images; add some or remove the folder")
    return files


def _in_order(files: dict[str, list[Path]]) -> tuple[list[Path], np.ndarray]:
    """Returns (paths, labels_N), class by class."""
    sizes = [len(class_paths) for class_paths in files.values()]
    paths = [path for class_paths in files.values() for path in class_paths]
    return paths, np.repeat(np.arange(len(files), dtype=np.int32), sizes)


def _on_disk_files(files: dict[str, list[Path]]) -> Records:
    paths, labels_N = _in_order(files)
    return Records(lambda n: (Picture(str(paths[n]), paths[n]), int(labels_N[n])), np.arange(len(paths)), labels_N)


def _read_files(files: dict[str, list[Path]], model: ModelConfig) -> Split:
    paths, labels_N = _in_order(files)
    images_NHWC = np.empty((len(paths), model.image_size, model.image_size, model.channels), np.uint8)
    _decode_into(images_NHWC, [Picture(str(path), path) for path in paths], size_rule(model))
    return Split(images_NHWC, labels_N)


def size_rule(model: ModelConfig) -> str:
    """Returns the rule on the size of a picture, with its remedies, for messages."""
    return (
        f"config.model.image_size is {model.image_size}; resize the image, set --config.model.image_size, "
        "or set --config.data.stream --config.data.crop=resized"
    )


def _decode_into(images_NHWC: np.ndarray, pictures: Sequence[Picture], rule: str) -> None:
    """Decodes the n-th picture into the n-th image. Raises DataError with its name and, on size, `rule`."""
    from PIL import Image

    def decode(start: int) -> None:
        for index, picture in enumerate(pictures[start : start + GROUP], start):
            images_NHWC[index] = exact(picture, images_NHWC.shape[1:], rule)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(decode, range(0, len(pictures), GROUP)):
            pass


@dataclasses.dataclass(frozen=True)
class _Set:
    """A TFDS set that is prepared and fits the model."""

    name: str
    builder: Any
    image_key: str
    label_key: str
    class_names: tuple[str, ...]

    @property
    def shape(self) -> Any:
        """Returns (height, width, channels) of its images, None where they vary."""
        return self.builder.info.features[self.image_key].shape

    def where(self, split: str) -> str:
        return f"the {split} split of {self.name} in {self.builder.data_dir}"

    def open(self, split: str) -> Any:
        """Returns the random access reader of a split, its images still encoded."""
        import tensorflow_datasets as tfds

        return self.builder.as_data_source(split, decoders={self.image_key: tfds.decode.SkipDecoding()})

    def tests(self) -> list[str]:
        """Returns the splits to test on, the first choice first."""
        splits = self.builder.info.splits
        tests = [name for name in ("test", "validation") if name in splits]
        if "train" not in splits or not tests:
            raise DataError(
                f"{self.name} has the splits {', '.join(splits)}; it must have train and test or validation"
            )
        return tests

    @contextlib.contextmanager
    def reading(self, split: str) -> Iterator[None]:
        """Turns what goes wrong in it into a DataError."""
        where = self.where(split)
        try:
            yield
        except DataError:
            raise
        except NotImplementedError as error:
            found = self.builder.info.file_format.value
            raise DataError(
                f"{where} is stored as {found}, and only array_record can be read at random; "
                "set --config.data.dir to another folder to prepare it anew"
            ) from error
        except Exception as error:
            raise DataError(f"cannot read {where} ({cause(error)}); if it is damaged, remove that folder") from error


def _open_tfds(data: DataConfig, model: ModelConfig) -> _Set:
    builder = _builder(data)
    image_key, label_key = _supervised_keys(data.name, builder)
    image, label = builder.info.features[image_key], builder.info.features[label_key]
    any_size = data.stream and data.crop == "resized"
    if None in image.shape[:2] and not any_size:
        raise DataError(
            f"images of {data.name} vary in size; set --config.data.stream --config.data.crop=resized, "
            "or resize them into an image folder and set --config.data.name=folder"
        )
    if image.np_dtype != np.uint8 or image.shape[-1] not in MODES:
        raise DataError(f"images of {data.name} are {image.np_dtype} {image.shape}; they must have 8 bits per channel")
    shape_HWC = (model.image_size, model.image_size, image.shape[-1]) if any_size else image.shape
    _check_fit(data.name, shape_HWC, label.num_classes or model.classes, model)  # before a download of hours
    _prepare(data.name, builder)
    names = tuple(builder.info.features[label_key].names)
    _check_fit(data.name, shape_HWC, len(names), model)
    return _Set(data.name, builder, image_key, label_key, names)


def _load_tfds(data: DataConfig, model: ModelConfig) -> Dataset[Split]:
    found = _open_tfds(data, model)

    def read(split: str) -> Split:
        height, width, _ = found.shape
        with found.reading(split):
            source = found.open(split)
            labels_N = np.empty(len(source), np.int32)
            images_NHWC = np.empty((len(source), *found.shape), np.uint8)
            for start in range(0, len(source), CHUNK):
                examples = source.__getitems__(list(range(start, min(start + CHUNK, len(source)))))
                labels_N[start : start + len(examples)] = [example[found.label_key] for example in examples]
                named = enumerate((example[found.image_key] for example in examples), start)
                pictures = [Picture(f"image {n} of {found.where(split)}", encoded) for n, encoded in named]
                _decode_into(images_NHWC[start:], pictures, f"the set says {height}x{width}")
        if not len(labels_N) or np.any((labels_N < 0) | (labels_N >= len(found.class_names))):
            raise DataError(f"{found.where(split)} is empty or holds images without a label; use another set")
        return Split(images_NHWC, labels_N)

    test, *_ = found.tests()
    return Dataset(read("train"), read(test), found.class_names)


def _browse_tfds(data: DataConfig, model: ModelConfig) -> Dataset[Records]:
    found = _open_tfds(data, model)

    def records(split: str) -> Records:
        with found.reading(split):
            source = found.open(split)

        def read(number: int) -> tuple[Picture, int]:
            with found.reading(split):
                example = source[number]
            name, label = f"image {number} of {found.where(split)}", int(example[found.label_key])
            if not 0 <= label < len(found.class_names):
                raise DataError(f"{name} has no label; use another set")
            return Picture(name, example[found.image_key]), label

        return Records(read, np.arange(len(source)), None)

    def labelled(split: str) -> bool:
        with found.reading(split):
            source = found.open(split)
            return len(source) > 0 and source[0][found.label_key] >= 0

    tests = [split for split in found.tests() if labelled(split)]  # ImageNet's test images come without labels
    if not tests or not labelled("train"):
        raise DataError(f"{found.where('train' if tests else 'test')} is empty or holds no labels; use another set")
    return Dataset(records("train"), records(tests[0]), found.class_names)


def _builder(data: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    # Names with a namespace (huggingface:x) would search the network; the others are known from the installed package.
    base, _, version = data.name.partition("/")[0].partition(":")
    try:
        if version and not version[0].isdigit():
            raise tfds.core.DatasetNotFoundError
        return tfds.builder(data.name, data_dir=os.path.expanduser(data.dir) or None)
    except tfds.core.DatasetNotFoundError as error:
        names = ["digits", "folder", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(base.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "names are in the catalogue of TensorFlow Datasets"
        raise DataError(
            f"config.data.name is {data.name!r}; it must be digits, folder or the name of a TFDS set; {hint}"
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
