"""A contact sheet: pictures in a grid, each with its predicted classes below."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jvitmoe.data import images
from jvitmoe.runs import files

CELL, LINE, GAP = 180, 18, 12  # pixels: side of a picture, height of a line of text, space between cells
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Latin, Greek, Cyrillic and more; no CJK
LINES = 4  # lines of text per picture: its name and three guesses
WHITE, INK, FAINT, BAR = "#ffffff", "#1a1a1a", "#6b6b6b", "#c9dcf2"


def draw(path: Path, cells: Sequence[tuple[Path, Sequence[tuple[str, float]]]]) -> None:
    """Writes the sheet as a PNG; cells are (file of the picture, (name, probability) of each guess, best first).
    Raises UserError where it cannot be written."""
    columns = min(len(cells), max(1, round(math.sqrt(len(cells) * 1.4))))
    rows = math.ceil(len(cells) / columns)
    high = CELL + LINES * LINE
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (high + GAP) + GAP), WHITE)
    pen, font, glyphs = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 12), FT2Font(str(FONT))
    for number, (file, guesses) in enumerate(cells):
        left = GAP + number % columns * (CELL + GAP)
        top = GAP + number // columns * (high + GAP)
        with images.opened(images.Picture(str(file), file)) as image:
            thumbnail = _thumbnail(images.pixels(image, 3, str(file)))
        sheet.paste(thumbnail, (left + (CELL - thumbnail.width) // 2, top + (CELL - thumbnail.height) // 2))
        top += CELL + 2
        pen.text((left, top), _fit(pen, font, _escaped(file.name, glyphs), CELL), FAINT, font)
        for rank, (name, probability) in enumerate(guesses[: LINES - 1], 1):
            line = top + rank * LINE
            pen.rectangle((left, line, left + max(1, round(CELL * probability)), line + LINE - 3), BAR)
            share = f"{probability:.1%}"
            width = pen.textlength(share, font)
            pen.text((left + 3, line), _fit(pen, font, _escaped(name, glyphs), CELL - width - 12), INK, font)
            pen.text((left + CELL - width - 2, line), share, INK, font)
    with files.writing(path):
        sheet.save(path, "PNG")


def _thumbnail(image: Image.Image) -> Image.Image:
    """Returns the picture in the size of a cell; small ones are enlarged without smoothing."""
    small = max(image.size) * 2 <= CELL
    return ImageOps.contain(image, (CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)


def _escaped(text: str, glyphs: FT2Font) -> str:
    """Returns the text with characters that the font does not have, such as CJK and line breaks, as Python escapes."""
    return "".join(c if glyphs.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)


def _fit(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str, width: float) -> str:
    """Returns the text, cut with an ellipsis if it is wider than `width` pixels."""
    text = text if pen.textlength(text, font) <= width else text + "…"
    while pen.textlength(text, font) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text
