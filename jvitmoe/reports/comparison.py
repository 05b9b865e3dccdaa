"""Tested runs in groups that differ only in their seed: which may be averaged, and their figures as text."""

import contextlib
import itertools
import math
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.config import Config
from jvitmoe.data import sources
from jvitmoe.errors import UserError, first_few, one_line
from jvitmoe.reports import results
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import console, duration, quantity


class TestedRun(NamedTuple):
    """A run folder whose result.json is there."""

    folder: Path
    config: Config
    result: dict[str, Any]


Groups = dict[str, list[TestedRun]]
LEAST_IMAGES = 6  # that decide: by a sign test, five of five would come by chance in 1 of 16 cases
DECIDED = (
    "Differences are of the same seeds, first the group, then the first dense group of the same data. Interval: "
    "Student's t over seeds; of one seed, by the number of images, as if both were tested on others; of two seeds, the "
    f"wider of both. Decided: the interval leaves out 0, and the difference is at least {LEAST_IMAGES} images."
)


def read_run(folder: Path) -> TestedRun:
    """Returns a run that was tested. Raises UserError where the folder holds none."""
    remedy = "give a folder whose training has ended"
    if not os.path.isdir(folder):  # unlike Path.is_dir, it raises for no name
        raise UserError(f"{str(folder)!r} is {'a file' if os.path.exists(folder) else 'no such folder'}; {remedy}")
    result = safe_io.read_result(folder)
    if not result and (folder / safe_io.CONFIG).exists():
        raise UserError(f"{str(folder)!r} was not trained to its end; repeat its command to go on")
    if not result:
        raise UserError(f"{str(folder)!r} holds no {safe_io.RESULT}; {remedy}")
    config = read_config(folder)
    with naming_result(folder):
        tested, path = f"seed {result['seed']} on {result['data']}", folder / safe_io.CONFIG
        if (own := f"seed {config.train.seed} on {config.data.name}") != tested:
            raise UserError(f"{path} is of {own}, but what was tested is {tested}; restore it from a copy")
        safe_io.compare(folder, result["step"], result.get("files", {}))
        run = TestedRun(folder, config, result)
        shown = results.result_rows(result), group_rows("", [run]), overview_row("", [run]), opening({"": [run]})
        if not all(shown):  # what cannot be shown is no result
            raise ValueError("no model was tested")
    return run


@contextlib.contextmanager
def naming_result(folder: Path) -> Iterator[None]:
    """Raises UserError for any error inside, which a result.json of other values may cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        path = folder / safe_io.RESULT
        raise UserError(f"{path} is damaged ({one_line(error)}); delete it and run jvitmoe evaluate") from error


def read_config(folder: Path) -> Config:
    """Returns the settings in a run folder, also of a run that has not ended. Raises UserError where it has none."""
    path = folder / safe_io.CONFIG
    if (text := safe_io.read_bytes(path)) is None:
        raise UserError(f"{str(folder)!r} holds no {safe_io.CONFIG}; give a folder that training wrote")
    config = config_lib.loads(text, str(path))
    try:
        return rules.check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}; restore it from a copy") from error


def group_runs(runs: Sequence[TestedRun]) -> Groups:
    """Returns the groups of `runs` that differ only in their seed, sorted by it. The name of a group is what the names
    of its folders share, with a number if it is taken. A run that may not be averaged with its group, such as another
    try of a seed, begins a group of its own, and a line says so."""
    by_config: dict[str, list[list[TestedRun]]] = {}
    for run in runs:
        tries = by_config.setdefault(_key(run, ("train.seed",)), [])
        for group in tries:
            if not (faults := [(other, fault) for other in group for fault in _faults(other, run)]):
                group.append(run)
                break
        else:
            if tries:
                console.print(f"apart       {faults[0][0].folder} and {run.folder} {faults[0][1]}")
            tries.append([run])
    groups: Groups = {}
    for group in itertools.chain.from_iterable(by_config.values()):
        name = _shared_name([run.folder.resolve().name for run in group])
        names = itertools.chain([name], (f"{name} ({n})" for n in itertools.count(2)))
        groups[next(n for n in names if n not in groups)] = sorted(group, key=lambda run: run.config.train.seed)
    return groups


def _faults(run: TestedRun, other: TestedRun) -> Iterator[str]:
    """Yields why two runs may not be averaged, with the remedy."""
    changed = sources.differences(run.config, other.config)
    changed.pop("train.seed", None)
    if _source(run.config) == _source(other.config):  # each seed may start from a run of its own seed
        changed.pop("init.source", None)
    if changed:
        listed = first_few([f"{field} ({a!r} and {b!r})" for field, (a, b) in changed.items()])
        yield f"differ in {listed}; only seeds may differ"
    if (seed := run.config.train.seed) == other.config.train.seed:
        yield f"are both of seed {seed}; leave one out"
    if (step := run.result["step"]) != (last := other.result["step"]):
        yield f"were tested at steps {step} and {last}; run jvitmoe evaluate on each with the same --checkpoint"
    if _models(run) != _models(other):
        yield "were tested as different models; run jvitmoe evaluate on each with the same --paths"


def in_order(groups: Groups) -> Groups:
    """Puts groups side by side that differ only in `routing`, `optim.mlp_rate` and EMA, dense ones first."""
    of_routing = "train.seed", "train.ema", "routing.", "optim.mlp_rate"
    keys = [_key(group[0], of_routing) for group in groups.values()]
    places = {
        name: (keys.index(key), groups[name][0].config.routing.experts > 1)
        for name, key in zip(groups, keys, strict=True)
    }
    return {name: groups[name] for name in sorted(groups, key=places.__getitem__)}


def group_rows(name: str, group: Sequence[TestedRun]) -> list[dict[str, str]]:
    """Returns the text cells of a group, one row per model; mean ± sample deviation where there are several seeds."""
    rates = [run.result["images_per_second"] for run in group if run.result.get("images_per_second")]
    hardware = "; ".join(dict.fromkeys(results.trained_on(run.result) or "not recorded" for run in group))
    rows, result = [], group[0].result
    for several in zip(*(run.result["rows"] for run in group), strict=True):
        numbers = dict(several[0])
        for metric in results.METRIC_FORMATS:
            values = [row[metric] for row in several if metric in row]
            if len(values) == len(group) > 1:
                numbers |= {metric: statistics.fmean(values), f"{metric}_std": results.deviation(values)}
        rows.append(
            {
                "run": name,
                "model": numbers["model"],
                **{**dict.fromkeys(results.METRIC_FORMATS, "-"), **results.metric_cells(numbers)},
                "seeds": str(len(group)),
                "images/s": f"{statistics.fmean(rates):,.0f}" if rates else "-",
                "FLOPs/image": quantity(numbers["flops_per_image"]) if "flops_per_image" in numbers else "-",
                "parameters": f"{numbers.get('parameters', result['active_parameters']):,}",
                "total": f"{result['total_parameters']:,}",
                "hardware": hardware,
            }
        )
    return results.equal_experts_as_one(rows)


def differences(groups: Groups) -> list[str]:
    """Returns a sentence for each group: how its first model differs from that of the first group of its data, a dense
    one if there is any, in points and images, and whether that is decided (`DECIDED`)."""

    def named(name: str, group: Sequence[TestedRun]) -> str:
        return name if (model := _models(group[0])[0]) == "dense" else f"{name} ({model})"

    lines = []
    for name, group in groups.items():
        of_data = [(n, g) for n, g in groups.items() if _data(g[0]) == _data(group[0])]
        other, reference = next((item for item in of_data if item[1][0].config.routing.experts == 1), of_data[0])
        if name == other or not (found := _difference(group, reference)):
            continue
        points, low, high = (100 * (found.mean + edge) for edge in (0, -found.half, found.half))
        seeds, digits = ("one seed", 0) if found.seeds == 1 else (f"mean of {found.seeds} seeds", 1)
        lines.append(
            f"{named(name, group)} is {abs(points):.2f} points {'below' if points < 0 else 'above'} "
            f"{named(other, reference)}: {'' if found.is_decided else 'not '}decided, 95 % interval {low:+.2f} to "
            f"{high:+.2f} ({found.mean * found.images:+,.{digits}f} of {found.images:,} images, {seeds})"
        )
    return lines


class _Difference(NamedTuple):
    """How far the accuracy of a group's first model is above another's, over the seeds that both have."""

    mean: float
    half: float  # of the 95 % interval
    images: int
    seeds: int

    @property
    def is_decided(self) -> bool:
        return abs(self.mean) > self.half and abs(self.mean) * self.images > LEAST_IMAGES - 0.5


def _difference(group: Sequence[TestedRun], reference: Sequence[TestedRun]) -> _Difference | None:
    """Returns the difference of two groups of the same data; None if they share no seed."""
    first, second = ({run.config.train.seed: run.result["rows"][0] for run in runs} for runs in (group, reference))
    paired = [(first[seed]["accuracy"], second[seed]["accuracy"]) for seed in first if seed in second]
    if not paired:
        return None
    images = next(iter(first.values()))["images"]
    mean = statistics.fmean(ours - theirs for ours, theirs in paired)
    return _Difference(mean, _half_interval(paired, images), images, len(paired))


def _half_interval(paired: Sequence[tuple[float, float]], images: int) -> float:
    """Returns half the 95 % interval of the mean difference of pairs of accuracies."""
    from scipy.special import stdtrit  # not above: --help need not wait for that

    variance = statistics.fmean(sum(p * (1 - p) for p in pair) for pair in paired)  # all seeds share the test images
    by_images = 1.96 * math.sqrt(variance / images)
    if len(paired) == 1:
        return by_images
    deviation = results.deviation([ours - theirs for ours, theirs in paired])
    over_seeds = float(stdtrit(len(paired) - 1, 0.975)) * deviation / math.sqrt(len(paired))
    return over_seeds if len(paired) > 2 else max(over_seeds, by_images)  # two differences may be equal by chance


def by_seed(seeds_results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns model -> accuracy of each seed, from the results of the seeds."""
    seeds = [{row["model"]: row["accuracy"] for row in result["rows"]} for result in seeds_results]
    return {model: [accuracy[model] for accuracy in seeds] for model in seeds[0]}


def record(group: Sequence[TestedRun]) -> dict[str, Any]:
    """Returns the config of a group and the whole result of each seed."""
    config = {field: value for field, value in config_lib.flatten(group[0].config).items() if field != "train.seed"}
    return {"config": config, "seeds": {run.config.train.seed: run.result for run in group}}


def overview(groups: Groups) -> list[dict[str, str]]:
    """Returns a row of text cells per group. The best accuracy is marked if all groups have the same data, and it is
    decided against every other."""
    rows = [overview_row(name, group) for name, group in groups.items()]
    for row, group in zip(rows, groups.values(), strict=True):
        others = [_difference(group, other) for other in groups.values() if other is not group]
        if of_one_set(groups) and others and all(found and found.mean > 0 and found.is_decided for found in others):
            row["accuracy"] += " (best)"
    return without_empty(with_data(groups, rows))


def with_data(groups: Groups, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Returns rows of text cells with a column for the data of each run, if they are not the same."""
    if of_one_set(groups):
        return list(rows)
    return [{"run": row["run"], "data": _data_name(groups[row["run"]][0])} | row for row in rows]


def _data_name(run: TestedRun) -> str:
    """Returns the name and the place of a set, and the number of its test images."""
    data, images = run.config.data, run.result["rows"][0]["images"]
    return f"{' '.join(filter(None, (data.name, data.dir)))}, {images:,} images"


def of_one_set(groups: Groups) -> bool:
    """True if all groups have the same data."""
    return len({repr(_data(group[0])) for group in groups.values()}) == 1


def without_empty(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Returns rows without the columns in which none has a value."""
    return [{name: row[name] for name in row if any(other[name] != "-" for other in rows)} for row in rows]


def in_words(config: Config) -> str:
    """Returns how a run trains its experts, such as "4 experts, random by batch, equal start"."""
    routing = config.routing
    when = "at every step" if routing.pull_every == 1 else f"every {routing.pull_every} steps"
    if routing.experts == 1:
        return "dense"
    how = f"{'random by' if routing.kind in ('batch', 'layer', 'sample', 'token') else 'router'} {routing.kind}"
    upcycled = config.init.source and not config.trains_adapters_only
    start = "equal start" if upcycled or routing.init == "shared" else "different starts"
    pulled = "averaged after every step" if routing.averages_every_step else f"pulled by {routing.pull:g} {when}"
    what = "whole models" if routing.part == "model" else "experts"
    return ", ".join([f"{routing.experts} {what}", how, start, *[pulled] * bool(routing.pull)])


def overview_row(name: str, group: Sequence[TestedRun]) -> dict[str, str]:
    """Returns the text cells of a group in one row: means over its seeds, and the worst layer's gap."""
    accuracies = by_seed([run.result for run in group])

    def cell(model: str) -> str:
        if model not in accuracies:
            return "-"
        deviation = f" ± {results.deviation(accuracies[model]):.2%}" if len(group) > 1 else ""
        return f"{statistics.fmean(accuracies[model]):.2%}{deviation}"

    experts = [statistics.fmean(values) for model, values in accuracies.items() if model.startswith("expert ")]
    why = [run.result["mergeability"] for run in group if "mergeability" in run.result]
    main, run = next(iter(accuracies)), group[0]
    rate, images = run.result.get("images_per_second"), run.result["step"] * run.config.train.batch_size
    return {
        "run": name,
        "model": main,
        "accuracy": cell(main),
        "seeds": str(len(group)),
        "trained as": in_words(run.config),
        **{model: cell(model) if model != main else "-" for model in ("merged", "EMA", "ensemble")},
        "experts": f"{statistics.fmean(experts):.2%}" if experts else "-",
        "barrier": f"{statistics.fmean(numbers['barrier']['height'] for numbers in why):.4f}" if why else "-",
        "gap": f"{statistics.fmean(max(numbers['gap']) for numbers in why):.3f}" if why else "-",
        "steps took": duration(images / rate) if rate else "-",
    }


def _models(run: TestedRun) -> list[str]:
    return [row["model"] for row in run.result["rows"]]


def _key(run: TestedRun, ignored: tuple[str, ...]) -> str:
    """Returns config and data as text, without fields that change no number or start with one of `ignored`."""
    fields = config_lib.flatten(run.config) | {"init.source": re.sub(r"(?<=seed)\d+", "", run.config.init.source)}
    kept = [(k, v) for k, v in fields.items() if k not in config_lib.FREE_ON_RESUME and not k.startswith(ignored)]
    return repr((kept, _images(run)))


def _source(config: Config) -> str:
    """Returns `init.source` without the seed of the run."""
    return re.sub(rf"(?<=seed){config.train.seed}(?!\d)", "", config.init.source)


def _data(run: TestedRun) -> object:
    return run.config.data.name, _images(run)


def _images(run: TestedRun) -> tuple[tuple[str, ...], dict[str, int | str] | None]:
    """Returns names of the classes, numbers of images and hashes, by which sets of one `data.name` are told apart."""
    return safe_io.read_classes(run.folder), safe_io.read_images(run.folder)


def _shared_name(names: Sequence[str]) -> str:
    """Returns what the names of a group share, without a trailing "_seed" or "-s"; one name alone stays as it is."""
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071 (names, not paths)
    return re.sub(r"[-_. ]+(seed|s)?[-_. ]*\d*$", "", shared) or names[0]


def tested(groups: Groups) -> str:
    """Returns the line about the test splits of the groups."""
    splits = {(group[0].result["data"], group[0].result["rows"][0]["images"]): None for group in groups.values()}
    return f"Accuracy on the test split of {'; '.join(f'{name}, {images:,} images' for name, images in splits)}."


def unfinished(groups: Groups) -> list[str]:
    """Returns a line for each group that was tested before the end of its training."""
    lines = []
    for name, ((folder, config, result), *_) in groups.items():
        images = (safe_io.read_images(folder) or {}).get("train", 0)  # results may be kept without that file
        if result["step"] < (last := config.train.epochs * (int(images) // config.train.batch_size)):
            lines.append(f"{name} was tested at step {result['step']:,} of {last:,}.")
    return lines


def opening(groups: Groups) -> str:
    """Returns the line about what was compared: hardware, versions, and the number of seeds of a run."""
    seeds = sorted({len(group) for group in groups.values()})
    made_with = results.made_with([run.result for group in groups.values() for run in group])
    return f"{made_with} n (seeds of a run): {' or '.join(map(str, seeds))}; ± is the sample deviation."


def setting_rows(groups: Groups) -> list[dict[str, str]]:
    """Returns a row of text cells per group: the settings in which groups differ."""
    configs = {name: record(group)["config"] for name, group in groups.items()}
    fields = next(iter(configs.values()))
    changed = [field for field in fields if len({str(config[field]) for config in configs.values()}) > 1]
    return [{"run": name, **{field: str(config[field]) for field in changed}} for name, config in configs.items()]
