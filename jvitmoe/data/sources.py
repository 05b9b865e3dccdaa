"""Images and labels in memory, from scikit-learn's digits, a TensorFlow Datasets (TFDS) set or an image folder.

Axes: N images, H rows, W columns, C channels.
"""

import dataclasses
import difflib
import importlib.util
import io
import os
import queue
import socket
import threading
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.config import DataConfig, ModelConfig, UserError

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for 8-bit pixels of that many channels
CHUNK = 1024  # records of a TFDS set held at once
GROUP = 64  # images per thread task: one by one, hand-over costs more than decoding
PROBE_SECONDS = 6.0


class DataError(UserError):
    """The data are absent, damaged, or do not fit the model; the message is one line and names the remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    images_NHWC: np.ndarray  # uint8, C-contiguous
    labels_N: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    train: Split
    test: Split
    class_names: tuple[str, ...]


def load(data: DataConfig, model: ModelConfig) -> Dataset:
    """Returns all images of `data.name`, each image_size x image_size x channels, with labels below `model.classes`.

    A TFDS set that is not yet in `data.dir` is downloaded and prepared there. Raises DataError if the data are absent,
    damaged, or of another shape or number of classes than `model` expects.
    """
    if data.name == "digits":
        return _load_digits(model)
    if data.name == "folder":
        return _load_folder(data, model)
    return _load_tfds(data, model)


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Returns (train, validation): `count` images, every class in proportion, moved to validation; order is kept.

    The choice depends on nothing but the labels and `count`. Raises DataError unless 0 <= count < len(split).
    """
    if not 0 <= count < len(split):
        raise DataError(
            f"config.data.validation is {count}; it must be at least 0 and below the number of training images, "
            f"which is {len(split)}"
        )
    if count == 0:
        return split, Split(split.images_NHWC[:0], split.labels_N[:0])
    classes, sizes = np.unique(split.labels_N, return_counts=True)
    shares, remainders = np.divmod(sizes * count, len(split))
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    random = np.random.RandomState(0)  # unlike Generator's, its stream is frozen: every NumPy holds out the same images
    held_N = np.zeros(len(split), bool)
    for label, share in zip(classes, shares, strict=True):
        held_N[random.permutation(np.flatnonzero(split.labels_N == label))[:share]] = True
    train, held = (Split(split.images_NHWC[mask_N], split.labels_N[mask_N]) for mask_N in (~held_N, held_N))
    return train, held


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


def _load_digits(model: ModelConfig) -> Dataset:
    _check_fit("digits", (8, 8, 1), 10, model)
    from sklearn.datasets import load_digits

    values_ND, labels_N = load_digits(return_X_y=True)
    images_NHWC = np.rint(values_ND * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = hold_out(Split(images_NHWC, labels_N.astype(np.int32)), 360)
    return Dataset(train, test, tuple("0123456789"))


def _load_folder(data: DataConfig, model: ModelConfig) -> Dataset:
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
    if train_files.keys() != test_files.keys():
        odd = sorted(train_files.keys() ^ test_files.keys())
        raise DataError(
            f"the classes of {tests[0]} must be those of {root / 'train'}; only one of them has {', '.join(odd[:5])}"
        )
    _check_fit(str(root), (model.image_size, model.image_size, model.channels), len(train_files), model)
    return Dataset(_read_files(train_files, model), _read_files(test_files, model), tuple(train_files))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    def images(entry: Path) -> list[Path]:
        return sorted(p for p in entry.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))

    try:
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = {entry.name: images(entry) for entry in classes}
    except OSError as error:
        raise DataError(f"cannot list {folder} ({_cause(error)}); let it be read") from error
    if not files:
        raise DataError(f"{folder} holds no class folders; it must hold one folder of images for each class")
    for name, paths in files.items():
        if not paths:
            raise DataError(f"class folder {folder / name} holds no images; add some or remove the folder")
    return files


def _read_files(files: dict[str, list[Path]], model: ModelConfig) -> Split:
    paths = [path for class_paths in files.values() for path in class_paths]
    labels_N = np.repeat(np.arange(len(files), dtype=np.int32), [len(class_paths) for class_paths in files.values()])
    images_NHWC = np.empty((len(paths), model.image_size, model.image_size, model.channels), np.uint8)
    rule = f"config.model.image_size is {model.image_size}; resize the image or set --config.model.image_size"
    _decode_into(images_NHWC, [(str(path), path) for path in paths], rule)
    return Split(images_NHWC, labels_N)


def _decode_into(images_NHWC: np.ndarray, named: Sequence[tuple[str, Path | bytes]], rule: str) -> None:
    """Decodes the n-th (name, encoded) into the n-th image. Raises DataError with the name and, on size, `rule`."""
    from PIL import Image

    height, width, channels = images_NHWC.shape[1:]

    def decode(start: int) -> None:
        for index, (name, encoded) in enumerate(named[start : start + GROUP], start):
            try:
                with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
                    # Only the header is read so far, so an image that claims a huge size never takes its memory.
                    if image.size != (width, height):
                        raise DataError(f"{name} is {image.height}x{image.width} pixels but {rule}")
                    if image.mode[0] in "IF":
                        raise DataError(f"{name} has pixels of mode {image.mode}; images must have 8 bits per channel")
                    pixels = image.convert("RGBA") if "transparency" in image.info else image
                    images_NHWC[index] = np.asarray(pixels.convert(MODES[channels])).reshape(height, width, channels)
            except DataError:
                raise
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more on damaged files
                raise DataError(f"{name} cannot be read as an image ({_cause(error)}); replace or remove it") from error

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(decode, range(0, len(named), GROUP)):
            pass


def _load_tfds(data: DataConfig, model: ModelConfig) -> Dataset:
    import tensorflow_datasets as tfds

    builder = _builder(data)
    image_key, label_key = _supervised_keys(data.name, builder)
    image, label = builder.info.features[image_key], builder.info.features[label_key]
    if None in image.shape:
        raise DataError(
            f"images of {data.name} vary in size; all must have one size: "
            "resize them into an image folder and set --config.data.name=folder"
        )
    if image.np_dtype != np.uint8 or image.shape[-1] not in MODES:
        raise DataError(f"images of {data.name} are {image.np_dtype} {image.shape}; they must have 8 bits per channel")
    _check_fit(data.name, image.shape, label.num_classes or model.classes, model)  # before a download of hours
    _prepare(data.name, builder)
    names = builder.info.features[label_key].names
    _check_fit(data.name, image.shape, len(names), model)
    tests = [name for name in ("test", "validation") if name in builder.info.splits]
    if "train" not in builder.info.splits or not tests:
        raise DataError(
            f"{data.name} has the splits {', '.join(builder.info.splits)}; it must have train and test or validation"
        )

    def read(split: str) -> Split:
        where = f"the {split} split of {data.name} in {builder.data_dir}"
        try:
            source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
            labels_N = np.empty(len(source), np.int32)
            images_NHWC = np.empty((len(source), *image.shape), np.uint8)
            for start in range(0, len(source), CHUNK):
                examples = source.__getitems__(list(range(start, min(start + CHUNK, len(source)))))
                labels_N[start : start + len(examples)] = [example[label_key] for example in examples]
                encoded = [(f"image {start + i} of {where}", e[image_key]) for i, e in enumerate(examples)]
                _decode_into(images_NHWC[start:], encoded, f"the set says {image.shape[0]}x{image.shape[1]}")
        except DataError:
            raise
        except NotImplementedError as error:
            raise DataError(
                f"{where} is stored as {builder.info.file_format.value}, and only array_record can be read at random; "
                "set --config.data.dir to another folder to prepare it anew"
            ) from error
        except Exception as error:
            raise DataError(f"cannot read {where} ({_cause(error)}); if it is damaged, remove that folder") from error
        if not len(labels_N) or np.any((labels_N < 0) | (labels_N >= len(names))):
            raise DataError(f"{where} is empty or holds images without a label; use another set")
        return Split(images_NHWC, labels_N)

    return Dataset(read("train"), read(tests[0]), tuple(names))


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
            f"config.data.name is {data.name!r} with config.data.dir {data.dir!r}; TFDS cannot open it: {_cause(error)}"
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
        raise DataError(f"cannot prepare {name} in {root}: {_cause(error)}; or {remedies}") from error


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


def _cause(error: BaseException) -> str:
    """Returns the kind and the first line of `error`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
