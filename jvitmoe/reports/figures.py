"""The style of all figures, and those of several runs: their curves and a comparison. `run_figures` has those of one.

A function returns a figure, or None if it would show nothing. `save` writes it, and `report --html` embeds the same
PNG. In `curves` and `comparison` a colour is a run and a mark a model.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from jvitmoe.reports.page import Picture
from jvitmoe.runs import safe_io

# The palette of Okabe and Ito, which colour-blind readers can distinguish. Black is the reference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Latin, Greek, Cyrillic and more; no CJK
STYLE: Any = {
    **{"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "legend.frameon": False, "savefig.dpi": 140},
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "axes.titlesize": 12},
    **{"figure.constrained_layout.use": True, "lines.markersize": 5, "lines.linewidth": 1.4},
    # Names are no formulas, and a tick shows its whole value: no offset, no power of ten.
    **{"text.parse_math": False, "axes.formatter.useoffset": False, "axes.formatter.limits": (-9, 9)},
    **{"font.family": "DejaVu Sans", "backend": "Agg"},
}
in_style: Any = matplotlib.rc_context(STYLE)  # used as a decorator
SEVERAL = "Several data sets: their errors cannot be compared"
MARKS = {"dense": "D", "EMA": "v", "merged": "o", "routed": "s", "expert (mean)": "P", "ensemble": "^"}
LEAST = 1e-3  # shown instead of an error or a loss of 0, which a log scale has not
POINTS = 60  # most points of a line; more records are averaged


def shown(name: str, most: int = 40) -> str:
    """Returns a name as pictures show it: characters that the font lacks, such as CJK and line breaks, as Python
    escapes, and a long name cut in the middle."""
    glyphs = get_font(FONT)
    text = "".join(c if glyphs.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in name)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """Returns a figure of `size` inches and its axes [rows, columns]."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@in_style
def png(figure: Figure) -> bytes:
    """Returns the picture in its file's form."""
    figure.savefig(out := io.BytesIO(), format="png")
    return out.getvalue()


def picture(name: str, figure: Figure) -> Picture:
    """Returns a figure for a report; its titles say the finding."""
    titles = [figure.get_suptitle()] if figure.get_suptitle() else [axes.get_title() for axes in figure.axes]
    return Picture(name, png(figure), "; ".join(filter(None, titles)).replace("\n", "; "))


def save(figure: Figure, path: Path) -> None:
    """Writes the picture. Raises UserError where it cannot be written."""
    safe_io.write_bytes(path, png(figure))


@in_style
def curves(groups: Mapping[str, Sequence[Path]], ranked: bool = True) -> Figure | None:
    """Returns training loss and evaluation error of {group: folders} against the step, and None if no run recorded two
    of one. A line is the mean over a group's seeds, its band the sample deviation. A row of panels has the first group
    and at most six others. `ranked` is False for groups of several data sets: the title then names no best one."""
    runs = {name: [safe_io.read_metrics(folder / safe_io.METRICS) for folder in groups[name]] for name in groups}
    splits = sorted({line["kind"] for several in runs.values() for run in several for line in run} - {"train"})
    losses, errors = (
        {name: [_series(run, training) for run in several] for name, several in runs.items()}
        for training in (True, False)
    )
    panels: list[tuple[str, str, int, dict[str, Any], dict[str, list[dict[int, float]]]]] = [
        ("Training loss", "loss, nats", 1, {}, losses),
        (f"{' and '.join(splits)} error".capitalize(), "error, %", 100, {"marker": "o", "markersize": 3}, errors),
    ]
    lengths = [max(len(series) for several in found.values() for series in several) for *_, found in panels]
    panels = [panel for panel, length in zip(panels, lengths, strict=True) if length > 1]
    if not panels:
        return None
    names, most = list(groups), len(COLOURS)
    rows = [[names[0], *names[start : start + most]] for start in range(1, max(len(names), 2), most)]
    labels, statistics = _seeds({name: len(folders) for name, folders in groups.items()})
    size = (2.2 + 4 * len(panels), 1 + 2.6 * len(rows))
    figure, grid = subplots(len(rows), len(panels), size, sharex=True, sharey="col")
    for column, (title, label, scale, style, found) in zip(grid.T, panels, strict=True):
        for axes, row in zip(column, rows, strict=True):
            lines = [_mean_line(axes, found[name], color=_colour(names, name), **style) for name in row]
            axes.set_ylabel(label)
            if axes in grid[:, -1]:
                place: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 10}
                axes.legend(lines, [labels[name] for name in row], **place)
        column[0].set(title=title, yscale="log")
        column[-1].set_xlabel("step")
        plain_ticks(column[0].yaxis, scale)
    title, _, scale, _, found = panels[-1]
    ends = {name: np.mean([s[max(s)] for s in several if s]) for name, several in found.items() if any(several)}
    best = min(ends, key=lambda name: ends[name])
    lowest = f"Lowest {title.lower()} at the end: {scale * ends[best]:.3g}{' %' * (scale > 1)}\n{shown(best)}"
    finding = lowest if ranked else SEVERAL
    averaged = f"lines averaged to {POINTS} points" if max(lengths) > POINTS else ""
    figure.suptitle("\n".join(filter(None, (finding, statistics, averaged))), fontsize=11)
    return figure


def _series(run: Iterable[Mapping[str, Any]], training: bool) -> dict[int, float]:
    """Returns step -> training loss or evaluation error of a history, without those that are not finite."""
    values = {
        line["step"]: line.get("loss") if training else None if line.get("accuracy") is None else 1 - line["accuracy"]
        for line in run
        if (line["kind"] == "train") == training
    }
    return {step: max(value, LEAST) for step, value in values.items() if value is not None}


def _mean_line(axes: Axes, runs: Sequence[Mapping[int, float]], **style: Any) -> Any:
    """Draws the mean of runs at their common steps, and their deviation as a band. Of more than POINTS steps it draws
    averages, each at its last step. Returns the line."""
    steps = sorted(set.intersection(*map(set, runs)))
    parts = [part for part in np.array_split(steps, POINTS) if len(part)]
    ends = [part[-1] for part in parts]
    means = np.array([[np.mean([run[step] for step in part]) for part in parts] for run in runs])
    mean = means.mean(0)
    if len(runs) > 1 and ends:
        deviation = means.std(0, ddof=1)
        low = np.maximum(mean - deviation, LEAST)
        axes.fill_between(ends, low, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
    return axes.plot(ends, mean, **style)[0]


def _colour(names: Sequence[str], name: str) -> str:
    """Returns the colour of a run among others: black for the first."""
    number = names.index(name)
    return COLOURS[(number - 1) % len(COLOURS)] if number else "black"


@in_style
def comparison(
    table: Mapping[str, Mapping[str, Sequence[float]]], images: Mapping[str, int], ranked: bool = True
) -> Figure:
    """Returns a figure of {group: {model: accuracy of each seed}}: a mark per model at its mean error, and one for all
    experts. Whiskers: the deviation over seeds; if all groups have one seed, the standard error over the group's
    `images`. On `ranked` see `curves`."""
    counts = {name: len(next(iter(models.values()))) for name, models in table.items()}
    errors: list[dict[str, Any]] = []
    for models in table.values():
        experts = [values for model, values in models.items() if model.startswith("expert ")]
        every: Any = {**models, "expert (mean)": np.mean(experts, 0)} if experts else models
        errors.append({model: 1 - np.array(every[model]) for model in MARKS if model in every})
    spacing = 0.86 / max(map(len, errors))
    figure, ((axes,),) = subplots(1, 1, (9, 1.6 + 0.1 / spacing * len(table)))
    for band, (name, by_model) in enumerate(zip(table, errors, strict=True)):
        axes.axhspan(band - 0.5, band + 0.5, color="0.95" if band % 2 else "white")
        for number, (model, values) in enumerate(by_model.items()):
            error = max(values.mean(), LEAST)
            one = (error * (1 - error) / images[name]) ** 0.5 if max(counts.values()) == 1 else 0.0
            whisker = values.std(ddof=1) if len(values) > 1 else one
            y = band + (number - (len(by_model) - 1) / 2) * spacing
            limits = [[min(whisker, error - LEAST)], [whisker]]
            axes.errorbar(error, y, xerr=limits, fmt=MARKS[model], color=_colour(list(table), name))
    if ranked and "dense" in errors[0]:
        axes.axvline(max(errors[0]["dense"].mean(), LEAST), color="black", linewidth=0.8, linestyle=":")
    labels, statistics = _seeds(counts)
    counted = " or ".join(f"{number:,}" for number in sorted(set(images.values())))
    means = [(v.mean(), name, model) for name, e in zip(table, errors, strict=True) for model, v in e.items()]
    best, name, model = min(means, key=lambda item: item[0])
    spread = statistics or f"one seed ± standard error over {counted} images"
    finding = f"Lowest test error: {100 * best:.2f} %, {shown(name)}, {model}" if ranked else SEVERAL
    figure.suptitle(f"{finding}\n{spread}", fontsize=12)
    axes.set(xlabel="test error, % (left is better)", xscale="log", ylim=(len(table) - 0.5, -0.5))
    axes.set_yticks(range(len(table)), labels.values())
    axes.grid(axis="y", visible=False)
    plain_ticks(axes.xaxis, 100)
    used = [model for model in MARKS if any(model in by_model for by_model in errors)]
    handles = [axes.plot([], [], MARKS[model], color="0.4")[0] for model in used]
    figure.legend(handles, used, loc="outside lower center", ncols=len(used))
    return figure


def _seeds(counts: Mapping[str, int]) -> tuple[dict[str, str], str]:
    """Returns the label of each group and the name of the statistics, "" for one seed. One of them holds n."""
    one, *more = sorted(set(counts.values()))
    labels = {name: f"{shown(name)} (n = {n})" if more else shown(name) for name, n in counts.items()}
    return labels, f"mean ± sample deviation over {'n' if more else one} seeds" if more or one > 1 else ""


def plain_ticks(axis: Axis, scale: float = 1) -> None:
    """Gives a logarithmic axis several ticks, whatever its range, as plain decimals of value * scale."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 6)
    axis.set_major_locator(LogLocator(subs=subs) if high > 4 * low else MaxNLocator(8, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(lambda value, _: np.format_float_positional(scale * value, 9, fractional=False, trim="-"))
    axis.set_minor_locator(NullLocator())
