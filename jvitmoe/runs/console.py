"""The console of all commands, and the progress line of a run."""

import contextlib
import time
import warnings
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.progress_bar import ProgressBar
from rich.table import Table

LEAST_BAR, WIDEST_BAR = 10, 40  # columns of a terminal
console = Console(highlight=False, markup=False, soft_wrap=True)  # names of files and classes are nobody's markup


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Prints a RuntimeWarning from inside as a line of its own, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, RuntimeWarning):
                    console.print(f"warning: {warning.message}")


class ProgressLine:
    """The progress of a run on a terminal, drawn several times a second: as many of its parts as fit in one line, first
    ones first, then the time elapsed and a bar."""

    def __init__(self, parts: list[str], done: int, total: int) -> None:
        self.parts, self.done, self._total = parts, done, total
        self._began = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        parts = [*self.parts, f"{duration(time.monotonic() - self._began)} elapsed"]
        while len(text := "  ".join(parts)) > options.max_width and len(parts) > 1:
            parts.pop()
        room = min(options.max_width - len(text) - 2, WIDEST_BAR)
        bar = [ProgressBar(total=self._total, completed=self.done, width=room)] if room >= LEAST_BAR else []
        row = Table.grid(padding=(0, 2))
        row.add_row(text, *bar)
        yield row


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
