"""Puts runs side by side: `python -m jvitmoe.report runs/a runs/b … [--out runs/report]`.

Prints one table and writes it as report.md, with the curves of all runs in curves.png.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from absl import flags

from jvitmoe import cli, tracking
from jvitmoe.config import UserError
from jvitmoe.tracking import console

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt


def main(argv: list[str]) -> None:
    """Writes report.md and curves.png and prints the table."""
    values, folders = cli.parse_with_arguments(argv, _define_flags)
    if not folders:
        raise UserError("no run folder was given; name one or more, such as runs/digits_dense runs/digits_random")
    runs = [Path(folder) for folder in folders]
    results = [_read_result(run) for run in runs]
    rows = [
        {"run": run.name, **row}
        for run, result in zip(runs, results, strict=True)
        for row in tracking.result_rows(result)
    ]
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    plot_curves(runs, out / "curves.png")
    tracking.write_text(out / "report.md", f"# Runs\n\n{tracking.markdown(rows)}\n![curves](curves.png)\n")
    tracking.show(rows, "test split")
    console.print(f"curves      {out / 'curves.png'}")


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/report", "Folder for report.md and curves.png.", flag_values=values)


def _read_result(run: Path) -> dict[str, Any]:
    path = run / tracking.RESULT
    if not path.is_file():
        raise UserError(f"{str(run)!r} holds no {tracking.RESULT}; give a folder whose training has ended")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; write it anew with jvitmoe.evaluate") from error


def plot_curves(runs: Sequence[Path], path: Path) -> None:
    """Writes one PNG: training loss, and accuracy on the watched split, against the step, one colour per run."""
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run in runs:
        lines = tracking.read_metrics(run / tracking.METRICS)
        train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
        watched = [(line["step"], line["accuracy"]) for line in lines if line["kind"] != "train"]
        (curve,) = loss_axes.plot(*zip(*train, strict=True), label=run.name, linewidth=1.2)
        accuracy_axes.plot(
            *zip(*watched, strict=True), label=run.name, color=curve.get_color(), marker="o", markersize=3
        )
    loss_axes.set(
        title="Training loss of the path that ran", xlabel="step", ylabel="cross-entropy (nats)", yscale="log"
    )
    accuracy_axes.set(title="Accuracy of the dense or merged model", xlabel="step", ylabel="accuracy")
    accuracy_axes.yaxis.set_major_formatter("{x:.0%}")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss_axes.legend(frameon=False, loc="upper right")
    accuracy_axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
