"""Draws the study (docs/study.md): `python scripts/study_figures.py --results results/study`.

differences.png of each experiment: every arm minus what it is compared with, and the 95 % interval, where there is one.
bytes.png: accuracy against the bytes that a device reduces, of C and, of H, of workers and their dense reference.
"""

import argparse
import math
import statistics
from pathlib import Path

import archive
import study
import verdicts
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from sweep import interval

from jvitmoe.runs import figures

CROWDED = 2.5  # GB; the names of points from here on stand in a column of their own
LINE = 0.35  # points between two names, one above the other
EDGE = 4.0  # points; a larger difference is a number at the edge, so that the small ones can be told apart
EQUAL = 0.2  # points; an ensemble that is so close to the merged model in every seed is not drawn beside it


def main(results: Path, out: Path) -> None:
    """Draws what there is of results/study into a folder; nothing where no arm has three seeds."""
    for name, arms_of in study.EXPERIMENTS.items():
        if not (runs := archive.kept(results / name)):
            continue
        arms = arms_of(results)
        compared = verdicts.comparisons(verdicts.read(runs, arms), arms)
        final = [item for item in compared if "EMA" not in (item.model, item.reference_model)]
        merged = {(item.arm, item.reference): item.paired for item in final if item.model == "merged"}
        repeated = [item for item in final if len(item.paired) >= verdicts.LEAST_SEEDS]
        if shown := [item for item in repeated if item.model != "ensemble" or apart(item, merged)]:
            (out / name).mkdir(parents=True, exist_ok=True)
            figures.save(differences(name, shown), out / name / "differences.png")
    if archive.kept(results / "C"):
        figures.save(bytes_against_accuracy(results), out / "bytes.png")


def apart(item: verdicts.Comparison, merged: dict[tuple[str, str], list[float]]) -> bool:
    """True if the ensemble of an arm differs from its merged model by more than EQUAL points in a seed."""
    pairs = zip(item.paired, merged[item.arm, item.reference], strict=True)
    return any(abs(ensemble - mean) > EQUAL for ensemble, mean in pairs)


@figures.in_style
def differences(name: str, compared: list[verdicts.Comparison]) -> Figure:
    """Returns a row per comparison of an experiment, whiskers from the lower to the upper limit."""
    figure, ((axes,),) = figures.subplots(1, 1, (10, 1.5 + 0.28 * len(compared)))
    for y, item in enumerate(compared):
        mean, (low, high) = statistics.fmean(item.paired), interval(item.paired)
        if abs(mean) > EDGE:
            side = 1 if mean > 0 else -1
            axes.plot(side * EDGE, y, ">" if mean > 0 else "<", color="black")
            text, at = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", (side * EDGE, y)
            where = {"xytext": (-10 * side, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
            axes.annotate(text, at, ha="right" if mean > 0 else "left", **where)
            continue
        ends = [max(low, -EDGE), min(high, EDGE)]
        axes.errorbar(mean, y, xerr=[[mean - ends[0]], [ends[1] - mean]], fmt=figures.MARKS[item.model], color="black")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(-verdicts.PARITY, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(compared)), [f"{item.arm} ({item.model}) - {item.reference}" for item in compared])
    above = sum(interval(item.paired)[0] > 0 for item in compared)
    axes.set(title=f"{name}: {above} of {len(compared)} intervals lie above 0", ylim=(len(compared) - 0.5, -0.5))
    axes.set_xlabel("difference of test accuracies, points\n(an interval right of the dotted line loses nothing)")
    return figure


@figures.in_style
def bytes_against_accuracy(results: Path) -> Figure:
    """Returns accuracy, mean ± sample deviation, against the bytes that a device reduces until the last
    logged step."""
    arms = dict.fromkeys(study.bytes_against_accuracy(), archive.kept(results / "C"))
    if runs := archive.kept(results / "H"):
        inside = [name for name in study.inside(results) if name.startswith(("dense_rate2", "local", "mlp_outer"))]
        arms |= dict.fromkeys(inside, runs)
    figure, ((axes,),) = figures.subplots(1, 1, (9, 5.5))
    points = {}
    for name, runs in arms.items():
        for models in verdicts.read(runs, [name]).values():
            model = verdicts.final(models)
            accuracies = list(models[model].values())
            deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            points[name] = at = study.reduced_bytes(runs, name) / 1e9, statistics.fmean(accuracies)
            axes.errorbar(*at, yerr=deviation, fmt=figures.MARKS[model], color="black")
    column, leaders = 1.25 * max(x for x, _ in points.values()), []
    below: dict[float, float] = {}  # bytes -> height of the lowest name there
    for name, (reduced, accuracy) in sorted(points.items(), key=lambda item: -item[1][1]):
        at = column if reduced >= CROWDED else reduced
        below[at] = min(accuracy, below.get(at, math.inf) - LINE)
        if at == column:
            leaders.append([(reduced, accuracy), (column, below[at])])
        axes.annotate(name, (at, below[at]), (6, 0), textcoords="offset points", fontsize=9, va="center")
    axes.add_collection(LineCollection(leaders, colors="grey", linewidths=0.5, zorder=0))
    axes.set(xlabel="reduced per device until the last logged step, GB", ylabel="test accuracy, %", xscale="log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 10) if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, 2 * high)  # room for the names
    axes.set_title("Accuracy against communication, one expert or one model per device")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    main(options.results, options.results)
