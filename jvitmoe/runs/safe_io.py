"""Files of a run folder: each written whole or not at all; what is read is checked for its form."""

import contextlib
import errno
import json
import os
import stat
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jvitmoe.config import LARGEST
from jvitmoe.errors import UserError, one_line

CONFIG, RESULT = "config.json", "result.json"
METRICS = "metrics.jsonl"  # the history: a line per step and kind ("train", "validation" or "test")
MOST_FIGURE = 1e300  # in a line of it; a larger one is damage
CHECKPOINTS = "checkpoints"  # a folder
EXPERIMENT = "experiment.py"  # the user's file that the run was trained with; only --plugin or --config runs it
CLASSES = "classes.json"  # names of the classes, in the order of their labels
IMAGES = "images.json"  # split -> number of images, and hashes, to notice that data have changed
MERGEABILITY = "mergeability.png"
CONFUSION = "confusion.png"
SAMPLES = "samples.png"
MISTAKES = "mistakes.png"
EXPERTS = "experts.png"
UNFINISHED = ".part"  # suffix of a file that is being written
# Bytes of a file that is read, of a history, and of a line of it: a longer one is damage, or an attack on memory.
MOST_BYTES, MOST_HISTORY, MOST_LINE = 2**26, 2**32, 2**22


def run_folder(name: Path | str) -> Path:
    """Returns the path of a run folder, with ~ for the home. Raises UserError for a URL, and for a path that is no
    UTF-8 in this process, which TensorStore cannot open."""
    if "://" in str(name):
        raise UserError(f"workdir {str(name)!r} is a URL; a run folder lies on a disk: mount it, and give its path")
    path = Path(os.path.expanduser(name))
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        remedy = "set --workdir to another name, or leave PYTHONUTF8=0 out"
        raise UserError(f"workdir {str(name)!r} is no UTF-8 here; {remedy}") from error
    return path


def checksum(value: Any) -> str:
    """Returns the CRC-32 of a value's JSON, independent of the order of keys."""
    return crc32(json.dumps(value, sort_keys=True).encode())


def crc32(data: bytes | memoryview, start: str = "0") -> str:
    """Returns the CRC-32 of data in hexadecimal digits, `start` being that of the data before it."""
    return f"{zlib.crc32(data, int(start, 16)):08x}"


def read_bytes(path: Path, most: int = MOST_BYTES, follow: bool = False) -> bytes | None:
    """Returns the content of a regular file; None if there is none. Raises UserError for any other, for more than
    `most` bytes, and, unless `follow`, for a link, whose target may be a secret."""
    with _reading(path, most, follow) as file:
        return file.read(most) if file else None


@contextlib.contextmanager
def _reading(path: Path, most: int, follow: bool) -> Iterator[IO[bytes] | None]:
    """Opens what `read_bytes` reads, and raises its errors, also those of reading."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))

    try:
        with open(path, "rb", MOST_LINE, opener=opener) as file:  # a buffer of that size reads lines four times as fast
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError("it is no regular file")
            if about.st_size > most:
                raise ValueError(f"its {about.st_size:,} bytes are more than {most:,}")
            yield file
    except FileNotFoundError:
        yield None
    except (OSError, ValueError) as error:  # ValueError: also for no name of a file
        is_link = isinstance(error, OSError) and error.errno == errno.ELOOP
        reason = "it is a link" if is_link else getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}; make it readable, or restore it from a copy") from error


def sizes_below(folder: Path) -> dict[Path, int]:
    """Returns the bytes of each file in a folder and the folders in it. Raises ValueError for anything else in it: who
    reads a link, a pipe or a device may read a secret, or for ever."""
    sizes = dict[Path, int]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                sizes |= sizes_below(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                sizes[Path(entry.path)] = entry.stat(follow_symlinks=False).st_size
            else:
                raise ValueError(f"{entry.name} is no regular file")
    return sizes


def refuse_links(workdir: Path) -> None:
    """Raises UserError where the run folder contains a link: a write to it would change a file elsewhere."""
    try:
        link = next((path for path in workdir.iterdir() if path.is_symlink()), None)
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be listed: {error.strerror}; make it readable") from error
    if link:
        raise UserError(f"{link} is a link, so writing to it changes a file elsewhere; replace it by its target")


def write_text(path: Path, text: str) -> None:
    """Writes a file as `write_bytes`; a name may hold bytes that are no UTF-8, which are escaped."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, even in a power cut. Raises UserError where it cannot be written."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with writing(path):
        try:
            unfinished.unlink(missing_ok=True)
            with unfinished.open("xb") as file:  # "x" does not follow a link of this name
                file.write(content)
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
        raise UserError(f"{path} cannot be written: {error.strerror}; {remedy_of(error)}, and try again") from error


def remedy_of(error: Exception) -> str:
    """Returns what a user can do about a write that failed."""
    too_many = os.strerror(errno.EMFILE) in str(error)
    return "allow more open files (ulimit -n)" if too_many else "make room or make it writable"


def make_folder(path: Path) -> None:
    """Makes a folder if there is none. Raises UserError where it cannot be made."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def read_classes(workdir: Path) -> tuple[str, ...]:
    """Returns the names of the classes; () if the run kept none. Raises UserError where the file is damaged."""

    def fits(names: Any) -> bool:
        return isinstance(names, list) and names != [] and all(isinstance(name, str) for name in names)

    remedy = "delete it, and classes are called by number"
    return tuple(read_json(workdir / CLASSES, fits, "a list of names", remedy) or ())


def read_images(workdir: Path) -> dict[str, int | str] | None:
    """Returns split -> images, and "hash of …" -> that of the data; None if there is none. Raises UserError."""

    def fits(name: str, number: Any) -> bool:
        return isinstance(number, str) if name.startswith("hash of ") else type(number) is int and 0 <= number < 2**63

    def all_fit(counts: Any) -> bool:
        return isinstance(counts, dict) and all(fits(*item) for item in counts.items())

    return read_json(workdir / IMAGES, all_fit, "the numbers of images", "delete it if the data are the same")


def read_json(path: Path, fits: Callable[[Any], bool], what: str, remedy: str) -> Any:
    """Returns the value in a JSON file; None if there is none. Raises UserError where it is not `what` it should be."""
    if (content := read_bytes(path)) is None:
        return None
    try:
        if not fits(value := json.loads(content)):
            raise ValueError("other values")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: {one_line(error)}; {remedy}") from error
    return value


def metrics_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a metrics.jsonl, and parts of a line of more than MOST_LINE bytes, which is damage. Raises
    UserError where it cannot be read."""
    with _reading(path, MOST_HISTORY, follow=False) as file:
        while file and (line := file.readline(MOST_LINE)):
            yield line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, each step and kind once, without damaged lines; [] if there is no file.
    Raises UserError where it cannot be read. A line has a step, a kind, and figures that are finite or null."""
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    for text in metrics_lines(path):
        try:
            line = json.loads(text.decode(errors="replace"))
            step, kind = line["step"], line["kind"]
            figures = [value for name, value in line.items() if name != "kind" and value is not None]
            known = type(step) is int and 0 <= step <= LARGEST and isinstance(kind, str)
            if known and all(abs(value) <= MOST_FIGURE for value in figures):
                lines.setdefault((step, kind), line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return list(lines.values())


def metrics_up_to(workdir: Path, step: int) -> str:
    """Returns the text of metrics.jsonl up to a step."""
    lines = [line for line in read_metrics(workdir / METRICS) if line["step"] <= step]
    return "".join(json.dumps(line) + "\n" for line in lines)


def checksums(workdir: Path, step: int, names: Collection[str] = (CLASSES, IMAGES, METRICS)) -> dict[str, str]:
    """Returns name -> CRC-32 of those of the files that are there, of metrics.jsonl up to a step."""
    texts = {name: read_bytes(workdir / name) for name in (CLASSES, IMAGES) if name in names}
    if METRICS in names and os.path.lexists(workdir / METRICS):
        texts[METRICS] = metrics_up_to(workdir, step).encode()
    return {name: crc32(text) for name, text in texts.items() if text is not None}


def compare(workdir: Path, step: int, expected: Mapping[str, str]) -> None:
    """Raises UserError where a file that is there is not as it was at a step, when its checksum was the `expected`."""
    for name, found in checksums(workdir, step, expected).items():
        if found != expected[name]:
            fault = f"{workdir / name} does not match its checksum of step {step}"
            raise UserError(f"{fault}; restore it from a copy, or delete it")


def read_result(workdir: Path) -> dict[str, Any]:
    """Returns the run's result.json; {} if there is none. Raises UserError where it is not as it was written."""
    remedy = "delete it and run jvitmoe evaluate"
    return read_json(workdir / RESULT, _is_whole, "a result that matches its checksum", remedy) or {}


def _is_whole(result: Any) -> bool:
    rest = {name: value for name, value in result.items() if name != "checksum"} if isinstance(result, dict) else {}
    return bool(rest) and result.get("checksum") == checksum(rest)


def save_result(workdir: Path, result: Mapping[str, Any]) -> None:
    """Writes result.json, with the checksum that `read_result` compares."""
    rest = {name: value for name, value in result.items() if name != "checksum"}
    write_text(workdir / RESULT, json.dumps({**rest, "checksum": checksum(rest)}, indent=2) + "\n")
