"""Image classification sets of Hugging Face's `datasets`: of its hub, or a local folder of parquet or image files."""

import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.data.pictures import DataError, Picture
from jvitmoe.data.splits import Dataset, Record, Records, Source, check_fit
from jvitmoe.errors import one_line
from jvitmoe.extras import is_installed

OPTIONS = ("config", "revision", "image", "label")
TESTS = ("test", "validation", "valid", "val")


def is_local(name: str) -> bool:
    """True if the NAME of `hf:NAME` is a folder, not a set of the hub."""
    return name.startswith((".", "/", "~")) or os.path.exists(name)


class HuggingFace(Source):
    """`hf:NAME`, a set of the hub or a folder; `hf:NAME?revision=COMMIT&label=COLUMN` says more.

    The options are config and revision of the set, and the columns of images and labels where there are several. A set
    of the hub is downloaded into `data.dir`, by default the cache of `datasets`.
    """

    def browse(self) -> Dataset[Records]:
        name, _, query = self.data.name.removeprefix("hf:").partition("?")
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        if not name or not options.keys() <= set(OPTIONS):
            rule = f"write hf:NAME?revision=COMMIT&label=COLUMN; the options are {', '.join(OPTIONS)}"
            raise DataError(f"config.data.name is {self.data.name!r}; {rule}")
        splits = _load(name, options, self.data.dir)
        features = next(iter(splits.values())).features  # all splits have the same
        image, label = (_column(name, features, kind, options.get(kind)) for kind in ("image", "label"))
        classes, side = tuple(features[label].names), self.model.image_size
        check_fit(name, (side, side, self.model.channels), len(classes), self.model)
        labels = {split: np.array([-1 if x is None else x for x in splits[split][label][:]], int) for split in splits}
        odd = {split: np.flatnonzero((found < 0) | (found >= len(classes))) for split, found in labels.items()}
        test = next((split for split in TESTS if split in labels and len(labels[split]) > len(odd[split]) == 0), "")
        if "train" not in labels or not len(labels["train"]) or len(odd["train"]) or not test:
            rule = f"train and one of {', '.join(TESTS)} must hold labels"
            rows = [
                f"row {n[0]} of {split} has {splits[split][label][int(n[0])]}" for split, n in odd.items() if len(n)
            ]
            raise DataError(f"{name} has the splits {', '.join(splits)}; {'; '.join([rule, *rows])}; use another set")
        parts = {s: _records(splits[s], f"the {s} split of {name}", image, labels[s]) for s in ("train", test)}
        return Dataset(parts["train"], parts[test], classes)


def _load(name: str, options: dict[str, str], place: str) -> Any:
    """Returns the splits by name, downloaded if need be."""
    if not is_installed("datasets"):
        raise DataError(f"config.data.name=hf:{name} needs datasets: pip install 'jvitmoe[hf]'")
    try:
        import datasets as hf

        return hf.load_dataset(
            os.path.expanduser(name) if is_local(name) else name,
            options.get("config"),
            revision=options.get("revision"),
            cache_dir=os.path.expanduser(place) or None,
        )
    except Exception as error:
        remedy = "give OWNER/NAME of a set on the hub, for a gated one after hf auth login, or a folder of image files"
        raise DataError(f"cannot load hf:{name} ({one_line(error)}); {remedy}") from error


def _column(name: str, features: Any, kind: str, wanted: str | None) -> str:
    """Returns the column of type Image, or ClassLabel: the one asked for, or the only one."""
    import datasets as hf

    typed = {"image": hf.Image, "label": hf.ClassLabel}[kind]
    found = [column for column, feature in features.items() if isinstance(feature, typed)]
    if len(chosen := [column for column in found if column == (wanted or column)]) == 1:
        return str(chosen[0])
    rule = f"choose one: hf:{name}?{kind}=COLUMN" if found else "use another set"
    some = f"{', '.join(found) or 'none'} are of type {typed.__name__}"
    raise DataError(f"{name} has the columns {', '.join(features)}, of which {some}; {rule}")


def _records(split: Any, about: str, image: str, labels_N: np.ndarray) -> Records:
    import datasets as hf
    import pyarrow.compute as pc

    encoded = split.select_columns([image]).cast_column(image, hf.Image(decode=False))

    def read(numbers: Sequence[int]) -> list[Record]:
        try:
            files = encoded[list(numbers)][image]
        except Exception as error:
            raise DataError(f"cannot read {about} ({one_line(error)}); load it again") from error
        return [(picture(n, file), int(labels_N[n])) for n, file in zip(numbers, files, strict=True)]

    def picture(number: int, file: Any) -> Picture:
        content, path = (file["bytes"], file["path"]) if file else (None, None)  # a row may lack its picture
        return Picture(f"image {number} of {about}", content or (Path(path) if path else b""))

    def known() -> list[str]:
        """Returns name and size of each picture; of a parquet file only the offsets of its pictures are read."""
        column = encoded.data.column(image)
        sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        paths = [path or "" for path in pc.struct_field(column, "path").to_pylist()]
        try:
            sizes = [os.path.getsize(path) if n is None and path else n for n, path in zip(sizes, paths, strict=True)]
        except OSError as error:
            raise DataError(f"cannot read all of {about} ({one_line(error)}); load it again") from error
        return [f"{os.path.basename(path)} {size}" for path, size in zip(paths, sizes, strict=True)]

    return Records(read, np.arange(len(labels_N)), labels_N.astype(np.int32), known)
