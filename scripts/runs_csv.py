"""Writes results/runs.csv, a flat file of all runs in results/: `python scripts/runs_csv.py results results/runs.csv`.

A row is a tested model of a run; a single expert has none. After what was measured come the settings that differ
between any two of the runs.
"""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from jvitmoe.runs.results import trained_on

MEASURED = ("accuracy", "nll", "ece", "images", "parameters", "flops_per_image")
OF_RUN = ("step", "images_per_second", "hardware")


def text(results: Path) -> str:
    """Returns the file."""
    runs = [(path.parent, json.loads(path.read_text())) for path in sorted(results.glob("**/runs/*/result.json"))]
    settings = {folder: _settings(folder / "config.json") for folder, _ in runs}
    names = dict.fromkeys(name for found in settings.values() for name in found)
    differ = [name for name in names if len({repr(found.get(name)) for found in settings.values()}) > 1]
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["folder", "run", "model", *MEASURED, *OF_RUN, *differ])
    for folder, result in runs:
        place = folder.relative_to(results)
        result["hardware"] = trained_on(result)
        about = [result.get(name, "") for name in OF_RUN] + [settings[folder].get(name, "") for name in differ]
        for row in result["rows"]:
            if row["model"].startswith("expert "):
                continue
            measured = [row.get(name, "") for name in MEASURED]
            table.writerow([place.parent.parent, place.name, row["model"], *measured, *about])
    return out.getvalue()


def _settings(path: Path) -> dict[str, Any]:
    sections = json.loads(path.read_text())
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(text(Path(sys.argv[1])))
