"""Image folders: train/<class>/*.png and test/<class>/*.png; a class folder may hold folders."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jvitmoe.data.pictures import DataError, Picture, is_image, visible
from jvitmoe.data.splits import Dataset, Record, Records, Source, check_fit
from jvitmoe.errors import one_line

TESTS = ("test", "val", "validation")  # names of the test split; the first with class folders is taken
Files = dict[str, list[Path]]  # class -> its images


class ImageFolder(Source):
    """The folder `data.dir`, which holds one folder of images per class."""

    def browse(self) -> Dataset[Records]:
        data, model = self.data, self.model
        if not data.dir:
            raise DataError("config.data.dir is ''; data.name=folder needs the folder: set --config.data.dir=...")
        root = Path(os.path.expanduser(data.dir))
        tests = (root / name for name in TESTS if _has_folders(root / name))  # ImageNet's `test` has no classes
        roots = [root / "train", next(tests, root / TESTS[0])]
        for folder in roots:
            if not os.path.isdir(folder):  # unlike Path.is_dir, it raises for no name
                rule = "an image folder holds train/<class>/*.png and test/<class>/*.png"
                raise DataError(f"{folder} is not a folder; {rule}: move them there, or set --config.data.dir=...")
        train, test = map(_class_files, roots)
        if odd := sorted(train.keys() ^ test.keys()):
            of = f"{', '.join(odd[:5])}{', …' * (len(odd) > 5)}"
            raise DataError(f"{of} is in one of {roots[0]} and {roots[1]} only; both must hold the same classes")
        check_fit(str(root), (model.image_size, model.image_size, model.channels), len(train), model)
        return Dataset(_records(roots[0], train), _records(roots[1], test), tuple(train))

    def flat(self) -> Dataset[Records]:
        """Returns `data.dir` as one split, if it holds the class folders themselves. Raises DataError."""
        root = Path(os.path.expanduser(self.data.dir))
        split = _records(root, files := _class_files(root))
        return Dataset(split, split, tuple(files))


def _has_folders(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # `_class_files` says what is wrong with it
        return any(entry.is_dir() for entry in visible(folder))
    return False


def _records(folder: Path, files: Files) -> Records:
    paths = list(itertools.chain.from_iterable(files.values()))
    labels_N = np.repeat(np.arange(len(files), dtype=np.int32), [len(inside) for inside in files.values()])

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
