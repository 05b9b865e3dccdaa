"""Files of a run folder: each written whole or not at all; what is read is checked for its form."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jvitmoe.errors import UserError, one_line

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
CHECKPOINTS = "checkpoints"  # a folder
CLASSES = "classes.json"  # names of the classes, in the order of their labels
IMAGES = "images.json"  # split -> number of images, to notice on resuming that the data have changed
MERGEABILITY = "mergeability.png"
CONFUSION = "confusion.png"
SAMPLES = "samples.png"
UNFINISHED = ".part"  # suffix of a file that is being written


def checksum(value: Any) -> str:
    """Returns the CRC-32 of a value's JSON, independent of the order of keys."""
    return crc32(json.dumps(value, sort_keys=True).encode())


def crc32(data: bytes | memoryview, start: str = "0") -> str:
    """Returns the CRC-32 of data in hexadecimal digits, `start` being that of the data before it."""
    return f"{zlib.crc32(data, int(start, 16)):08x}"


def refuse_links(workdir: Path) -> None:
    """Raises UserError where the run folder contains a link: a write to it would change a file elsewhere, chosen by
    whoever made the folder."""
    try:
        links = [path for path in workdir.iterdir() if path.is_symlink()]
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be listed: {error.strerror}; make it readable") from error
    if links:
        raise UserError(f"{links[0]} is a link, so writing to it changes a file elsewhere; replace it by its target")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, even in a power cut. Raises UserError where it cannot be written."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with writing(path):
        try:
            unfinished.unlink(missing_ok=True)
            # "x" does not follow a link of this name; a class may be named by bytes that are no UTF-8.
            with unfinished.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError for an OSError from inside."""
    try:
        yield
    except OSError as error:
        remedy = "make room or make it writable, and repeat the command"
        raise UserError(f"{path} cannot be written: {error.strerror}; {remedy}") from error


def make_folder(path: Path) -> None:
    """Makes a folder if there is none. Raises UserError where it cannot be made."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def read_classes(workdir: Path) -> tuple[str, ...]:
    """Returns the names of the classes; () if the run kept none. Raises UserError where the file is damaged."""
    remedy = "delete it, and classes are called by number"
    return tuple(read_json(workdir / CLASSES, [str], "a list of names", remedy) or ())


def read_images(workdir: Path) -> dict[str, int] | None:
    """Returns split -> number of images; None if the run kept none. Raises UserError where the file is damaged."""
    remedy = "delete it if the data are the same"
    counts: dict[str, int] | None = read_json(workdir / IMAGES, {"*": int}, "the numbers of images", remedy)
    return counts


def read_json(path: Path, form: Any, what: str, remedy: str) -> Any:
    """Returns the value in a JSON file; None if there is none. Raises UserError where it cannot be read or lacks the
    form: a type, [form of each entry] or {name: form}. A name with ? may be absent or null; * is every other name."""
    try:
        value = json.loads(path.read_bytes())
        _check_form(value, form, "the whole")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: {one_line(error)}; {remedy}") from error
    return value


def _check_form(value: Any, form: Any, name: str) -> None:
    """Raises ValueError with the part of a JSON value that does not have the form."""
    if isinstance(form, type):
        types, number = (float, int) if form is float else (form,), isinstance(value, int)
        fits, expected = type(value) in types and not (number and abs(value) >= 2**63), form.__name__
    else:
        fits, expected = isinstance(value, type(form)) and value != [], f"{type(form).__name__} with entries"
    if not fits:
        raise ValueError(f"{name} is {type(value).__name__}, not {expected}")
    if isinstance(form, list):
        for entry in value:
            _check_form(entry, form[0], f"an entry of {name}")
    elif isinstance(form, dict):
        for key in {key.rstrip("?") for key in form} - {"*"}:
            if key in form or value.get(key) is not None:
                _check_form(value.get(key), form.get(key, form.get(f"{key}?")), key)
        for key in (value.keys() - {key.rstrip("?") for key in form}) if "*" in form else ():
            _check_form(value[key], form["*"], key)
