"""One picture from its file: upright, in 8 bits and the model's channels; as it is, or cut and resized to its size.

Training, evaluation, predictions and the contact sheet all read pictures here, so all of them see the same pixels.

H rows · W columns · C channels
"""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jvitmoe.errors import UserError

LONGEST = 65_535  # pixels of a side, JPEG's limit: decoders need time for each row, however short it is

# Those that Pillow reads by itself: a file that says it is PostScript would be run by another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for 8-bit pixels of that many channels
AREA = (0.08, 1.0)  # share of a picture that a random crop takes, and its ratio of width to height, both as in
RATIO = (3 / 4, 4 / 3)  # Szegedy et al., arXiv 1409.4842, log-uniform as the field has it
TRIES = 10
ORIENTATION = 0x0112  # EXIF's tag for how a camera was held; 1 is upright


class DataError(UserError):
    """The data are absent, damaged, or do not fit the model; the message is one line and names the remedy."""


class Picture(NamedTuple):
    name: str  # for messages
    encoded: Path | bytes | np.ndarray  # a file, its contents, or uint8 pixels [H, W, C]


def exact(picture: Picture, size: tuple[int, int, int], rule: str) -> np.ndarray:
    """Returns uint8 [H, W, C] of exactly `size`. Raises DataError with the name and, on another size, `rule`."""
    height, width, channels = size
    with opened(picture) as image:
        # Only the header is read so far, so an image that claims a huge size never takes its memory.
        found = pixels(image, channels, picture.name) if {*image.size} == {width, height} else image
        if found.size != (width, height):
            raise DataError(f"{picture.name} is {found.height}x{found.width} pixels but {rule}")
        return np.asarray(found).reshape(size)


def random_crop(picture: Picture, side: int, channels: int, random: np.random.RandomState) -> np.ndarray:
    """Returns uint8 [side, side, C]: a random part of the picture, of 8 % to 100 % of its area and a width of 3/4 to
    4/3 of its height, resized bilinearly; the largest part in its middle where ten draws do not fit in.

    Source: Szegedy et al., arXiv 1409.4842. Raises DataError.
    """
    with opened(picture) as file:
        image = pixels(file, channels, picture.name)
        width, height = image.size
        box = None
        for _ in range(TRIES):
            area, ratio = random.uniform(*AREA) * width * height, math.exp(random.uniform(*np.log(RATIO)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w + 1), random.randint(0, height - h + 1)
                box = (left, top, left + w, top + h)
                break
        return _resized(image, box or _middle(width, height), side)


def centre_crop(picture: Picture, side: int, channels: int) -> np.ndarray:
    """Returns uint8 [side, side, C] as ImageNet is tested: the shorter side is resized to 8/7 of `side`, bilinearly,
    and the centre cropped. Raises DataError."""
    return _centre(picture, side, channels, side * 8 // 7, "BILINEAR")


def square(picture: Picture, side: int, channels: int) -> np.ndarray:
    """Returns uint8 [side, side, C]: the shorter side is resized to `side`, bicubically, and the centre cropped; a
    picture of that size is returned as it is. Raises DataError."""
    return _centre(picture, side, channels, side, "BICUBIC")


def _centre(picture: Picture, side: int, channels: int, shorter: int, filter_name: str) -> np.ndarray:
    """Returns the centre crop of the picture whose shorter side was resized to `shorter`.

    Sizes and offsets are rounded as torchvision rounds them, so timm's transform gives the same pixels.
    """
    from PIL import Image

    with opened(picture) as file:
        image = pixels(file, channels, picture.name)
        size = [int(shorter * length / min(image.size)) for length in image.size]
        if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width}x{image.height} pixels are too narrow a strip to be resized")
        left, top = (round((length - side) / 2) for length in size)
        image = image.resize(size, Image.Resampling[filter_name])
        return np.asarray(image.crop((left, top, left + side, top + side))).reshape(side, side, channels)


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    """Returns the largest box in the middle whose ratio is allowed."""
    w, h = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _resized(image: Any, box: tuple[float, float, float, float], side: int) -> np.ndarray:
    from PIL import Image

    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))
    return pixels.reshape(side, side, -1)


@contextlib.contextmanager
def opened(picture: Picture) -> Iterator[Any]:
    """Gives the picture with its header read; whatever goes wrong in it is a DataError that names the picture."""
    from PIL import Image

    encoded = picture.encoded
    try:
        if isinstance(encoded, np.ndarray):
            yield Image.fromarray(encoded.squeeze(-1) if encoded.shape[-1] == 1 else encoded)
            return
        if isinstance(encoded, Path) and not encoded.is_file():
            raise ValueError("it is no regular file")  # reading a pipe or a device might never end
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=FORMATS) as image:
            area = image.width * image.height
            if area > (Image.MAX_IMAGE_PIXELS or math.inf) or max(image.size) > LONGEST:
                raise ValueError(f"{image.width}x{image.height} pixels are more than any photograph has")
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more on damaged files
        raise DataError(f"{picture.name} cannot be read as an image ({cause(error)}); replace or remove it") from error


def pixels(image: Any, channels: int, name: str) -> Any:
    """Returns the image turned as its EXIF says, with 8 bits in each of 1, 3 or 4 channels: the upper ones of 16, and
    white where it is transparent and the model sees no transparency. Raises DataError for pixels of other kinds."""
    from PIL import Image, ImageOps

    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"{name} has pixels of mode {image.mode}; images must have 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels < 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def cause(error: BaseException) -> str:
    """Returns the kind and the first line of `error`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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
    cut = centre_crop if crop == "resized" else square
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's; what it warns of is refused here
        return cut(Picture(str(path), Path(path)), size, channels)


IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
