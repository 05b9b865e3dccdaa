"""Image folders: train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE, or a table of files; a class folder may hold
folders."""

import contextlib
import csv
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jvitmoe.data.pictures import DataError, Picture, is_image, visible
from jvitmoe.data.splits import Dataset, Record, Records, Source, check_fit
from jvitmoe.errors import first_few, one_line

TESTS = ("test", "val", "validation")  # names of the test split; the first with class folders is taken
TEST_SHARE = 0.2  # of a folder that is not split
MOST_NAMED = 10  # classes in a line
Files = dict[str, list[Path]]  # class -> its images


class ImageFolder(Source):
    """The folder `data.dir`: train/CLASS/FILE and test/CLASS/FILE; or CLASS/FILE; or a table, FILE.csv."""

    def browse(self) -> Dataset[Records]:
        train, test, note = self._splits()
        only = zip(("training", "test"), (train.keys() - test.keys(), test.keys() - train.keys()), strict=True)
        if odd := " and ".join(
            f"{first_few(sorted(names))} only in {split} pictures" for split, names in only if names
        ):
            raise DataError(f"the classes of {self.data.dir} differ: {odd}; both must hold the same classes")
        self._check_classes(train)
        return Dataset(_records(self._root, train), _records(self._root, test), tuple(sorted(train)), note)

    def labelled(self) -> Dataset[Records]:
        """Returns `browse`, or a folder of classes as one split, which is both. Raises DataError."""
        if self._is_table or self._is_parted:
            return self.browse()
        self._check_classes(files := _class_files(self._root))
        split = _records(self._root, files)
        return Dataset(split, split, tuple(files))

    def _check_classes(self, files: Files) -> None:
        size = self.model.image_size, self.model.image_size, self.model.channels
        check_fit(self.data.dir, size, len(files), self.model)

    @property
    def _root(self) -> Path:
        if not self.data.dir:
            raise DataError("config.data.dir is ''; data.name=folder needs the folder: set --config.data.dir=...")
        if "://" in self.data.dir:
            raise DataError(f"config.data.dir is {self.data.dir!r}, a URL; images lie on a disk: give their path")
        return Path(os.path.expanduser(self.data.dir))

    @property
    def _is_table(self) -> bool:
        return self._root.suffix == ".csv"

    @property
    def _is_parted(self) -> bool:
        return any(os.path.isdir(self._root / name) for name in ("train", *TESTS))

    def _splits(self) -> tuple[Files, Files, str]:
        """Returns the files of the training and of the test split, and what is to be said of them."""
        root = self._root
        if self._is_table:
            return _of_table(root)
        if not self._is_parted and _has_folders(root):
            return _split(_class_files(root), root)
        tests = (root / name for name in TESTS if _has_folders(root / name))  # ImageNet's `test` has no classes
        roots = [root / "train", next(tests, root / TESTS[0])]
        for folder in roots:
            if not os.path.isdir(folder):  # unlike Path.is_dir, it raises for no name
                rule = "an image folder holds CLASS/FILE, or train/CLASS/FILE and test/CLASS/FILE"
                raise DataError(f"{folder} is not a folder; {rule}: move them there, or set --config.data.dir=...")
        train, test = map(_class_files, roots)
        return train, test, ""


def _split(files: Files, root: Path) -> tuple[Files, Files, str]:
    """Returns (training files, test files, note): of each class about TEST_SHARE, by a hash of the file's name, so that
    more pictures move none; but at least one, the first by that hash, and not all: this more pictures may change.
    Raises DataError for a class of one picture."""
    train, test = Files(), Files()
    for name, paths in files.items():
        if len(paths) < 2:
            raise DataError(f"class {name!r} of {root} has 1 picture; it needs two, to train and to test on: add some")
        by_hash = sorted(paths, key=lambda path: _hash(path, root))
        count = sum(_hash(path, root) < TEST_SHARE for path in paths)
        count = min(max(count, 1), len(paths) - 1)
        train[name], test[name] = sorted(by_hash[count:]), sorted(by_hash[:count])
    counts = (f"{len(train[name])} + {len(test[name])} {name}" for name in [*files][:MOST_NAMED])
    said = f"{', '.join(counts)}{', …' * (len(files) > MOST_NAMED)}"
    return train, test, f"{root} by a hash of file names into training + test pictures: {said}"


def _hash(path: Path, root: Path) -> float:
    """Returns a number from 0 to 1 that follows from the path inside the folder."""
    name = os.fsencode(os.path.relpath(path, root))
    return int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64


def _of_table(path: Path) -> tuple[Files, Files, str]:
    """Returns the splits of a table with the columns file (beside the table, or absolute), label and, if it is split
    already, split: train or test. Raises DataError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({one_line(error)}); give a CSV file") from error
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise DataError(f"{path} must have the columns file and label, and rows; its first line names the columns")
    splits: dict[str, Files] = {name: {} for name in ("train", "test")} if "split" in rows[0] else {"": {}}
    for number, row in enumerate(rows, start=2):
        name, label = row.get("split", ""), row["label"]
        if name not in splits or not label or not row["file"]:
            rule = "file, label" + (" and train or test" if "split" in rows[0] else "")
            raise DataError(f"line {number} of {path} has {[*row.values()]}; it must have {rule}")
        splits[name].setdefault(label, []).append(path.parent / row["file"])
    return (splits["train"], splits["test"], "") if "train" in splits else _split(splits[""], path.parent)


def _has_folders(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # `_class_files` says what is wrong with it
        return any(entry.is_dir() for entry in visible(folder))
    return False


def _records(folder: Path, files: Files) -> Records:
    inside = [files[name] for name in sorted(files)]
    paths = list(itertools.chain.from_iterable(inside))
    labels_N = np.repeat(np.arange(len(files), dtype=np.int32), [*map(len, inside)])

    def read(numbers: Sequence[int]) -> list[Record]:
        return [(Picture(str(paths[n]), paths[n]), int(labels_N[n])) for n in numbers]

    def about() -> list[str]:
        try:  # sizes too: in two swapped class folders the names may be the same
            return [f"{str(path).removeprefix(str(folder))} {os.path.getsize(path)}" for path in paths]
        except OSError as error:
            raise DataError(f"cannot read all of {folder} ({one_line(error)}); let it be read, or remove it") from error

    return Records(read, np.arange(len(paths)), labels_N, about)


def _class_files(folder: Path) -> Files:
    """Returns class -> its images. Raises DataError for an empty class, or an image outside a class folder."""
    try:
        entries = visible(folder)
        files = {entry.name: list(_images_below(entry)) for entry in entries if entry.is_dir()}
        misplaced = next((entry for entry in entries if is_image(entry) and not entry.is_dir()), None)
    except OSError as error:
        raise DataError(f"cannot list {folder} ({one_line(error)}); let it be read") from error
    if not files:
        raise DataError(f"{folder} holds no class folders; it must hold one folder of images for each class")
    if misplaced:
        raise DataError(f"{misplaced} is not in a class folder, {folder}/<class>; move it there or elsewhere")
    for name, paths in files.items():
        if not paths:
            raise DataError(f"class folder {folder / name} holds no images; add some or remove the folder")
    return files


def _images_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields the images in and below a folder; links that lead back to it are not followed. Raises OSError."""
    seen = (*above, folder.resolve())
    for entry in visible(folder):
        if entry.is_dir():
            if not (entry.is_symlink() and any(path.is_relative_to(entry.resolve()) for path in seen)):
                yield from _images_below(entry, seen)
        elif is_image(entry):
            yield entry
