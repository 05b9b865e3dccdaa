"""The figures: curves of runs, and why averaging the experts of a run works or fails."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from jvitmoe import tracking

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

COLOURS = {"merged": "tab:orange", "ensemble": "tab:green", "EMA": "tab:olive"}  # of the bars; experts are blue


def curves(runs: Sequence[Path], path: Path) -> None:
    """Writes one PNG: training loss, and accuracy on the watched split, against the step, one colour per run."""
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run in runs:
        lines = tracking.read_metrics(run / tracking.METRICS)
        train = [line for line in lines if line["kind"] == "train"]
        watched = [line for line in lines if line["kind"] != "train"]
        (curve,) = loss_axes.plot(
            [line["step"] for line in train], [line["loss"] for line in train], label=run.name, linewidth=1.2
        )
        accuracy_axes.plot(
            [line["step"] for line in watched],
            [line["accuracy"] for line in watched],
            label=run.name,
            color=curve.get_color(),
            marker="o",
            markersize=3,
        )
    loss_axes.set(
        title="Training loss of the path that ran", xlabel="step", ylabel="cross-entropy (nats)", yscale="log"
    )
    accuracy_axes.set(title="Accuracy of the dense or merged model", xlabel="step", ylabel="accuracy")
    accuracy_axes.yaxis.set_major_formatter("{x:.0%}")
    _plain(loss_axes, accuracy_axes)
    loss_axes.legend(frameon=False, loc="upper right")
    accuracy_axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def mergeability(result: Mapping[str, Any], path: Path) -> None:
    """Writes one PNG of a run's result.json: spread and layer gap by layer, the loss from experts through their mean to
    experts, and the accuracy of every model tested."""
    why = result["mergeability"]
    figure, (layer_axes, loss_axes, bar_axes) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    layers = range(len(why["spread"]))
    layer_axes.plot(layers, why["spread"], marker="o", label="spread of experts' weights")
    layer_axes.plot(layers, why["gap"], marker="s", label="gap of the layer's output")
    layer_axes.set(title="How far experts are from their mean", xlabel="layer", ylabel="relative to the mean")
    layer_axes.set_ylim(bottom=0)
    layer_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    layer_axes.legend(frameon=False)

    share, losses = why["barrier"]["share"], why["barrier"]["losses"]
    places = [s - 1 for s in share] + [1 - s for s in share[-2::-1]]
    pairs = [(e, (e + 1) % len(losses)) for e in range(len(losses))][: None if len(losses) > 2 else 1]
    for e, f in pairs:
        loss_axes.plot(places, losses[e] + losses[f][-2::-1], linewidth=1.2, label=f"{e} to {f}")
    loss_axes.plot(0, losses[0][-1], "o", color=COLOURS["merged"], markersize=9, zorder=3, label="mean (merged)")
    loss_axes.set(title="Loss from expert to mean to expert", ylabel="cross-entropy (nats)")
    loss_axes.set_xticks([-1, 0, 1], ["expert", "mean", "expert"])
    if len(pairs) <= 8:
        loss_axes.legend(frameon=False)

    rows = result["rows"]
    bar_axes.barh(
        [row["model"] for row in rows],
        [row["accuracy"] for row in rows],
        xerr=[row.get("accuracy_std", 0.0) for row in rows],
        color=[COLOURS.get(row["model"], "tab:blue") for row in rows],
    )
    for place, row in enumerate(rows):
        end = row["accuracy"] + row.get("accuracy_std", 0.0)
        bar_axes.annotate(f"{row['accuracy']:.1%}", (end, place), (4, 0), textcoords="offset points", va="center")
    bar_axes.invert_yaxis()
    bar_axes.margins(x=0.2)
    bar_axes.set(title=f"Accuracy, {result['data']} test split", xlabel="accuracy")
    bar_axes.xaxis.set_major_formatter("{x:.0%}")
    _plain(layer_axes, loss_axes, bar_axes)
    _save(figure, path)


def _plain(*every: Axes) -> None:
    for axes in every:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140)
    plt.close(figure)
