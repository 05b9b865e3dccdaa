"""configs/finetune.py and configs/folder.py end to end on folders of pictures."""

import json
import math
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import jvitmoe
import processes
from jvitmoe.commands import train
from jvitmoe.config import ModelConfig
from jvitmoe.interop import load, weight_names
from jvitmoe.interop.formats import weights
from jvitmoe.models import vit

pytestmark = pytest.mark.slow

SIZES = {"image_size": 224, "classes": 3, "patch": 16, "width": 24, "hidden": 48, "depth": 2, "heads": 2}


@pytest.fixture
def files(tmp_path):
    """Returns (a folder with timm's weights and config, an image folder of three colours)."""
    source, pictures = tmp_path / "vit", tmp_path / "pictures"
    source.mkdir()
    model = ModelConfig(channels=3, cls_position=True, norm_epsilon=1e-6, **SIZES | {"classes": 7})
    flat = weight_names.flatten(jax.device_get(vit.init(vit.build(model), jax.random.key(0))))
    save_file(weight_names.write(flat, weight_names.TIMM, cls_row=True), source / "model.safetensors")
    about = weights.timm_config(model, (), "resized", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    (source / "config.json").write_text(json.dumps(about))
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for label in range(3):
            folder = pictures / split / "rgb"[label]
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 120, (40, 50, 3), np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return source, pictures


@pytest.mark.long
@pytest.mark.parametrize("variant", ["dense", "random"])
def test_a_vit_of_timm_is_tuned_on_a_folder_of_pictures(files, tmp_path, variant):
    source, pictures = files
    workdir = tmp_path / "run"
    settings = {"data.dir": pictures, "init.source": source / "model.safetensors", "train.batch_size": 16}
    settings |= {"train.epochs": 8, "train.devices": 1, "train.log_every": 1}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    train.main(["train", f"--config=configs/finetune.py:{variant}", f"--workdir={workdir}", *flags])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    rows = {row["model"]: row for row in json.loads((workdir / "result.json").read_text())["rows"]}
    assert rows["merged" if variant == "random" else "dense"]["accuracy"] > 0.5
    found = load.read(workdir).model
    assert {name: getattr(found, name) for name in SIZES} == SIZES  # of the source; the head is that of the folder


def drawn(page: str) -> str:
    """Returns the first block of Python of a page, which draws pictures."""
    return re.search(r"```python\n(.*?)```", (processes.ROOT / "docs" / page).read_text(), re.DOTALL)[1]


def trained(*flags: str) -> str:
    """Trains in a process whose programs are optimised, as those of tests are not, and returns what it printed."""
    environment = processes.environment()
    del environment["XLA_FLAGS"]
    command = [sys.executable, "-m", "jvitmoe.train", *flags]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.long
def test_60_pictures_a_class_in_a_flat_folder_tune_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = drawn("average.md").partition("sites =")
    names = "disc", "ring", "square"
    exec(code + "".join(f"draw(Path('flat/{name}'), '{name}', 60)\n" for name in names), {})
    out = trained("--config=finetune", "--config.init.source=cifar10_cct", "--config.data.dir=flat")
    assert "batch       8 of " in out
    assert "not above guessing" not in out.rpartition("\ntesting\n")[2]
    assert jvitmoe.Run("runs/finetune").accuracy() >= 0.9


@pytest.mark.long
def test_a_vit_learns_the_tutorial_s_shapes_from_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(drawn("tutorial.md"), {})
    trained("--config=folder", "--config.data.dir=shapes", "--config.optim.mlp_rate=2", "--config.train.epochs=12")
    assert jvitmoe.Run("runs/folder").accuracy() >= 0.9
