"""Sets of Hugging Face's `datasets`, from local folders: no test reaches the hub."""

import io
import json

import datasets as hf
import numpy as np
import pytest
from PIL import Image

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data import sources
from jvitmoe.data.pictures import DataError

MODEL = ModelConfig(image_size=8, channels=3, classes=2)
NAMES = ("ant", "bee")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)
    hf.disable_progress_bars()


def pixels(split: str, count: int, levels: int = 255) -> np.ndarray:
    return np.random.default_rng(len(split)).integers(0, levels, (count, 8, 8, 3)).astype(np.uint8)


def write_parquet(root, labels=None, splits=(("train", 6), ("test", 4)), levels=255, **columns):
    """Writes a set as the hub keeps it: one parquet file per split, pictures encoded in it."""
    (root / "data").mkdir(parents=True)
    labels = labels or hf.ClassLabel(names=list(NAMES))
    for split, count in splits:
        features = hf.Features(
            {"image": hf.Image(), "label": labels, **{name: kind for name, (kind, _) in columns.items()}}
        )
        values = {
            "image": [Image.fromarray(image) for image in pixels(split, count, levels)],
            "label": [number % 2 for number in range(count)],
            **{name: [value] * count for name, (_, value) in columns.items()},
        }
        hf.Dataset.from_dict(values, features).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def write_images(root, levels=255):
    for split, count in (("train", 6), ("test", 4)):
        for number, image in enumerate(pixels(split, count, levels)):
            folder = root / split / NAMES[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    return root


def load(root, query="", model=MODEL):
    return sources.load(DataConfig(name=f"hf:{root}{query}", dir=str(root.parent / "cache")), model)


@pytest.mark.parametrize("write", [write_parquet, write_images])
def test_pictures_labels_and_names_are_those_of_the_set(tmp_path, write):
    dataset = load(write(tmp_path / "set"))
    assert dataset.class_names == NAMES
    for split, count, name in ((dataset.train, 6, "train"), (dataset.test, 4, "test")):
        written = {bytes(image): number % 2 for number, image in enumerate(pixels(name, count))}
        read = {bytes(image): int(label) for image, label in zip(split.images_NHWc, split.labels_N, strict=True)}
        assert read == written


def write_bmps(root, levels=255):
    """Writes a set as `write_parquet`, whose encoded pictures all have one size in bytes."""
    (root / "data").mkdir(parents=True)
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(NAMES))})
    for split, count in (("train", 6), ("test", 4)):
        encoded = [io.BytesIO() for _ in range(count)]
        for file, image in zip(encoded, pixels(split, count, levels), strict=True):
            Image.fromarray(image).save(file, "BMP")
        rows = [{"image": {"bytes": file.getvalue(), "path": None}, "label": n % 2} for n, file in enumerate(encoded)]
        hf.Dataset.from_list(rows, features).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("write", [write_parquet, write_images, write_bmps])
def test_a_set_is_known_by_its_pictures_names_sizes_labels_and_contents_wherever_it_lies(tmp_path, write):
    def facts(name):
        data = DataConfig(name=f"hf:{tmp_path / name}", dir=str(tmp_path / f"{name} cache"))
        return sources.browse(data, MODEL).facts()

    for name in ("set", "a copy that lies somewhere else"):
        write(tmp_path / name)
    assert facts("set") == facts("a copy that lies somewhere else")
    write(tmp_path / "other", levels=2)
    differ = {key for key, value in facts("set").items() if facts("other")[key] != value}
    assert differ == {"hash of train images and labels", "hash of test images and labels"}


def test_validation_images_are_the_same_streamed_or_not(tmp_path):
    root = write_parquet(tmp_path / "set", splits=(("train", 20), ("validation", 4)))
    data = DataConfig(name=f"hf:{root}", dir=str(tmp_path / "cache"))
    whole = sources.hold_out(sources.load(data, MODEL).train, 6)[1]
    stream = sources.hold_out(sources.browse(data, MODEL).train, 6)[1]
    np.testing.assert_array_equal(stream.labels_N, whole.labels_N)
    assert [label for _, label in (stream[n] for n in range(6))] == whole.labels_N.tolist()


def test_a_column_is_chosen_where_several_are_of_its_type_and_others_do_not_count(tmp_path):
    number = {"number": (hf.Value("int64"), 2)}
    assert load(write_parquet(tmp_path / "one", **number)).class_names == NAMES
    root = write_parquet(tmp_path / "set", **number, fine=(hf.ClassLabel(names=["a", "b", "c"]), 2))
    chosen = load(root, "?label=fine", ModelConfig(image_size=8, channels=3, classes=3))
    assert chosen.train.labels_N.tolist() == [2] * 6
    for query in ("", "?label=number", "?label=absent"):
        with pytest.raises(DataError, match=r"label, fine are of type ClassLabel; .*\?label="):
            load(root, query)


@pytest.mark.parametrize("name", ["hf:", "hf:./absent", "hf:nobody/nothing"])
def test_a_set_that_is_not_there_is_refused(name):
    with pytest.raises(DataError, match=name):
        sources.load(DataConfig(name=name), MODEL)


def test_a_set_without_a_test_split_images_or_names_of_classes_is_refused(tmp_path):
    for split in ("train", "test"):
        with pytest.raises(DataError, match=f"has the splits {split}"):
            load(write_parquet(tmp_path / split, splits=((split, 6),)))
    with pytest.raises(DataError, match="none are of type ClassLabel"):
        load(write_parquet(tmp_path / "numbers", hf.Value("int64")))
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.jsonl").write_text(json.dumps({"text": "a", "label": 1}) + "\n")
    with pytest.raises(DataError, match="none are of type Image"):
        load(tmp_path / "text")


def test_images_without_a_label_or_without_pixels_are_refused_where_they_are_used(tmp_path):
    root = write_parquet(tmp_path / "set", splits=(("train", 6), ("validation", 4)))
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(NAMES))})
    pictures = [Image.fromarray(image) for image in pixels("test", 2)]

    def write(split, images, labels):
        rows = hf.Dataset.from_dict({"image": images, "label": labels}, features)
        rows.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")

    write("test", pictures, [None, None])  # as the hub has test splits whose labels are kept back
    assert len(load(root).test) == 4
    for absent in (None, {"bytes": b"", "path": None}):
        write("train", [pictures[0], absent], [0, 1])
        with pytest.raises(DataError, match=r"image 1 of the train split of .* cannot be read"):
            load(root)
    for label in (None, -1):
        write("train", pictures, [0, label])
        with pytest.raises(DataError, match=f"row 1 of train has {label}"):
            load(root)
