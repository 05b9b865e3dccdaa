"""A report, from its parts: as Markdown, or one page of HTML with everything in it, without script and network."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jvitmoe.errors import UserError
from jvitmoe.runs.console import LEFT, markdown_table
from jvitmoe.runs.safe_io import read_bytes

MOST_BYTES = 20_000_000  # of a picture that is put into a page
OPENING = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>jvitmoe: runs</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1400px; padding: 1rem; font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; white-space: pre-wrap; }
p { overflow-wrap: anywhere; } h1 + p { font-size: 1.1rem; }
/* A shadow at the side where a table goes on. */
div { overflow-x: auto; background: linear-gradient(to right, Canvas 1rem, #0000 3rem) 0 0 / 100% 100% local,
  linear-gradient(to left, Canvas 1rem, #0000 3rem) 0 0 / 100% 100% local,
  linear-gradient(to right, #8888, #0000 1rem) 0 0 / 100% 100% scroll,
  linear-gradient(to left, #8888, #0000 1rem) 0 0 / 100% 100% scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: pre; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
.left { text-align: left; }
img { background: #fff; max-width: 100%; display: block; margin: 1rem 0; }
@media (max-width: 600px) { body { padding: .5rem; } th, td { padding: .25rem .3rem; font-size: 13px; }
  td:first-child { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 4.5rem; } }
/* On paper nothing scrolls or unfolds: cells break, and notes are open. */
@media print { @page { size: landscape; margin: 1cm; } div { overflow: visible; background: none; }
  table { white-space: pre-wrap; max-width: 100%; }
  th, td { padding: 1px 4px; font-size: 8px; overflow-wrap: anywhere; }
  tr, img { break-inside: avoid; } h2 { break-after: avoid; } img { max-height: 17cm; }
  details::details-content { content-visibility: visible; display: block; } }
</style>
</head>
<body>
"""


class Heading(NamedTuple):
    level: int
    text: str


class Picture(NamedTuple):
    name: str  # of its file beside the report, without .png
    png: bytes = b""  # that a page of HTML needs
    finding: str = ""  # what it shows, for those who do not see it


class Notes(NamedTuple):
    """Paragraphs that explain; a page of HTML folds them."""

    texts: Sequence[str]


# A string is a paragraph, a sequence the rows of a table.
Part = Heading | Picture | Notes | str | Sequence[Mapping[str, str]]


def as_markdown(parts: Sequence[Part]) -> str:
    """Returns a report whose pictures are files beside it."""
    return "\n".join(f"{_markdown(part)}\n" for part in parts)


def _markdown(part: Part) -> str:
    match part:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Picture(name):
            return f"![{name}]({name}.png)"
        case Notes(texts):
            return "\n\n".join(texts)
        case str(text):
            return text
    return markdown_table(part).removesuffix("\n")


def as_html(parts: Sequence[Part]) -> str:
    """Returns the page."""
    return OPENING + "".join(f"{_html(part)}\n" for part in parts) + "</body>\n</html>\n"


def _html(part: Part) -> str:
    match part:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Picture(name, png, finding):
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            return f'<img alt="{html.escape(finding or name)}" src="{source}">'
        case Notes(texts):
            return f"<details><summary>Notes</summary>{''.join(map(_html, texts))}</details>"
        case str(text):
            marked = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
            return f"<p>{marked}</p>"
    head = "".join(_cell("th", name, name) for name in part[0])
    body = "".join(f"<tr>{''.join(_cell('td', *item) for item in row.items())}</tr>\n" for row in part)
    return f"<div tabindex=0 role=region aria-label=table><table>\n<tr>{head}</tr>\n{body}</table></div>"


def _cell(tag: str, column: str, text: str) -> str:
    return f"<{tag}{' class=left' if column in LEFT else ''}>{html.escape(text)}</{tag}>"


def own_picture(path: Path, finding: str) -> Picture | None:
    """Returns a picture of a run folder; None if it is no regular file: a link may lead to a secret."""
    try:
        data = read_bytes(path, MOST_BYTES) or b""
    except UserError:
        return None
    return Picture(path.stem, data, finding) if data.startswith(b"\x89PNG") else None
