"""One picture: read from its file, upright, in 8 bits and the model's channels; whole, or cropped and resized.

Training, evaluation and predictions all read pictures here, so they see the same pixels.

H rows · W columns · c channels
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

from jvitmoe.errors import UserError, one_line

LONGEST = 65_535  # pixels of a side, JPEG's limit; a decoder's time grows with the rows, even if they are short

# Formats that Pillow decodes itself. It would hand PostScript to another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for 8-bit pixels of that many channels
# Of a random crop (arXiv 1409.4842): its smallest share of the picture's area, and its width / height, log-uniform.
AREA = 0.08
RATIO = (3 / 4, 4 / 3)
PADDING = 128  # grey, beside a whole picture
TRIES = 10
GAP = 2  # a JPEG is decoded at the smallest scale of which the crop still has this many times the pixels per side
ORIENTATION = 0x0112  # EXIF's tag for how the camera was held; 1 is upright, and above 4 rows are columns
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}  # how Pillow makes it upright
TURNS |= {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}

# Pillow warns about sizes that `opened` refuses. Here, once: `catch_warnings` would mix up the filters of threads.
warnings.filterwarnings("ignore", "Image size .* exceeds limit")


class DataError(UserError):
    """The data are absent, damaged, or do not fit the model; the message is one line and names the remedy."""


class Picture(NamedTuple):
    name: str  # for messages
    encoded: Path | bytes | np.ndarray  # a file, its contents, or uint8 pixels [H, W, c]


class Crop(NamedTuple):
    """How the pictures of a set become images of the model's size."""

    kind: str  # data.crop
    side: int
    channels: int
    area: float = AREA  # data.crop_area

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, self.channels

    def __call__(self, picture: Picture, seed: Sequence[int] | None = None) -> np.ndarray:
        """Returns uint8 [H, W, c]: with `seed` as training sees the picture, else as evaluation does. Raises
        DataError."""
        if self.kind == "resized" and seed is not None:
            return random_crop(picture, self.side, self.channels, seed, self.area)
        if self.kind != "exact":
            return as_tested(picture, self.side, self.channels, self.kind)
        crops = "--config.data.crop=centre or whole, --config.data.stream --config.data.crop=resized"
        remedy = f"set {crops}, or model.image_size"
        return exact(picture, self.shape, f"config.model.image_size is {self.side}; {remedy}")


def exact(picture: Picture, size: tuple[int, int, int], rule: str) -> np.ndarray:
    """Returns uint8 [H, W, c] of exactly `size`. Raises DataError with the name and, for another size, `rule`."""
    height, width, channels = size
    with opened(picture) as image:
        # Only the header is read so far: an image that claims a huge size never takes its memory.
        if {*image.size} == {width, height}:
            image = pixels(image, channels, picture.name)
        if image.size != (width, height):
            raise DataError(f"{picture.name} is {image.height}x{image.width} pixels but {rule}")
        return np.asarray(image).reshape(size)


def random_crop(
    picture: Picture, side: int, channels: int, seed: int | Sequence[int], area: float = AREA
) -> np.ndarray:
    """Returns uint8 [side, side, c]: a random part of the picture, resized bilinearly. It has a share of the area from
    `area` to 1, uniform, and RATIO.

    If TRIES draws do not fit in, the largest part in the middle whose ratio is allowed. Source: Szegedy et al.,
    arXiv 1409.4842. Raises DataError.
    """
    from PIL import Image

    with opened(picture) as file:
        shrinks = file.format in ("JPEG", "MPO")  # only these can be decoded at a smaller size
        image = file if shrinks else pixels(file, channels, picture.name)
        turned = shrinks and _orientation(file) > 4
        width, height = image.size[::-1] if turned else image.size
        left, top, right, bottom = box = _random_box(width, height, np.random.RandomState(seed), area)
        if shrinks:
            needed = math.ceil(GAP * side * width / (right - left)), math.ceil(GAP * side * height / (bottom - top))
            file.draft(None, needed[::-1] if turned else needed)
            image = pixels(file, channels, picture.name)
        scale = round(width / image.width)
        box = tuple(edge / scale for edge in box)
        resized = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        return np.asarray(resized).reshape(side, side, channels)


def _random_box(
    width: int, height: int, random: np.random.RandomState, smallest: float
) -> tuple[float, float, float, float]:
    """Returns (left, top, right, bottom) of a random crop."""
    for _ in range(TRIES):
        area, ratio = random.uniform(smallest, 1) * width * height, math.exp(random.uniform(*np.log(RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w + 1), random.randint(0, height - h + 1)
            return left, top, left + w, top + h
    widest, highest = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    return (width - widest) / 2, (height - highest) / 2, (width + widest) / 2, (height + highest) / 2


def as_tested(picture: Picture, side: int, channels: int, crop: str) -> np.ndarray:
    """Returns uint8 [side, side, c] of a picture of any size, as evaluation sees it with `data.crop`. Raises
    DataError."""
    return whole(picture, side, channels) if crop == "whole" else centre_crop(picture, side, channels, crop)


def whole(picture: Picture, side: int, channels: int) -> np.ndarray:
    """Returns uint8 [side, side, c]: the longer side resized to `side`, bicubically, and PADDING beside the shorter.
    As timm's crop_mode "border" for a mean of 0.5. Raises DataError."""
    from PIL import Image

    with opened(picture) as file:
        image = pixels(file, channels, picture.name)
        width, height = (max(1, round(length * side / max(image.size))) for length in image.size)
        square = Image.new(image.mode, (side, side), PADDING if channels == 1 else (PADDING,) * channels)
        square.paste(
            image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2)
        )
        return np.asarray(square).reshape(side, side, channels)


def centre_crop(picture: Picture, side: int, channels: int, crop: str = "resized") -> np.ndarray:
    """Returns uint8 [side, side, c]: the shorter side is resized and the centre cropped. Raises DataError.

    crop="resized" resizes to 8/7 of `side`, bilinearly, as ImageNet is tested; "exact" and "centre" to `side`,
    bicubically. Sizes and offsets are rounded as in torchvision, so timm's transform gives the same pixels.
    """
    from PIL import Image

    shorter, filter_name = (side * 8 // 7, "BILINEAR") if crop == "resized" else (side, "BICUBIC")
    with opened(picture) as file:
        image = pixels(file, channels, picture.name)
        size = [int(shorter * length / min(image.size)) for length in image.size]
        if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width}x{image.height} pixels are too narrow a strip to be resized")
        left, top = (round((length - side) / 2) for length in size)
        image = image.resize(size, Image.Resampling[filter_name])
        return np.asarray(image.crop((left, top, left + side, top + side))).reshape(side, side, channels)


@contextlib.contextmanager
def opened(picture: Picture) -> Iterator[Any]:
    """Yields the picture as a Pillow image, its header read. Any error inside becomes a DataError with its name."""
    from PIL import Image, UnidentifiedImageError

    encoded = picture.encoded
    try:
        if isinstance(encoded, np.ndarray):
            yield Image.fromarray(encoded.squeeze(-1) if encoded.shape[-1] == 1 else encoded)
            return
        if isinstance(encoded, Path) and not encoded.is_file():
            raise ValueError("it is no regular file")  # reading a pipe or a device might never end
        if encoded == b"":
            raise ValueError("it is absent or empty")
        # Never by its name: Pillow maps an uncompressed TIFF into memory, with a wrong size if it is rotated.
        file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded.open("rb")
        with file, Image.open(file, formats=FORMATS) as image:
            area = image.width * image.height
            if area > (Image.MAX_IMAGE_PIXELS or math.inf) or max(image.size) > LONGEST:
                raise ValueError(f"{image.width}x{image.height} pixels are more than any photograph has")
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
        unknown = f"it is damaged, or none of {', '.join(FORMATS)}"  # Pillow would name our buffer
        cause = unknown if isinstance(error, UnidentifiedImageError) else one_line(error)
        fault = f"{picture.name} cannot be read as an image ({cause})"
        raise DataError(f"{fault}; replace or remove it") from error


def pixels(image: Any, channels: int, name: str) -> Any:
    """Returns the image upright, with 1, 3 or 4 channels of 8 bits.

    Of 16 bits the upper 8 are kept. Transparency is put on white unless the model has 4 channels. Raises DataError for
    other kinds of pixels.
    """
    from PIL import Image

    # Pillow reads a PGM of 16 bits into pixels of 32.
    has_16_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    image.load()  # this turns a TIFF
    if (orientation := _orientation(image)) != 1:  # not exif_transpose, which fails where it cannot write EXIF again
        image = image.transpose(Image.Transpose[TURNS[orientation]])
    if has_16_bits:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"{name} has pixels of mode {image.mode}; images must have 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels < 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _orientation(image: Any) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 where it cannot be read, because the pixels can."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises SyntaxError and more for damaged EXIF
        return 1
    return int(value) if value in TURNS else 1


def is_image(path: Path) -> bool:
    """True if the file name has the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def visible(folder: Path) -> list[Path]:
    """Returns the entries of a folder that are not hidden, sorted. Raises OSError."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def find(paths: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Returns (files, complaints): each file, and the images directly in each folder, in order; ~ is the home."""
    files: list[Path] = []
    complaints = []
    for name in paths:
        path = Path(os.path.expanduser(name))
        if not os.path.lexists(path):  # unlike Path.exists, this raises for no name
            complaints.append(f"{name} {'is a URL' if '://' in str(name) else 'does not exist'}; give files or folders")
            continue
        try:
            inside = [p for p in visible(path) if is_image(p) and p.is_file()] if os.path.isdir(path) else [path]
        except OSError as error:
            complaints.append(f"{path} cannot be listed ({type(error).__name__}); let it be read")
            continue
        files += inside
        if not inside:
            complaints.append(f"{path} holds no images; give files, or a folder of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files, complaints


def read(picture: str | Path | bytes, size: int, channels: int, crop: str = "exact") -> np.ndarray:
    """Returns a path or a file's bytes `as_tested`. Raises DataError."""
    if channels not in MODES:
        raise DataError(f"the model takes {channels} channels; pictures have 1, 3 or 4: classify arrays instead")
    named = Picture("the picture", picture) if isinstance(picture, bytes) else Picture(str(picture), Path(picture))
    return as_tested(named, size, channels, crop)
