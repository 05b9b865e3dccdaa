"""A contact sheet: pictures in a grid, each with its predicted classes below."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from jvitmoe.data import images
from jvitmoe.runs import figures, files

CELL, LINE, GAP = 180, 18, 12  # pixels: side of a picture, height of a line of text, space between cells
LINES = 4  # lines of text per picture: its caption and three guesses
WHITE, INK, FAINT, BAR, WRONG = "#ffffff", "#1a1a1a", "#6b6b6b", "#c9dcf2", figures.COLOURS[1]


class Cell(NamedTuple):
    """A picture of the sheet."""

    picture: images.Picture
    caption: str
    guesses: Sequence[tuple[str, float]]  # (name, probability) of classes, best first
    is_wrong: bool = False  # the best guess is not the class of the picture


def draw(path: Path, cells: Sequence[Cell]) -> None:
    """Writes the sheet as a PNG. Raises UserError where it cannot be written."""
    columns = min(len(cells), max(1, round(math.sqrt(len(cells) * 1.4))))
    rows = math.ceil(len(cells) / columns)
    high = CELL + LINES * LINE
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (high + GAP) + GAP), WHITE)
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(figures.FONT, 12)
    for number, cell in enumerate(cells):
        left = GAP + number % columns * (CELL + GAP)
        top = GAP + number // columns * (high + GAP)
        with images.opened(cell.picture) as image:
            thumbnail = _thumbnail(images.pixels(image, 3, cell.picture.name))
        sheet.paste(thumbnail, (left + (CELL - thumbnail.width) // 2, top + (CELL - thumbnail.height) // 2))
        top += CELL + 2
        pen.text((left, top), _fit(pen, font, cell.caption, CELL), WRONG if cell.is_wrong else FAINT, font)
        for rank, (name, probability) in enumerate(cell.guesses[: LINES - 1], 1):
            line = top + rank * LINE
            pen.rectangle((left, line, left + max(1, round(CELL * probability)), line + LINE - 3), BAR)
            share = f"{probability:.1%}"
            width = pen.textlength(share, font)
            pen.text((left + 3, line), _fit(pen, font, name, CELL - width - 12), INK, font)
            pen.text((left + CELL - width - 2, line), share, INK, font)
    with files.writing(path):
        sheet.save(path, "PNG")


def _thumbnail(image: Image.Image) -> Image.Image:
    """Returns the picture in the size of a cell; small ones are enlarged without smoothing."""
    small = max(image.size) * 2 <= CELL
    return ImageOps.contain(image, (CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)


def _fit(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, name: str, width: float) -> str:
    """Returns the name, cut with an ellipsis if it is wider than `width` pixels."""
    text = figures.shown(name, 1000)
    text = text if pen.textlength(text, font) <= width else text + "…"
    while pen.textlength(text, font) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text
