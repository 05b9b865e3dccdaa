"""Trains the recipe of configs/cifar10_cct.py, dense and with random experts, and the tries from which it was chosen.
Draws accuracy against the cost of training.

    python scripts/search_recipe.py --config configs/cifar10_cct.py --seeds 3 --runs runs/recipe90 \\
        --out results/recipe90 --only dense random -- --config.data.dir=DIR

A try, one seed, is chosen by its accuracy on images held out. To resume, repeat: see scripts/sweep.py.
"""

from pathlib import Path
from typing import NamedTuple

import archive
import verdicts
from archive import Run, Runs
from routers import validation_accuracy
from sweep import SEED, Variant, main

from jvitmoe.reports import figures
from jvitmoe.runs.console import markdown_table

PICTURE = "frontier.png"
RECIPE = {"dense": Variant({}), "random": Variant({}, "random", ("dense",))}
# What the tries share and the recipe has not.
BASE: dict[str, object] = {
    **{"data.validation": 5000, "data.cutmix": 0.0, "optim.mlp_rate": 1.0, "train.eval_every": 4},
}
SHORT, MIDDLE = BASE | {"train.epochs": 8}, BASE | {"train.epochs": 24}
LONG: dict[str, object] = {"data.validation": 5000, "train.eval_every": 16}
STRONG = LONG | {"data.cutmix": 1.0, "data.erase": 0.25}
PLAIN_END: dict[str, object] = {"data.plain_at_end": 0.2}  # in which a long run memorises its images
LOW = LONG | {"model.image_size": 24, "data.crop": "whole", "data.crop_padding": 3}
TRIES: dict[str, dict[str, object]] = {  # what may decide most comes first
    "conv": SHORT,
    "hidden128": SHORT | {"model.hidden": 128},
    "plain_24epochs": MIDDLE,
    "cutmix_24epochs": MIDDLE | PLAIN_END | {"data.cutmix": 0.3},
    "cutmix1_24epochs": MIDDLE | PLAIN_END | {"data.cutmix": 1.0},
    "three_cutmix_24epochs": MIDDLE | PLAIN_END | {"data.augment": "three", "data.cutmix": 0.3},
    "erase_cutmix_24epochs": MIDDLE | PLAIN_END | {"data.erase": 0.25, "data.cutmix": 0.3},
    "rate8e-3": SHORT | {"optim.learning_rate": 8e-3},
    "rate2e-3": SHORT | {"optim.learning_rate": 2e-3},
    "batch64": SHORT | {"train.batch_size": 64},
    "plain_end": PLAIN_END,  # trained on all images
    "long": LONG | PLAIN_END,
    "long_mixed_to_end": LONG,  # the recipe, with images held out
    "strong": STRONG | PLAIN_END,
    "strong_mixed_to_end": STRONG,
    "mixed_24epochs": LONG | {"train.epochs": 24},
    "low_24epochs": LOW | {"train.epochs": 24},
    # The weights of low_24epochs at full resolution: train that first, with --runs runs/recipe90. Both cost as much as
    # mixed_24epochs.
    "low_then_11epochs": LONG | {"train.epochs": 11, "init.source": f"runs/recipe90/low_24epochs-seed{SEED}"},
    "strided_13epochs": SHORT | {"model.stem": "strided", "train.epochs": 13},  # as long as conv by the clock
}


class Published(NamedTuple):
    """What others report of CIFAR-10 from scratch. Sources: READMEs of SHI-Labs/Compact-Transformers (MACs of a forward
    pass and epochs) and KellerJordan/cifar10-airbench (FLOPs of training)."""

    name: str
    petaflops: float  # of training
    accuracy: float  # on the test images, %


def of_macs(macs: float, epochs: int) -> float:
    """Returns the PFLOP of training: a backward pass counts as two forward passes."""
    return 3 * 2 * macs * 50_000 * epochs / 1e15


PUBLISHED = (
    Published("CCT-2/3x2", of_macs(0.033e9, 200), 89.17),
    Published("CCT-4/3x2", of_macs(0.046e9, 200), 91.45),
    Published("ViT-Lite-6/4", of_macs(0.205e9, 200), 90.94),
    Published("CCT-6/3x2", of_macs(0.241e9, 200), 93.56),
    Published("airbench94, a CNN", 0.36, 94.01),
    Published("airbench95, a CNN", 1.4, 95.01),
)


def variants() -> dict[str, Variant]:
    """Returns name -> what differs from the dense recipe."""
    return RECIPE | {name: Variant(settings) for name, settings in TRIES.items()}


def images_seen(run: Run) -> int:
    return int(run["result"]["step"] * run["config"]["train"]["batch_size"])


def trainings(runs: Runs, run: Run) -> list[Run]:
    """Returns a run, the run that it started from, and so on."""
    source = runs.get(Path(run["config"]["init"]["source"]).name)
    return [run, *(trainings(runs, source) if source else ())]


def training_flops(runs: Runs, run: Run) -> float:
    """Returns the FLOPs of the products of its trainings, of which the forward pass is a third."""
    every = trainings(runs, run)
    return float(sum(3 * one["result"]["rows"][0]["flops_per_image"] * images_seen(one) for one in every))


def minutes(runs: Runs, run: Run) -> str:
    """Returns the minutes of its trainings; "-" for a run of a few steps, which has no rate."""
    every = [(images_seen(one), one["result"].get("images_per_second")) for one in trainings(runs, run)]
    return f"{sum(images / rate / 60 for images, rate in every):.0f}" if all(rate for _, rate in every) else "-"


def table(runs: Runs) -> list[dict[str, str]]:
    """Returns a row per run, from the cheapest to the dearest."""
    cells = []
    for name, run in sorted(runs.items(), key=lambda item: training_flops(runs, item[1])):
        held = validation_accuracy(run)
        cells.append(
            {
                "run": name,
                "held out, %": "-" if held is None else f"{100 * held:.2f}",
                "test, %": f"{100 * run['result']['rows'][0]['accuracy']:.2f}",
                "training, PFLOP": f"{training_flops(runs, run) / 1e15:.3f}",
                "minutes": minutes(runs, run),
                "parameters": f"{run['result']['rows'][0]['parameters']:,}",
            }
        )
    return cells


@figures.in_style
def picture(runs: Runs) -> figures.Figure:
    """Returns test accuracy against the FLOPs of training, beside what others report."""
    figure, ((axes,),) = figures.subplots(1, 1, (9, 5.5))
    for is_final, label, style in ((False, "tries", "o"), (True, "the recipe, a run per seed", "^")):
        own = {name: run for name, run in runs.items() if is_final == (name.rpartition("-")[0] in RECIPE)}
        x = [training_flops(runs, run) / 1e15 for run in own.values()]
        y = [100 * run["result"]["rows"][0]["accuracy"] for run in own.values()]
        axes.plot(x, y, style, color=figures.COLOURS[is_final], label=label)
    axes.plot(
        [one.petaflops for one in PUBLISHED], [one.accuracy for one in PUBLISHED], "D", color="black", label="published"
    )
    for one in PUBLISHED:
        axes.annotate(one.name, (one.petaflops, one.accuracy), (6, -3), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", xlabel="training, PFLOP", ylabel="test accuracy, %", title="CIFAR-10 from scratch")
    axes.margins(x=0.2)
    figures.plain_ticks(axes.xaxis, 1)
    axes.legend(loc="lower right")
    return figure


def conclusion(out: Path) -> str:
    """Returns the end of the report, and draws its picture beside it."""
    runs = archive.kept(out)
    figures.save(picture(runs), out / PICTURE)
    shown = f"![accuracy against the cost of training]({PICTURE})"
    return f"\n## Accuracy and cost\n\n{shown}\n\n{markdown_table(table(runs))}{verdicts.conclusion(out, RECIPE)}"


if __name__ == "__main__":
    main(__doc__, variants(), evaluate=["--paths=0"], conclusion=conclusion)
