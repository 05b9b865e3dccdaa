"""The console of all commands: lines, tables, which are Markdown in files, and the progress of a training run."""

import contextlib
import html
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from jvitmoe.errors import escaped

NARROWEST_BAR, WIDEST_BAR = 10, 40  # columns of a terminal
KEPT = 4  # columns of a table that are shown in any terminal
DAY = 24 * 3600.0  # seconds
LEFT = {  # columns of text; the others are right-aligned
    *("run", "model", "hardware", "image", "class", "most often taken for", "probe", "data", "trained as"),
    "memory of a device",  # of the commands
    *("arm", "try", "kind", "minus", "module", "pass", "verdict", "program", "shard"),  # of the scripts
}


class _Console(Console):
    """A console whose lines cannot control the terminal: they hold names of files, classes and runs."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(escaped(x, "\n") if isinstance(x, str) else x for x in objects), **options)


console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # names may hold [b] and :b:


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
                    (show or console.print)(escaped(f"warning: {warning.message}"))


def show_table(rows: Sequence[Mapping[str, Any]], title: str, file: str = "") -> None:
    """Prints rows of text cells as a table; columns are the first row's keys. Where `file` has all of them, those that
    do not fit are left out from the right, but not the first KEPT, and the title says so."""
    # In a file, do not fold cells at the usual 80 columns, unless COLUMNS sets a width.
    wide = Console(width=None if os.environ.get("COLUMNS") else 200, highlight=False, markup=False, emoji=False)
    shown, names = console if console.is_terminal else wide, list(rows[0])
    widths = {name: 3 + max(cell_len(str(text)) for text in (name, *(row[name] for row in rows))) for name in names}
    while file and len(names) > KEPT and 1 + sum(widths[name] for name in names) > shown.width:
        names.pop()
    if left_out := len(rows[0]) - len(names):
        title = f"{title} ({left_out} more column{'s' * (left_out > 1)}: {file})"
    table = Table(title=escaped(title), title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escaped(str(row[name])) for name in names))
    shown.print(table)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of text cells as a Markdown table; a line break in a cell is escaped."""
    names = list(rows[0])
    rules = [":--" if name in LEFT else "--:" for name in names]
    # A bar in a name of a class or a run would begin a new cell.
    lines = [names, rules, *([escaped(str(cell)).replace("|", "\\|") for cell in row.values()] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def quantity(number: float) -> str:
    """Returns a large number in three digits: 5.46 M."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # 999.5 k is 1e+03 k in three digits
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


class ProgressLine:
    """One line of progress. A terminal, where it is drawn several times a second, shows as many of `texts` and the
    elapsed time as fit, then a bar; a notebook shows a bar, then all texts."""

    def __init__(self, texts: list[str], done: int, total: int | None) -> None:
        self.texts, self.done, self._total = texts, done, total
        self._began = time.monotonic()

    def begin(self, stage: str) -> None:
        """Shows a stage, whose elapsed time begins now."""
        self.texts, self._began = [stage], time.monotonic()

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


@contextlib.contextmanager
def progress(stage: str) -> Iterator[Callable[[], None]]:
    """Says that a stage begins, and yields what to call after each batch of it: a terminal shows their number."""
    line = ProgressLine([stage], 0, None)
    if not console.is_terminal:
        console.print(stage)
        yield lambda: None
        return

    def advance() -> None:
        line.done += 1
        line.texts = [stage, f"batch {line.done}"]

    with Live(line, console=console, transient=True):
        console.show_cursor(True)  # rich hides it, and a killed process cannot show it again
        yield advance


def duration(seconds: float) -> str:
    """Returns a time as 3:09 (minutes and seconds), 5 h 12 min or 3.2 days."""
    if seconds >= DAY:
        return f"{seconds / DAY:,.1f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes}:{rest:02d}"
