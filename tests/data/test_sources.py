import contextlib
import functools
import hashlib
import http.server
import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.data import sources, splits
from jvitmoe.data.pictures import DataError
from jvitmoe.data.sources import hold_out, load, tfds
from jvitmoe.data.splits import Split

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tfds"
TFDS_DIR = Path(os.environ.get("JVITMOE_TFDS_DIR", SHARED))
CIFAR_MODEL = ModelConfig(image_size=32, channels=3)
ARCHIVE = "cifar-10-binary.tar.gz"
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="preparing a set needs TensorFlow: jvitmoe[prepare]"
)


def refused(name: str, place: Path | str, model: ModelConfig, says: str = "", **data: object) -> None:
    """Checks that a set is refused in one line that says this."""
    with pytest.raises(DataError) as error:
        load(DataConfig(name=name, dir=str(place), **data), model)
    assert len(str(error.value).splitlines()) == 1
    assert says in str(error.value)


# digits and validation images


def test_digits_are_split_once_and_for_all_into_1437_and_360():
    from sklearn.datasets import load_digits

    one, two = load(DataConfig(), ModelConfig()), load(DataConfig(), ModelConfig())
    assert (len(one.train), len(one.test), one.class_names) == (1437, 360, tuple("0123456789"))
    for split, again in ((one.train, two.train), (one.test, two.test)):
        assert split.images_NHWc.shape == (len(split), 8, 8, 1)
        assert split.images_NHWc.dtype == np.uint8
        assert split.labels_N.dtype == np.int32
        assert split.images_NHWc.flags.c_contiguous
        np.testing.assert_array_equal(split.images_NHWc, again.images_NHWc)
    values, labels = load_digits(return_X_y=True)
    images = np.concatenate([one.train.images_NHWc, one.test.images_NHWc]).reshape(1797, 64)
    assert sorted(map(bytes, images)) == sorted(bytes(np.rint(v * 255 / 16).astype(np.uint8)) for v in values)
    share = np.bincount(labels) * 360 / 1797
    assert np.all(np.abs(np.bincount(one.test.labels_N) - share) < 1)


def numbered(labels: np.ndarray) -> Split:
    """Returns images that carry their own number, so that each can be told from the others."""
    images = np.arange(len(labels), dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2, 1)
    return Split(images, labels.astype(np.int32))


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99])
def test_held_out_images_leave_the_rest_and_every_class_gives_its_share(count):
    split = numbered(np.repeat([0, 1, 2, 5], [50, 30, 19, 1]))
    train, held = hold_out(split, count)
    np.random.seed(1)
    _, again = hold_out(split, count)
    np.testing.assert_array_equal(held.images_NHWc, again.images_NHWc)
    assert (len(train), len(held)) == (100 - count, count)
    numbers = [part.images_NHWc.reshape(-1, 4).view(np.uint32).ravel() for part in (train, held)]
    assert sorted(np.concatenate(numbers)) == list(range(100))
    for part, kept in zip((train, held), numbers, strict=True):
        np.testing.assert_array_equal(part.labels_N, split.labels_N[kept])
        assert np.all(np.diff(kept.astype(int)) > 0)
        assert part.images_NHWc.flags.c_contiguous
    for label, size in ((0, 50), (1, 30), (2, 19), (5, 1)):
        assert abs(np.sum(held.labels_N == label) - size * count / 100) < 1


@pytest.mark.parametrize("count", [-1, 100])
def test_holding_out_all_images_or_fewer_than_none_is_an_error(count):
    with pytest.raises(DataError):
        hold_out(numbered(np.zeros(100)), count)


def write_folder(root: Path, parts=("train", "test"), names=("cat", "dog"), mode="RGB", per_class=3) -> np.ndarray:
    """Writes PNG images of 8x8; returns their pixels, which differ from image to image, in the order of the paths."""
    shape = (len(parts), len(names) * per_class, 8, 8, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for part, images in zip(parts, pixels, strict=True):
        for i, image in enumerate(images):
            path = root / part / names[i // per_class] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze() if mode == "L" else image).save(path)
    return pixels


def folder(root: Path, **model) -> splits.Dataset:
    return load(DataConfig(name="folder", dir=str(root)), ModelConfig(**({"channels": 3, "classes": 2} | model)))


def test_a_set_that_serves_a_run_has_the_run_s_classes_in_their_order(tmp_path):
    write_folder(tmp_path)
    asked = DataConfig(name="folder", dir=str(tmp_path)), ModelConfig(channels=3, classes=2)
    for names in ((), ("cat", "dog")):
        assert sources.with_classes(sources.load, *asked, names).class_names == ("cat", "dog")
    for names, fault in ((("dog", "cat"), "'cat', and was 'dog'"), (("cat",), "'dog', and was None")):
        with pytest.raises(DataError, match=fault):
            sources.with_classes(sources.browse, *asked, names)


@pytest.mark.parametrize(("test", "mode", "channels"), [("test", "L", 1), ("val", "RGB", 3), ("validation", "RGBA", 4)])
def test_a_folder_gives_back_the_pixels_and_sorted_classes_written_into_it(tmp_path, monkeypatch, test, mode, channels):
    monkeypatch.setattr(splits, "GROUP", 2)  # several threads share it
    pixels = write_folder(tmp_path, ("train", test), mode=mode)
    for file in ("train/list.txt", "train/cat/notes.txt", "train/cat/._000.png", "train/dog/notes/list.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("not an image")
    for place in ("train", "train/dog"):
        shutil.copytree(tmp_path / test / "dog", tmp_path / place / ".hidden")
    dataset = folder(tmp_path, channels=channels)
    assert dataset.class_names == ("cat", "dog")
    for split, images in ((dataset.train, pixels[0]), (dataset.test, pixels[1])):
        np.testing.assert_array_equal(split.images_NHWc, images)
        np.testing.assert_array_equal(split.labels_N, [0, 0, 0, 1, 1, 1])
        assert (split.images_NHWc.dtype, split.labels_N.dtype) == (np.uint8, np.int32)


def png(path: Path) -> Path:
    return path / "train" / "dog" / "004.png"


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def clear(path: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(path / part)


FOLDER_MISTAKES = {  # what is done, and the place that the line names; reading a picture itself: test_decode.py
    "no test": (lambda p: (p / "test").rename(p / "other"), "{root}/test"),
    "no train": (lambda p: (p / "train").rename(p / "other"), "{root}/train"),
    "nothing": (lambda p: [(p / part).rename(f"{p}-{part}") for part in ("train", "test")], "{root}/train"),
    "one picture of a flat class": (
        lambda p: [(p / "train" / "cat" / "000.png").rename(mkdir(p / "cat") / "0.png"), clear(p)],
        "class 'cat' of {root} has 1 picture",
    ),
    "no classes": (lambda p: [f.rename(p / f.name) for f in (p / "train").iterdir()], "{root}/train"),
    "an empty class": (lambda p: (p / "train" / "bird").mkdir(), "{root}/train/bird"),
    "another test class": (
        lambda p: (p / "test" / "dog").rename(p / "test" / "cow"),
        "dog only in training pictures and cow only in test pictures; both",
    ),
    "seven classes of test only": (
        lambda p: [shutil.copytree(p / "test" / "dog", p / "test" / name) for name in "abcdefg"],
        "a, b, c and 4 more only in test pictures; both",
    ),
    "an image beside classes": (lambda p: shutil.copy(png(p), p / "train"), "{root}/train/004.png"),
    "another size": (lambda p: Image.new("RGB", (10, 12)).save(png(p)), "{root}/train/dog/004.png is 12x10 pixels"),
    # Beyond what Pillow warns about: 144 MB of pixels in a small file.
    "a bomb": (lambda p: Image.new("1", (12000, 12000)).save(png(p)), "{root}/train/dog/004.png cannot be read"),
    "a pipe": (lambda p: [png(p).unlink(), os.mkfifo(png(p))], "{root}/train/dog/004.png cannot be read"),
}


def test_a_url_as_a_folder_is_refused_as_it_was_given():
    refused("folder", "gs://bucket/x", ModelConfig(), "'gs://bucket/x', a URL")


@pytest.mark.parametrize("mistake", FOLDER_MISTAKES)
def test_a_mistake_in_a_folder_is_one_line_that_names_the_place(tmp_path, mistake):
    write_folder(tmp_path)
    make, place = FOLDER_MISTAKES[mistake]
    make(tmp_path)
    refused("folder", tmp_path, ModelConfig(channels=3, classes=2), place.format(root=tmp_path))


def names(records: splits.Records) -> list[str]:
    return [record.name for record, _ in records.read(records.number_N)]


def test_a_flat_folder_is_split_by_the_names_of_its_files_and_more_pictures_move_none(tmp_path):
    for name, count in (("cat", 100), ("dog", 40), ("eel", 2)):
        mkdir(tmp_path / name)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    asked = DataConfig(name="folder", dir=str(tmp_path)), ModelConfig(channels=3, classes=3)
    found = sources.browse(*asked)
    train, test = names(found.train), names(found.test)
    assert sorted(train + test) == sorted(map(str, tmp_path.glob("*/*.png")))
    assert found.class_names == ("cat", "dog", "eel")
    for label, count in enumerate((100, 40, 2)):
        held = (found.test.labels_N == label).sum()
        assert 1 <= held < count
        assert abs(held - count / 5) < 3 * (count * 0.16) ** 0.5
    assert f"{100 - (found.test.labels_N == 0).sum()} + " in found.note
    for number in range(100, 150):
        Image.new("RGB", (8, 8)).save(tmp_path / "cat" / f"{number}.png")
    more = sources.browse(*asked)
    assert {*train} <= {*names(more.train)}
    assert {*test} <= {*names(more.test)}
    both = sources.labelled(*asked, found.class_names, "test")
    assert len(both) == len(more.train) + len(more.test)  # for a check of a model: all that is there
    with pytest.raises(DataError, match="3 classes"):  # nobody named the classes of the model
        sources.labelled(asked[0], ModelConfig(channels=3, classes=2), (), "test")


@pytest.mark.parametrize("is_split", [True, False])
def test_a_table_names_the_files_their_labels_and_perhaps_their_split(tmp_path, is_split):
    pixels = write_folder(tmp_path / "somewhere", parts=("a",), per_class=8)[0]
    paths = sorted((tmp_path / "somewhere").glob("*/*/*.png"))
    table = tmp_path / "set.csv"
    header, *rows = [["label", "file", "split"]] + [
        [path.parent.name.upper(), path.relative_to(tmp_path), "test" if n % 4 == 0 else "train"]
        for n, path in enumerate(paths)
    ]
    table.write_text("\n".join(",".join(map(str, row[: 2 + is_split])) for row in (header, *rows)))
    found = folder(table)
    assert found.class_names == ("CAT", "DOG")
    assert len(found.train) + len(found.test) == len(paths)
    if is_split:
        np.testing.assert_array_equal(found.test.images_NHWc, pixels[::4])
        np.testing.assert_array_equal(found.test.labels_N, [0, 0, 1, 1])
    for text, place in (
        ("file\n1.png", "must have the columns file and label"),
        ("file,label,split\n1.png,cat,no", "line 2 of "),
        ("file,label\n1.png,cat\n,dog", "line 3 of "),
    ):
        table.write_text(text)
        refused("folder", table, ModelConfig(channels=3, classes=2), place)


def test_folders_in_a_class_folder_are_of_that_class_and_links_are_not_followed_in_a_circle(tmp_path):
    write_folder(tmp_path)
    plain, dog = folder(tmp_path).train, tmp_path / "train" / "dog"
    (dog / "more" / "deep").mkdir(parents=True)
    for file in dog.glob("*.png"):
        file.rename(dog / "more" / "deep" / file.name)
    for name in (".", "..", "../..", str(tmp_path / "train")):
        (dog / f"link{len(name)}").symlink_to(name)
    outside, there = mkdir(tmp_path / "outside"), mkdir(tmp_path / "there")
    (dog / "there").symlink_to(there)
    (there / "and back").symlink_to(dog)
    deep = folder(tmp_path).train
    np.testing.assert_array_equal(deep.images_NHWc, plain.images_NHWc)
    np.testing.assert_array_equal(deep.labels_N, plain.labels_N)
    shutil.copy(dog / "more" / "deep" / "003.png", outside / "other.png")
    (dog / "other").symlink_to(outside)
    assert len(folder(tmp_path).train) == 7


def test_a_folder_read_picture_by_picture_is_known_by_names_sizes_labels_and_contents_wherever_it_lies(tmp_path):
    def facts(name: str) -> dict[str, object]:
        model = ModelConfig(channels=3, classes=2)
        return sources.browse(DataConfig(name="folder", dir=str(tmp_path / name)), model).facts()

    changes = {
        "copy": lambda path: None,
        "renamed": lambda path: path.rename(path.with_name("005b.png")),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "another of equal size": lambda path: path.write_bytes(path.read_bytes()[::-1]),
        "a pipe": lambda path: [path.unlink(), os.mkfifo(path)],
        "moved": lambda path: path.rename(path.parents[1] / "cat" / path.name),
    }
    write_folder(tmp_path / "set")
    for name, change in changes.items():
        shutil.copytree(tmp_path / "set", tmp_path / name)
        change(png(tmp_path / name))
        differ = {key for key, value in facts("set").items() if facts(name)[key] != value}
        assert differ == ({"hash of train images and labels"} if name != "copy" else set())
    png(tmp_path / "copy").unlink()
    png(tmp_path / "copy").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"cannot read all of .*004.png"):
        facts("copy")


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000])
def test_of_each_split_the_first_the_last_and_at_most_64_records_evenly_spaced_are_read_to_know_it(count):
    """What changes in the others, sizes and labels apart, is not found."""
    split, read = numbered(np.zeros(count)), []

    def fingerprint(labels_N, images_NHWc):
        def records(numbers):
            read[:] = numbers
            return splits.in_memory(Split(images_NHWc, labels_N)).read(numbers)

        return splits.Records(records, np.arange(count), None).fingerprint()

    known = fingerprint(split.labels_N, split.images_NHWc)
    sampled = list(read)
    assert (sampled[0], sampled[-1], len(sampled)) == (0, count - 1, min(64, count))
    assert set(np.diff(sampled)) <= {max(1, (count - 1) // 63), (count - 1) // 63 + 1}
    for number in range(0, count, 7):
        labels_N, images_NHWc = split.labels_N.copy(), split.images_NHWc.copy()
        labels_N[number] += 1  # of a source that knows labels only by reading records
        images_NHWc[number] ^= 1
        for changed in ((labels_N, split.images_NHWc), (split.labels_N, images_NHWc)):
            assert (fingerprint(*changed) != known) == (number in sampled)


def test_a_test_folder_without_classes_gives_way_to_the_validation_folder(tmp_path):
    pixels = write_folder(tmp_path, parts=("train", "val"))
    shutil.copytree(tmp_path / "val" / "dog", tmp_path / "test")  # as ImageNet's, which has no labels
    np.testing.assert_array_equal(folder(tmp_path).test.images_NHWc, pixels[1])
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DataError, match="/test holds no class folders"):
        folder(tmp_path)


def test_held_out_pictures_whose_labels_are_not_known_are_drawn_from_all():
    def read(number):
        raise AssertionError("a label was read")

    train, held = hold_out(splits.Records(read, np.arange(1000), None), 100)
    assert (len(train), len(held)) == (900, 100)
    assert sorted([*train.number_N, *held.number_N]) == list(range(1000))
    assert 300 < held.number_N.mean() < 700


@pytest.mark.parametrize(
    ("name", "validation", "same"),
    [("digits", 50, True), ("folder", 50, True), ("cifar10", 0, True), ("cifar10", 50, False)],
)
def test_a_run_may_go_on_as_a_stream_unless_that_would_hold_out_other_images(name, validation, same):
    old, new = (Config(data=DataConfig(name=name, validation=validation, stream=stream)) for stream in (False, True))
    assert sources.differences(old, new) == ({} if same else {"data.stream": (False, True)})
    assert sources.differences(new, old) == ({} if same else {"data.stream": (True, False)})


# TFDS: sets that are prepared


@pytest.mark.process
@pytest.mark.skipif(not (TFDS_DIR / "cifar10").is_dir(), reason=f"needs a prepared CIFAR-10 in {TFDS_DIR}")
def test_a_prepared_set_is_read_whole_without_tensorflow_or_jax():
    code = (
        "import sys; from jvitmoe.data.sources import load; from jvitmoe.config import DataConfig, ModelConfig\n"
        f"d = load(DataConfig(name='cifar10', dir={str(TFDS_DIR)!r}), ModelConfig(image_size=32, channels=3))\n"
        "print(d.train.images_NHWc.shape, d.test.images_NHWc.shape, d.train.images_NHWc.dtype, d.class_names[3])\n"
        "print(set(map(int, __import__('numpy').bincount(d.train.labels_N))), d.train.images_NHWc.mean() // 1)\n"
        "print([name for name in ('tensorflow', 'jax') if name in sys.modules])"
    )
    lines = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert lines == ["(50000, 32, 32, 3) (10000, 32, 32, 3) uint8 cat", "{5000} 120.0", "[]"]


# TFDS: sets that are not


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifra10", "did you mean 'cifar10'?"),
        ("hf", "it must be digits, folder, hf:"),
        *((name, repr(name)) for name in ("CIFAR-10", "huggingface:mnist")),
        ("cifar10:1.0.0", "cannot be loaded at version 1.0.0"),
        ("tf_flowers", "--config.data.crop=centre"),
        ("ag_news_subset", "must pair one image with one class label"),
        ("mnist", "set --config.model.image_size=28 --config.model.chan"),
        ("cifar100", "set --config.model.classes=100"),
    ],
)
def test_a_set_that_cannot_serve_is_refused_at_once_and_without_a_download(tmp_path, name, says):
    refused(name, tmp_path, CIFAR_MODEL, says)
    assert not list(tmp_path.iterdir())


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def cifar_archive(path: Path, seed: int = 0) -> dict[bytes, int]:
    """Writes CIFAR-10's official layout with 10 images per file; returns the label of each image's pixels."""
    random, labels = np.random.default_rng(seed), {}
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

        for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
            planes_NCHW = random.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
            add(name, b"".join(bytes([label]) + planes.tobytes() for label, planes in enumerate(planes_NCHW)))
            labels |= {planes.transpose(1, 2, 0).tobytes(): label for label, planes in enumerate(planes_NCHW)}
        add("batches.meta.txt", b"\n".join(b"class%d" % i for i in range(10)) + b"\n")
    return labels


def point_cifar10_at(monkeypatch: pytest.MonkeyPatch, url: str, archive: Path | None = None) -> None:
    """Replaces the address and the checksum that TFDS has registered for CIFAR-10's archive."""
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.image_classification.cifar import Cifar10

    content = archive.read_bytes() if archive else b""
    registered = UrlInfo(size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename=ARCHIVE)
    info = Cifar10._cifar_info.fget
    monkeypatch.setattr(Cifar10, "_cifar_info", property(lambda self: info(self)._replace(url=url)))
    monkeypatch.setattr(Cifar10, "url_infos", {url: registered})
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


def cifar10(data_dir: Path) -> splits.Dataset:
    return load(DataConfig(name="cifar10", dir=str(data_dir)), CIFAR_MODEL)


@contextlib.contextmanager
def server(folder: Path):
    """Serves `folder` on the loopback; yields its address and the list of paths that were read."""
    read = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            read.extend([self.path] * (self.command == "GET"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}", read
        finally:
            httpd.shutdown()
            thread.join()


def assert_holds(dataset: splits.Dataset, labels: dict[bytes, int]) -> None:
    assert (len(dataset.train), len(dataset.test)) == (50, 10)
    assert dataset.class_names == tuple(f"class{i}" for i in range(10))
    seen = {}
    for split in (dataset.train, dataset.test):
        seen |= dict(zip(map(bytes, split.images_NHWc), split.labels_N.tolist(), strict=True))
    assert seen == labels
    assert set(map(bytes, dataset.test.images_NHWc)) == set(list(labels)[50:])


@needs_tensorflow
def test_a_set_is_downloaded_and_prepared_once_and_read_back_exactly(tmp_path, monkeypatch):
    labels = cifar_archive(mkdir(tmp_path / "web") / ARCHIVE)
    killed = tmp_path / "data" / "cifar10" / "incomplete.ABC123_3.0.2"  # what a killed preparation leaves
    killed.mkdir(parents=True)
    (killed / "cifar10-train.array_record-00000-of-00001").write_bytes(b"half")
    with server(tmp_path / "web") as (address, read):
        point_cifar10_at(monkeypatch, f"{address}/{ARCHIVE}", tmp_path / "web" / ARCHIVE)
        assert_holds(cifar10(tmp_path / "data"), labels)
    assert_holds(cifar10(tmp_path / "data"), labels)
    assert read == [f"/{ARCHIVE}"]

    shard = tmp_path / "data" / "cifar10" / "3.0.2" / "cifar10-train.array_record-00000-of-00001"
    os.truncate(shard, shard.stat().st_size // 2)
    refused("cifar10", tmp_path / "data", CIFAR_MODEL, str(shard.parent))


@needs_tensorflow
def test_an_archive_in_the_manual_folder_needs_no_network_and_its_set_obeys_the_rules_on_splits_and_format(
    tmp_path, monkeypatch
):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    labels = cifar_archive(manual / ARCHIVE)
    point_cifar10_at(monkeypatch, f"http://127.0.0.1:{closed_port()}/{ARCHIVE}", manual / ARCHIVE)
    monkeypatch.setattr(splits, "GROUP", 7)  # reading in pieces must lose nothing either
    assert_holds(cifar10(tmp_path), labels)

    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.with_name("cifar10-test.array_record-00000-of-00001").rename(
        info.with_name("cifar10-validation.array_record-00000-of-00001")
    )
    info.write_text(info.read_text().replace('"name": "test"', '"name": "validation"'))
    assert_holds(cifar10(tmp_path), labels)  # a set without a test split is tested on its validation split

    info.write_text(info.read_text().replace('"name": "validation"', '"name": "extra"'))
    refused("cifar10", tmp_path, CIFAR_MODEL, "cifar10 has the splits")
    info.write_text(info.read_text().replace('"name": "extra"', '"name": "test"').replace("array_record", "tfrecord"))
    refused("cifar10", tmp_path, CIFAR_MODEL, "it must be a whole set in array_record")


@pytest.mark.slow
@needs_tensorflow
def test_a_prepared_set_is_known_by_its_contents_wherever_it_lies(tmp_path, monkeypatch):
    facts = []
    for name, seed in (("set", 0), ("same", 0), ("others of equal sizes", 1)):
        archive = tmp_path / name / "downloads" / "manual" / ARCHIVE
        archive.parent.mkdir(parents=True)
        cifar_archive(archive, seed)
        point_cifar10_at(monkeypatch, f"http://127.0.0.1:{closed_port()}/{ARCHIVE}", archive)
        facts.append(sources.browse(DataConfig(name="cifar10", dir=str(tmp_path / name)), CIFAR_MODEL).facts())
    one, same, others = facts
    assert one == same
    differ = {key for key, value in one.items() if others[key] != value}
    assert differ == {"hash of train images and labels", "hash of test images and labels"}


@needs_tensorflow
def test_imagenet_is_prepared_without_a_network_from_the_archives_that_its_owner_downloaded(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    model = ModelConfig(image_size=32, channels=3, classes=1000)
    for said in (f"Manual directory {manual} does not exist or is empty", "empty file"):  # of tarfile: it was opened
        refused("imagenet2012", tmp_path, model, said, crop="centre")
        for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
            (manual / name).write_bytes(b"")


@needs_tensorflow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("checksum", "wrong checksum"),
        ("missing", "HTTP code: 404"),
        ("../../../evil", "cannot prepare"),  # a path in the archive that leads out of its folder
        ("/{tmp}/evil", "cannot prepare"),
    ],
)
def test_a_preparation_that_fails_is_one_line_and_leaves_nothing_to_be_taken_for_a_set(
    tmp_path, monkeypatch, fault, said
):
    archive = mkdir(tmp_path / "web") / ARCHIVE
    if fault == "checksum":
        cifar_archive(archive)
    elif fault != "missing":
        with tarfile.open(archive, "w:gz") as evil:
            entry = tarfile.TarInfo(fault.format(tmp=str(tmp_path).lstrip("/")))
            entry.size = 4
            evil.addfile(entry, io.BytesIO(b"evil"))
    with server(tmp_path / "web") as (address, _):
        point_cifar10_at(monkeypatch, f"{address}/{ARCHIVE}", archive if "evil" in fault else None)
        refused("cifar10", tmp_path / "data", CIFAR_MODEL, said)
    assert not list(tmp_path.rglob("evil"))
    assert not list((tmp_path / "data" / "cifar10").glob("*"))


def test_offline_an_absent_set_fails_within_10_seconds_and_names_its_remedies(tmp_path, monkeypatch):
    """TFDS itself would try again for three minutes."""
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    refused("cifar10", tmp_path, CIFAR_MODEL, f"{tmp_path}/cifar10/3.0.2 is not a complete TFDS set")
    shutil.rmtree(tmp_path / "cifar10")
    point_cifar10_at(monkeypatch, f"http://127.0.0.1:{closed_port()}/{ARCHIVE}")
    remedies = {"": f"{ARCHIVE} into {tmp_path}/downloads/manual"}
    remedies |= dict.fromkeys(("tensorflow", "tensorflow_datasets"), "pip install 'jvitmoe[prepare]'")
    for absent, remedy in remedies.items():
        monkeypatch.setattr(tfds, "is_installed", lambda name, absent=absent: name != absent)
        start = time.monotonic()
        refused("cifar10", tmp_path, CIFAR_MODEL, remedy)
        assert time.monotonic() - start < 10
        assert not list(tmp_path.iterdir())
