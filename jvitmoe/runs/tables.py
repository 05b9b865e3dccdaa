"""Tables, on the console and as Markdown."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jvitmoe.runs.console import console

LEFT = {  # columns of text; the others are right-aligned
    *("run", "model", "hardware", "image", "class", "most often taken for", "probe", "data"),  # of the commands
    *("arm", "ingredient", "kind", "minus", "module", "pass", "verdict"),  # of the scripts
}


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints rows of text cells as a table; columns are the first row's keys."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    # In a file, do not fold cells at the usual 80 columns, unless COLUMNS sets a width.
    wide = Console(width=None if os.environ.get("COLUMNS") else 200, highlight=False, markup=False)
    (console if console.is_terminal else wide).print(table)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of text cells as a Markdown table."""
    names = list(rows[0])
    rules = [":--" if name in LEFT else "--:" for name in names]
    # A bar in a name of a class or a run would begin a new cell.
    lines = [names, rules, *([str(cell).replace("|", "\\|") for cell in row.values()] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def quantity(number: float) -> str:
    """Returns a large number in three digits: 5.46 M."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # 999.5 k is 1e+03 k in three digits
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
