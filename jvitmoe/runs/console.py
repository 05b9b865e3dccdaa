"""The console of all commands, and the progress line of a training run."""

import contextlib
import html
import time
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions
from rich.progress_bar import ProgressBar
from rich.table import Table

NARROWEST_BAR, WIDEST_BAR = 10, 40  # columns of a terminal
console = Console(highlight=False, markup=False, soft_wrap=True)  # no markup: file and class names may hold brackets


@contextlib.contextmanager
def warnings_as_lines(show: Callable[[str], object] | None = None) -> Iterator[None]:
    """Prints each RuntimeWarning as one line, without file and line number of the code; with `show` if it is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, RuntimeWarning):
                    (show or console.print)(f"warning: {warning.message}")


class ProgressLine:
    """One line of progress. A terminal, where it is drawn several times a second, shows as many of `texts` and the
    elapsed time as fit, then a bar; a notebook shows a bar, then all texts."""

    def __init__(self, texts: list[str], done: int, total: int) -> None:
        self.texts, self.done, self._total = texts, done, total
        self._began = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        texts = [*self.texts, f"{duration(time.monotonic() - self._began)} elapsed"]
        while len(text := "  ".join(texts)) > options.max_width and len(texts) > 1:
            texts.pop()
        width = min(options.max_width - len(text) - 2, WIDEST_BAR)
        bar = [ProgressBar(total=self._total, completed=self.done, width=width)] if width >= NARROWEST_BAR else []
        row = Table.grid(padding=(0, 2))
        row.add_row(text, *bar)
        yield row

    def _repr_html_(self) -> str:
        """Returns what a notebook shows."""
        texts = [*self.texts, f"{duration(time.monotonic() - self._began)} elapsed"]
        return f'<progress value="{self.done}" max="{self._total}"></progress> {html.escape("  ".join(texts))}'


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
