"""result.json and report.md of a run."""

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jvitmoe.errors import UserError
from jvitmoe.reports.page import Heading, Part, Picture, as_markdown
from jvitmoe.runs.console import console, quantity, show_table
from jvitmoe.runs.safe_io import (
    CONFUSION,
    EXPERTS,
    MERGEABILITY,
    RESULT,
    read_classes,
    read_result,
    save_result,
    write_text,
)

LEGEND = (
    "Spread: how far experts are from their mean, relative to it. Cosine: of two experts' weights, mean of pairs. "
    "Closest pair: largest cosine of two experts' differences from the mean, which average to about -1 / (E - 1). "
    "Layer gap: how far the output of the mean expert is from the mean of the experts' outputs, relative to it."
)
EQUAL = "All experts are equal, so their average is each of them: there is nothing to measure between them."
PROBES = (
    "n-shot: ridge regression on n training images per class, mean ± sample deviation over three draws of them. It "
    "sees only the features, the input of the head."
)
# Of a row of a model, and how they are shown.
METRIC_FORMATS = {"accuracy": ".2%", "nll": ".4f", "top5": ".2%", "ece": ".4f"}
REPORT = "report.md"
LAYER_COLUMNS = {"spread": "spread", "cosine": "cosine", "closest pair": "difference_cosine", "layer gap": "gap"}


def of_step(workdir: Path, step: int) -> dict[str, Any]:
    """Returns the result of this step that is in the run folder; {} if there is none or it is damaged."""
    with contextlib.suppress(UserError):  # a damaged one is written anew
        if (result := read_result(workdir)).get("step") == step:
            return result
    return {}


def of_training(workdir: Path, versions: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns what only training could measure, for a command that tests its checkpoint: the rate, the hardware and the
    versions, which the checkpoint has."""
    try:
        earlier = read_result(workdir)
    except UserError:
        console.print(f"warning: {RESULT} is damaged; it is rewritten without images/s")
        earlier = {}
    found = {"trained_on": trained_on(earlier), "trained_with": versions}
    known = {name: value for name, value in found.items() if value}
    return {"images_per_second": earlier.get("images_per_second"), **known}


def trained_on(result: Mapping[str, Any]) -> str:
    """Returns the hardware of training, or "". Where `trained_with` stands, `hardware` is that of a later test."""
    return str(result.get("trained_on") or ("" if "trained_with" in result else result.get("hardware", "")))


def deviation(values: Sequence[float]) -> float:
    """Returns the sample deviation; nan if a value is not finite, which `statistics` does not accept."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def are_equal(result: Mapping[str, Any]) -> bool:
    """True if the experts of a run were measured, and do not differ in any layer."""
    return bool(spread := result.get("mergeability", {}).get("spread")) and not any(spread)


def result_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the rows of a result as text cells, those of equal experts as one."""
    rows = [
        {
            "model": row["model"],
            **metric_cells(row),
            "images": f"{row['images']:,}",
            "parameters": f"{row.get('parameters', result['active_parameters']):,}",
            **({"FLOPs/image": quantity(row["flops_per_image"])} if "flops_per_image" in row else {}),
        }
        for row in result["rows"]
    ]
    return equal_experts_as_one(rows)


def equal_experts_as_one(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Returns rows of text cells in which equal experts, and paths and ensembles of them, are one row."""

    def metrics(row: Mapping[str, str]) -> list[str]:
        return [row.get(name, "").partition(" ")[0] for name in METRIC_FORMATS]  # without the deviation, 0 over paths

    experts = [row for row in rows if row["model"].startswith("expert ")]
    if len(experts) < 2 or any(metrics(row) != metrics(experts[0]) for row in experts):
        return list(rows)
    shipped = ("dense", "merged", "EMA", "routed")
    kept = [r for r in rows if r is experts[0] or r["model"] in shipped or metrics(r) != metrics(experts[0])]
    return [r | {"model": f"{len(experts)} experts, equal"} if r is experts[0] else r for r in kept]


def metric_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the cells of those of METRIC_FORMATS that the row has, each with its deviation if it has one."""
    return {
        name: f"{row[name]:{form}}" + (f" ± {row[f'{name}_std']:{form}}" if f"{name}_std" in row else "")
        for name, form in METRIC_FORMATS.items()
        if row.get(name) is not None  # a line of metrics.jsonl has null for nan
    }


def class_names(workdir: Path, classes: int) -> tuple[str, ...]:
    """Returns the names of the classes; their numbers if the run kept no names."""
    names = read_classes(workdir)
    return names if len(names) == classes else tuple(map(str, range(classes)))


def class_rows(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, str]]:
    """Returns a row of text cells per class. Row c of `confusion` counts the images of class c by predicted class."""
    rows = []
    for label, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        images, wrong = sum(counts), [count * (other != label) for other, count in enumerate(counts)]
        most = max(wrong)
        rows.append(
            {
                "class": name,
                "images": f"{images:,}",
                "accuracy": f"{counts[label] / images:.2%}" if images else "-",
                "most often taken for": f"{names[wrong.index(most)]} ({most / images:.2%})" if most else "-",
            }
        )
    return rows


def probe_rows(probes: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns the rows of the probes as text cells."""
    rows = []
    for row in probes:
        images = {f"{split} images": f"{row[f'{split}_images']:,}" for split in ("train", "test")}
        rows.append({"probe": row["probe"], "model": row["model"], **metric_cells(row), **images})
    return rows


def made_with(several: Sequence[Mapping[str, Any]]) -> str:
    """Returns the line that a report opens with: hardware and versions of training and tests."""
    hardware = dict.fromkeys(r[name] for r in several for name in ("trained_on", "hardware") if r.get(name))
    used = [r.get(name) or {} for r in several for name in ("trained_with", "versions")]
    versions = dict.fromkeys(f"{name} {version}" for each in used for name, version in each.items())
    return f"Hardware: {'; '.join(hardware)}. Versions: {', '.join(versions) or 'not recorded'}."


def show_models(workdir: Path, result: Mapping[str, Any]) -> None:
    """Prints the table of the tested models."""
    title = f"{workdir.resolve().name}: {result['data']} test split, step {result['step']}"
    show_table(result_rows(result), title, str(workdir / REPORT))


def write_result(workdir: Path, result: Mapping[str, Any], confusion_drawn: bool = False) -> None:
    """Prints the tables, except that of the classes, which may be long, and writes report.md, with confusion.png if it
    is drawn. Writes result.json last, because it marks a run that was tested."""
    show_models(workdir, result)
    tested = f"Test split of {result['data']}, checkpoint at step {result['step']}, seed {result['seed']}."
    counts = f"Parameters: {result['active_parameters']:,} active, {result['total_parameters']:,} total."
    parts: list[Part] = [Heading(1, workdir.resolve().name), f"{made_with([result])} n (seeds): 1."]
    parts += [result_rows(result), f"{tested} {counts}"]
    if probes := probe_rows(result.get("probes") or ()):
        parts += [Heading(2, "Probes"), probes, PROBES]
        show_table(probes, "probes of the features")
    if result.get("routes"):
        parts += [Heading(2, "What the router does"), Picture(Path(EXPERTS).stem)]
    if are_equal(result):
        parts += [Heading(2, "Why averaging works or fails"), EQUAL]
        console.print(EQUAL)
    elif why := result.get("mergeability"):
        layers = [
            {"layer": str(layer), **{title: f"{why[name][n]:.4f}" for title, name in LAYER_COLUMNS.items()}}
            for n, layer in enumerate(why["layers"])
        ]
        barrier = f"Highest rise of the loss from an expert to the mean: {why['barrier']['height']:.4f} nats."
        legend = f"{barrier} {LEGEND} Measured on {why['images']:,} test images."
        parts += [Heading(2, "Why averaging works or fails"), Picture(Path(MERGEABILITY).stem), layers, legend]
        show_table(layers, "experts of each layer")
        console.print(barrier)
    for row in result["rows"]:
        if confusion := row.get("confusion"):
            parts += [Heading(2, f"Classes, {row['model']}"), *[Picture(Path(CONFUSION).stem)] * confusion_drawn]
            parts.append(class_rows(confusion, class_names(workdir, len(confusion))))
    write_text(workdir / REPORT, as_markdown(parts))
    save_result(workdir, result)
