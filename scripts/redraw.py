"""Draws the pictures in results/ again, from the numbers beside them: `python scripts/redraw.py [--out DIR]`.

The curves (curves.png) are left alone: they need the metrics.jsonl of all runs, and results/ keeps only some of them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import benchmark
import routers
import scaling_check
import scaling_model
import study_figures

from jvitmoe.runs import figures, groups

RESULTS = Path(__file__).resolve().parents[1] / "results"


def redraw(folder: Path, out: Path) -> None:
    """Writes the pictures of one folder of results to `out`."""
    if (folder / "runs.json").is_file():
        runs = read(folder / "runs.json")
        compare({name: list(group["seeds"].values()) for name, group in runs.items()}, out)
        for name, group in runs.items():
            if (folder / (picture := f"mergeability_{name}.png")).is_file():
                figures.save(figures.mergeability(group["seeds"]["0"]), out / picture)
    if singles := sorted(folder.glob("*_result.json")):
        compare({path.name.removesuffix("_result.json"): [read(path)] for path in singles}, out)
    if (folder / "benchmark.json").is_file():
        figures.save(benchmark.throughput(read(folder / "benchmark.json")["rows"]), out / "benchmark.png")
    if (folder / "model.json").is_file():
        scaling_model.draw(read(folder / "model.json")["rows"], out / "model.png")
    if (folder / "check.json").is_file():
        scaling_check.draw(read(folder / "check.json")["rows"], out / "check.png")


def compare(results: dict[str, list[dict[str, Any]]], out: Path) -> None:
    table = {name: groups.by_seed(group) for name, group in results.items()}
    images = {name: group[0]["rows"][0]["images"] for name, group in results.items()}
    figures.save(figures.comparison(table, images), out / "comparison.png")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to, with a subfolder per result")
    chosen = parser.parse_args()
    for folder in sorted({path.parent for path in RESULTS.rglob("*.json") if path.parent.parent.name != "runs"}):
        out = chosen.out / folder.relative_to(RESULTS)
        out.mkdir(parents=True, exist_ok=True)
        redraw(folder, out)
    routers.draw(RESULTS / "routers" / "runs", routers.table(RESULTS, Path()), chosen.out / "routers")
    study_figures.main(RESULTS / "study", chosen.out / "study")


if __name__ == "__main__":
    main()
