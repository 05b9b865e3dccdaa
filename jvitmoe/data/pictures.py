"""Pictures from anybody, as the model wants them: files and folders of any size and mode in, uint8 of one size out."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jvitmoe.data import decode
from jvitmoe.data.decode import MODES, DataError, Picture
from jvitmoe.data.sources import IMAGE_SUFFIXES


def find(paths: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Returns (files, complaints): files as they are, folders by the images in them, in order. Hidden files and deeper
    folders are skipped."""
    files, complaints = [], []
    for path in map(Path, paths):
        if not os.path.lexists(path):  # which no name makes raise
            complaints.append(f"{path} does not exist; give files or folders")
            continue
        if not os.path.isdir(path):
            files.append(path)
            continue
        try:
            inside = sorted(
                p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "." and p.is_file()
            )
        except OSError as error:
            complaints.append(f"{path} cannot be listed ({type(error).__name__}); let it be read")
            continue
        files += inside
        if not inside:
            complaints.append(f"{path} holds no images; give files, or a folder of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files, complaints


def read(path: str | Path, size: int, channels: int, crop: str = "pad") -> np.ndarray:
    """Returns the picture as uint8 [size, size, channels]: upright, the shorter side resized to `size` (crop="pad",
    bicubic) or to 8/7 of it ("resized", bilinear: as such a run resizes its test images), and the centre cropped.

    Raises DataError for what cannot be read, or claims more pixels than photographs have.
    """
    if channels not in MODES:
        raise DataError(f"the model takes {channels} channels; pictures have 1, 3 or 4: classify arrays instead")
    cut = decode.centre_crop if crop == "resized" else decode.square
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's; what it warns of is refused here
        return cut(Picture(str(path), Path(path)), size, channels)
