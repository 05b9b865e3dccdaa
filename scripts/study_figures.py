"""Draws the study (docs/study.md): `python scripts/study_figures.py --results results/study`.

differences.png: for each experiment, the difference of every arm from dense with its 95 % interval. bytes.png: accuracy
against the bytes that a device reduces, of experiment C.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import study

from jvitmoe.runs import files, history, plots

NOT_COMPARED = ("A_search", "D_search", "D_pretrained")  # one seed each


def main(results: Path, out: Path) -> None:
    """Draws what there is of results/study into a folder."""
    found = {}
    for name in sorted([*study.EXPERIMENTS, *study.AFTER_SEARCH]):
        if name in NOT_COMPARED or not (results / name / "runs").is_dir():
            continue
        compared = from_dense(results / name / "runs", study.arms_of(name, results))
        found[name] = [model for model in compared if model.paired]
    differences(found, out / "differences.png")
    if "C" in found:
        bytes_against_accuracy(results / "C" / "runs", out / "bytes.png")


def from_dense(runs: Path, arms: study.Arms) -> list[study.Compared]:
    """Returns the models of all arms, compared with the dense model of the first arm."""
    return study.compare(study.read(runs, arms), *study.references(arms)[0])


@plots.in_style
def differences(found: dict[str, list[study.Compared]], path: Path) -> None:
    """Writes one panel per experiment: a row per arm and model, whiskers from the lower to the upper limit."""
    heights = [max(1, len(rows)) for rows in found.values()]
    size = (9, 1.5 + 0.28 * sum(heights) + 0.6 * len(heights))
    figure, panels = plt.subplots(len(found), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False)
    for axes, (name, rows) in zip(panels[:, 0], found.items(), strict=True):
        for y, row in enumerate(rows):
            mean = statistics.fmean(row.paired)
            low, high = study.interval(row.paired) if len(row.paired) > 1 else (mean, mean)
            marker, colour = plots.MARKS[row.model]
            axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt=marker, color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(-study.PARITY, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [f"{row.arm}, {row.model}" for row in rows])
        axes.set(title=f"{name}: test accuracy minus that of dense", ylim=(len(rows) - 0.5, -0.5))
    label = "difference of the mean over seeds, points; an interval right of the dotted line loses nothing"
    panels[-1, 0].set_xlabel(label)
    plots.save(figure, path)


@plots.in_style
def bytes_against_accuracy(runs: Path, path: Path) -> None:
    """Writes accuracy, mean ± sample deviation, against the bytes that a device reduces in a run."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, _, accuracies, _ in (row for row in from_dense(runs, study.EXPERIMENTS["C"]()) if row.model != "EMA"):
        lines = history.read_metrics(next(runs.glob(f"{name}-seed*")) / files.METRICS)
        (reduced, *_) = [line["reduced_bytes"] for line in reversed(lines) if "reduced_bytes" in line]
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        axes.errorbar(reduced, statistics.fmean(accuracies), yerr=deviation, fmt="o", color=plots.COLOURS[0])
        axes.annotate(name, (reduced, statistics.fmean(accuracies)), xytext=(6, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="reduced per device in a run, GB", ylabel="test accuracy, %")
    plots.plain_ticks(axes.xaxis, 1e-9)
    axes.set_title("Accuracy against communication, one expert per device")
    plots.save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    main(options.results, options.results)
