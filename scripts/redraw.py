"""Draws the pictures in results/ again, from the numbers beside them: `python scripts/redraw.py [--out DIR]`.

They have 256 colours, which takes a third of the space. Only pictures that are there are drawn; curves need a history.
The pictures of the study's differences and bytes, and the sheet of augmentations, stay as they are.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import archive
import average_report
import benchmark
import routers
import scaling_check
import scaling_model
import search_recipe
from archive import Run, Runs
from PIL import Image

from jvitmoe.reports import comparison, figures, run_figures

COMPARISON, CURVES = "comparison.png", "curves.png"
RESULTS = Path(__file__).resolve().parents[1] / "results"


def redraw(folder: Path, out: Path) -> None:
    """Writes the pictures of one folder of results to `out`."""
    if runs := archive.kept(folder):
        by_group = grouped(runs)
        if (folder / COMPARISON).is_file():
            compare(by_group, out)
        for name, group in by_group.items():
            if (folder / (picture := f"mergeability_{name}.png")).is_file():
                figures.save(run_figures.mergeability(next(iter(group.values()))["result"]), out / picture)
        if (folder / CURVES).is_file():
            draw_curves(by_group, out)
        if (folder / average_report.PICTURE).is_file():
            figures.save(average_report.picture(runs), out / average_report.PICTURE)
        if (folder / search_recipe.PICTURE).is_file():
            figures.save(search_recipe.picture(runs), out / search_recipe.PICTURE)
    if (folder / "benchmark.json").is_file():
        figures.save(benchmark.throughput(read(folder / "benchmark.json")["rows"]), out / "benchmark.png")
    if (folder / "model.json").is_file():
        scaling_model.draw(read(folder / "model.json")["rows"], out / "model.png")
    if (folder / "check.json").is_file():
        scaling_check.draw(read(folder / "check.json")["rows"], out / "check.png")


def grouped(runs: Runs) -> dict[str, Runs]:
    """Returns the runs by the names that their report gives their groups: a run without others keeps its own."""
    by_group: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        by_group.setdefault(name.rpartition("-seed")[0] or name, {})[name] = run
    return {next(iter(group)) if len(group) == 1 else name: group for name, group in by_group.items()}


def compare(by_group: Mapping[str, Runs], out: Path) -> None:
    results = {name: [run["result"] for run in group.values()] for name, group in by_group.items()}
    table = {name: comparison.by_seed(seeds) for name, seeds in results.items()}
    images = {name: seeds[0]["rows"][0]["images"] for name, seeds in results.items()}
    figures.save(figures.comparison(table, images), out / COMPARISON)


def draw_curves(by_group: Mapping[str, Runs], out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: archive.unpack(group, Path(folder)) for name, group in by_group.items()}
        if curves := figures.curves(folders):
            figures.save(curves, out / CURVES)


def reduce_colours(path: Path) -> None:
    """Writes a picture again with 256 colours if it is one of matplotlib's."""
    with Image.open(path) as picture:
        if picture.mode == "RGBA":
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to, with a subfolder per result")
    chosen = parser.parse_args()
    for folder in sorted(path for path in RESULTS.glob("**/") if "runs" not in path.parts[len(RESULTS.parts) :]):
        out = chosen.out / folder.relative_to(RESULTS)
        out.mkdir(parents=True, exist_ok=True)
        redraw(folder, out)
    routers.draw(RESULTS / "routers", routers.table(RESULTS, Path()), chosen.out / "routers")
    for path in chosen.out.rglob("*.png"):
        reduce_colours(path)


if __name__ == "__main__":
    main()
