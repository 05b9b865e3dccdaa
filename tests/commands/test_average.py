"""Starts, sites and means: docs/average.md is run, and what a person may do wrong is one line."""

import importlib
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optax
import pytest
from PIL import Image

import jvitmoe
import processes
from jvitmoe.commands import average, export, start, train
from jvitmoe.commands.average import average as average_models
from jvitmoe.config import Config, DataConfig
from jvitmoe.data import sources
from jvitmoe.data.splits import Split
from jvitmoe.errors import UserError
from jvitmoe.interop import load
from jvitmoe.interop.formats import TARGETS, base
from jvitmoe.training import build
from jvitmoe.training.optimizer import OPTIMIZERS
from processes import ROOT, call, refused, succeed
from run_folders import assert_same_run, lose_newest, tiny

pytestmark = pytest.mark.slow

NAMES = tuple("0123456789")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "average.md").read_text(), re.DOTALL)


@pytest.mark.long
def test_every_block_of_the_page_runs_in_its_order(tmp_path, monkeypatch, capsys):
    """On fewer pictures and for one epoch, so the verdict may be any of the three."""
    monkeypatch.chdir(tmp_path)
    Path("digits.txt").write_text("\n".join(NAMES))
    out = ""
    for language, block in BLOCKS:
        if language == "python":
            exec(block.replace("shape, 100)", "shape, 33)").replace("shape, 20)", "shape, 4)"), {})
            continue
        for _, command, *arguments in map(shlex.split, block.splitlines()):
            short = ["--config.train.epochs=1"] if command == "train" else []
            out += succeed(importlib.import_module(f"jvitmoe.commands.{command}").main, *arguments, *short)
    verdicts = re.findall("^(The mean is better than|The mean is worse than|Not decided: the mean)", out, re.MULTILINE)
    assert len(verdicts) == 2
    assert re.search(r"^(The mean is|Not decided)", capsys.readouterr().out, re.MULTILINE)


def write_digits(folder: Path, images: Split, classes: Sequence[int]) -> None:
    for number in np.flatnonzero(np.isin(images.labels_N, classes)):
        path = folder / str(images.labels_N[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images_NHWc[number, ..., 0]).save(path)


@pytest.mark.process
def test_four_sites_with_a_few_classes_each_make_a_mean_that_is_better_than_all_and_their_start(tmp_path):
    """As processes: none has the data of another, and only the start and the exports are shared."""
    digits = sources.load(Config().data, Config().model)
    model = {"width": 32, "hidden": 64, "depth": 2, "heads": 4, "patch": 4, "dropout": 0.0}
    settings = {"data": {"validation": 0, "flip": False}, "routing": {"experts": 1, "kind": "batch"}, "model": model}
    config = tiny(**settings, train={"epochs": 12, "batch_size": 32, "devices": 1}, optim={"learning_rate": 3e-3})
    config.data.part = "1/6"
    first = jvitmoe.train(config, tmp_path / "first", trackers=[])
    config.data.part, config.data.name, config.init.source = "", "folder", str(first.workdir)
    config.train.epochs, config.optim.learning_rate = 3, 1e-3
    start.start(config, NAMES, tmp_path / "start")
    write_digits(tmp_path / "check", digits.test, range(10))
    command, running = [sys.executable, "-m", "jvitmoe"], []
    for site, classes in {"a": (0, 1, 2), "b": (3, 4), "c": (5, 6, 7), "d": (8, 9)}.items():
        for split in ("train", "test"):
            write_digits(tmp_path / site / split, getattr(digits, split), classes)
        data, workdir = f"--config.data.dir={tmp_path / site}", tmp_path / "runs" / site
        begin = [f"--start={tmp_path / 'start'}", data, f"--workdir={workdir}", "--trackers="]
        running.append(processes.start([*command, "train", *begin]))
    for ended in processes.collect(running):
        assert ended.code == 0, ended.err
    sites = [tmp_path / "runs" / site for site in "abcd"]
    check = [f"--start={tmp_path / 'start'}", f"--data_dir={tmp_path / 'check'}", f"--out={tmp_path / 'mean'}"]
    ended = processes.run([*command, "average", *sites, *check])
    assert (ended.code, ended.err) == (0, "")
    assert "The mean is better than every site and than the start" in ended.out


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Returns a folder with the start of a tiny ViT for digits."""
    root = tmp_path_factory.mktemp("begun")
    start.start(tiny(routing={"experts": 1, "kind": "batch"}), NAMES, root / "start")
    return root


def run_of(begun: Path, workdir: Path, **overrides) -> jvitmoe.Run:
    """Trains the start with these settings, written section__field."""
    fields = {name.replace("__", "."): value for name, value in overrides.items()}
    return jvitmoe.train(start=begun / "start", workdir=workdir, overrides={"train.epochs": 1, **fields}, trackers=[])


def test_one_step_at_each_site_and_the_mean_is_one_step_on_all_their_images(begun, tmp_path, monkeypatch):
    """With plain SGD and sites of equal sizes (FedSGD, arXiv 1602.05629)."""
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda optim: optax.identity())
    settings = {"optim__name": "sgd", "optim__learning_rate": 0.1, "data__validation": 0, "model__dropout": 0.0}
    settings |= {"data__crop_padding": 0, "data__flip": False}
    sites = [
        run_of(begun, tmp_path / f"{k}", data__part=f"{k}/3", train__batch_size=479, **settings) for k in (1, 2, 3)
    ]
    together = run_of(begun, tmp_path / "together", train__batch_size=1437, **settings)
    assert [line["step"] for line in together.history if line["kind"] == "train"] == [1]
    average_models([site.workdir for site in sites], tmp_path / "mean", begun / "start")
    found, wanted = load.read(tmp_path / "mean").params, load.read(together.workdir).params
    first = load.read(begun / "start").params
    assert max(np.abs(wanted[name] - first[name]).max() for name in wanted) > 1e-3
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 26])
def test_parts_are_disjoint_and_cover_the_set_whatever_the_seed(tiny_split, count):
    every = []
    for number in range(1, count + 1):
        part, held = sources.training_images(tiny_split, DataConfig(part=f"{number}/{count}"))
        assert len(held) == 0
        assert abs(len(part) - 26 / count) < 1
        every += [image.tobytes() for image in part.images_NHWc]
    assert sorted(every) == sorted(image.tobytes() for image in tiny_split.images_NHWc)


def test_a_part_survives_a_resume_and_is_the_same_on_any_devices(begun, tmp_path):
    def run(name: str, part: str = "2/4") -> jvitmoe.Run:
        settings = {"data__validation": 59, "train__batch_size": 60, "train__epochs": 2}
        return run_of(begun, tmp_path / name, data__part=part, **settings)

    whole = run("whole")
    shutil.copytree(whole.workdir, tmp_path / "resumed")
    lose_newest(tmp_path / "resumed")
    run("resumed")
    assert_same_run(tmp_path / "resumed", whole.workdir)
    images = []
    for devices in (1, 2, 4):
        config = whole.config
        config.train.devices = devices
        images.append(build.build(config, build.choose(config)).data.train.images_NHWc)
    assert len(images[0]) == 300
    assert all(np.array_equal(images[0], other) for other in images)
    with pytest.raises(UserError, match=r"data\.part"):
        run("many", "1/9999")
    with pytest.raises(UserError, match=r"holds another experiment: data\.part"):
        run("whole", "1/4")


@pytest.fixture(scope="module")
def sites(begun) -> list[Path]:
    """Returns the folders of two runs from the start, on a half of the digits each."""
    return [run_of(begun, begun / f"half{k}", data__part=f"{k}/2").workdir for k in (1, 2)]


def test_a_mean_is_exported_to_every_format_and_starts_a_next_round(begun, sites, tmp_path):
    models, data = [jvitmoe.Run(sites[0]), sites[1]], DataConfig("digits")
    made = jvitmoe.average(models, tmp_path / "m", begun / "start", data, weights="greedy")
    assert [row["model"] for row in made.rows] == ["the start", "half1", "half2", "the mean", "ensemble of 2"]
    images = sources.load(Config().data, Config().model).test.images_NHWc[:16]
    wanted = made.classifier().logits(images)
    for name in TARGETS:
        if name == "onnx" and importlib.util.find_spec("jax2onnx") is None:
            continue
        if name == "hf":  # which has no mean pooling
            continue
        succeed(export.main, f"--model={tmp_path / 'm'}", f"--to={name}", f"--out={tmp_path / name}")
        sample = np.load(tmp_path / name / "sample.npz")
        np.testing.assert_allclose(made.classifier().logits(sample["images"]), sample["logits"], atol=1e-6)
        assert "the mean of" in (tmp_path / name / "README.md").read_text()
        if name in ("safetensors", "timm"):
            np.testing.assert_allclose(jvitmoe.load(tmp_path / name).logits(images), wanted, atol=1e-5)
    again = jvitmoe.train(start=tmp_path / "m", workdir=tmp_path / "round2", overrides={"train.epochs": 1}, trackers=[])
    assert again.config.init.start != jvitmoe.Run(sites[0]).config.init.start
    with pytest.raises(UserError, match="another start"):
        average_models([sites[0], tmp_path / "round2"], tmp_path / "never")


def test_sites_of_a_start_given_by_home_may_train_lora_alone(begun, tmp_path, monkeypatch):
    routing, source = {"experts": 1, "kind": "batch"}, {"source": str(begun / "start")}
    start.start(tiny(model={"lora": 2}, routing=routing, init=source), NAMES, tmp_path / "start")
    monkeypatch.setenv("HOME", str(tmp_path))
    sites = [
        jvitmoe.train(start="~/start", workdir=tmp_path / f"{k}", overrides={"data.part": f"{k}/2"}, trackers=[])
        for k in (1, 2)
    ]
    average_models([site.workdir for site in sites], tmp_path / "mean", tmp_path / "start")
    first, found = (load.read(path).params for path in (begun / "start", tmp_path / "mean"))
    changed = {name for name, leaf in found.items() if (leaf != first[name]).any()}
    assert any("mlp" in name for name in changed)
    assert all("mlp" in name or "head" in name for name in changed), changed


def test_what_is_wrong_at_a_site_is_one_line(begun, tmp_path):
    def message(*arguments: str) -> str:
        return refused(train.main, *arguments, f"--workdir={tmp_path / 'run'}")

    begin = f"--start={begun / 'start'}"
    assert "config.model.width is 16; the start has 8" in message(begin, "--config.model.width=16")
    assert "config.init.source is 'x'" in message(begin, "--config.init.source=x")
    made_up = ["--config=digits_dense", f"--config.init.source={begun / 'start'}", "--config.init.start=0123"]
    assert "config.init.start is '0123'" in message(*made_up)
    assert "give one of them" in message(begin, "--config=digits_dense")
    assert "jvitmoe start" in message(f"--start={tmp_path}")
    assert "data.part" in message(begin, "--config.data.part=3/2")
    folder = tmp_path / "set"
    split = sources.load(Config().data, Config().model).test
    for part in ("train", "test"):
        for name in ("3", "ten"):
            (folder / part / name).mkdir(parents=True)
            Image.fromarray(split.images_NHWc[0, ..., 0]).save(folder / part / name / "0.png")
    data = ["--config.data.name=folder", f"--config.data.dir={folder}"]
    assert "the class 'ten', which is none of the start's" in message(begin, *data)
    names = tmp_path / "names.txt"
    names.write_text("a\na\n")
    assert "each once" in refused(start.main, "--config=digits_dense", f"--classes={names}", f"--out={tmp_path / 's'}")


def test_an_average_that_is_told_to_end_leaves_nothing(sites, tmp_path, monkeypatch):
    monkeypatch.setattr(base.Target, "export", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = call(average.main, *sites, f"--out={tmp_path / 'mean'}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert (code, err) == (143, "")
    assert list(tmp_path.iterdir()) == []
