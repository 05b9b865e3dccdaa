"""A probe: how well a linear classifier on few images does on a model's features, the input of its head.

N images · D width · C classes
"""

from collections.abc import Callable, Mapping
from statistics import fmean, stdev
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jvitmoe.config import DataConfig
from jvitmoe.data import augment, stream
from jvitmoe.data.batches import Batch, EvalBatches
from jvitmoe.data.splits import Dataset
from jvitmoe.errors import UserError
from jvitmoe.machine import compilation
from jvitmoe.models import vit
from jvitmoe.runs.console import console

SEEDS = (0, 1, 2)  # of the draws of shots
L2, BIAS = 2.0**10, 100.0


class Features(NamedTuple):
    """The features of a split, and its labels."""

    features_ND: np.ndarray  # float32
    labels_N: np.ndarray  # int32


def measure(
    net: vit.ViT,
    trees: Mapping[str, Any],
    found: Dataset,
    data: DataConfig,
    batch_size: int,
    mesh: Mesh,
    shots: int,
) -> list[dict[str, Any]]:
    """Returns one row per model: the probe's name, the model's, accuracy on the test split, mean over SEEDS with the
    deviation as accuracy_std, and images.

    Args:
        net: the dense model.
        trees: {name of a model: its parameters}.
        found: the set, whose images are seen as evaluation sees them. Its whole training split is passed through.
        data: the settings of the set.
        batch_size: images at once.
        shots: images per class of `few_shot`.

    Raises UserError for more shots than there are training images of a class.
    """
    damaged = stream.Damaged(len(found.train), console.print)
    splits = [
        stream.eval_batches(found.train, batch_size, mesh, damaged),
        stream.eval_batches(found.test, batch_size, mesh),
    ]
    extract, names, rows = make_extract(net, data), found.class_names, []

    for model, params in trees.items():
        train, test = (extract(params, split) for split in splits)
        accuracies = [few_shot(train, test, names, shots, seed) for seed in SEEDS]
        numbers = {"accuracy": fmean(accuracies), "accuracy_std": stdev(accuracies)}
        images = {"train_images": shots * len(names), "test_images": len(test.labels_N)}
        rows.append({"probe": f"{shots}-shot", "model": model, **numbers, **images})
    return rows


def make_extract(net: vit.ViT, data: DataConfig) -> Callable[[Any, EvalBatches], Features]:
    """Returns a function (params, batches) -> features of every image, in order."""

    @compilation.jit
    def of_batch(params: Any, batch: Batch) -> jax.Array:
        return vit.features(net, params, augment.normalize(batch.images(net.config), data.mean, data.std))

    def extract(params: Any, batches: EvalBatches) -> Features:
        found = [jax.device_get((of_batch(params, batch), batch.labels_B)) for batch in batches]
        features_ND, labels_N = map(np.concatenate, zip(*found, strict=True))
        return Features(features_ND[labels_N >= 0], labels_N[labels_N >= 0])

    return extract


def draw_shots(labels_N: np.ndarray, names: tuple[str, ...], shots: int, seed: int) -> np.ndarray:
    """Returns the indices of `shots` images of each class, a function of labels and seed.

    Raises UserError if a class has fewer.
    """
    images_C: np.ndarray = np.bincount(labels_N, minlength=len(names))
    least = int(np.argmin(images_C))
    if shots > images_C[least]:
        rule = f"class {names[least]!r} has {images_C[least]} training images"
        raise UserError(f"--few_shot is {shots}; {rule}; give at most that many")
    random = np.random.RandomState(seed)  # unlike Generator's, its numbers are the same in every version of NumPy
    return np.concatenate([random.permutation(np.flatnonzero(labels_N == c))[:shots] for c in range(len(names))])


def few_shot(train: Features, test: Features, names: tuple[str, ...], shots: int, seed: int) -> float:
    """Returns the accuracy on `test` of a ridge regression on `shots` training images per class (`draw_shots`).

    As big_vision's evaluators/fewshot_lsr.py: features are standardised by mean and deviation of the shots and get a
    constant of 100 for the bias, so that it is hardly regularised; targets are 1 for the label and -1 for other
    classes; L2 is 2^10, which big_vision fixes for all sets. Raises UserError as `draw_shots`.
    """
    from sklearn.linear_model import Ridge  # not above: importing it takes as long as JAX

    index = draw_shots(train.labels_N, names, shots, seed)
    shots_ND = train.features_ND[index].astype(float)
    mean_D, std_D = shots_ND.mean(0), shots_ND.std(0) + 1e-5

    def inputs(features_ND: np.ndarray) -> np.ndarray:
        return np.pad((features_ND - mean_D) / std_D, ((0, 0), (0, 1)), constant_values=BIAS)

    targets_NC = 2 * np.eye(len(names))[train.labels_N[index]] - 1
    ridge = Ridge(L2, fit_intercept=False).fit(inputs(shots_ND), targets_NC)
    scores_NC = ridge.predict(inputs(test.features_ND)).reshape(-1, len(names))  # [N] for one class
    return float(np.mean(scores_NC.argmax(1) == test.labels_N))
