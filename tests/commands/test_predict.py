"""Pictures in, classes out: by command and by object, also where some of the pictures are none."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

import jvitmoe
from jvitmoe.commands import predict
from jvitmoe.config import Config, ModelConfig
from jvitmoe.data import pictures, sources
from jvitmoe.data.pictures import DataError
from jvitmoe.errors import UserError
from jvitmoe.interop import classifier, load, manifest
from jvitmoe.interop.formats import TARGETS
from processes import call, refused, succeed


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns the folder of a small ViT for digits that was never trained, as an export for timm writes it."""
    folder, config = tmp_path_factory.mktemp("exported"), ModelConfig(width=8, hidden=12, depth=2, heads=2, patch=4)
    rng = np.random.default_rng(0)
    params = {name: 0.3 * rng.normal(size=shape).astype("f") for name, shape in load._shapes(config).items()}
    TARGETS["timm"].write(folder, load.Source(Path("run"), "run", params, config, tuple("0123456789")), config)
    manifest.write(folder)
    return folder


@pytest.fixture(scope="module")
def model(exported):
    return jvitmoe.load(exported)


@pytest.fixture(scope="module")
def digits():
    return sources.load(Config().data, Config().model).test


@pytest.fixture
def folder(digits, tmp_path):
    for number in range(3):
        Image.fromarray(digits.images_NHWc[number, ..., 0]).save(tmp_path / f"digit{number}.png")
    return tmp_path


def test_files_their_bytes_and_arrays_get_the_same_classes(model, digits, folder):
    by_array, paths = model(digits.images_NHWc[:3]), sorted(folder.iterdir())
    assert model(paths) == model(folder) == model([paths[0].read_bytes(), *paths[1:]]) == by_array
    assert model(str(paths[1])) == model(paths[1].read_bytes()) == model(digits.images_NHWc[1])
    for number, (guesses,) in enumerate(map(model, digits.images_NHWc[:3])):  # another program than for three
        assert [guess.label for guess in guesses] == [guess.label for guess in by_array[number]]
        assert [g.probability for g in guesses] == pytest.approx([g.probability for g in by_array[number]], abs=1e-6)
    with pytest.raises(DataError, match="the picture"):
        model(b"no picture")


def test_predictions_are_sorted_named_and_sum_to_one(model, digits):
    (guesses,) = model(digits.images_NHWc[0], top=10)
    assert sorted(guess.label for guess in guesses) == list(range(10))
    assert all(guess.name == str(guess.label) for guess in guesses)
    shares = [guess.probability for guess in guesses]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert len(model(digits.images_NHWc[0])[0]) == 5


def test_a_model_says_what_it_is(model):
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert repr(model) == f"Classifier(10 classes: 0, 1, 2 and 7 more; 8x8x1; {count:,} parameters)"


def test_any_number_of_images_is_classified(model, digits):
    """Also more than one batch holds, and none."""
    found = model.logits(digits.images_NHWc)
    assert len(np.unique(found.argmax(1))) > 1
    np.testing.assert_allclose(model.logits(digits.images_NHWc[:5]), found[:5], atol=1e-6)
    assert model(digits.images_NHWc[:0]) == []


ZEROS = np.zeros((2, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    "images",
    [
        ZEROS.astype(np.float32),
        np.zeros((2, 9, 9, 1), np.uint8),
        ZEROS[0, ..., 0],
        [ZEROS[0], np.zeros((9, 9, 1), np.uint8)],
    ],
)
def test_arrays_of_another_shape_or_type_are_refused(model, images):
    with pytest.raises(UserError, match=r"they must be uint8 \(N, 8, 8, 1\)"):
        model(images)


def test_a_trained_model_comes_with_the_package_and_a_file_of_its_name_goes_before_it(tmp_path, monkeypatch):
    folder = load.SHIPPED / "cifar10_cct"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "SHA256SUMS", load.CONFIG, load.WEIGHTS]
    assert (folder / load.WEIGHTS).stat().st_size < 1.3e6
    picture = Image.new("RGB", (320, 320), "skyblue")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 210, 320, 320), fill="steelblue")
    draw.polygon([(40, 190), (280, 190), (245, 245), (75, 245)], fill="dimgray")
    draw.rectangle((110, 140, 200, 190), fill="white")
    draw.rectangle((150, 95, 175, 140), fill="firebrick")
    picture.save(tmp_path / "picture.png")
    listed = json.loads(succeed(predict.main, "--model=cifar10_cct", "--json", "--top=10", tmp_path / "picture.png"))
    names = [guess["name"] for guess in listed[0]["classes"]]
    assert names[0] == "ship"
    assert sorted(names) == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10_cct").mkdir()
    with pytest.raises(UserError, match=r"'cifar10_cct/model\.safetensors' is not a file"):
        jvitmoe.load("cifar10_cct")


def test_hidden_files_in_a_folder_are_skipped_as_in_training(folder):
    before, _ = pictures.find([folder])
    for name in (".hidden.png", "._digit0.png"):  # macOS writes the second, which is no image
        (folder / name).write_bytes(b"no image")
    assert pictures.find([folder]) == (before, [])
    assert pictures.find([folder / ".hidden.png"]) == ([folder / ".hidden.png"], [])


def test_the_table_and_the_json_tell_the_same_of_pictures_read_a_few_at_a_time(exported, folder, monkeypatch):
    arguments = f"--workdir={exported}", folder, "--top=2"
    table = succeed(predict.main, *arguments)
    counts, run = [], classifier.Classifier.__call__
    monkeypatch.setattr(classifier, "BATCH", 2)
    monkeypatch.setattr(
        classifier.Classifier, "__call__", lambda *args, **rest: counts.append(len(args[1])) or run(*args, **rest)
    )
    found = json.loads(succeed(predict.main, *arguments, "--json"))
    assert counts == [2, 1]
    assert [entry["file"] for entry in found] == [str(folder / f"digit{n}.png") for n in range(3)]
    for entry in found:
        assert len(entry["classes"]) == 2
        for guess in entry["classes"]:
            assert f"{guess['name']} {guess['probability']:.1%}" in table


def test_what_was_assumed_of_weights_of_another_library_is_told(exported, folder, tmp_path):
    out = shutil.copytree(exported, tmp_path / "timm")
    about = json.loads((out / "config.json").read_text())
    about["pretrained_cfg"]["crop_pct"] = 0.5
    (out / "config.json").write_text(json.dumps(about))
    (out / "SHA256SUMS").unlink()
    code, _, err = call(predict.main, f"--workdir={out}", folder)
    assert code == 0
    assert [line[:16] for line in err.splitlines()] == ["source      its "]  # its crop
    assert "leave --checkpoint" in refused(predict.main, f"--workdir={out}", folder, "--checkpoint=best")


def test_unreadable_files_are_reported_skipped_and_the_rest_is_done(exported, folder):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    huge = Image.new("1", (20_000, 6_000))
    huge.save(folder / "huge.png")
    # Pillow hands what says it is PostScript to another program, unless it is told not to.
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    (folder / "empty").mkdir()
    pipe = folder / "empty" / "pipe.png"
    os.mkfifo(pipe)
    more = (folder / "none.png", folder / "empty", pipe)
    code, out, err = call(predict.main, "--json", f"--workdir={exported}", folder, *more)
    assert code == 1
    assert len(json.loads(out)) == 3
    lines = err.splitlines()
    assert len(lines) == 6
    for name in ("broken.png", "huge.png", "none.png", "empty", "script.png", "pipe.png"):
        assert any(line.startswith("skipped: ") and name in line for line in lines), name
    assert "it is damaged, or none of BMP, GIF, " in next(line for line in lines if "broken.png" in line)
    assert call(predict.main, f"--workdir={exported}", folder / "broken.png")[:2] == (1, "")


def test_where_no_picture_can_be_no_model_is_read(folder, monkeypatch):
    monkeypatch.setattr(classifier, "load", lambda *_: 1 / 0)
    (folder / "empty").mkdir()
    code, out, err = call(predict.main, "--workdir=x", folder / "none.png", "https://host/a.png", folder / "empty")
    assert (code, out, err.count("skipped: ")) == (1, "", 3)
    assert "https://host/a.png is a URL; give files or folders" in err


def test_names_of_files_cannot_control_the_terminal(exported, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "\x1b[2J.png").write_bytes(b"no picture")
    (folder / "digit0.png").rename(folder / "\x1b[3J.png")
    code, out, err = call(predict.main, f"--workdir={exported}", folder)
    assert code == 1
    assert r"\x1b[2J.png" in err
    assert r"\x1b[3J.png" in out
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("x.png", "--workdir"),
        ("--workdir={run}", "no picture"),
        ("--workdir={run} --top=0 x.png", "--top"),
        ("--workdir=no/where --checkpoint=best {run}/config.json", "no/where"),
        ("--workdir=gs://bucket/x {run}/config.json", "'gs://bucket/x' is not a file"),
    ],
)
def test_predict_refuses_in_one_line(exported, arguments, named):
    assert named in refused(predict.main, *arguments.format(run=exported).split())
