"""Does averaging finished runs pay? Trains the arms of experiment I of docs/study.md and reports them.

    python scripts/average_study.py --data_dir DIR --runs runs/average --out results/study/I

Everything that ended is kept in OUT/runs.jsonl.gz (archive.py); the same command trains what is missing. The weights of
the starts are kept in RUNS, and trained again where they are missing. A site is trained as `jvitmoe train --start` does
it, without a process of its own, because 16 rounds of four sites would need 64 (tests/scripts/test_average_study.py).
"""

import argparse
import dataclasses
import functools
import io
import itertools
import math
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, cast

import archive
import average_report
import jax
import numpy as np
from archive import Run, Runs
from PIL import Image, ImageEnhance, ImageFilter

from jvitmoe import config as config_lib
from jvitmoe import experiments, rules
from jvitmoe.config import Config, DataConfig, ModelConfig, RoutingConfig
from jvitmoe.data import sources, stream
from jvitmoe.data.batches import TrainOrder
from jvitmoe.data.splits import Dataset, Split, some
from jvitmoe.experts import merge
from jvitmoe.interop import averaging, pretrained, starts, weight_names
from jvitmoe.interop.averaging import Scorer, Scores
from jvitmoe.interop.load import Source
from jvitmoe.interop.weight_names import Dict
from jvitmoe.machine import devices, memory
from jvitmoe.runs import checkpoints, safe_io
from jvitmoe.training import build, state, step

SITES, ALPHA, LEAST = 4, 0.3, 256  # alpha of Dirichlet's distribution; least images of a site
HELD, OLD = 2500, 6  # images held out; classes of the other task
CORRUPTED = 1000  # test images of each corruption
KINDS, MIXES = tuple(average_report.TITLES), average_report.MIXES
START_EPOCHS = {"same": 10, "other": 20}
BATCH, ROUNDS, RANK = 128, (4, 16), 8
SEARCH_SEED, SEEDS = 100, 5
RATES, LORA_RATES = (5e-4, 1e-3, 2e-3), (2e-3, 4e-3, 8e-3)  # first tries, see `phases`
LENGTH, SHORT = 6, 2  # epochs
SHARES = tuple(n / 10 for n in range(11))  # of the way back to the start
SOUP = ((1.0, "none"), (2.0, "none"), (0.5, "none"), (1.0, "three"))  # x the learning rate, and augmentation
TOGETHER = ("together_batch512", "together_batch128")
APART = tuple(f"{arm}_{mix}" for arm in ("once", "rounds4", "rounds16", "lora") for mix in MIXES)


class Task(NamedTuple):
    """What one process does at a time."""

    kind: str  # of the start: of the same task, or of another one
    arm: str
    seed: int
    rate: float  # learning rate
    epochs: int

    @property
    def name(self) -> str:
        tried = f"-rate{self.rate:g}-epochs{self.epochs}" if self.seed == SEARCH_SEED else ""
        return f"{self.kind}-{self.arm}{tried}-seed{self.seed}"


class Data(NamedTuple):
    """What a kind of start is trained on and what its task has."""

    start: Split
    classes: tuple[str, ...]  # of the start
    held: Split
    sites: Split  # the images of all sites
    test: Split
    names: tuple[str, ...]  # of the task's classes


def parts(dataset: Dataset[Split], kind: str) -> Data:
    """Returns the images of a kind of start. The halves and the images held out are the same for all seeds."""
    first, second = (sources.training_images(dataset.train, DataConfig(part=f"{n}/2"))[0] for n in (1, 2))
    first, held = sources.hold_out(first, HELD)
    names = dataset.class_names
    if kind == "same":
        return Data(first, names, held, second, dataset.test, names)

    def new(split: Split) -> Split:
        chosen = split.select(split.labels_N >= OLD)
        return dataclasses.replace(chosen, labels_N=chosen.labels_N - OLD)

    old = first.select(first.labels_N < OLD)
    return Data(old, names[:OLD], new(held), new(second), new(dataset.test), names[OLD:])


def sites_of(split: Split, mix: str, seed: int) -> list[Split]:
    """Returns the images of every site: equal parts, or shares of each class drawn from Dirichlet's distribution, again
    until each site has LEAST images."""
    if mix == "alike":
        return [sources.training_images(split, DataConfig(part=f"{n}/{SITES}"))[0] for n in range(1, SITES + 1)]
    random = np.random.RandomState(seed)
    while True:
        site_N = np.zeros(len(split), int)
        for label in np.unique(split.labels_N):
            of_class = random.permutation(np.flatnonzero(split.labels_N == label))
            cuts = (np.cumsum(random.dirichlet([ALPHA] * SITES))[:-1] * len(of_class)).astype(int)
            for site, chosen in enumerate(np.split(of_class, cuts)):
                site_N[chosen] = site
        found = [split.select(site_N == site) for site in range(SITES)]
        if min(map(len, found)) >= LEAST:
            return found


def recipe(task: Task, classes: int) -> Config:
    """Returns the settings of the study's model at its better learning rate, with those of a task."""
    config = experiments.load("cifar10_fast")
    config.model = dataclasses.replace(config.model, patch=8, stem="patch", classes=classes)
    warmup = 0.1 * task.epochs
    config.optim = dataclasses.replace(config.optim, learning_rate=task.rate, mlp_rate=2.0, warmup_epochs=warmup)
    config.train = dataclasses.replace(config.train, epochs=task.epochs, batch_size=BATCH, seed=task.seed)
    if task.arm in ("together_batch512", "inside"):
        config.train.batch_size = SITES * BATCH
    if task.arm == "inside":  # whole models, each on its share of every batch, never pulled together
        config.routing = RoutingConfig(experts=SITES, kind="sample", part="model", init="shared")
    rules.check(config)
    if task.arm.startswith("lora"):  # after the check, which asks for a source: `train` is given its weights
        config.model.lora, config.optim.name = RANK, "adamw"
    return config


@functools.lru_cache(maxsize=16)  # of a task: one if its sites have as many images
def program(settings: str, count: int) -> tuple[state.Plan, Any]:
    """Returns (the plan of a run on so many images, its compiled step)."""
    config = config_lib.loads(settings, "a run")
    plan = build.plan_for(config, devices.make_mesh(config.train), count)
    return plan, step.make_train_step(plan)


def train(config: Config, split: Split, begin: Dict | None, steps: int = 0, number: int = 0) -> Dict:
    """Returns the merged model after training from `begin`, or from a new one. Of a run in rounds it trains the
    `steps` of one, `number`, with the schedule and the optimiser's state of a new run."""
    count = steps * config.train.batch_size if steps else len(split)
    plan, train_step = program(config_lib.dumps(config), count)
    order, first = plan.order, 0
    if steps:  # a round goes on where the last one left the epoch
        order, first = TrainOrder(len(split), config.train.batch_size, config.train.seed, plan.mesh), number * steps
    now = state.make_state(plan, weight_names.unflatten(begin) if begin else None)
    for batch in stream.train_batches(split, order, first, first + plan.total):
        now, metrics = train_step(now, batch)
        devices.wait_on_cpu(plan.mesh, metrics)
    if not math.isfinite(loss := float(metrics.loss)):
        raise ValueError(f"the loss is {loss}")
    return weight_names.flatten(jax.device_get(merge.dense_tree(now.params)))


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """What `averaging` asks of a model, without its file."""

    digest: str  # models are added in the order of these
    weights: Dict

    def read(self) -> Dict:
        return self.weights


def in_memory(models: Sequence[Dict]) -> Any:
    return [InMemory(str(number), flat) for number, flat in enumerate(models)]


class Tested(NamedTuple):
    """Rows of a table, as `result.json` has them, and what else is known."""

    rows: list[dict[str, Any]]
    corrupted: dict[str, dict[str, float]]  # model -> corruption -> accuracy
    chosen: dict[str, Any]  # by the images held out


class Arm:
    """One arm of one seed: its data, its start, and how its models are tested."""

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        self.task, self.data = task, _data(task.kind, options.data_dir)
        config = recipe(task, len(self.data.names))
        self.source, _ = starts.make(config, self.data.names)
        self.begin = _start(task.kind, task.seed, options)
        if task.kind == "other":
            self.begin, _ = pretrained.adapt(
                dataclasses.replace(starts.make(recipe(task, OLD), self.data.classes)[0], params=self.begin),
                dataclasses.replace(config.model, lora=0),
                pretrained.fresh(config),
                config.data,
            )
        self.is_search = task.seed == SEARCH_SEED

    def scorer(self, split: str) -> Scorer:
        return _scorer(self.task.kind, split, self.data, self.source)

    def test(self, models: Mapping[str, Dict], most: Sequence[str] = (), chosen: Mapping[str, Any] = {}) -> Tested:
        """Returns the accuracy of each model: in a search on the images held out, otherwise on the test set; and of
        those in `most` on corrupted test images. `ensemble` is that of the models called "site …"."""
        score = self.scorer("held" if self.is_search else "test")
        total: Any = 0
        rows, sites = [], [name for name in models if name.startswith("site ")]
        for name, flat in models.items():
            log_NC, labels_N = score.log_probabilities(flat)
            rows.append(row(name, averaging.scores(log_NC, labels_N)))
            total = total + (np.exp(log_NC, dtype=np.float64) if name in sites else 0)
        if sites:
            rows.append(row("ensemble", averaging.scores(np.log(total / len(sites)), labels_N)))
        corrupted = {} if self.is_search else {name: self.corrupted(models[name]) for name in most}
        return Tested(rows, corrupted, dict(chosen))

    def corrupted(self, flat: Dict) -> dict[str, float]:
        right_KN = self.scorer("corrupted")(flat).right_N.reshape(len(CORRUPTIONS), -1)
        return {name: float(right_N.mean()) for name, right_N in zip(CORRUPTIONS, right_KN, strict=True)}

    def together(self, model: str) -> Tested:
        found = train(recipe(self.task, len(self.data.names)), self.data.sites, self.begin)
        return self.test({model: found}, [model])

    def apart(self, rounds: int, mix: str) -> Tested:
        """Sites that train by themselves, and whose mean, by their images, begins the next round."""
        task, sites = self.task, sites_of(self.data.sites, mix, self.task.seed)
        config, sizes = recipe(task, len(self.data.names)), [len(site) for site in sites]
        if rounds == 1:
            found = [train(config, site, self.begin) for site in sites]
        else:
            config.train.epochs, config.optim.warmup_epochs, now = 1, 0.1, self.begin
            for number in range(rounds):
                steps = [max(1, round(task.epochs * size / BATCH / rounds)) for size in sizes]
                found = [train(config, site, now, n, number) for site, n in zip(sites, steps, strict=True)]
                now = averaging.mean(in_memory(found), sizes)
        average = averaging.mean(in_memory(found), sizes)
        models = {"mean": average, "mean, equal": averaging.mean(in_memory(found))}
        models |= {f"site {number}": flat for number, flat in enumerate(found, start=1)}
        chosen: dict[str, Any] = {"images": sizes}
        if not self.is_search:
            models["start"] = self.begin
            back = {share: averaging.between(average, self.begin, share) for share in SHARES}
            held = {share: self.scorer("held")(flat).accuracy for share, flat in back.items()}
            chosen["toward_start"] = max(held, key=lambda share: held[share])
            models["toward start"] = back[chosen["toward_start"]]
        return self.test(models, ["start", "mean", "toward start"] if rounds == 1 else ["mean"], chosen)

    def soups(self) -> Tested:
        """Four runs on the images of all sites, their soups, and one run four times as long."""
        found = []
        for times, augment in SOUP:
            config = recipe(self.task, len(self.data.names))
            config.optim.learning_rate *= times
            config.data.augment = augment
            found.append(train(config, self.data.sites, self.begin))
        long = recipe(self.task._replace(epochs=4 * self.task.epochs), len(self.data.names))
        named, score = in_memory(found), self.scorer("held")
        kept = averaging.greedy(named, score)
        best = max(named, key=lambda model: score(model.read()).accuracy)
        models = {"greedy": averaging.mean(kept), "uniform": averaging.mean(named), "best": best.read()}
        models |= {"four times as long": train(long, self.data.sites, self.begin)}
        models |= {f"site {number}": flat for number, flat in enumerate(found, start=1)}
        return self.test(models, ["greedy", "best"], {"greedy": [model.digest for model in kept], "best": best.digest})


def row(name: str, scores: Scores) -> dict[str, Any]:
    return {"model": name, "accuracy": scores.accuracy, "nll": scores.nll, "images": len(scores.right_N)}


ARMS: dict[str, Callable[[Arm], Tested]] = {
    "together_batch512": functools.partial(Arm.together, model="dense"),
    "together_batch128": functools.partial(Arm.together, model="dense"),
    **{f"once_{mix}": functools.partial(Arm.apart, rounds=1, mix=mix) for mix in MIXES},
    **{f"rounds{n}_{mix}": functools.partial(Arm.apart, rounds=n, mix=mix) for n in ROUNDS for mix in MIXES},
    **{f"lora_{mix}": functools.partial(Arm.apart, rounds=1, mix=mix) for mix in MIXES},
    "inside": functools.partial(Arm.together, model="merged"),
    "soups": Arm.soups,
}
SETTINGS_OF = {"inside": "once_alike", "soups": "together_batch128"}  # arms without a search of their own


# Corruptions of images of 32 pixels, after CIFAR-10-C (arXiv 1903.12261), at three strengths. They are not that set.
def _noise(image: Image.Image, strength: float, random: np.random.RandomState) -> Image.Image:
    pixels = np.asarray(image, np.float32) + 255 * random.normal(0, strength, (image.height, image.width, 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _jpeg(image: Image.Image, quality: float, random: np.random.RandomState) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=int(quality))
    return Image.open(file)


def _pixelate(image: Image.Image, side: float, random: np.random.RandomState) -> Image.Image:
    return image.resize((int(side), int(side)), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


CORRUPT: dict[str, tuple[Callable[[Image.Image, float, np.random.RandomState], Image.Image], tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.08, 0.12)),
    "blur": (lambda image, radius, _: image.filter(ImageFilter.GaussianBlur(radius)), (0.5, 0.8, 1.2)),
    "contrast": (lambda image, factor, _: ImageEnhance.Contrast(image).enhance(factor), (0.6, 0.4, 0.2)),
    "jpeg": (_jpeg, (50, 25, 10)),
    "pixelate": (_pixelate, (24, 16, 12)),
}
CORRUPTIONS = tuple(f"{name} {strength:g}" for name, (_, strengths) in CORRUPT.items() for strength in strengths)


def corrupted(split: Split) -> Split:
    """Returns the images of all CORRUPTIONS, one after the other."""
    random, clean = np.random.RandomState(0), some(split, CORRUPTED)
    images = [
        [np.asarray(corrupt(Image.fromarray(image_HWc), strength, random)) for image_HWc in clean.images_NHWc]
        for corrupt, strengths in CORRUPT.values()
        for strength in strengths
    ]
    return Split(np.concatenate(images), np.tile(clean.labels_N, len(CORRUPTIONS)))


# What the tasks of one process share.


@functools.cache
def _cifar(data_dir: str) -> Dataset[Split]:
    return sources.load(DataConfig("cifar10", data_dir), ModelConfig(image_size=32, channels=3))


@functools.cache
def _data(kind: str, data_dir: str) -> Data:
    return parts(_cifar(data_dir), kind)


_scorers: dict[tuple[str, str], Scorer] = {}


def _scorer(kind: str, split: str, data: Data, source: Source) -> Scorer:
    if (kind, split) not in _scorers:
        pictures = corrupted(data.test) if split == "corrupted" else getattr(data, split)
        _scorers[kind, split] = Scorer(source, pictures, lambda: None)
    return _scorers[kind, split]


def _start(kind: str, seed: int, options: argparse.Namespace) -> Dict:
    """Returns the weights of a start, from RUNS if they are there."""
    path = options.runs / f"start-{kind}-{seed}.npz"
    if not path.exists():
        data, task = _data(kind, options.data_dir), Task(kind, "start", seed, 2e-3, START_EPOCHS[kind])
        flat = train(recipe(task, len(data.classes)), data.start, None)
        file = io.BytesIO()
        np.savez(file, **cast(Any, flat))
        safe_io.write_bytes(path, file.getvalue())
    with np.load(path) as file:
        return dict(file)


def work(task: Task, options: argparse.Namespace) -> tuple[Task, Run | None]:
    """Returns the task and what is kept of it; of a start nothing, whose weights lie in RUNS."""
    began = time.monotonic()
    if task.arm == "start":
        _start(task.kind, task.seed, options)
        return task, None
    arm = Arm(task, options)
    tested = ARMS[task.arm](arm)
    result = tested._asdict() | {"split": "held out" if arm.is_search else "test", "seconds": time.monotonic() - began}
    result |= {"hardware": devices.describe(devices.make_mesh(Config().train)), "versions": checkpoints.versions()}
    config = recipe(task, len(arm.data.names))
    return task, {"config": config_lib.to_dict(config), "result": result}


def first_tries(kind: str, arm: str) -> list[Task]:
    return [Task(kind, arm, SEARCH_SEED, rate, LENGTH) for rate in (LORA_RATES if arm.startswith("lora") else RATES)]


def at_edge(kept: Runs, kind: str, arm: str) -> list[Task]:
    """Returns one more try, where the best of the first ones is the highest or the lowest."""
    lowest, *_, highest = first_tries(kind, arm)
    found = best(kept, kind, arm)
    by_edge = {lowest.rate: lowest.rate / 2, highest.rate: 2 * highest.rate}
    return [lowest._replace(rate=by_edge[found.rate])] if found.rate in by_edge else []


def best(kept: Runs, kind: str, arm: str) -> Task:
    """Returns the try whose model was best on the images held out."""
    prefix, suffix = f"{kind}-{SETTINGS_OF.get(arm, arm)}-", f"-seed{SEARCH_SEED}"
    tried = {name: run for name, run in kept.items() if name.startswith(prefix) and name.endswith(suffix)}
    config = tried[max(tried, key=lambda name: tried[name]["result"]["rows"][0]["accuracy"])]["config"]
    return Task(kind, arm, SEARCH_SEED, config["optim"]["learning_rate"], config["train"]["epochs"])


def phases(options: argparse.Namespace) -> Iterator[list[Task]]:
    """Yields the tasks of each phase, of which the later ones ask what the earlier ones have kept: starts; the search
    of rates, with one more at an edge, and then of the shorter length at the best rate; and the arms, seed by seed."""
    seeds, searched = range(SEEDS), list(itertools.product(KINDS, (*TOGETHER, *APART)))
    yield [Task(kind, "start", seed, 0, 0) for seed in (SEARCH_SEED, *seeds) for kind in KINDS]
    first = [task for kind, arm in searched for task in first_tries(kind, arm)]
    yield first
    found = archive.kept(options.out)
    kept = {task.name: found[task.name] for task in first}
    more = [task for kind, arm in searched for task in at_edge(kept, kind, arm)]
    yield more
    kept |= {task.name: archive.kept(options.out)[task.name] for task in more}
    yield [best(kept, kind, arm)._replace(epochs=SHORT) for kind, arm in searched]
    searches = archive.kept(options.out)
    for arms in ([*TOGETHER, *APART[:-2]], APART[-2:]):
        yield [best(searches, kind, arm)._replace(seed=seed) for seed in seeds for kind in KINDS for arm in arms]
    last = (("same", "soups"), *((kind, "inside") for kind in KINDS))  # the longest first, for two workers
    yield [best(searches, kind, arm)._replace(seed=seed) for kind, arm in last for seed in seeds]


def pin(cpus: "multiprocessing.Queue[int]") -> None:
    """Keeps a worker to one CPU: two runs of one core each train more than two of two."""
    os.sched_setaffinity(0, {cpus.get()})


def run(options: argparse.Namespace) -> None:
    """Trains what is missing."""
    options.runs.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    cpus = context.Queue()
    for _, cpu in zip(range(options.jobs), itertools.cycle(sorted(os.sched_getaffinity(0)))):
        cpus.put(cpu)
    with ProcessPoolExecutor(options.jobs, context, pin, (cpus,)) as pool:
        for number, tasks in enumerate(phases(options), start=1):
            kept = archive.kept(options.out)
            todo = [task for task in tasks if task.name not in kept]
            print(f"phase {number}: {len(tasks)} tasks, {len(todo)} to do", flush=True)
            began = time.monotonic()
            for done, future in enumerate(as_completed([pool.submit(work, task, options) for task in todo]), start=1):
                task, found = future.result()
                left = (time.monotonic() - began) / done * (len(todo) - done) / 60
                text = ""
                if found:
                    kept = {**kept, task.name: found}
                    archive.write(options.out / archive.FILE, kept)
                    text = "  ".join(f"{one['model']} {one['accuracy']:.2%}" for one in found["result"]["rows"][:3])
                print(f"{done}/{len(todo)}  {task.name}  {text}  {left:.0f} min left", flush=True)


def main() -> None:
    """Runs the command line; see the top of the file."""
    memory.use_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="", help="where TFDS keeps its sets")
    parser.add_argument("--runs", type=Path, required=True, help="where the weights of starts go")
    parser.add_argument("--out", type=Path, required=True, help="where the report goes, and what is kept of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="tasks at a time, of one CPU each")
    options = parser.parse_args()
    run(options)
    average_report.write(options.out, f"python {shlex.join(sys.argv)}")


if __name__ == "__main__":
    main()
