"""The figures of one run: mergeability, confusion, what its router does, and test images with their predicted classes;
and those of a mean of models."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jvitmoe.reports import results
from jvitmoe.reports.figures import COLOURS, MARKS, in_style, shown, subplots
from jvitmoe.runs import safe_io

LEAST_RISE = 5e-5  # nats of a barrier that is shown as a number
LEAST_RANGE = 0.05  # of an axis, relative to its values: one that shows less would make mountains of rounding errors
MOST_CLASSES, MOST_COUNTED = 100, 20  # classes of a confusion matrix that is drawn, and of one with counts in its cells
TITLES = {
    safe_io.EXPERTS: "The expert of each patch: one colour an expert; white: no expert took it",
    safe_io.SAMPLES: "What the model says of some test images; red: wrong",
    safe_io.MISTAKES: "The test images with the highest loss, and where the model looked (attention rollout)",
}
SAMPLES, MISTAKES, GUESSES = 5, 3, 3  # pictures in a row of samples, of mistakes, and guesses told of each
Cell = tuple[np.ndarray, str, Sequence[tuple[str, float]]]  # pixels [H, W, c], class, (name, probability), best first


def of_run(result: Mapping[str, Any], workdir: Path) -> dict[str, Figure]:
    """Returns file name -> figure of the result of a run: its mergeability, unless experts are equal,
    and a confusion matrix."""
    tells = "mergeability" in result and not results.are_equal(result)
    drawn = {safe_io.MERGEABILITY: mergeability(result)} if tells else {}
    for row in result["rows"]:
        if figure := confusion(row, results.class_names(workdir, len(row.get("confusion", ())))):
            drawn[safe_io.CONFUSION] = figure
    return drawn


@in_style
def mergeability(result: Mapping[str, Any]) -> Figure:
    """Returns a figure of a run's result.json: spread and layer gap by layer, the loss on the lines between experts and
    their mean, and the accuracy of every tested model."""
    why, rows = result["mergeability"], result["rows"]
    figure, ((layer_axes, loss_axes, accuracy_axes),) = subplots(1, 3, (13, max(4.0, 1.2 + 0.25 * len(rows))))
    layer_axes.plot(why["layers"], why["spread"], "o-", color="black", label="experts' weights (spread)")
    layer_axes.plot(why["layers"], why["gap"], "s:", color="black", label="layer's output (gap)")
    layer_axes.set(title="Distance of experts from their mean", xlabel="layer", ylabel="distance / size of the mean")
    top = max(layer_axes.get_ylim()[1], LEAST_RANGE)
    layer_axes.set_ylim(-0.04 * top, top)
    layer_axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    share, losses = why["barrier"]["share"], why["barrier"]["losses"]
    xs = [s - 1 for s in share] + [1 - s for s in share[-2::-1]]
    pairs = [(e, (e + 1) % len(losses)) for e in range(len(losses))][: None if len(losses) > 2 else 1]
    for number, (e, f) in enumerate(pairs):
        label = "_" if number else "from an expert to the next"
        loss_axes.plot(xs, losses[e] + losses[f][-2::-1], color="0.5", label=label)
    loss_axes.plot(0, losses[0][-1], "ok", markersize=8, zorder=3, label="mean (merged)")
    height = why["barrier"]["height"]
    rise = f"rises by {height:.4f} nats" if height >= LEAST_RISE else "no rise"
    loss_axes.set(title=f"Loss from expert to mean: {rise}", ylabel="loss, nats")
    loss_axes.set_xticks([-1, 0, 1], ["expert", "mean", "expert"])
    low, high = loss_axes.get_ylim()
    missing = max(0.0, LEAST_RANGE * high - (high - low))
    loss_axes.set_ylim(low - missing / 2, high + missing / 2)

    for y, row in enumerate(rows):
        accuracy, deviation = row["accuracy"], row.get("accuracy_std")
        error = (accuracy * (1 - accuracy) / row["images"]) ** 0.5
        mark = MARKS.get(row["model"], MARKS["expert (mean)"])
        accuracy_axes.errorbar(at := 100 * accuracy, y, xerr=100 * error, fmt=mark, color="black")
        text = f"{at:.1f}" + (f" ± {100 * deviation:.1f}" if deviation else "")
        accuracy_axes.annotate(text, (at, y), (0, 5), textcoords="offset points", ha="center", fontsize=9)
    accuracy_axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    accuracy_axes.set(title=f"Accuracy, {rows[0]['images']:,} test images", ylim=(len(rows) - 0.5, -0.7))
    accuracy_axes.set_xlabel("accuracy, %\n(bar: standard error; ±: over paths)")
    for axes in (layer_axes, loss_axes):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=10)
    return figure


@in_style
def average(measured: Any, classes: Sequence[str]) -> Figure:
    """Returns a figure of `averaging.Measured`: the accuracy of start, models, mean and ensemble; the way from them to
    the mean; and for few classes the accuracy of each."""
    rows, by_class_MC = measured.rows, measured.by_class_MC
    names_C = classes or range(by_class_MC.shape[1])
    has_classes = len(names_C) <= MOST_COUNTED
    figure, ((models_axes, way_axes, *more),) = subplots(
        1, 2 + has_classes, (9.5 + has_classes * (1.8 + 0.28 * len(names_C)), max(4.0, 1.6 + 0.32 * len(rows)))
    )
    names = [shown(row["model"], 24) for row in rows]
    for y, row in enumerate(rows):
        is_mean = row is rows[-2]
        style: Any = {"color": COLOURS[0] if is_mean else "black", "fmt": "o" if is_mean else "D"}
        at = 100 * row["accuracy"]
        if "low" in row:  # the interval of the mean minus this model
            middle = 100 * rows[-2]["accuracy"]
            models_axes.plot([middle - row["high"], middle - row["low"]], [y, y], color="0.6", linewidth=3)
        models_axes.errorbar(at, y, **style)
        models_axes.annotate(f"{at:.1f}", (at, y), (0, 6), textcoords="offset points", ha="center", fontsize=9)
        if is_mean:
            models_axes.axvline(at, color=COLOURS[0], linewidth=0.8, linestyle=":")
    models_axes.set_yticks(range(len(rows)), names)
    models_axes.set(title="Accuracy on the pictures", ylim=(len(rows) - 0.5, -0.7))
    models_axes.set_xlabel("accuracy, %\n(grey: where the model may lie against the mean, 95 %)")

    x = np.linspace(0, 1, len(next(iter(measured.losses.values()))))
    for name, values in measured.losses.items():
        is_start = name == rows[0]["model"] and bool(measured.way)
        way_axes.plot(x, values, "o-" if is_start else "-", color="black" if is_start else "0.6")
        for at, value, accuracy in zip(x, values, measured.way, strict=False) if is_start else ():
            way_axes.annotate(f"{accuracy:.0%}", (at, value), (3, 4), textcoords="offset points", fontsize=9)
    way_axes.plot([], [], "-", color="0.6", label="from a model")
    if measured.way:
        way_axes.plot([], [], "o-", color="black", label="from the start, with accuracies")
    way_axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=10)
    way_axes.set(title="Loss on the straight way to the mean", ylabel="loss, nats")
    way_axes.set_xticks([0, 0.5, 1], ["model", "half", "mean"])
    for axes in more:
        axes.imshow(100 * by_class_MC, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for y, x_C in enumerate(100 * by_class_MC):
            for c, value in enumerate(x_C):
                if np.isfinite(value):
                    axes.text(c, y, f"{value:.0f}", ha="center", va="center", color="w" if value > 60 else "k", size=8)
        axes.set_xticks(range(len(names_C)), [shown(str(name), 14) for name in names_C], rotation=60, ha="right")
        axes.set_yticks(range(len(rows)), names)
        axes.set_title("Accuracy by class, %")
        axes.grid(visible=False)
    figure.suptitle("\n".join(textwrap.wrap(measured.verdict, 110)), fontsize=11)
    return figure


@in_style
def confusion(row: Mapping[str, Any], classes: Sequence[str]) -> Figure | None:
    """Returns a figure of the matrix in a row of result.json: a row is the share of the images of a class by predicted
    class; for up to 20 classes, cells hold the counts. None if the matrix was not counted or has more than 100 classes.
    """
    counts_CC = np.array(row.get("confusion") or ())
    if not 0 < len(counts_CC) <= MOST_CLASSES:
        return None
    count, counted, names = len(counts_CC), len(counts_CC) <= MOST_COUNTED, [shown(name, 20) for name in classes]
    share_CC = 100 * counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    side, size = (0.5, 9) if counted else (0.14, 7)  # of a cell, inches; of its text, points
    figure, ((axes,),) = subplots(1, 1, (max(side * count, 3) + 2.5, max(side * count, 3) + 1.5))
    colours = LinearSegmentedColormap.from_list("confusion", ["white", "0.15"])
    # On a linear scale the errors of a good model, a few per cent, would look white.
    picture = axes.imshow(share_CC, cmap=colours, norm=PowerNorm(0.5, 0, 100))
    for label, predicted in zip(*np.nonzero(counts_CC), strict=True) if counted else ():
        ink = "white" if share_CC[label, predicted] > 40 else "black"
        text = str(counts_CC[label, predicted])
        axes.text(predicted, label, text, color=ink, fontsize=size, ha="center", va="center")
    upright = max(map(len, names)) > 3 or not counted
    axes.set_xticks(range(count), names, rotation=90 if upright else 0, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.grid(visible=False)
    title = f"{row['model']}: {row['images']:,} test images, {100 * row['accuracy']:.1f} % right"
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    figure.colorbar(picture, label="share of the true class, %", ticks=[0, 1, 5, 10, 25, 50, 100], shrink=0.8)
    return figure


@in_style
def experts(
    routes: Any, pictures: Sequence[tuple[np.ndarray, str, np.ndarray]], layers: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Returns a figure of what a router does (`evaluation.expert_maps.Routes`). A row is a layer: the expert of each
    patch of some pictures, the load of the experts, and their shares of each class.

    Args:
        pictures: of each, its pixels [H, W, c], its class, and expert_XP.
        layers: indices of the layers with experts.
        classes: names, drawn for up to 20.
    """
    count = routes.load_XE.shape[1]
    more = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))[:, :3]  # no two experts have one colour
    palette = np.array([*([to_rgb(c) for c in COLOURS[:count]] if count <= len(COLOURS) else more), to_rgb("white")])
    columns = len(pictures) + 2
    size = 1.25 * len(pictures) + 5, 1.25 * (len(layers) + 1) + 0.6
    figure, grid = subplots(len(layers) + 1, columns, size, width_ratios=[1.0] * len(pictures) + [1.4, 1.8])
    for axes in grid.flat:
        axes.grid(visible=False)
        axes.set(xticks=[], yticks=[])
    for axes in grid[0, -2:]:
        axes.axis("off")
    for column, (pixels_HWc, name, expert_XP) in enumerate(pictures):
        grey = pixels_HWc.mean(-1) if pixels_HWc.shape[-1] == 3 else pixels_HWc[..., 0]
        grid[0, column].imshow(pixels_HWc if pixels_HWc.shape[-1] == 3 else grey, cmap="gray")
        grid[0, column].set_title(shown(name, 14), fontsize=9)
        side, high = math.isqrt(expert_XP.shape[1]), pixels_HWc.shape[0]
        for row, expert_P in enumerate(expert_XP, 1):
            colours = palette[expert_P.reshape(side, side)].repeat(high // side, 0).repeat(high // side, 1)
            # The picture shows through, so that a reader sees what an expert took.
            grid[row, column].imshow(0.65 * colours + 0.35 * grey[..., None] / 255)
    for row, layer in enumerate(layers, 1):
        grid[row, 0].set_ylabel(f"layer {layer}", fontsize=9)
        load_axes, class_axes = grid[row, -2:]
        load_axes.bar(range(count), 100 * routes.load_XE[row - 1], color=palette[:count])
        load_axes.axhline(100 / count, color="black", linewidth=0.8)
        load_axes.set_yticks([0, round(100 / count)])
        load_axes.tick_params(labelsize=8)
        left = np.zeros(len(classes))
        for expert in range(count):
            share_C = 100 * routes.of_class_XCE[row - 1, :, expert]
            class_axes.barh(range(len(classes)), share_C, left=left, color=palette[expert])
            left = left + share_C
        class_axes.invert_yaxis()
        if len(classes) <= MOST_COUNTED:
            class_axes.set_yticks(range(len(classes)), [shown(name, 12) for name in classes], fontsize=6)
            class_axes.yaxis.tick_right()
    grid[1, -2].set_title("load, %", fontsize=9)
    grid[1, -1].set_title("experts of a class", fontsize=9)
    figure.suptitle(TITLES[safe_io.EXPERTS], fontsize=11)
    return figure


@in_style
def samples(cells: Sequence[Cell]) -> Figure:
    """Returns a figure of pictures. The text is red where the best guess is wrong."""
    columns = min(len(cells), SAMPLES)
    rows = math.ceil(len(cells) / columns)
    figure, grid = subplots(rows, columns, (2.2 * columns, 3 * rows))
    for axes in grid.flat:
        axes.axis("off")
    for axes, cell in zip(grid.flat, cells, strict=False):
        _show(axes, *cell)
    figure.suptitle(TITLES[safe_io.SAMPLES], fontsize=11)
    return figure


@in_style
def mistakes(cells: Sequence[Cell], rollout_KP: np.ndarray) -> Figure:
    """Returns a figure of the pictures of `cells`, as `samples` has them, each beside its `vit.rollout` over it."""
    columns = min(len(cells), MISTAKES)
    rows = math.ceil(len(cells) / columns)
    figure, grid = subplots(rows, 2 * columns, (4.4 * columns, 3 * rows))
    for axes in grid.flat:
        axes.axis("off")
    for left, right, cell, share_P in zip(grid.flat[::2], grid.flat[1::2], cells, rollout_KP, strict=False):
        _show(left, *cell)
        _show(right, cell[0], "", [])
        side, extent = math.isqrt(len(share_P)), (-0.5, cell[0].shape[1] - 0.5, cell[0].shape[0] - 0.5, -0.5)
        right.imshow(share_P.reshape(side, side), "inferno", alpha=0.6, extent=extent, interpolation="bilinear")
    figure.suptitle(TITLES[safe_io.MISTAKES], fontsize=11)
    return figure


def _show(axes: Axes, pixels_HWc: np.ndarray, name: str, guesses: Sequence[tuple[str, float]]) -> None:
    """Draws a picture and, above it, its class and the guesses, in red where the best is wrong."""
    axes.imshow(pixels_HWc if pixels_HWc.shape[-1] > 2 else pixels_HWc[..., 0], cmap="gray", vmin=0, vmax=255)
    if guesses:
        lines = [f"true: {shown(name, 20)}", *(f"{shown(name, 16)} {share:.1%}" for name, share in guesses[:GUESSES])]
        axes.set_title("\n".join(lines), fontsize=9, color="black" if guesses[0][0] == name else "#b00020")
