"""The figures: curves of runs, and why averaging the experts of a run works or fails."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from jvitmoe import tracking

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

COLOURS = {"merged": "tab:orange", "ensemble": "tab:green", "EMA": "tab:olive"}  # of the bars; experts are blue
LEAST_ERROR = 1e-3  # what a log scale shows for none
MARKS = {
    **{"dense": ("D", "black"), "merged": ("o", COLOURS["merged"]), "routed": ("s", "tab:purple")},
    **{"expert (mean)": ("x", "tab:blue"), "ensemble": ("^", COLOURS["ensemble"]), "EMA": ("v", COLOURS["EMA"])},
}


def curves(groups: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Writes one PNG: training loss, and accuracy on the watched split, against the step. One colour per group of runs,
    and one legend beside the two where there are many."""
    few = len(groups) <= 10
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = plt.get_cmap("tab10" if few else "turbo")
    for number, (name, runs) in enumerate(groups.items()):
        colour = colours(number if few else number / (len(groups) - 1))
        for place, run in enumerate(runs):
            lines = tracking.read_metrics(run / tracking.METRICS)
            train = [line for line in lines if line["kind"] == "train"]
            watched = [line for line in lines if line["kind"] != "train"]
            style = {"color": colour, "linewidth": 1.2, "label": "_" if place else name}
            loss_axes.plot([line["step"] for line in train], [line["loss"] for line in train], **style)
            steps, accuracies = [line["step"] for line in watched], [line["accuracy"] for line in watched]
            accuracy_axes.plot(steps, accuracies, marker="o", markersize=3, **style)
    loss_axes.set(
        title="Training loss of the path that ran", xlabel="step", ylabel="cross-entropy (nats)", yscale="log"
    )
    accuracy_axes.set(title="Accuracy of the dense, merged or routed model", xlabel="step", ylabel="accuracy")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _plain(loss_axes, accuracy_axes)
    if few:
        loss_axes.legend(frameon=False, loc="upper right")
        accuracy_axes.legend(frameon=False, loc="lower right")
    else:
        figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    _save(figure, path)


def comparison(table: Mapping[str, Mapping[str, tuple[float, float]]], path: Path) -> None:
    """Writes one PNG of {run: {model: (accuracy, deviation)}}: a line per run with a mark per model at its error;
    experts are one mark, at their mean."""
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(table)), layout="constrained")
    marks: dict[str, list[tuple[float, float, int]]] = {}
    for place, models in enumerate(table.values()):
        experts = [accuracy for model, (accuracy, _) in models.items() if model.startswith("expert ")]
        shown = {name: models[name] for name in models if name in MARKS}
        if experts:
            shown["expert (mean)"] = (sum(experts) / len(experts), 0.0)
        for model, (accuracy, deviation) in shown.items():
            marks.setdefault(model, []).append((accuracy, deviation, place))
    for model, (marker, colour) in MARKS.items():
        if model in marks:
            accuracies, deviations, places = zip(*marks[model], strict=True)
            errors = [max(1 - accuracy, LEAST_ERROR) for accuracy in accuracies]
            axes.errorbar(errors, places, xerr=deviations, fmt=marker, color=colour, markersize=6, label=model)
    axes.set_yticks(range(len(table)), table)
    axes.invert_yaxis()
    axes.set(title="Test error, mean and deviation over seeds", xlabel="error (left is better)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))  # some of them in any range
    axes.xaxis.set_major_formatter(lambda error, _: f"{100 * error:g}%")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _plain(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def mergeability(result: Mapping[str, Any], path: Path) -> None:
    """Writes one PNG of a run's result.json: spread and layer gap by layer, the loss from experts through their mean to
    experts, and the accuracy of every model tested."""
    why = result["mergeability"]
    figure, (layer_axes, loss_axes, bar_axes) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    layers = why["layers"]
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


def throughput(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes one PNG of a benchmark's rows: a bar of images per second for each model and dtype."""
    dtypes, models = (list(dict.fromkeys(row[name] for row in rows)) for name in ("dtype", "model"))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(models) * len(dtypes)), layout="constrained")
    height = 0.8 / len(dtypes)
    for number, dtype in enumerate(dtypes):
        shown = [row for row in rows if row["dtype"] == dtype]
        places = [models.index(row["model"]) + (number - (len(dtypes) - 1) / 2) * height for row in shown]
        rates = [row["images_per_second"] for row in shown]
        errors = [row["images_per_second"] * row["spread"] / 2 for row in shown]
        axes.barh(places, rates, height, xerr=errors, label=dtype, error_kw={"elinewidth": 0.8})
        for row, place, rate, error in zip(shown, places, rates, errors, strict=True):
            text = f"{rate:,.0f}" + (f"  ({row['times_dense']:.2f} of dense)" if "times_dense" in row else "")
            axes.annotate(text, (rate + error, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(title="Training, images per second", xlabel="images/s (right is better); in brackets the time of a step")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)  # beside the title, off the bars
    _plain(axes)
    _save(figure, path)


def _plain(*every: Axes) -> None:
    for axes in every:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140)
    plt.close(figure)
