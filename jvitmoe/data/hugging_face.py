"""Image classification sets of Hugging Face's `datasets`: of its hub, or a local folder of parquet or image files."""

import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data.images import MODES, DataError, Picture
from jvitmoe.data.splits import Dataset, Record, Records, Source, check_fit
from jvitmoe.errors import one_line

OPTIONS = ("config", "revision", "image", "label")
TESTS = ("test", "validation", "valid", "val")
MOST_CLASSES = 10**6  # of a set with fewer images; a greater number is an id


def is_local(name: str) -> bool:
    """True if the NAME of `hf:NAME` is a folder, not a set of the hub."""
    return name.startswith((".", "/", "~")) or os.path.exists(name)


class HuggingFace(Source):
    """`hf:NAME`, a set of the hub or a folder; `hf:NAME?revision=COMMIT&label=COLUMN` says more.

    The options are config and revision of the set, and the columns of images and labels where there are several. A set
    of the hub is downloaded into `data.dir`, by default the cache of `datasets`.
    """

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        super().__init__(data, model)
        self._name, _, query = data.name.removeprefix("hf:").partition("?")
        self._options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        unknown = self._options.keys() - set(OPTIONS)
        if not self._name or unknown:
            problem = (
                f"{', '.join(sorted(unknown))} is not one of {', '.join(OPTIONS)}" if unknown else "a name is missing"
            )
            raise DataError(f"config.data.name is {data.name!r}; {problem}; write hf:NAME?revision=COMMIT&label=COLUMN")
        if model.channels not in MODES:
            raise DataError(f"config.model.channels is {model.channels}; it must be 1, 3 or 4 for data.name=hf:NAME")

    def browse(self) -> Dataset[Records]:
        splits = self._load()
        if "train" not in splits:
            raise DataError(f"{self._name} has the splits {', '.join(splits)}; it must have train")
        image, label = (self._column(splits["train"].features, kind) for kind in ("image", "label"))
        try:
            labels = {name: _labels(split[label]) for name, split in splits.items()}
        except OverflowError as error:  # of uint64, such as a hash
            largest = max(value for split in splits.values() for value in split[label] if value is not None)
            raise self._no_label(label, largest) from error
        tests = [name for name in TESTS if name in splits and len(labels[name]) and labels[name].min() >= 0]
        if not tests or not len(labels["train"]) or labels["train"].min() < 0:
            raise DataError(
                f"{self._name} has the splits {', '.join(splits)}; train and one of {', '.join(TESTS)} must hold labels"
            )
        names = getattr(splits["train"].features[label], "names", None)
        count, side = len(names) if names else int(labels["train"].max()) + 1, self.model.image_size
        if count > max(MOST_CLASSES, len(labels["train"])):
            raise self._no_label(label, count - 1)
        check_fit(self._name, (side, side, self.model.channels), count, self.model)
        if (most := max(labels[name].max() for name in ("train", tests[0]))) >= count:
            raise DataError(f"{self._name} has the label {most} but {count} classes; use another set")
        train, test = (
            self._records(splits[name], name, image, labels[name].astype(np.int32)) for name in ("train", tests[0])
        )
        return Dataset(train, test, tuple(names or map(str, range(count))))

    def _load(self) -> Any:
        """Returns the splits by name, downloaded if need be."""
        try:
            import datasets as hf
        except ImportError as error:
            raise DataError(
                f"config.data.name is {self.data.name!r}; it needs datasets: pip install 'jvitmoe[hf]'"
            ) from error
        local = is_local(self._name)
        try:
            return hf.load_dataset(
                os.path.expanduser(self._name) if local else self._name,
                self._options.get("config"),
                revision=self._options.get("revision"),
                cache_dir=os.path.expanduser(self.data.dir) or None,
            )
        except Exception as error:
            hub = "give OWNER/NAME of a set on the hub, and for a gated one run hf auth login"
            remedy = "give a folder of parquet or image files" if local else hub
            raise DataError(f"cannot load {self.data.name} ({one_line(error)}); {remedy}") from error

    def _column(self, features: Any, kind: str) -> str:
        """Returns the column of images, or of labels: the one asked for, the one of that name, or the only one."""
        import datasets as hf

        def fits(feature: Any) -> bool:
            if kind == "image":
                return isinstance(feature, hf.Image)
            return isinstance(feature, hf.ClassLabel) or getattr(feature, "dtype", "").startswith(("int", "uint"))

        found = [name for name, feature in features.items() if fits(feature)]
        classes = [name for name in found if isinstance(features[name], hf.ClassLabel)]
        wanted = self._options.get(kind)
        if wanted in found:
            return str(wanted)
        for choice in [] if wanted else [[name for name in found if name == kind], classes, found]:
            if len(choice) == 1:
                return str(choice[0])
        rule = f"one must be chosen: hf:{self._name}?{kind}=COLUMN" if found else "use a set for image classification"
        asked = f"has no {kind} column {wanted!r}; it " if wanted else ""
        raise DataError(
            f"{self._name} {asked}has the columns {', '.join(features)}, of which {', '.join(found) or 'none'} can be "
            f"the {kind}; {rule}"
        )

    def _no_label(self, column: str, value: int) -> DataError:
        found = f"column {column} of {self._name} has the value {value}, which is no label"
        return DataError(f"{found}; name another: hf:{self._name}?label=COLUMN")

    def _records(self, split: Any, name: str, image: str, labels_N: np.ndarray) -> Records:
        import datasets as hf

        encoded = split.select_columns([image]).cast_column(image, hf.Image(decode=False))

        def read(numbers: Sequence[int]) -> list[Record]:
            try:
                files = encoded[list(numbers)][image]
            except Exception as error:
                raise DataError(
                    f"cannot read the {name} split of {self._name} ({one_line(error)}); load it again"
                ) from error
            return [(picture(n, file), int(labels_N[n])) for n, file in zip(numbers, files, strict=True)]

        def picture(number: int, file: Any) -> Picture:
            about = f"image {number} of the {name} split of {self._name}"
            if not file or not (file["bytes"] or file["path"]):
                raise DataError(f"{about} is absent; remove its row, or use another set")
            return Picture(about, file["bytes"] or Path(file["path"]))

        return Records(read, np.arange(len(labels_N)), labels_N)


def _labels(values: Sequence[int | None]) -> np.ndarray:
    """Returns labels_N; an image without one has -1, as the sets of the hub write it too."""
    return np.asarray([-1 if value is None else value for value in values], np.int64)
