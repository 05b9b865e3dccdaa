"""Streamed batches are the batches of the set on the device: same images, same order, same bits after training."""

import dataclasses
import io
import json
import shutil
import threading
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from jvitmoe.commands import evaluate, train
from jvitmoe.config import Config, DataConfig, ModelConfig, TrainConfig
from jvitmoe.data import pictures as images_lib
from jvitmoe.data import sources, stream
from jvitmoe.data.batches import Resident, TrainOrder
from jvitmoe.data.pictures import DataError, Picture
from jvitmoe.data.splits import decode, in_memory
from jvitmoe.errors import ConfigError
from jvitmoe.evaluation import evaluator
from jvitmoe.evaluation.evaluator import make_evaluate
from jvitmoe.machine import memory
from jvitmoe.machine.devices import make_mesh
from jvitmoe.runs.folder import open_run_folder
from jvitmoe.training import build
from processes import call
from run_folders import assert_same_run, losses, rows, saved, saved_config

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def streamed(tiny_split, training):
    """Returns a maker of runs that read the tiny split through Grain: streamed(config).run(steps, start)."""

    class Streamed:
        def __init__(self, config):
            config.data.stream = True
            self.run_of = training(config)  # set up alike; its images on the device are not used
            self.records = in_memory(tiny_split)

        def batches(self, start, total):
            plan = self.run_of.plan
            return stream.train_batches(self.records, plan.order, start, total)

        def run(self, steps):
            state = self.run_of.state
            for batch in self.batches(0, steps):
                state, metrics = jax.block_until_ready(self.run_of.step(state, batch))
            return jax.device_get((state, metrics))

    return Streamed


@pytest.mark.parametrize(
    ("routed", "meshes"),
    [
        ({"experts": 4}, {"devices": 1}),
        ({"experts": 2, "kind": "sample"}, {"devices": 4, "expert_devices": 2, "accumulate": 2}),
    ],
    ids=["batch", "sample on both axes in parts"],
)
def test_a_streamed_run_equals_a_run_on_the_device_to_the_bits(tiny_config, training, streamed, routed, meshes):
    def config():
        return tiny_config(
            data={"crop_padding": 1, "flip": True, "mixup": 0.8, "cutmix": 1.0},
            model={"dropout": 0.2},
            routing=routed,
            train=meshes,
        )

    resident = training(config()).run(4)  # over the end of an epoch of three steps
    state, metrics = streamed(config()).run(4)
    chex.assert_trees_all_equal(state, resident.history[-1])
    chex.assert_trees_all_equal(metrics, resident.metrics[-1])


def test_a_stream_taken_up_at_any_step_gives_the_rest_and_reads_no_row_before_it(tiny_config, streamed):
    run = streamed(tiny_config())
    whole = [jax.device_get(batch) for batch in run.batches(0, 8)]
    assert len(whole) == 8
    assert len({batch.pixels_BP.tobytes() for batch in whole}) == 8
    order, seen, read = run.run_of.plan.order, [], run.records.read
    for epoch in (0, 5, 1):  # on any number of devices: tests/data/test_feed.py
        chex.assert_trees_all_equal(order.rows_on_host(epoch), jax.device_get(order.rows(epoch)))
    run.records = dataclasses.replace(run.records, read=lambda numbers: seen.extend(numbers) or read(numbers))
    for start in (1, 3, 5, 8):
        seen.clear()
        rest = [jax.device_get(batch) for batch in run.batches(start, 8)]
        chex.assert_trees_all_equal(rest, whole[start:])
        wanted = [order.rows_on_host(s // 3).row_SB[s % 3] for s in range(start, 8)]
        assert sorted(seen) == sorted(np.concatenate([*wanted, []]).tolist())


def test_a_stream_is_the_same_with_any_number_of_threads_and_ends_all_of_them(tiny_config, streamed, monkeypatch):
    before, results = set(threading.enumerate()), []
    for cores in (1, 8):
        monkeypatch.setattr(stream.os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        batches = streamed(tiny_config()).batches(0, 8)
        results.append([jax.device_get(next(batches)) for _ in range(5)])
        batches.close()  # in the middle
    chex.assert_trees_all_equal(*results)
    deadline = time.monotonic() + 30
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


def test_no_image_of_a_streamed_batch_lies_on_two_devices(tiny_config, streamed):
    """Nor do two processes read it: tests/training/test_distributed.py."""
    meshes = {"devices": 4, "expert_devices": 2}
    for images in streamed(tiny_config(routing={"experts": 2, "kind": "sample"}, train=meshes)).batches(0, 4):
        shards = [shard.data.shape[0] for shard in images.pixels_BP.addressable_shards]
        assert shards == [2] * 4
        assert len(np.unique(jax.device_get(images.pixels_BP), axis=0)) == 8


def test_a_streamed_split_is_evaluated_exactly_with_padding_masked(tiny_config, training, tiny_split):
    config = tiny_config(
        data={"stream": True},
        routing={"experts": 2, "init": "independent"},
        train={"devices": 4, "batch_size": 8},
    )
    run = training(config)
    mesh, way = run.plan.mesh, run.plan.routing
    found = make_evaluate(run.plan.model, mesh, config.data)
    assert len(tiny_split) % 8 != 0
    records = in_memory(tiny_split)
    shown = stream.Streamed(records, 8, mesh)
    resident = evaluator.evaluate_run(way, 0, run.state.params, None, found, Resident(tiny_split, 8, mesh))
    for _ in range(2):  # and once more: a stream can be gone through again
        assert evaluator.evaluate_run(way, 0, run.state.params, None, found, shown) == resident
    assert resident[0]["images"] == len(tiny_split)
    chex.assert_trees_all_equal(vars(decode(records)), vars(tiny_split))


# pictures of many sizes


def write_pictures(root: Path, per_class: int = 12, seed: int = 0, suffix: str = "jpg") -> None:
    """Writes JPEG files of all sizes, or BMP files of one, and two classes, bright and dark."""
    random = np.random.default_rng(seed)
    for part, count in (("train", per_class), ("val", 5)):
        for label, name in enumerate(("bright", "dark")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(9, 40, 2) if suffix == "jpg" else (20, 20)
                pixels = random.integers(0, 100, (height, width, 3)) + (150 if label == 0 else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i:02}.{suffix}")


SIZES = ("model.image_size=8", "model.channels=3", "model.patch=4", "model.width=8", "model.hidden=12")
TINY = (*SIZES, "model.depth=2", "model.heads=2", "train.batch_size=8", "train.devices=1")


def command(folder: Path, *settings: str, of: str = "configs/digits_random.py") -> list[str]:
    """Returns the arguments that train a tiny model on the pictures of a folder."""
    more = ("model.classes=2", "data.name=folder", f"data.dir={folder}", "data.stream=True", "data.crop=resized")
    return [f"--config={of}", *(f"--config.{setting}" for setting in (*TINY, *more, "train.log_every=1", *settings))]


def test_a_streamed_folder_is_trained_on_tested_and_refused_with_a_picture_more(tmp_path, monkeypatch):
    write_pictures(tmp_path / "set")
    settings = ("routing.experts=2", "routing.kind=sample", "optim.eps=1e-3", "optim.warmup_epochs=0")
    settings += ("train.epochs=4", "train.eval_every=4", "train.checkpoint_every=4")
    arguments = [*command(tmp_path / "set", *settings), f"--workdir={tmp_path / 'run'}"]
    monkeypatch.chdir(CONFIGS.parent)
    code, _, err = call(train.main, *arguments)
    assert code == 0, err
    assert len(losses(tmp_path / "run")) == 12
    trained = rows(tmp_path / "run")[0]
    code, _, err = call(evaluate.main, f"--workdir={tmp_path / 'run'}", "--paths=1")
    assert code == 0, err
    close = {name: pytest.approx(trained[name], rel=1e-5) for name in ("nll", "ece")}
    assert rows(tmp_path / "run")[0] == trained | close
    assert json.loads((tmp_path / "run" / "result.json").read_text())["mergeability"]["images"] == 10

    dark = tmp_path / "set" / "train" / "dark"
    shutil.copy(dark / "00.jpg", dark / "99.jpg")
    code, _, err = call(train.main, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds a run on other data: 24 train images, 25 now, another hash of train images" in err.replace(";", ",")
    assert "set --config.data.dir to what it was" in err


@pytest.mark.parametrize(("stream", "suffix"), [(True, "jpg"), (False, "jpg"), (True, "bmp")])
def test_a_run_goes_on_with_its_pictures_moved_or_streamed_and_not_with_as_many_others(tmp_path, stream, suffix):
    write_pictures(tmp_path / "set", suffix=suffix)
    write_pictures(tmp_path / "others", seed=1, suffix=suffix)
    shutil.copytree(tmp_path / "set", tmp_path / "moved")
    config, workdir = Config(), tmp_path / "run"
    config.data = DataConfig(name="folder", crop="centre", stream=stream)
    config.model, config.train = ModelConfig(channels=3, classes=2), TrainConfig(batch_size=8, devices=1)

    def start(folder):
        config.data.dir = str(tmp_path / folder)
        data = build.build(config, build.choose(config)).data
        with open_run_folder(workdir, config, data.classes, data.counts | data.hashes):
            (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)

    start("set")
    config.data.stream = not stream
    start("moved")
    with pytest.raises(ConfigError, match=r"on other data: another hash of train images and labels; another hash of t"):
        start("others")


@pytest.mark.parametrize("broken", [(7, 8), (7, 8, 150)])
def test_up_to_one_per_cent_of_pictures_are_skipped_counted_and_named(tiny_split, tiny_config, broken):
    """The next picture takes the place of a damaged one, whatever the batch."""

    def read(numbers):
        found = in_memory(tiny_split).read([n % len(tiny_split) for n in numbers])
        return [
            (Picture(f"picture {n}", b"none"), 0) if n in broken else one for n, one in zip(numbers, found, strict=True)
        ]

    config = tiny_config(train={"batch_size": 40, "devices": 1})
    mesh, said = make_mesh(config.train), []
    order, number_N = TrainOrder(200, 40, 0, mesh), np.arange(200)

    def batches(records, *damaged):
        found = stream.train_batches(records, order, 0, 10, *damaged)
        return [jax.device_get((batch.pixels_BP, batch.labels_B)) for batch in found]

    records = dataclasses.replace(in_memory(tiny_split), read=read, number_N=number_N, labels_N=None)
    damaged = stream.Damaged(200, said.append)
    if len(broken) > 2:
        with pytest.raises(
            DataError, match=r"3 of 200 training images cannot be read, which is more than 1%; the last"
        ):
            batches(records, damaged)
        return
    taken = batches(records, damaged)
    number_N[[7, 8]] = 9
    chex.assert_trees_all_equal(taken, batches(records))
    assert [line.partition(": picture")[0] for line in said] == [f"{n} of 200 training images" for n in (1, 2)]


def test_an_evaluation_leaves_out_the_pictures_that_training_may_have_skipped(tiny_split, damaged_7):
    said = []
    with pytest.raises(DataError, match=r"picture 7 cannot be read as an image .*it is absent or empty"):
        decode(damaged_7)
    found, rest = decode(damaged_7, said.append), np.delete(np.arange(len(tiny_split)), 7)
    np.testing.assert_array_equal(found.images_NHWc, tiny_split.images_NHWc[rest])
    np.testing.assert_array_equal(found.labels_N, tiny_split.labels_N[rest])
    assert [line.partition(" cannot")[0] for line in said] == ["skipped     picture 7"]


def test_an_evaluation_holds_no_more_images_at_once_than_a_part_of_a_batch(tiny_split, tiny_config):
    config = tiny_config(train={"accumulate": 4, "devices": 1})
    settings = config.train.images_at_once, make_mesh(config.train)
    for split in (tiny_split, in_memory(tiny_split)):
        batches = stream.eval_batches(split, *settings)
        assert (len(batches), batches.batch_size) == (13, 2)  # of 26 images, where a step has 8 at a time


def test_a_set_larger_than_the_memory_is_refused_before_it_is_read(tiny_split, monkeypatch):
    monkeypatch.setattr(memory, "installed", lambda: tiny_split.images_NHWc.nbytes - 1)
    with pytest.raises(DataError, match=r"^\d+ images need .* train with --config\.data\.stream=true"):
        decode(dataclasses.replace(in_memory(tiny_split), read=None))


def test_damaged_headers_are_found_before_the_first_step(tmp_path, tiny_config):
    write_pictures(tmp_path, per_class=60)
    config = tiny_config(
        data={"name": "folder", "dir": str(tmp_path), "crop": "centre"}, model={"channels": 3, "classes": 2}
    )
    said, groups = [], []

    def check():
        records = sources.browse(config.data, config.model).train
        stream.Damaged(len(records), said.append).check(records, lambda: groups.append(1))

    (tmp_path / "train" / "dark" / "07.jpg").write_bytes(b"none")
    check()
    (line,) = said
    assert line.startswith(f"1 of 120 training images: {tmp_path}/train/dark/07.jpg cannot be read as an image")
    assert len(groups) == 2
    (tmp_path / "train" / "dark" / "08.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 120 training images cannot be read, which is more than 1%"):
        check()
    (tmp_path / "train" / "dark" / "08.jpg").unlink()
    config.data.crop = "exact"
    with pytest.raises(DataError, match=r"pixels but config.model.image_size is 8; .*--config.data.crop=resized"):
        check()


def test_what_a_start_refuses_can_be_mended_as_it_says_in_the_same_folder(tmp_path, monkeypatch):
    """A setting, and a picture that only the first evaluation would read."""
    write_pictures(tmp_path / "set")
    picture = tmp_path / "set" / "val" / "dark" / "03.jpg"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    arguments = command(tmp_path / "set", "train.epochs=1", of="configs/digits_dense.py")
    arguments += [f"--workdir={tmp_path / 'run'}"]
    monkeypatch.chdir(CONFIGS.parent)
    code, _, err = call(train.main, *arguments, "--config.data.crop=exact")
    assert (code, err.count("\n")) == (2, 1)
    assert "set --config.data.crop=centre" in err
    code, _, err = call(train.main, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{picture} cannot be read as an image" in err
    assert "replace or remove it" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    picture.write_bytes(content)
    code, out, err = call(train.main, *arguments)
    assert code == 0, err
    assert "checking    the images of evaluations" in out


def test_a_picture_that_cannot_be_read_for_a_while_costs_no_step(tmp_path, monkeypatch):
    write_pictures(tmp_path / "set", per_class=6)
    arguments = command(tmp_path / "set", "train.batch_size=4", "train.epochs=2", of="configs/digits_dense.py")
    monkeypatch.chdir(CONFIGS.parent)
    code, _, err = call(train.main, *arguments, f"--workdir={tmp_path / 'whole'}")
    assert code == 0, err
    config = saved_config(tmp_path / "whole")
    order = TrainOrder(12, 4, config.train.seed, make_mesh(config.train))
    files = sorted((tmp_path / "set" / "train").glob("*/*"))
    last = files[order.rows_on_host(0).row_SB[2, 0]]  # seen at step 3
    content = last.read_bytes()
    damaged = content[:100] + bytes(len(content) - 100)
    with monkeypatch.context() as patch:  # it is damaged after the start
        patch.setattr(stream.Damaged, "check", lambda *_: last.write_bytes(damaged))
        code, _, err = call(train.main, *arguments, f"--workdir={tmp_path / 'run'}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"1 of 12 training images cannot be read, which is more than 1%; the last: {last} cannot be read" in err
    assert [path.name for path in saved(tmp_path / "run")] == ["2"]
    last.write_bytes(content)
    code, out, err = call(train.main, *arguments, f"--workdir={tmp_path / 'run'}")
    assert code == 0, err
    assert "resuming    from step 2" in out
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_folder_of_all_sizes_is_resized_to_what_predict_sees(tmp_path, tiny_config):
    write_pictures(tmp_path)
    folder = {"name": "folder", "dir": str(tmp_path), "crop": "centre"}
    config = tiny_config(data=folder, model={"channels": 3, "classes": 2})
    whole = dataclasses.replace(config.data, crop="exact")
    with pytest.raises(DataError, match=r"config.model.image_size is 8; .*--config.data.crop=resized"):
        sources.load(whole, config.model)
    loaded = sources.load(config.data, config.model)
    files = sorted((tmp_path / "val").rglob("*.jpg"))
    wanted = np.stack([images_lib.read(file, 8, 3, crop="centre") for file in files])
    np.testing.assert_array_equal(loaded.test.images_NHWc, wanted)
    np.testing.assert_array_equal(wanted, [images_lib.read(file, 8, 3, crop="exact") for file in files])
    assert loaded.train.images_NHWc.shape == (24, 8, 8, 3)
    with pytest.raises(DataError, match="takes 2 channels"):
        images_lib.read(files[0], 8, 2)
    config.data.stream = True
    streamed = decode(sources.browse(config.data, config.model).train)
    np.testing.assert_array_equal(streamed.images_NHWc, loaded.train.images_NHWc)


def test_random_parts_are_a_function_of_seed_step_and_place(tmp_path, tiny_config):
    write_pictures(tmp_path)

    def batches(seed=0, start=0, devices=1):
        config = tiny_config(
            data={"name": "folder", "dir": str(tmp_path), "stream": True, "crop": "resized"},
            model={"channels": 3, "classes": 2},
            train={"seed": seed, "devices": devices},
        )
        records, mesh = sources.browse(config.data, config.model).train, make_mesh(config.train)
        # The same order for all seeds, so that only the parts can differ.
        order = TrainOrder(len(records), 8, seed, mesh)
        order.rows_on_host = TrainOrder(len(records), 8, 0, mesh).rows_on_host
        return [jax.device_get(images) for images in stream.train_batches(records, order, start, 4)]

    first = batches()
    chex.assert_trees_all_equal(batches(devices=4), first)
    chex.assert_trees_all_equal(batches(start=2), first[2:])
    for one, other in zip(batches(seed=1), first, strict=True):
        np.testing.assert_array_equal(one.labels_B, other.labels_B)
        assert (one.pixels_BP != other.pixels_BP).any(1).all()
    for images in first:
        means = images.pixels_BP.mean(1)
        np.testing.assert_array_equal(means < 125, images.labels_B == 1)


# ImageNet as TFDS has it


def write_imagenet(root: Path) -> None:
    """Writes a prepared imagenet2012 of 12 training, 6 validation and 2 unlabelled test images, of all sizes."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import naming, splits
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def feature(value):
        if isinstance(value, int):
            return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))

    builder, infos = tfds.builder("imagenet2012", data_dir=root, file_format="array_record"), []
    folder, random = Path(builder.data_path), np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in {"train": 12, "validation": 6, "test": 2}.items():
        template = naming.ShardedFileTemplate(
            data_dir=folder, dataset_name="imagenet2012", split=split, filetype_suffix="array_record"
        )
        infos.append(splits.SplitInfo(name=split, shard_lengths=[count], num_bytes=0, filename_template=template))
        writer = ArrayRecordWriter(str(folder / f"imagenet2012-{split}.array_record-00000-of-00001"), "group_size:1")
        for i in range(count):
            height, width = random.integers(20, 50, 2)
            content = io.BytesIO()
            Image.new("RGB", (width, height), (10 * i, 20, 30)).save(content, "JPEG")
            label = -1 if split == "test" else 80 * i
            fields = {"image": content.getvalue(), "label": label, "file_name": b"%d.JPEG" % i}
            features = tf_feature_pb2.Features(feature={name: feature(value) for name, value in fields.items()})
            writer.write(tf_example_pb2.Example(features=features).SerializeToString())
        writer.close()
    builder.info.set_splits(splits.SplitDict(infos))
    builder.info.write_to_directory(folder)


def test_the_imagenet_config_streams_a_tfds_set_and_tests_on_its_labelled_split(tmp_path, monkeypatch):
    write_imagenet(tmp_path)
    small = ("model.depth=2", "model.width=8", "model.hidden=12", "model.heads=2", "model.image_size=32")
    settings = (*small, f"data.dir={tmp_path}", "train.batch_size=4", "train.epochs=2", "train.devices=1")
    arguments = [f"--config.{setting}" for setting in (*settings, "train.log_every=1")]
    monkeypatch.chdir(CONFIGS.parent)
    workdir = tmp_path / "run"
    code, out, err = call(train.main, "--config=configs/imagenet.py:random", *arguments, f"--workdir={workdir}")
    assert code == 0, err
    assert "12 train, 0 validation, 6 test" in out
    assert len(losses(workdir)) == 6
    assert np.isfinite(list(losses(workdir).values())).all()
    config = saved_config(workdir)
    records = sources.browse(config.data, config.model).test
    (known,) = records.about()
    assert known.startswith("imagenet2012/")
    assert known.endswith(" [6]")
    test = decode(records)
    np.testing.assert_array_equal(test.labels_N, [0, 80, 160, 240, 320, 400])
    np.testing.assert_allclose(test.images_NHWc[:, 16, 16, 0], [0, 10, 20, 30, 40, 50], atol=2)  # of JPEG
