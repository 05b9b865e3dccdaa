"""Pictures from anybody, as the model wants them: any size and mode in, uint8 of one size out. NumPy and Pillow only.

N pictures · H, W rows and columns · C channels
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.config import UserError
from jvitmoe.data.decode import FORMATS, MODES
from jvitmoe.data.sources import IMAGE_SUFFIXES

MOST_PIXELS = 100_000_000  # more is refused by what the header says, before the memory is taken


class PictureError(UserError):
    """A file that is no picture, or too large a one; one line that names it."""


def find(paths: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Returns (files, complaints): files as they are, folders by the images in them (not deeper), in order."""
    files, complaints = [], []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        except OSError as error:
            complaints.append(f"{path} cannot be listed ({type(error).__name__}); let it be read")
            continue
        files += inside
        if not inside:
            complaints.append(f"{path} holds no images; give files, or a folder of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files, complaints


def read(path: str | Path, size: int, channels: int) -> np.ndarray:
    """Returns the picture as uint8 [size, size, channels]: turned as its EXIF says, scaled (bicubic) until its shorter
    side fits, and cut to the middle square. Transparent parts show white where the model sees no transparency.

    Raises PictureError for what cannot be read, or claims more than MOST_PIXELS.
    """
    from PIL import Image, ImageOps

    if channels not in MODES:
        raise PictureError(f"the model takes {channels} channels; pictures have 1, 3 or 4: classify arrays instead")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below is ours
            if Path(path).exists() and not Path(path).is_file():
                raise PictureError(f"{path} is no regular file")  # reading a pipe or a device might never end
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise PictureError(f"{path} has {image.width} x {image.height} pixels; at most {MOST_PIXELS:,}")
                upright = ImageOps.exif_transpose(image)
                fitted = ImageOps.fit(_to_mode(upright, MODES[channels]), (size, size), Image.Resampling.BICUBIC)
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"{path} does not exist") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more on damaged files
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PictureError(f"{path} cannot be read as an image ({cause})") from error
    return np.asarray(fitted, np.uint8).reshape(size, size, channels)


def _to_mode(image: Any, mode: str) -> Any:
    """Returns the image in 8 bits per channel; 16 bits keep their upper ones."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        image = Image.fromarray(np.clip(values / (257 if values.max() > 255 else 1), 0, 255).astype(np.uint8))
    if mode != "RGBA" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
