"""Few-shot regression on features, and the command that reports it."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe.commands import evaluate
from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.data import sources, stream
from jvitmoe.data.batches import Resident
from jvitmoe.data.pictures import DataError
from jvitmoe.data.splits import Dataset, Records, Split, in_memory
from jvitmoe.errors import UserError
from jvitmoe.evaluation import probes
from jvitmoe.evaluation.probes import Features
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import vit
from jvitmoe.models.layers import Head
from processes import call

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def noise(tiny_config):
    """Returns a maker of (model, random parameters) with other settings of the model."""

    def make(**settings):
        net, rng = vit.build(tiny_config(model=settings).model), np.random.default_rng(0)
        return net, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), vit.shapes(net))

    return make


@pytest.mark.parametrize("settings", [{"pool": "cls"}, {"pool": "mean"}, {"head_hidden": 6}])
def test_the_head_on_the_features_gives_the_logits(noise, settings):
    net, params = noise(**settings)
    images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    head = Head(3, net.config.head_hidden, net.dtype)
    features_BD, wanted_BC = jax.jit(lambda x: (vit.features(net, params, x), vit.logits(net, params, x)))(images)
    assert features_BD.shape == (5, 8)
    logits_BC = head.apply({"params": params["head"]}, features_BD)
    np.testing.assert_allclose(logits_BC, wanted_BC, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_features_are_those_of_one_image_at_a_time_on_any_number_of_devices(
    tiny_config, tiny_split, damaged_7, noise, devices
):
    config = tiny_config(train={"devices": devices})
    mesh, (net, params) = make_mesh(config.train), noise()
    images_NHWc = jnp.asarray((tiny_split.images_NHWc / 255 - 0.2) / 0.3, jnp.float32)
    of_one = jax.jit(functools.partial(vit.features, net))
    expected_ND = np.concatenate([of_one(params, image[None]) for image in images_NHWc])
    extract = probes.make_extract(net, DataConfig(mean=(0.2,), std=(0.3,)))
    whole, rest = np.arange(26), np.delete(np.arange(26), 7)

    said = []
    streamed = stream.Streamed(in_memory(tiny_split), 8, mesh)
    skipping = stream.Streamed(damaged_7, 8, mesh, stream.Damaged(100, said.append))
    every = (Resident(tiny_split, 8, mesh), whole), (streamed, whole), (skipping, rest)
    for shown, kept in every:
        features_ND, labels_N = extract(params, shown)
        np.testing.assert_allclose(features_ND, expected_ND[kept], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(labels_N, tiny_split.labels_N[kept])
    (line,) = said
    assert line.startswith("1 of 100 training images: picture 7 cannot be read")


def clusters(count, width, seed):
    """Returns the features of four classes that overlap."""
    rng = np.random.default_rng(seed)
    labels_N = rng.permutation(np.arange(count) % len(NAMES)).astype(np.int32)
    centres_CD = np.random.default_rng(9).normal(size=(len(NAMES), width))
    scale_D = 1 + np.arange(width)
    features_ND = (centres_CD[labels_N] * 1.5 * width**-0.5 + rng.normal(size=(count, width))) * scale_D + 3
    return Features(features_ND.astype(np.float32), labels_N)


@pytest.mark.parametrize(("shots", "width"), [(1, 6), (10, 6), (10, 64)])  # 64 features are more than 40 images
def test_few_shot_is_the_closed_form_of_ridge_regression(shots, width):
    train, test = clusters(200, width, 0), clusters(500, width, 1)
    for seed in (0, 1):
        index = probes.draw_shots(train.labels_N, NAMES, shots, seed)
        x, y = train.features_ND[index].astype(float), -np.ones((len(index), len(NAMES)))
        y[np.arange(len(index)), train.labels_N[index]] = 1
        mean, std = x.mean(0), x.std(0) + 1e-5
        x, z = (np.column_stack([(f - mean) / std, np.full(len(f), 100.0)]) for f in (x, test.features_ND))
        weights = np.linalg.inv(x.T @ x + 1024 * np.eye(width + 1)) @ x.T @ y
        expected = np.mean((z @ weights).argmax(1) == test.labels_N)
        assert probes.few_shot(train, test, NAMES, shots, seed) == expected
        assert 0.25 < expected < 1


def test_few_shot_of_one_class_is_always_right():
    one = Features(clusters(20, 6, 0).features_ND, np.zeros(20, np.int32))
    assert probes.few_shot(one, one, ("all",), 5, 0) == 1


def test_shots_are_fixed_by_the_seed_and_even_over_classes():
    labels_N = clusters(40, 2, 0).labels_N
    first = probes.draw_shots(labels_N, NAMES, 3, 0)
    assert np.bincount(labels_N[first]).tolist() == [3] * 4
    assert len(set(first)) == 12
    assert first.tolist() == probes.draw_shots(labels_N, NAMES, 3, 0).tolist()
    assert first.tolist() != probes.draw_shots(labels_N, NAMES, 3, 1).tolist()
    with pytest.raises(UserError, match="--few_shot is 11; class 'a' has 10 training images"):
        probes.draw_shots(labels_N, NAMES, 11, 0)
    with pytest.raises(UserError, match="class 'e' has 0 training images"):
        probes.draw_shots(labels_N, (*NAMES, "e"), 1, 0)


def test_few_shot_is_told_of_each_model_as_mean_and_deviation_over_three_draws(
    tiny_config, tiny_split, noise, monkeypatch
):
    monkeypatch.setattr(probes, "few_shot", lambda *arguments: {0: 0.1, 1: 0.2, 2: 0.6}[arguments[-1]])
    config, (net, params) = tiny_config(), noise()
    data = Dataset(tiny_split, tiny_split, ("a", "b", "c"))
    rows = probes.measure(net, {"merged": params, "EMA": params}, data, config.data, 8, make_mesh(config.train), 2)
    assert [(row["probe"], row["model"]) for row in rows] == [("2-shot", "merged"), ("2-shot", "EMA")]
    assert rows[0]["accuracy"] == pytest.approx(0.3)
    assert rows[0]["accuracy_std"] == pytest.approx((0.14 / 2) ** 0.5)


@pytest.fixture
def workdir(experiment_run, tmp_path):
    return shutil.copytree(experiment_run, tmp_path / "run")


def test_evaluate_probes_and_counts_what_it_reports(workdir):
    code, out, err = call(evaluate.main, f"--workdir={workdir}", "--paths=1", "--few_shot=5", "--devices=2")
    assert code == 0, err
    result, text = json.loads((workdir / "result.json").read_text()), (workdir / "report.md").read_text()
    few, of_ema = result["probes"]
    assert (of_ema["probe"], of_ema["model"]) == ("5-shot", "EMA")
    assert few.items() >= {"model": "merged", "probe": "5-shot", "train_images": 50, "test_images": 360}.items()
    assert few["accuracy"] > 0.2  # chance is 0.1
    assert few["accuracy_std"] > 0
    assert "5-shot" in out
    assert "| 5-shot | merged |" in text
    (row,) = (row for row in result["rows"] if "confusion" in row)
    assert row["model"] == "merged"
    assert np.trace(row["confusion"]) / np.sum(row["confusion"]) == row["accuracy"] <= row["top5"]
    labels_N = sources.load(Config().data, Config().model).test.labels_N
    assert np.sum(row["confusion"], 1).tolist() == np.bincount(labels_N).tolist()
    assert "## Classes, merged" in text
    assert "(confusion.png)" in text
    assert (workdir / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stream", [False, True])
def test_a_probe_does_not_train_on_the_validation_images_of_the_run(stream, workdir, monkeypatch):
    restore = evaluate._restore

    def held_out(*arguments):
        config, *rest = restore(*arguments)
        config.data.validation, config.data.stream = 300, stream
        return config, *rest

    monkeypatch.setattr(evaluate, "_restore", held_out)
    kept, _ = sources.hold_out(sources.load(Config().data, Config().model).train, 300)
    smallest = min(np.bincount(kept.labels_N))
    code, _, err = call(evaluate.main, f"--workdir={workdir}", "--paths=0", "--few_shot=1000")
    assert code == 2, err
    assert re.search(rf"class '\d' has {smallest} training images", err), err


def test_without_a_probe_no_training_picture_is_read(tmp_path):
    data = evaluate._data(Config(), tmp_path, False)
    assert (type(data.train), type(data.test)) == (Records, Split)


def test_digits_of_another_size_are_read():
    model = ModelConfig(image_size=16, classes=0)
    dataset = sources.load(DataConfig(crop="centre"), model)
    assert dataset.test.images_NHWc.shape == (360, 16, 16, 1)
    with pytest.raises(DataError, match="images of digits are 8x8x1"):
        sources.load(DataConfig(), model)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--few_shot=-1", "--few_shot=-1: -1 is not a non-negative integer"),
        ("--few_shot=1000", "--few_shot is 1000; class '8' has"),
    ],
)
def test_a_probe_is_refused_in_one_line(workdir, argument, message):
    code, _, err = call(evaluate.main, f"--workdir={workdir}", "--paths=0", argument)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
