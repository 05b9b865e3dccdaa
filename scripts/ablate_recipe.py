"""Takes away the ingredients of a recipe, one at a time, or adds one, in its dense and in its random variant.

    python scripts/ablate_recipe.py --config configs/cifar10_fast.py --runs runs/ablation --out results/recipe \
        -- --config.data.dir=DIR --config.train.epochs=4

The report ends with a line per ingredient, and random routing against dense. To resume, repeat: see scripts/sweep.py.
"""

from pathlib import Path

import archive
import verdicts
from archive import Runs
from sweep import Variant, accuracies, main, mean_cell

from jvitmoe.runs.console import markdown_table

INGREDIENTS: dict[str, dict[str, object]] = {
    "recipe": {},
    "patch_stem": {"model.stem": "patch"},
    "mean_pool": {"model.pool": "mean"},
    # AdamW gets two rates: that of Muon, and a usual one.
    "adamw": {"optim.name": "adamw"},
    "adamw_quarter_rate": {"optim.name": "adamw", "optim.learning_rate": 1e-3},
    "no_crop_and_flip": {"data.crop_padding": 0, "data.flip": False},
    "no_smoothing": {"train.label_smoothing": 0.0},
    "no_decay": {"optim.weight_decay": 0.0},
    "mlp_rate2": {"optim.mlp_rate": 2.0},
    "plus_augment": {"data.augment": "three", "data.cutmix": 1.0, "data.plain_at_end": 0.1},
}
RANDOM_ONLY: dict[str, dict[str, object]] = {
    "no_pull": {"routing.pull": 0.0},
    "same_rate": {"optim.mlp_rate": 1.0},
    "independent_init": {"routing.init": "independent"},
    "route_per_batch": {"routing.kind": "batch"},
    "former": {"optim.mlp_rate": 2.0, "routing.pull": 0.1},  # the random variant before the study
}
MODELS = {"dense": "dense", "random": "merged"}  # variant of the file -> the model that is compared
DENSE = ("dense_recipe", "dense_mlp_rate2")  # what random routing has to beat


def variants() -> dict[str, Variant]:
    """Returns name -> what differs from the dense config; the recipe itself first, then those of both kinds."""
    both = {f"{kind}_{name}": Variant(settings, kind) for name, settings in INGREDIENTS.items() for kind in MODELS}
    routed = {"recipe": INGREDIENTS["recipe"]} | RANDOM_ONLY
    return both | {f"random_{name}": Variant(settings, "random", DENSE) for name, settings in routed.items()}


def table(runs: Runs) -> list[dict[str, str]]:
    """Returns the text cells of a row per ingredient: accuracy, and its difference from the recipe's on the same seeds,
    mean ± sample deviation; and how many seeds there are of the dense and of the random variant."""
    recipe = {kind: accuracies(runs, f"{kind}_recipe").get(model, {}) for kind, model in MODELS.items()}
    rows = []
    for name in INGREDIENTS | RANDOM_ONLY:
        row, seeds = {"ingredient": name.replace("_", " ")}, []
        for kind, model in MODELS.items():
            own = accuracies(runs, f"{kind}_{name}").get(model, {})
            differences = [value - recipe[kind][seed] for seed, value in own.items() if seed in recipe[kind]]
            row |= {model: mean_cell(list(own.values()), ".2f"), f"{model} - recipe": mean_cell(differences, "+.2f")}
            seeds.append(len(own))
        if any(seeds):
            rows.append(row | {"seeds": ", ".join(map(str, seeds))})
    return rows


def conclusion(out: Path) -> str:
    """Returns the end of the report."""
    legend = "Accuracy on the test split, %. Seeds: of the dense and of the random variant."
    ingredients = markdown_table(table(archive.kept(out)))
    return f"\n## Ingredients\n\n{legend}\n\n{ingredients}{verdicts.conclusion(out, variants())}"


if __name__ == "__main__":
    main(__doc__, variants(), conclusion=conclusion)
