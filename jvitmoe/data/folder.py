"""Image folders: train/<class>/*.png and test/<class>/*.png."""

import itertools
from pathlib import Path

import numpy as np

from jvitmoe.data.images import IMAGE_SUFFIXES, DataError, Picture, cause
from jvitmoe.data.splits import Dataset, Records, Source, Split, check_fit, decode

Files = dict[str, list[Path]]  # class -> its images


class ImageFolder(Source):
    """The folder `data.dir`, which holds one folder of images per class."""

    def load(self) -> Dataset[Split]:
        found = self.browse()
        return Dataset(decode(found.train, self.model), decode(found.test, self.model), found.class_names)

    def browse(self) -> Dataset[Records]:
        train, test = self._files()
        return Dataset(_records(train), _records(test), tuple(train))

    def _files(self) -> tuple[Files, Files]:
        """Returns the (train, test) files of each class."""
        data, model = self.data, self.model
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
        train, test = _class_files(root / "train"), _class_files(tests[0])
        lacks = []
        for folder, files, others in ((root / "train", train, test), (tests[0], test, train)):
            if absent := sorted(others.keys() - files.keys()):
                lacks.append(f"{folder} lacks {', '.join(absent[:5])}{', …' * (len(absent) > 5)}")
        if lacks:
            raise DataError(f"{'; '.join(lacks)}; both must hold the same classes: add or remove their folders")
        check_fit(str(root), (model.image_size, model.image_size, model.channels), len(train), model)
        return train, test


def _records(files: Files) -> Records:
    paths = list(itertools.chain.from_iterable(files.values()))
    labels_N = np.repeat(np.arange(len(files), dtype=np.int32), [len(inside) for inside in files.values()])
    return Records(lambda n: (Picture(str(paths[n]), paths[n]), int(labels_N[n])), np.arange(len(paths)), labels_N)


def _class_files(folder: Path) -> Files:
    """Returns class -> its images. Raises DataError where an image is not directly in a class folder."""

    def visible(place: Path) -> list[Path]:
        return sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))

    def is_image(path: Path) -> bool:
        return path.suffix.lower() in IMAGE_SUFFIXES

    files: Files = {}
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
