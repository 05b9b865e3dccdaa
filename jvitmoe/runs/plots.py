"""The figures: curves of runs, a comparison of runs, mergeability and confusion of one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from jvitmoe.runs import files, history, results

matplotlib.use("Agg")  # writes files without a display

# The palette of Okabe and Ito, which colour-blind readers can distinguish. Black is the reference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: Any = {
    **{"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "legend.frameon": False, "savefig.dpi": 140},
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "axes.titlesize": 12},
    **{"figure.constrained_layout.use": True, "lines.markersize": 5, "lines.linewidth": 1.4},
}
in_style: Any = plt.rc_context(STYLE)  # used as a decorator
MARKS = {
    **{"dense": ("D", "black"), "EMA": ("v", COLOURS[4]), "merged": ("o", COLOURS[1]), "routed": ("s", COLOURS[3])},
    **{"expert (mean)": ("P", COLOURS[0]), "ensemble": ("^", COLOURS[2])},
}
LEAST_ERROR = 1e-3  # shown instead of an error of 0, which a log scale has not
MOST_CLASSES, MOST_COUNTED = 100, 20  # classes of a confusion matrix that is drawn, and of one with counts in its cells
MOST_SAMPLES = 16  # images of `samples`
POINTS = 60  # most points of a line; more records are averaged


@in_style
def curves(families: Sequence[Mapping[str, Sequence[Path]]], path: Path) -> None:
    """Writes one PNG: training loss and evaluation error against the step. A line is the mean over a group's seeds, its
    band the sample deviation. Each family {group: folders} has a row; small ones share one. All rows have the first
    group."""
    groups = {name: folders for family in families for name, folders in family.items()}
    rows = _rows([list(family) for family in families])
    labels, statistics = _seeds({name: len(folders) for name, folders in groups.items()})
    size = (10, 1 + 2.6 * len(rows))
    figure, grid = plt.subplots(len(rows), 2, squeeze=False, sharex=True, sharey="col", figsize=size)
    kinds, most = set(), 0  # evaluated splits; largest number of records of a line
    for panels, row in zip(grid, rows, strict=True):
        for name, colour in zip(row, ("black", *COLOURS), strict=False):
            runs = [history.read_metrics(folder / files.METRICS) for folder in groups[name]]
            kinds |= {line["kind"] for run in runs for line in run} - {"train"}
            losses = [{line["step"]: line["loss"] for line in run if line["kind"] == "train"} for run in runs]
            errors = [{line["step"]: 1 - line["accuracy"] for line in run if line["kind"] != "train"} for run in runs]
            most = max(most, *map(len, losses + errors))
            _mean_line(panels[0], losses, 0.0, color=colour)
            _mean_line(panels[1], errors, LEAST_ERROR, color=colour, label=labels[name], marker="o", markersize=3)
        panels[0].set_ylabel("cross-entropy, nats")
        panels[1].set_ylabel("error, %")
        panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
    averaged = f"lines averaged to {POINTS} points" if most > POINTS else ""
    figure.suptitle("; ".join(filter(None, (statistics, averaged))), fontsize=11)
    grid[0, 0].set_title("Training loss")
    grid[0, 1].set_title(f"{' and '.join(sorted(kinds))} error".strip().capitalize())
    for column, scale in enumerate((1, 100)):
        grid[-1, column].set_xlabel("step")
        grid[0, column].set_yscale("log")
        plain_ticks(grid[0, column].yaxis, scale)
    save(figure, path)


def _rows(families: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns the names in each row of panels: the first of all, then at most as many others as there are colours."""
    first, most = families[0][0], len(COLOURS)
    rows: list[list[str]] = [[]]
    for family in families:
        others = [name for name in family if name != first]
        for names in (others[start : start + most] for start in range(0, len(others), most)):
            if len(rows[-1]) + len(names) > most:
                rows.append([])
            rows[-1] += names
    return [[first, *row] for row in rows]


def _mean_line(axes: Axes, runs: Sequence[Mapping[int, float]], least: float, **style: Any) -> None:
    """Draws the mean of runs at their common steps, in at most POINTS points, and their deviation as a band."""
    ends, means = history.averaged(runs, POINTS)
    if not ends:
        axes.plot([], [], **style)  # for the legend
        return
    mean = np.maximum(means.mean(0), least)
    axes.plot(ends, mean, **style)
    if len(runs) > 1:
        deviation = means.std(0, ddof=1)
        low = np.maximum(mean - deviation, least)
        axes.fill_between(ends, low, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)


@in_style
def comparison(table: Mapping[str, Mapping[str, Sequence[float]]], images: Mapping[str, int], path: Path) -> None:
    """Writes one PNG of {group: {model: accuracy of each seed}}: a mark per model at its mean error, and one for all
    experts. Whiskers: the deviation over seeds; if all groups have one seed, the standard error over the group's
    `images`."""
    counts = {name: len(next(iter(models.values()))) for name, models in table.items()}
    shown: list[dict[str, Any]] = []
    for models in table.values():
        experts = [values for model, values in models.items() if model.startswith("expert ")]
        every: Any = {**models, "expert (mean)": np.mean(experts, 0)} if experts else models
        shown.append({model: 1 - np.array(every[model]) for model in MARKS if model in every})
    spacing = 0.86 / max(map(len, shown))
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.1 / spacing * len(shown)))
    handles: Any = {}
    for band, (name, errors) in enumerate(zip(table, shown, strict=True)):
        axes.axhspan(band - 0.5, band + 0.5, color="0.95" if band % 2 else "white")
        for number, (model, values) in enumerate(errors.items()):
            marker, colour = MARKS[model]
            error = max(values.mean(), LEAST_ERROR)
            one = (error * (1 - error) / images[name]) ** 0.5 if max(counts.values()) == 1 else 0.0
            whisker = values.std(ddof=1) if len(values) > 1 else one
            y = band + (number - (len(errors) - 1) / 2) * spacing
            limits = [[min(whisker, error - LEAST_ERROR)], [whisker]]
            handles[model] = axes.errorbar(error, y, xerr=limits, fmt=marker, color=colour)
    if "dense" in shown[0]:
        axes.axvline(max(shown[0]["dense"].mean(), LEAST_ERROR), color=MARKS["dense"][1], linewidth=0.8, linestyle=":")
    labels, statistics = _seeds(counts)
    numbers = sorted(set(images.values()))
    counted = f"{' or '.join(f'{number:,}' for number in numbers)} images"
    title = f"Test error, {statistics or f'one seed ± standard error over {counted}'}"
    axes.set(title=title, xlabel="error, % (left is better)", xscale="log", ylim=(len(shown) - 0.5, -0.5))
    axes.set_yticks(range(len(shown)), labels.values())
    axes.grid(axis="y", visible=False)
    plain_ticks(axes.xaxis, 100)
    order = [model for model in MARKS if model in handles]
    figure.legend([handles[model] for model in order], order, loc="outside lower center", ncols=len(order))
    save(figure, path)


@in_style
def mergeability(result: Mapping[str, Any], path: Path) -> None:
    """Writes one PNG of a run's result.json: spread and layer gap by layer, the loss on the lines between experts and
    their mean, and the accuracy of every tested model."""
    why, rows = result["mergeability"], result["rows"]
    size = (13, max(4.0, 1.2 + 0.25 * len(rows)))
    figure, (layer_axes, loss_axes, accuracy_axes) = plt.subplots(1, 3, figsize=size)
    layer_axes.plot(why["layers"], why["spread"], "o-", color=COLOURS[0], label="experts' weights (spread)")
    layer_axes.plot(why["layers"], why["gap"], "s-", color=COLOURS[1], label="layer's output (gap)")
    layer_axes.set(title="Distance of experts from their mean", xlabel="layer", ylabel="distance / size of the mean")
    layer_axes.set_ylim(bottom=0)
    layer_axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    share, losses = why["barrier"]["share"], why["barrier"]["losses"]
    xs = [s - 1 for s in share] + [1 - s for s in share[-2::-1]]
    pairs = [(e, (e + 1) % len(losses)) for e in range(len(losses))][: None if len(losses) > 2 else 1]
    few = len(pairs) <= len(COLOURS)
    for number, (e, f) in enumerate(pairs):
        label = f"{e} to {f}" if few else "_" if number else f"{len(pairs)} pairs"
        loss_axes.plot(xs, losses[e] + losses[f][-2::-1], color=COLOURS[number] if few else "0.5", label=label)
    loss_axes.plot(0, losses[0][-1], "ok", markersize=8, zorder=3, label="mean (merged)")
    loss_axes.set(title="Loss from expert to mean to expert", ylabel="cross-entropy, nats")
    loss_axes.set_xticks([-1, 0, 1], ["expert", "mean", "expert"])

    for y, row in enumerate(rows):
        accuracy, deviation = row["accuracy"], row.get("accuracy_std")
        marker, colour = MARKS.get(row["model"], MARKS["expert (mean)"])
        error = (accuracy * (1 - accuracy) / row["images"]) ** 0.5
        accuracy_axes.errorbar(100 * accuracy, y, xerr=100 * error, fmt=marker, color=colour)
        text = f"{100 * accuracy:.1f}" + (f" ± {100 * deviation:.1f}" if deviation else "")
        at = (100 * accuracy, y)
        accuracy_axes.annotate(text, at, (0, 5), textcoords="offset points", ha="center", fontsize=9)
    accuracy_axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    accuracy_axes.set(title=f"Accuracy, {rows[0]['images']:,} test images", ylim=(len(rows) - 0.5, -0.7))
    accuracy_axes.set_xlabel("accuracy, %\n(bar: standard error; ±: over paths)")
    for axes, columns in ((layer_axes, 1), (loss_axes, 3)):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=10, ncols=columns)
    save(figure, path)


@in_style
def confusion(result: Mapping[str, Any], workdir: Path) -> bool:
    """Writes confusion.png of the dense or merged model of a run: a row is the share of the images of a class by
    predicted class; for up to 20 classes, cells hold the counts. Returns False, and writes nothing, if the matrix was
    not counted or has more than 100 classes."""
    row = next((row for row in result["rows"] if 0 < len(row.get("confusion", ())) <= MOST_CLASSES), None)
    if row is None:
        return False
    counts_CC = np.array(row["confusion"])
    classes, counted = len(counts_CC), len(counts_CC) <= MOST_COUNTED
    names = _axis_names(results.class_names(workdir, classes))
    share_CC = 100 * counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    side, size = (0.5, 9) if counted else (0.14, 7)  # of a cell, inches; of its text, points
    figure, axes = plt.subplots(figsize=(max(side * classes, 3) + 2.5, max(side * classes, 3) + 1.5))
    colours = LinearSegmentedColormap.from_list("confusion", ["white", COLOURS[0]])
    # On a linear scale the errors of a good model, a few per cent, would look white.
    picture = axes.imshow(share_CC, cmap=colours, norm=PowerNorm(0.5, 0, 100))
    for label, predicted in zip(*np.nonzero(counts_CC), strict=True) if counted else ():
        ink = "white" if share_CC[label, predicted] > 40 else "black"
        text = str(counts_CC[label, predicted])
        axes.text(predicted, label, text, color=ink, fontsize=size, ha="center", va="center")
    upright = max(map(len, names)) > 3
    style: Any = {"fontsize": size, "parse_math": False}
    axes.set_xticks(range(classes), names, rotation=90 if upright or not counted else 0, **style)
    axes.set_yticks(range(classes), names, **style)
    axes.grid(visible=False)
    title = f"{row['model']}: {row['images']:,} test images, {100 * row['accuracy']:.1f} % right"
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    figure.colorbar(picture, label="share of the true class, %", ticks=[0, 1, 5, 10, 25, 50, 100], shrink=0.8)
    save(figure, workdir / files.CONFUSION)
    return True


@in_style
def samples(
    images_NHWc: np.ndarray, labels_N: np.ndarray, probabilities_NC: np.ndarray, names: Sequence[str], path: Path
) -> None:
    """Writes one PNG of up to 16 images, each with its predicted class, and its true class if that differs."""
    count = min(len(labels_N), MOST_SAMPLES)
    columns = min(count, 8)
    rows = -(-count // columns)
    names = _axis_names(names)
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=(1.35 * columns, 1.75 * rows))
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image_HWc, label, share_C in zip(grid.flat, images_NHWc, labels_N, probabilities_NC, strict=False):
        axes.imshow(image_HWc.squeeze(), cmap="gray", vmin=0, vmax=255)
        predicted = int(share_C.argmax())
        is_right = predicted == label
        text = f"{names[predicted]} {share_C[predicted]:.0%}" + ("" if is_right else f"\nnot {names[label]}")
        axes.set_title(text, fontsize=9, color="black" if is_right else COLOURS[1], parse_math=False)
    save(figure, path)


def _axis_names(names: Sequence[str]) -> list[str]:
    """Returns the names, cut to 20 characters; a number for a name with characters that the font does not have."""
    glyphs = get_font(findfont(FontProperties()))
    known = (name if all(map(glyphs.get_char_index, map(ord, name))) else str(n) for n, name in enumerate(names))
    return [name if len(name) <= 20 else f"{name[:19]}…" for name in known]


def _seeds(counts: Mapping[str, int]) -> tuple[dict[str, str], str]:
    """Returns the label of each group and the name of the statistics, "" for one seed. One of them holds n."""
    one, *more = sorted(set(counts.values()))
    labels = {name: f"{name} (n = {n})" if more else name for name, n in counts.items()}
    return labels, f"mean ± sample deviation over {'n' if more else one} seeds" if more or one > 1 else ""


def plain_ticks(axis: Axis, scale: float = 1) -> None:
    """Gives a logarithmic axis several ticks, whatever its range, as plain decimals of value * scale."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 6)
    axis.set_major_locator(LogLocator(subs=subs) if high > 4 * low else MaxNLocator(8, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(lambda value, _: f"{scale * value:g}")
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path) -> None:
    """Writes the figure and forgets it. Raises UserError where it cannot be written."""
    with files.writing(path):
        figure.savefig(path)
    plt.close(figure)
