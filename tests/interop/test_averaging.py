"""The mean of models that were trained apart: what it is, what may not be averaged, and when it may be shipped."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jvitmoe.commands import average, export, start
from jvitmoe.commands.average import average as average_models
from jvitmoe.config import Config, DataConfig, ModelConfig, RoutingConfig
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.interop import averaging, load, starts
from jvitmoe.interop.averaging import Scores
from jvitmoe.interop.formats import TARGETS, base
from processes import refused

MODEL = ModelConfig(width=8, hidden=12, depth=2, heads=2, patch=4, cls_position=True)
NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Returns a folder with a start, and with models `a` to `d` that moved away from it at random."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    start.start(Config(model=dataclasses.replace(MODEL)), NAMES, root / "start")
    begin = load.read(root / "start")
    for number, name in enumerate("abcd", 1):
        moved = {key: leaf + rng.normal(0, 0.02, leaf.shape).astype("f") for key, leaf in begin.params.items()}
        write(root / name, dataclasses.replace(begin, params=moved), start=starts.digest(begin), images=100 * number)
    return root


def write(folder: Path, source: load.Source, **fields) -> None:
    """Writes a model as a site exports it."""
    source = dataclasses.replace(source, config=None, **fields)
    target = TARGETS["safetensors"]
    export.write(folder, target, source, target.sample(source, base.noise(source.model)))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def test_a_mean_is_that_of_the_files_in_float64_rounded_once_in_any_order(made, tmp_path):
    average_models([made / name for name in "abc"], tmp_path / "abc", made / "start")
    average_models([made / name for name in "cab"], tmp_path / "cab")
    average_models([made / name for name in "abc"], tmp_path / "images", made / "start", weights="images")
    files = [arrays(made / name) for name in "abc"]
    for name, leaf in arrays(tmp_path / "abc").items():
        several = np.stack([file[name] for file in files]).astype(np.float64)
        np.testing.assert_array_max_ulp(leaf, several.mean(0).astype(np.float32), 1)
        assert (leaf == several.mean(0).astype(np.float32)).mean() > 0.999  # NumPy adds in another order
        np.testing.assert_array_equal(arrays(tmp_path / "cab")[name], leaf)
        by_images = (several * np.array([1, 2, 3]).reshape(-1, *[1] * leaf.ndim) / 6).sum(0).astype(np.float32)
        np.testing.assert_array_max_ulp(arrays(tmp_path / "images")[name], by_images, 1)


@pytest.mark.parametrize("target", ["timm", "hf"])
def test_files_of_another_library_are_averaged_with_ours_if_the_start_is_given(made, tmp_path, target):
    source = load.read(made / "b")
    theirs, sample = TARGETS[target], TARGETS[target].sample(source, base.noise(source.model))
    export.write(tmp_path / "b", theirs, source, sample)
    average_models([made / "a", tmp_path / "b"], tmp_path / "mixed", made / "start")
    average_models([made / "a", made / "b"], tmp_path / "ours", made / "start")
    for name, leaf in arrays(tmp_path / "ours").items():
        np.testing.assert_allclose(arrays(tmp_path / "mixed")[name], leaf, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="says nothing of its start"):
        average_models([made / "a", tmp_path / "b"], tmp_path / "out")


def test_the_mean_of_copies_is_the_copy_and_all_the_way_back_is_the_start(made):
    begin, one = load.read(made / "start"), averaging.Model("a", str(made / "a"), "1", 5)
    for count in (2, 3, 7):
        for weights in ([], [3.0] * count, [*range(1, count + 1)]):
            found = averaging.mean([one] * count, weights)
            assert all(np.array_equal(leaf, found[name]) for name, leaf in one.read().items())
    back = averaging.mean([one, one._replace(path=str(made / "b"))], [], begin, 1.0)
    assert all(np.array_equal(leaf, back[name]) for name, leaf in begin.params.items())


def test_equal_counts_of_images_are_equal_weights(made):
    models = [averaging.Model(name, str(made / name), name, 40) for name in "abcd"]
    equal, images = averaging.mean(models), averaging.mean(models, [model.images for model in models])
    assert all(np.array_equal(leaf, images[name]) for name, leaf in equal.items())


def test_a_greedy_soup_is_never_worse_than_its_best_model_where_it_was_chosen(made):
    rng, models = np.random.default_rng(1), [averaging.Model(n, str(made / n), n, 0) for n in "abcd"]
    for _ in range(5):
        direction = {name: rng.normal(size=leaf.shape) for name, leaf in models[0].read().items()}

        def score(flat, direction=direction):
            value = sum(float((flat[name] * weight).sum()) for name, weight in direction.items())
            return Scores(np.arange(1000) < 500 + 40 * value, np.zeros(1000))

        kept = averaging.greedy(models, score)
        assert score(averaging.mean(kept)).accuracy >= max(score(model.read()).accuracy for model in models)


def change(made: Path, folder: Path, **fields) -> Path:
    write(folder, load.read(made / "a"), **{"start": load.read(made / "a").start, **fields})
    return folder


@pytest.mark.parametrize(
    ("change_of", "rule"),
    [
        ({"start": "0123456789abcdef"}, "another start"),
        ({"classes": (*NAMES[:8], "9", "8")}, "other classes"),
        ({"mean": (0.4,)}, "data.mean"),
        ({"crop": "centre"}, "data.crop"),
        ({"start": ""}, "says nothing of its start"),
    ],
)
def test_what_may_not_be_averaged_is_one_line_before_pictures_are_read(made, tmp_path, change_of, rule):
    other = change(made, tmp_path / "other", **change_of)
    with pytest.raises(UserError, match=rule) as error:
        average_models([made / "b", other], tmp_path / "out", data=DataConfig("folder", "nowhere"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_damaged_equal_few_and_foreign_models_are_refused_in_one_line(made, tmp_path):
    def message(*models, **options) -> str:
        argv = [*map(str, models), *(f"--{name}={value}" for name, value in options.items())]
        return refused(average.main, *argv, f"--out={tmp_path / 'out'}")

    params = {name: np.full_like(leaf, np.nan) for name, leaf in load.read(made / "a").params.items()}
    with pytest.raises(UserError):  # an export of them cannot be checked
        change(made, tmp_path / "nan", params=params)
    wide = dataclasses.replace(MODEL, hidden=16)
    start.start(Config(model=wide), NAMES, tmp_path / "wide")
    change(made, tmp_path / "copy")
    change(made, tmp_path / "damaged", params={k: 2 * v for k, v in load.read(made / "a").params.items()})
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert "at least two" in message(made / "a")
    assert "each model once" in message(made / "a", tmp_path / "copy")
    assert "SHA256SUMS" in message(made / "a", tmp_path / "damaged")
    assert "model.hidden" in message(made / "a", tmp_path / "wide", start=made / "start")
    assert "--start" in message(made / "a", made / "b", toward_start=0.5)
    assert "--data_dir" in message(made / "a", made / "b", weights="greedy")
    assert "--weights is" in message(made / "a", made / "b", weights="equl")
    assert not (tmp_path / "out").exists()
    shared = Config(model=dataclasses.replace(MODEL, shared_hidden=8), routing=RoutingConfig(experts=2, kind="topk"))
    with pytest.raises(ConfigError, match="shared_hidden is 8"):
        start.start(shared, NAMES, tmp_path / "shared")


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", -1), ("images", 10**40), ("images", "many"), ("start", 5), ("averaged", [1]), ("averaged", {"of": 3})],
)
def test_edited_numbers_of_an_export_are_one_line(made, tmp_path, name, value):
    shutil.copytree(made / "a", tmp_path / "a")
    (tmp_path / "a" / "SHA256SUMS").unlink()
    about = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(about | {name: value}))
    assert "config.json" in refused(average.main, tmp_path / "a", made / "b", f"--out={tmp_path / 'out'}")


def test_weights_that_are_not_finite_are_named(made, tmp_path):
    params = {**load.read(made / "a").params}
    params["head.logits.bias"] = np.full_like(params["head.logits.bias"], np.inf)
    source = dataclasses.replace(load.read(made / "a"), params=params)
    with pytest.raises(UserError, match=r"head\.logits\.bias.* not finite"):
        averaging._check("x", source, source, source.start, True)


def scored(right_N: list[int]) -> Scores:
    return Scores(np.array(right_N, bool), np.zeros(len(right_N)))


def test_the_verdict_needs_every_interval_above_0_to_be_better_and_one_below_0_to_be_worse():
    mean = scored([1] * 90 + [0] * 10)
    sites = {"a": scored([1] * 50 + [0] * 50), "b": scored([1] * 60 + [0] * 40)}
    assert averaging.verdict(mean, sites, scored([1] * 70 + [0] * 30)).startswith(
        "The mean is better than every site and than the start: +20.0 points against the start"
    )
    assert averaging.verdict(mean, sites, None).startswith("The mean is better than every site: +30.0 points against b")
    assert averaging.verdict(mean, sites, scored([1] * 88 + [0] * 12)).startswith("Not decided")
    worse = averaging.verdict(mean, sites, scored([1] * 100))
    assert worse.startswith("The mean is worse than the start by 10.0 points")
    assert worse.endswith("do not ship it.")
    few = {name: scored([1] * 3 + [0] * 2) for name in "abcdefgh"}
    assert averaging.verdict(scored([1] * 5), few, None).startswith("Not decided")


@pytest.mark.parametrize(("count", "better", "worse"), [(40, 0.2, 0.1), (300, 0.06, 0.03), (1000, 0.0, 0.0)])
def test_the_interval_of_a_difference_holds_it_in_95_percent(count, better, worse):
    rng, held = np.random.default_rng(count), 0
    for _ in range(2000):
        kind_N = rng.choice(3, count, p=[better, worse, 1 - better - worse])
        one_N, other_N = kind_N == 0, kind_N == 1
        found = averaging.difference(one_N, other_N)
        assert found.low <= found.points <= found.high
        held += found.low <= 100 * (better - worse) <= found.high
    assert held / 2000 > 0.94
