"""One page of HTML about many runs, with everything in it: no network, no other files.

Charts are Vega-Lite's, written with Altair, whose scripts are put into the page. The table and the choices are the
page's own few lines of JavaScript (page.html).
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvitmoe.errors import UserError
from jvitmoe.runs import files, history, results

try:
    import altair as alt
    import vl_convert
except ImportError as error:
    raise UserError("--html and --serve need Altair; install it with pip install 'jvitmoe[html]'") from error

TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 100  # most points of a line
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d", "#eeca3b", "#72b7b2", "#ff9da6", "#79706e")
FIRST_SHOWN = 6  # lines that a page opens with
HEIGHT = 260  # of a chart, pixels
PICTURES = {"samples": files.SAMPLES}  # of a run folder, shown as they are


class GroupOnPage(NamedTuple):
    """A group of runs that differ in their seed."""

    name: str
    cells: Sequence[Mapping[str, str]]  # of the table, a row per model
    folders: Sequence[Path]
    config: Mapping[str, Any]
    result: Mapping[str, Any]  # of its first seed


def text(opening: str, groups: Sequence[GroupOnPage], stamp: str = "") -> str:
    """Returns the page.

    Args:
        stamp: of the runs, for a page that is served and loads itself again when that changes (runs/serve.py).
    """
    names = [group.name for group in groups]
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    data = {
        "stamp": stamp,
        "names": names,
        "colours": colours,
        "shown": names[:FIRST_SHOWN],
        "rows": [{k: v for k, v in row.items() if k != "hardware"} for group in groups for row in group.cells],
        "configs": {group.name: {field: str(value) for field, value in group.config.items()} for group in groups},
        "charts": {title: _curves(title, groups, colours) for title in ("training loss", "accuracy")},
        "details": {group.name: _details(group) for group in groups},
    }
    inside = json.dumps(_finite(data)).replace("<", "\\u003c")  # neither ends the script element nor begins a comment
    page = TEMPLATE.read_text()
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    for mark, value in (
        ("{{opening}}", _escape(opening)),
        ("{{vega}}", vl_convert.javascript_bundle(vl_version=version)),  # type: ignore[call-arg]
        ("{{data}}", inside),
    ):
        page = page.replace(mark, value)
    return page


def _curves(title: str, groups: Sequence[GroupOnPage], colours: Mapping[str, str]) -> dict[str, Any]:
    """Returns the chart of training loss or of evaluated accuracy: a line per group, the mean over its seeds, in a band
    from the lowest seed to the highest."""
    points = []
    for group in groups:
        lines = [history.read_metrics(folder / files.METRICS) for folder in group.folders]
        points += [{"run": group.name, **point} for point in _points(lines, title == "training loss")]
    shown = alt.param(name="shown", value=list(colours))
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    base = (
        alt.Chart(alt.Data(values=points))
        .transform_filter("indexof(shown, datum.run) >= 0")
        .encode(x=alt.X("step:Q"), color=alt.Color("run:N", scale=scale, legend=None))
    )
    axis, form = ("nats", ".3f") if title == "training loss" else ("accuracy", ".1%")

    def y(field: str) -> alt.Y:
        return alt.Y(field, title=axis, axis=alt.Axis(format=form), scale=alt.Scale(zero=False))

    band = base.mark_area(opacity=0.2).encode(y=y("low:Q"), y2="high:Q")
    tip = ["run:N", "step:Q", alt.Tooltip("mean:Q", format=form), alt.Tooltip("low:Q", format=form), "high:Q"]
    line = base.mark_line(point=title != "training loss").encode(y=y("mean:Q"), tooltip=tip)
    return _spec(alt.layer(band, line).add_params(shown).properties(title=title))


def _points(runs: Sequence[Sequence[Mapping[str, Any]]], training: bool) -> list[dict[str, float]]:
    """Returns step, mean, low and high of at most POINTS averages over the steps that all seeds recorded."""
    figure = "loss" if training else "accuracy"
    values: list[dict[int, float | None]] = [
        {
            line["step"]: line[figure]
            for line in run
            if (line["kind"] == "train") == training and line.get(figure) is not None
        }
        for run in runs
    ]
    steps, means = history.averaged(values, POINTS)
    rows = zip(steps, *(bound(0).tolist() for bound in (means.mean, means.min, means.max)), strict=True)
    return [{"step": step, "mean": mean, "low": low, "high": high} for step, mean, low, high in rows]


def _details(group: GroupOnPage) -> dict[str, Any]:
    """Returns the charts and pictures of the first seed of a group, by title."""
    folder, found = group.folders[0], dict[str, Any]()
    if why := group.result.get("mergeability"):
        barrier = why["barrier"]
        points = [
            {"expert": str(expert), "share": share, "loss": loss}
            for expert, losses in enumerate(barrier["losses"])
            for share, loss in zip(barrier["share"], losses, strict=True)
        ]
        line = alt.Chart(alt.Data(values=points)).mark_line(point=True)
        x = alt.X("share:Q", title="from the expert (0) to the mean (1)")
        y = alt.Y("loss:Q", title="loss, nats", scale=alt.Scale(zero=False))
        found["straight line from each expert to the mean"] = _spec(line.encode(x=x, y=y, color="expert:N"))
        layers = [{"layer": layer, "gap": gap} for layer, gap in zip(why["layers"], why["gap"], strict=True)]
        bar = alt.Chart(alt.Data(values=layers)).mark_bar()
        y = alt.Y("gap:Q", title="relative gap")
        found["what the mean does to each layer's output"] = _spec(bar.encode(x="layer:O", y=y, tooltip=["gap:Q"]))
    for row in group.result.get("rows", ()):
        if matrix := row.get("confusion"):
            names = results.class_names(folder, len(matrix))
            cells = [
                {"label": names[i], "predicted": names[j], "count": count, "share": count / max(sum(counts), 1)}
                for i, counts in enumerate(matrix)
                for j, count in enumerate(counts)
            ]
            rect = alt.Chart(alt.Data(values=cells)).mark_rect()
            share = alt.Color("share:Q", scale=alt.Scale(scheme="blues"), legend=alt.Legend(format=".0%"))
            axes = {"x": alt.X("predicted:N", sort=list(names)), "y": alt.Y("label:N", sort=list(names))}
            found[f"confusion of {row['model']}"] = _spec(
                rect.encode(color=share, tooltip=["label:N", "predicted:N", "count:Q"], **axes)
            )
    for title, name in PICTURES.items():
        if (folder / name).is_file():
            found[title] = "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
    return found


def _spec(chart: Any) -> dict[str, Any]:
    return chart.properties(width="container", height=HEIGHT).to_dict()


def _finite(value: Any) -> Any:
    """Returns the value with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
