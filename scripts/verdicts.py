"""Verdicts of a sweep: every arm minus what it is compared with, seed by seed, by the rule of docs/study.md."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import archive
from archive import Runs
from sweep import Variant, accuracies, interval, mean_cell

from jvitmoe.runs.console import markdown_table

Arms = Mapping[str, Variant]
Found = Mapping[str, Mapping[str, Mapping[str, float]]]  # arm -> model -> seed -> accuracy on the test split, %
LEAST_SEEDS = 3  # of an interval: with two it reaches 12.7 standard errors to each side
CLAIM = 5  # seeds
PARITY = 0.5  # points: an arm that is not better loses nothing if its interval is above -PARITY; see `verdict`


class Comparison(NamedTuple):
    """A model of an arm minus a model of a reference, on the same seeds."""

    arm: str
    model: str
    reference: str
    reference_model: str
    paired: list[float]  # differences in points


def conclusion(out: Path, arms: Arms) -> str:
    """Returns the end of a report: the accuracies of all arms, all comparisons, and which arms are better than all that
    they are compared with."""
    found = read(archive.kept(out), arms)
    compared = comparisons(found, arms)
    if not compared:
        return "\n## Verdicts\n\nNo two arms have been trained that are compared.\n"
    better = winners(compared, arms)
    return (
        f"\n## Arms\n\n{markdown_table(summary(found))}\n## Verdicts\n\n{markdown_table(rows(compared))}\n"
        f"Better than all that it is compared with: {', '.join(better) or 'no arm'}.\n"
    )


def read(runs: Runs, arms: Iterable[str]) -> Found:
    """Returns the accuracies of the arms that have results."""
    found = {name: accuracies(runs, name) for name in arms}
    return {name: models for name, models in found.items() if models}


def comparisons(found: Found, arms: Arms) -> list[Comparison]:
    """Returns the differences of each model from the final model and the EMA of each reference; of EMA, from EMA."""
    compared = []
    for name, models in found.items():
        references = [(reference, final(found[reference])) for reference in arms[name].against if reference in found]
        for model in models:
            for reference, last in references:
                for other in ("EMA",) if model == "EMA" else (last, "EMA"):
                    its = found[reference].get(other, {})
                    if paired := [value - its[seed] for seed, value in models[model].items() if seed in its]:
                        compared.append(Comparison(name, model, reference, other, paired))
    return compared


def final(models: Mapping[str, object]) -> str:
    """Returns which of an arm's models is the plain ViT after the last step."""
    return "dense" if "dense" in models else "merged"


def summary(found: Found) -> list[dict[str, str]]:
    """Returns the text cells of a row per model: accuracy, mean ± sample deviation."""
    cells = []
    for arm, models in found.items():
        for model, by_seed in models.items():
            values = list(by_seed.values())
            cells.append({"arm": arm, "model": model, "seeds": str(len(values)), "accuracy": mean_cell(values)})
    return cells


def rows(compared: list[Comparison]) -> list[dict[str, str]]:
    """Returns the text cells of a row per comparison."""
    return [
        {"arm": arm, "model": model, "minus": f"{reference}, {other}", "seeds": str(len(paired)), **cells(paired)}
        for arm, model, reference, other, paired in compared
    ]


def cells(paired: list[float]) -> dict[str, str]:
    """Returns the text cells of differences: their mean, and from LEAST_SEEDS on their interval and verdict; "-" where
    there is none."""
    found = {"difference": f"{statistics.fmean(paired):+.2f}" if paired else "-", "interval": "-", "verdict": "-"}
    if len(paired) >= LEAST_SEEDS:
        low, high = interval(paired)
        found |= {"interval": f"{low:+.2f} to {high:+.2f}", "verdict": verdict(low, high)}
    return found


def verdict(low: float, high: float) -> str:
    """Returns what follows from an interval."""
    if low > 0:
        return "better"
    loses_nothing = ", loses nothing" if low > -PARITY else ""
    if high < 0:
        return f"worse{loses_nothing}"
    return f"not decided{loses_nothing}{', gains nothing' if high < PARITY else ''}"


def winners(compared: list[Comparison], arms: Arms) -> list[str]:
    """Returns the arms whose final model is better than both models of all references, on enough seeds for a claim."""
    won = []
    for name, arm in arms.items():
        own = [item for item in compared if item.arm == name and item.model in ("dense", "merged")]
        tried = {item.reference for item in own}
        decided = own and tried == set(arm.against) and all(len(item.paired) >= CLAIM for item in own)
        if decided and all(interval(item.paired)[0] > 0 for item in own):
            won.append(name)
    return won
