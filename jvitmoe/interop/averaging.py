"""The mean of models that were trained apart from one start, and whether it may be shipped.

E models · N pictures · C classes
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np

from jvitmoe.config import DataConfig, TrainConfig
from jvitmoe.data import augment, sources, stream
from jvitmoe.data.batches import Batch
from jvitmoe.data.splits import Records, Split, decode, some
from jvitmoe.errors import UserError
from jvitmoe.interop import classifier, load, starts, weight_names
from jvitmoe.interop.load import Source
from jvitmoe.interop.weight_names import Dict
from jvitmoe.machine import compilation, devices
from jvitmoe.models import vit

CONFIDENCE = 0.95
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a line between two models
BATCH = 128  # pictures at once
IN_MEMORY = 2**31  # bytes of pictures that are kept decoded, because every model sees them
ON_LINES = 1000  # most pictures on which the loss between two models is measured
START, MEAN = "the start", "the mean"  # names of rows
UNKNOWN = "Nothing is known of its accuracy: give labelled pictures with --data_dir to test it before it is shipped."
NOTE = (
    "Distance: of the model from the start, over the size of the start (without a start: from the mean). Cosine: of "
    "its update with that of the mean. Barrier: the highest rise of the loss on the straight line to the mean, above "
    "its higher end, in nats, on at most 1,000 pictures. In brackets: 95 % intervals, paired over the pictures (Bonett "
    "and Price, 2012). The ensemble, the mean of probabilities, costs as much as all models together."
)


class Model(NamedTuple):
    """A model to be averaged. Its weights are read again wherever they are needed, so that memory holds few at once."""

    name: str
    path: str
    digest: str
    images: int  # that its training showed it; 0: not known

    def read(self) -> Dict:
        return load.read(self.path).params


def inspect(paths: Sequence[str], start: Source | None) -> tuple[list[Model], Source]:
    """Returns (the models; the first one, or the start, without weights). Folders of one name are named by their paths.

    Raises UserError for fewer than two models, the same one twice, weights that are not finite, and where they, or the
    start, are not of one start, one architecture, one preprocessing and the same classes.
    """
    if len(paths) < 2:
        raise UserError("a mean needs at least two models; name the folders of all of them")
    first = dataclasses.replace(start, params={}) if start else None
    start_hash = starts.digest(start) if start else ""
    found: dict[str, Model] = {}
    for path in paths:
        source = load.read(path, start.model.heads if start else 0)
        if first is None:
            first = dataclasses.replace(source, params={})
        _check(path, source, first, start_hash or first.start, bool(start))
        digest, name = starts.digest(source), Path(path).name
        if digest in found:
            raise UserError(f"{path} has the weights of {found[digest].path}; name each model once")
        is_unique = [Path(other).name for other in paths].count(name) == 1
        found[digest] = Model(name if is_unique else path, path, digest, source.images)
    assert first is not None
    return [*found.values()], first


def _check(path: str, source: Source, first: Source, start: str, is_given: bool) -> None:
    if not (source.start or is_given):
        raise UserError(f"{path} says nothing of its start; train it with --start, or give --start here")
    if source.start and source.start != start:
        raise UserError(f"{path} was trained from another start ({source.start}, not {start}); average those of one")
    if [*source.classes] != [*first.classes] and (source.classes or source.model.classes != first.model.classes):
        raise UserError(f"{path} has other classes than {first.path}, or in another order; train both from one start")
    theirs = starts.facts(first)
    for name, value in starts.facts(source).items():
        if value != theirs[name]:
            raise UserError(f"{path} has {name}={value!r}, and {first.path} has {theirs[name]!r}; they must be equal")
    for name, leaf in source.params.items():
        if not np.isfinite(leaf).all():
            raise UserError(f"{path} has weights in {name!r} that are not finite; leave it out, or train it again")


def mean(
    models: Sequence[Model], weights: Sequence[float] = (), start: Source | None = None, toward_start: float = 0.0
) -> Dict:
    """Returns sum_e weight_e w_e / sum_e weight_e, computed in float64 and rounded once to float32. By default weights
    are equal; FedAvg (arXiv 1602.05629) weighs by images. `toward_start` is the share of the way back from there to
    the start (WiSE-FT, arXiv 2109.01903). The order of the models does not matter."""
    weights = weights or [1] * len(models)
    total: Dict = {}
    for model, weight in sorted(zip(models, weights, strict=True), key=lambda pair: pair[0].digest):
        for name, leaf in model.read().items():
            part = np.multiply(leaf, weight, dtype=np.float64)
            total[name] = np.add(total[name], part, out=total[name]) if name in total else part
    for name, leaf in total.items():
        leaf /= sum(weights)
        if toward_start:
            assert start is not None
            leaf = (1 - toward_start) * leaf + toward_start * start.params[name]
        total[name] = leaf.astype(np.float32)
    return total


class Scores(NamedTuple):
    """What a model says of N pictures."""

    right_N: np.ndarray  # bool
    nll_N: np.ndarray  # nats

    @property
    def accuracy(self) -> float:
        return float(self.right_N.mean())

    @property
    def nll(self) -> float:
        return float(self.nll_N.mean())


def greedy(models: Sequence[Model], score: Callable[[Dict], Scores]) -> list[Model]:
    """Returns the models of the greedy soup (Wortsman et al., arXiv 2203.05482): the best one, and of the others in the
    order of accuracy each with which the mean is not worse."""
    alone = {model: score(model.read()).accuracy for model in models}
    first, *rest = sorted(models, key=lambda model: (-alone[model], model.digest))
    kept, best = [first], alone[first]
    for model in rest:
        if (found := score(mean([*kept, model])).accuracy) >= best:
            kept, best = [*kept, model], found
    return kept


class Scorer:
    """The compiled evaluation of all models of one architecture, `source`, on one split of pictures."""

    def __init__(self, source: Source, pictures: Split | Records, progress: Callable[[], None]) -> None:
        self._source, self._progress = source, progress
        self._batches = stream.eval_batches(pictures, BATCH, devices.make_mesh(TrainConfig(batch_size=BATCH)))
        net = vit.build(classifier.as_it_runs(source.model))

        def log_probabilities(params: Any, batch: Batch) -> jax.Array:
            images = augment.normalize(batch.images(net.config), source.mean, source.std)
            return jax.nn.log_softmax(vit.logits(net, params, images))

        self._run = compilation.jit(log_probabilities)

    def log_probabilities(self, flat: Dict) -> tuple[np.ndarray, np.ndarray]:
        """Returns (float32 [N, C], labels_N)."""
        arrays = classifier.dense_arrays(dataclasses.replace(self._source, params=flat))
        params, found = jax.device_put(weight_names.unflatten(arrays)), []
        for batch in self._batches:
            with jax.default_matmul_precision("highest"):
                found.append(jax.device_get((self._run(params, batch), batch.labels_B)))
            self._progress()
        log_NC, labels_N = map(np.concatenate, zip(*found, strict=True))
        return log_NC[labels_N >= 0], labels_N[labels_N >= 0]

    def __call__(self, flat: Dict) -> Scores:
        return scores(*self.log_probabilities(flat))


def scores(log_NC: np.ndarray, labels_N: np.ndarray) -> Scores:
    return Scores(log_NC.argmax(1) == labels_N, -log_NC[np.arange(len(labels_N)), labels_N])


def between(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], share: float) -> Dict:
    """Returns the point at a share of the way from one model to another."""
    return {name: ((1 - share) * leaf + share * other[name]).astype(np.float32) for name, leaf in one.items()}


def geometry(flat: Dict, start: Mapping[str, np.ndarray], average: Dict) -> tuple[float, float]:
    """Returns (the distance of a model from the start over the size of the start, the cosine of its update and that of
    the mean; 0 if the start is the mean)."""
    sums = np.zeros(4)
    for name in flat:
        for row, first, of_all in zip(*(_rows(tree[name]) for tree in (flat, start, average)), strict=True):
            update, of_mean = row - first, of_all - first
            sums += [update @ update, of_mean @ of_mean, update @ of_mean, first @ first]
    return math.sqrt(sums[0] / sums[3]), float(sums[2] / max(math.sqrt(sums[0] * sums[1]), 1e-30))


def _rows(leaf: np.ndarray) -> np.ndarray:
    """Returns the leaf in rows: sums of one in float32 are accurate, and four times as fast as in float64."""
    return leaf.reshape(len(leaf), -1) if leaf.ndim > 1 else leaf[None]


class Difference(NamedTuple):
    """The accuracy of the mean minus that of another model, in points, with its interval."""

    points: float
    low: float
    high: float


def difference(right_N: np.ndarray, other_N: np.ndarray, confidence: float = CONFIDENCE) -> Difference:
    """Returns the difference of two accuracies on the same pictures, with the adjusted Wald interval for paired
    proportions (Bonett and Price, 2012, J. Educ. Behav. Stat. 37(4)), which holds for few pictures too."""
    count, gained, lost = len(right_N), int((right_N & ~other_N).sum()), int((other_N & ~right_N).sum())
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Difference(*(100 * share for share in ((gained - lost) / count, up - down - half, up - down + half)))


def verdict(average: Scores, sites: Mapping[str, Scores], start: Scores | None) -> str:
    """Returns whether the mean may be shipped, in a sentence. It is better only if its interval against every site and
    the start is above 0, each at 95 %; it is worse if one is below 0, where the level is shared out over all of them
    (Bonferroni), because one of many is below 0 by chance."""
    others = {**sites, START: start} if start else sites
    level = 1 - (1 - CONFIDENCE) / len(others)
    found = {name: difference(average.right_N, other.right_N) for name, other in others.items()}
    strict = {name: difference(average.right_N, other.right_N, level) for name, other in others.items()}
    closest = min(found, key=lambda name: found[name].points)
    who = f"every site and than {START}" if start else "every site"
    points, low, high = found[closest]
    interval = f"(95 % interval {low:+.1f} to {high:+.1f}, {len(average.right_N):,} pictures)"
    by = f"{points:+.1f} points against {closest} {interval}"
    if all(one.low > 0 for one in found.values()):
        return f"The mean is better than {who}: {by}."
    if worse := {name: one for name, one in strict.items() if one.high < 0}:
        worst = min(worse, key=lambda name: worse[name].points)
        points, low, high = (-number for number in worse[worst])
        interval = f"({100 * level:.4g} % interval {high:.1f} to {low:.1f}, {len(average.right_N):,} pictures)"
        return f"The mean is worse than {worst} by {points:.1f} points {interval}: do not ship it."
    return f"Not decided: the mean is not shown to be better than {who}: {by}."


def find_pictures(data: DataConfig, split: str, first: Source) -> Split | Records:
    """Returns a split of a set, as models like `first` see it, decoded if it is small. Raises DataError."""
    records = sources.labelled(dataclasses.replace(data, crop=first.crop), first.model, first.classes, split)
    return decode(records) if len(records) * math.prod(records.crop.shape) <= IN_MEMORY else records


class Measured(NamedTuple):
    """What is known of a mean.

    `rows`: a row for the start, each model, the mean and the ensemble. Models have `distance` (from the start, over its
    size) and `cosine` (of their update with that of the mean). With pictures all have `accuracy` and `nll`, start and
    models also `barrier` (nats, the highest rise of the loss on the line to the mean above its higher end) and
    `points`, `low`, `high` (accuracy of the mean minus theirs).
    """

    rows: list[dict[str, Any]]
    verdict: str
    losses: dict[str, list[float]]  # of start and models: at POINTS of the line to the mean, on ON_LINES pictures
    way: list[float]  # accuracy at POINTS of the line from start to mean
    by_class_MC: np.ndarray  # accuracy of each row; nan where a class has no pictures


def measure(
    models: Sequence[Model],
    average: Dict,
    start: Source | None,
    first: Source,
    pictures: Split | Records | None,
    progress: Callable[[], None],
) -> Measured:
    """Returns what is known of the mean of models. Memory holds one model beside start and mean, and the ensemble's
    probabilities."""
    rows: dict[str, dict[str, Any]] = {START: {"model": START}} if start else {}
    for model in models:
        distance, cosine = geometry(model.read(), start.params if start else average, average)
        rows[model.name] = {"model": model.name, "images": model.images, "distance": distance, "cosine": cosine}
    if not pictures:
        return Measured([*rows.values()], UNKNOWN, {}, [], np.empty((0, 0)))
    score, quick = (Scorer(first, one, progress) for one in (pictures, some(pictures, ON_LINES)))
    by_name, mean, end = {model.name: model for model in models}, score(average), quick(average).nll
    found, losses, way = {}, {}, list[float]()
    total: Any = 0
    for name in [*rows]:
        flat = start.params if start and name == START else by_name[name].read()
        log_NC, labels_N = score.log_probabilities(flat)
        found[name] = scores(log_NC, labels_N)
        total = total + (np.exp(log_NC, dtype=np.float64) if name != START else 0)
        losses[name] = [*(quick(between(flat, average, share)).nll for share in POINTS[:-1]), end]
        rows[name]["barrier"] = max(0.0, max(losses[name]) - max(losses[name][0], end))
    if start:
        between_them = [score(between(start.params, average, share)).accuracy for share in POINTS[1:-1]]
        way = [found[START].accuracy, *between_them, mean.accuracy]
    said = verdict(mean, {name: found[name] for name in by_name}, found.get(START))
    for name, one in found.items():
        rows[name] |= difference(mean.right_N, one.right_N)._asdict()
    found |= {MEAN: mean, f"ensemble of {len(models)}": scores(np.log(total / len(models)), labels_N)}
    for name, one in found.items():
        rows[name] = {"model": name, **rows.get(name, {}), "accuracy": one.accuracy, "nll": one.nll}
    classes = first.model.classes
    counts_C = np.bincount(labels_N, minlength=classes)
    with np.errstate(invalid="ignore"):
        by_class_MC = [np.bincount(labels_N, one.right_N, classes) / counts_C for one in found.values()]
    return Measured([*rows.values()], said, losses, way, np.array(by_class_MC))


def cells(rows: Sequence[Mapping[str, Any]], weight: Mapping[str, float]) -> list[dict[str, str]]:
    """Returns the rows as text; a column that no row has is left out. `weight` is the share of each model."""
    forms = {"model": "{model}", "weight": "{weight:.1%}", "images": "{images:,}", "distance": "{distance:.4f}"}
    forms |= {"cosine": "{cosine:.2f}", "accuracy": "{accuracy:.2%}", "nll": "{nll:.4f}", "barrier": "{barrier:.4f}"}
    forms |= {"points": "{points:+.1f} ({low:+.1f} to {high:+.1f})"}
    full = [{"weight": weight.get(row["model"], 0.0), **row} if "images" in row else row for row in rows]
    kept = [name for name in forms if any(name in row for row in full)]
    titles = {"points": "mean minus it"}
    return [{titles.get(name, name): forms[name].format(**row) if name in row else "" for name in kept} for row in full]
