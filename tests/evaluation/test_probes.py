"""Few-shot regression and nearest neighbours on features, and the command that reports them."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvitmoe.commands import evaluate
from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.data import sources, stream
from jvitmoe.data.batches import Resident
from jvitmoe.data.pictures import DataError
from jvitmoe.data.splits import Dataset, Records, Source, Split, check_fit, in_memory
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
    features_BD = vit.features(net, params, images)
    assert features_BD.shape == (5, 8)
    logits_BC = head.apply({"params": params["head"]}, features_BD)
    np.testing.assert_allclose(logits_BC, vit.logits(net, params, images), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_features_are_those_of_one_image_at_a_time_on_any_number_of_devices(
    tiny_config, tiny_split, damaged_7, noise, devices
):
    config = tiny_config(train={"devices": devices})
    mesh, (net, params) = make_mesh(config.train), noise()
    images_NHWc = jnp.asarray((tiny_split.images_NHWc / 255 - 0.2) / 0.3, jnp.float32)
    expected_ND = np.concatenate([vit.features(net, params, image[None]) for image in images_NHWc])
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


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_nearest_is_the_brute_force_vote(neighbours):
    train, test = clusters(200, 6, 0), clusters(300, 6, 1)
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (train.features_ND, test.features_ND)]
    right = 0
    for z, label in zip(unit[1], test.labels_N, strict=True):
        similarity_N, votes = unit[0] @ z, np.zeros(len(NAMES))
        for n in np.argsort(-similarity_N)[:neighbours]:
            votes[train.labels_N[n]] += np.exp(similarity_N[n] / 0.07)
        right += votes.argmax() == label
    assert probes.nearest(train, test, neighbours) == right / 300
    assert 0.25 < right / 300 < 1


def test_shots_are_fixed_by_the_seed_and_even_over_classes():
    labels_N = clusters(40, 2, 0).labels_N
    first = probes.draw_shots(labels_N, NAMES, 3, 0)
    assert np.bincount(labels_N[first]).tolist() == [3] * 4
    assert len(set(first)) == 12
    assert first.tolist() == probes.draw_shots(labels_N, NAMES, 3, 0).tolist()
    assert first.tolist() != probes.draw_shots(labels_N, NAMES, 3, 1).tolist()
    with pytest.raises(UserError, match="--few_shot is 11; class 'a' has 10 training images; give at most that many"):
        probes.draw_shots(labels_N, NAMES, 11, 0)
    with pytest.raises(UserError, match="class 'e' has 0 training images"):
        probes.draw_shots(labels_N, (*NAMES, "e"), 1, 0)


@pytest.mark.slow
def test_each_probe_has_a_row_for_each_model(tiny_config, tiny_split, noise):
    config, (net, params) = tiny_config(), noise()
    trees = {"merged": params, "EMA": jax.tree.map(lambda leaf: leaf**3, params)}
    data = Dataset(tiny_split, tiny_split, ("a", "b", "c"))
    rows = probes.measure(net, trees, data, config.data, 8, make_mesh(config.train), 2, 1)
    assert [(row["probe"], row["model"]) for row in rows] == [
        *(("2-shot", "merged"), ("1-nn", "merged")),
        *(("2-shot", "EMA"), ("1-nn", "EMA")),
    ]
    assert rows[0]["accuracy"] != rows[2]["accuracy"]
    assert rows[1]["accuracy"] == rows[3]["accuracy"] == 1.0  # the nearest training image is the test image itself


def test_few_shot_is_told_as_mean_and_deviation_over_three_draws(tiny_config, tiny_split, noise, monkeypatch):
    monkeypatch.setattr(probes, "few_shot", lambda *arguments: {0: 0.1, 1: 0.2, 2: 0.6}[arguments[-1]])
    config, (net, params) = tiny_config(), noise()
    data = Dataset(tiny_split, tiny_split, ("a", "b", "c"))
    (row,) = probes.measure(net, {"merged": params}, data, config.data, 8, make_mesh(config.train), 2, 0)
    assert row["accuracy"] == pytest.approx(0.3)
    assert row["accuracy_std"] == pytest.approx((0.14 / 2) ** 0.5)


@pytest.fixture
def workdir(experiment_run, tmp_path):
    return shutil.copytree(experiment_run, tmp_path / "run")


def test_evaluate_probes_and_counts_what_it_reports(workdir):
    code, out, err = call(evaluate.main, f"--workdir={workdir}", "--paths=1", "--few_shot=5", "--knn=20", "--devices=2")
    assert code == 0, err
    result, text = json.loads((workdir / "result.json").read_text()), (workdir / "report.md").read_text()
    few, near, *of_ema = result["probes"]
    assert [(probe["probe"], probe["model"]) for probe in of_ema] == [("5-shot", "EMA"), ("20-nn", "EMA")]
    about = {"model": "merged", "data": "digits", "test_images": 360}
    assert few.items() >= {**about, "probe": "5-shot", "train_images": 50}.items()
    assert near.items() >= {**about, "probe": "20-nn", "train_images": 1437}.items()
    assert min(few["accuracy"], near["accuracy"]) > 0.2  # chance is 0.1
    assert few["accuracy_std"] > 0
    assert "20-nn" in out
    assert "| 5-shot | merged | digits |" in text
    (row,) = (row for row in result["rows"] if "confusion" in row)
    assert row["model"] == "merged"
    assert np.trace(row["confusion"]) / np.sum(row["confusion"]) == row["accuracy"] <= row["top5"]
    labels_N = sources.load(Config().data, Config().model).test.labels_N
    assert np.sum(row["confusion"], 1).tolist() == np.bincount(labels_N).tolist()
    assert "## Classes, merged" in text
    assert "(confusion.png)" in text
    assert (workdir / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_probes_take_another_set_with_another_number_of_classes(workdir, tmp_path):
    rng = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "test") for name in ("dark", "bright")):
        folder = tmp_path / "set" / split / name
        folder.mkdir(parents=True)
        for n in range(6):
            pixels = rng.integers(0, 60, (8, 8)) + 180 * (name == "bright")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{n}.png")
    flags = ("--few_shot=4", "--knn=3", "--probe_data=folder", f"--probe_dir={tmp_path / 'set'}", "--paths=0")
    code, _, err = call(evaluate.main, f"--workdir={workdir}", *flags)
    assert code == 0, err
    result = json.loads((workdir / "result.json").read_text())
    assert [(row["data"], row["accuracy"], row["train_images"]) for row in result["probes"]] == [
        ("folder", 1.0, 8),
        ("folder", 1.0, 12),
    ] * 2  # merged and EMA
    assert result["data"] == "digits"
    for path in (tmp_path / "set").glob("*/*/*.png"):
        Image.open(path).resize((20, 16), Image.Resampling.NEAREST).save(path)
    code, _, err = call(evaluate.main, f"--workdir={workdir}", *flags)
    assert code == 0, err
    assert json.loads((workdir / "result.json").read_text())["probes"][0]["accuracy"] == 1.0


@pytest.mark.parametrize("stream", [False, True])
def test_probes_do_not_train_on_the_validation_images_of_the_run(stream, monkeypatch, tmp_path):
    config = Config(data=DataConfig(validation=37, stream=stream))
    whole = sources.load(config.data, config.model).train
    kept, _ = sources.hold_out(whole, 37)
    monkeypatch.setitem(sources.SOURCES, "other", sources.Digits)
    for probe_data, labels_N in (("", kept.labels_N), ("digits", kept.labels_N), ("other", whole.labels_N)):
        own, probed, _ = evaluate._data(config, tmp_path, evaluate.Probes(few_shot=5, data=probe_data))
        np.testing.assert_array_equal(probed.train.labels_N, labels_N)
        assert len(own.test) == len(probed.test) == 360


def test_another_folder_of_images_has_no_validation_images_of_the_run(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    for folder, split, name in itertools.product(("own", "other"), ("train", "test"), ("a", "b")):
        (tmp_path / folder / split / name).mkdir(parents=True)
        for n, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / folder / split / name / f"{n}.png")
    config = Config(data=DataConfig(name="folder", dir=str(tmp_path / "own"), validation=4))
    config.model.classes = 2
    for folder, count in (("own/../own", 20), ("other", 24)):
        asked = evaluate.Probes(knn=1, data="folder", dir=str(tmp_path / folder))
        assert len(evaluate._data(config, tmp_path, asked)[1].train) == count
    own, _, _ = evaluate._data(config, tmp_path, evaluate.NO_PROBES)
    assert (type(own.train), type(own.test)) == (Records, Split)  # without probes no training picture is read


def test_digits_of_another_size_are_probed_too():
    model = ModelConfig(image_size=16, classes=0)
    dataset = sources.load(DataConfig(crop="centre"), model)
    assert dataset.test.images_NHWc.shape == (360, 16, 16, 1)
    with pytest.raises(DataError, match="images of digits are 8x8x1"):
        sources.load(DataConfig(), model)


class Small(Source):
    """Images of 4 x 4 pixels in colour."""

    def browse(self):
        check_fit("small", (4, 4, 3), 2, self.model)
        raise AssertionError


class Fitting(Source):
    """Eight images of each of two classes."""

    def browse(self):
        images_NHWc = np.zeros((16, 8, 8, 1), np.uint8)
        split = Split(images_NHWc, (np.arange(16) % 2).astype(np.int32))
        return Dataset(in_memory(split), in_memory(split), ("even", "odd"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--few_shot=-1",), "--few_shot=-1: -1 is not a non-negative integer"),
        (("--probe_data=digits",), "--probe_data is 'digits'; name a probe on it: --few_shot=10 or --knn=20"),
        (("--knn=3", "--probe_dir=x"), "--probe_dir is 'x'; name the set in it: --probe_data=NAME"),
        (("--knn=3", "--probe_data=folder"), "data.name=folder needs the folder: set --probe_dir="),
        (("--knn=1438",), "--knn is 1438; it must be at most the 1437 training images"),
        (("--few_shot=9", "--probe_data=fitting"), "--few_shot is 9; class 'even' has 8 training images"),
        (
            ("--knn=3", "--probe_data=small"),
            "--probe_data is 'small', but images of small are 4x4x3 but config.model expects 8x8x1; "
            "write them into an image folder, and give --probe_data=folder --probe_dir=DIR",
        ),
    ],
)
def test_probes_are_refused_in_one_line(workdir, monkeypatch, arguments, message):
    monkeypatch.setitem(sources.SOURCES, "small", Small)
    monkeypatch.setitem(sources.SOURCES, "fitting", Fitting)
    code, _, err = call(evaluate.main, f"--workdir={workdir}", "--paths=0", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
