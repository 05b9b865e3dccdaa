"""Exports: what is written gives our logits where it goes; what has no counterpart is refused and nothing written."""

import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jvitmoe
from jvitmoe import evaluate, export
from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.data import datasets, images
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.interop import classifier, load, model_card, weight_names
from jvitmoe.interop.targets import TARGETS, base
from jvitmoe.models import vit
from jvitmoe.runs import files
from processes import call

pytestmark = pytest.mark.slow

WITH_ONNX = pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is None, reason="needs jvitmoe[export]")


@pytest.fixture(scope="module")
def exported(experiment_run, tmp_path_factory):
    """Returns a maker of exports of the run, by the command itself, each once."""
    root, done = tmp_path_factory.mktemp("exports"), {}

    def make(target: str) -> Path:
        if target not in done:
            export.main(["export", f"--workdir={experiment_run}", f"--to={target}", f"--out={root / target}"])
            done[target] = root / target
        return done[target]

    return make


def outside(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs code in a fresh process that cannot import jvitmoe."""
    block = "import sys\nsys.modules['jvitmoe'] = None\n"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", block + code], env=environment, cwd=folder, capture_output=True, text=True, timeout=200
    )


def code_of(card: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL))


def test_help_names_every_target(capsys):
    with pytest.raises(SystemExit):
        export.main(["export.py", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in TARGETS)


def test_our_own_export_loads_to_the_same_logits(exported, experiment_run, monkeypatch):
    out = exported("safetensors")
    sample = np.load(out / "sample.npz")
    again, first = jvitmoe.load(out), jvitmoe.load(experiment_run)
    np.testing.assert_array_equal(again.logits(sample["images"]), sample["logits"])
    np.testing.assert_array_equal(first.logits(sample["images"]), sample["logits"])
    assert again.names == first.names == tuple("0123456789")
    monkeypatch.chdir(out)
    exec(code_of(out / "README.md").replace('print(model(["picture.png"]))', ""), {})


def test_the_ema_of_a_run_is_exported_and_classifies_as_it_was_tested(experiment_run, exported, tmp_path):
    rows = {row["model"]: row for row in jvitmoe.Run(experiment_run).results["rows"]}
    test = datasets.load(Config().data, Config().model).test
    out = jvitmoe.Run(experiment_run).export("safetensors", tmp_path / "ema", ema=True)
    logits = jvitmoe.load(out).logits(test.images_NHWc)
    np.testing.assert_array_equal(logits, jvitmoe.Run(experiment_run).classifier(ema=True).logits(test.images_NHWc))
    assert (logits.argmax(1) == test.labels_N).mean() == pytest.approx(rows["EMA"]["accuracy"])
    assert (logits != jvitmoe.load(experiment_run).logits(test.images_NHWc)).any()
    assert "This export is the row `EMA`." in (out / "README.md").read_text()
    assert "This export is the row `merged`, or `dense`." in (exported("safetensors") / "README.md").read_text()
    with pytest.raises(UserError, match="is not a run folder, so it has no EMA"):
        jvitmoe.load(out, ema=True)


def test_a_run_without_an_ema_says_how_to_have_one(experiment_run, monkeypatch):
    read = load.Checkpoints.read
    monkeypatch.setattr(load.Checkpoints, "read", lambda self, which: read(self, which)._replace(ema=None))
    with pytest.raises(UserError, match=r"has no EMA; leave --ema out, or train with --config\.train\.ema"):
        jvitmoe.load(experiment_run, ema=True)


def test_the_sample_holds_real_test_images_and_what_the_model_takes(exported):
    test = datasets.load(Config().data, Config().model).test
    for target in ("safetensors", "timm"):
        sample = np.load(exported(target) / "sample.npz")
        np.testing.assert_array_equal(sample["images"], test.images_NHWc[:16])
        np.testing.assert_array_equal(sample["labels"], test.labels_N[:16])
        inputs = sample["inputs"] if target == "safetensors" else sample["inputs"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(inputs, sample["images"] / 127.5 - 1, atol=1e-6)


def test_of_a_set_that_streams_only_the_sample_is_read_and_cut_as_in_tests(experiment_run, tmp_path):
    for number in range(10):
        for part in ("train", "test"):
            folder = tmp_path / part / str(number)
            folder.mkdir(parents=True)
            for n in range(3):
                Image.effect_noise((20 + n, 30), 20 * number).save(folder / f"{n}.png")
    (tmp_path / "train" / "0" / "0.png").write_bytes(b"no picture, and nobody looks at it")
    source = load.read(experiment_run)
    source.config.data = DataConfig("folder", str(tmp_path), stream=True, crop="resized")
    source = dataclasses.replace(source, crop="resized")
    sample = TARGETS["onnx"].sample(source, source.config)
    files = sorted((tmp_path / "test").rglob("*.png"))[:16]
    for image, file in zip(sample["images"], files, strict=True):
        np.testing.assert_array_equal(image, images.centre_crop(images.Picture("", file), 8, 1))
    np.testing.assert_array_equal(sample["labels"], np.arange(16) // 3)
    TARGETS["safetensors"].write(tmp_path, source, source.model)
    again = jvitmoe.load(tmp_path)
    np.testing.assert_array_equal(again.logits(files), sample["logits"])
    whole = classifier.from_source(dataclasses.replace(source, crop="exact"))
    assert (whole.logits(files) != sample["logits"]).any()


@pytest.mark.parametrize("target", ["stablehlo", pytest.param("onnx", marks=WITH_ONNX)])
def test_in_a_fresh_process_without_jvitmoe_the_code_of_the_card_runs_at_any_batch(exported, target):
    out = exported(target)
    code = code_of(out / "README.md")
    code += "\nfor n in (1, 2, 7):\n    assert np.abs(run(sample['inputs'][:n]) - sample['logits'][:n]).max() < 1e-4\n"
    if target == "onnx":  # without padding, onnxruntime 1.30 ends by SIGFPE here
        code += "assert run(sample['inputs'][:0]).shape == (0, 10)\n"
    done = outside(code, out)
    assert done.returncode == 0, done.stderr
    wrong = outside(code.replace('sample["logits"]', 'sample["logits"] + 0.01'), out)
    assert "AssertionError" in wrong.stderr


def test_stablehlo_is_for_cpu_and_cuda(exported):
    code = (
        "from jax import export\nprint(export.deserialize(bytearray(open('model.stablehlo', 'rb').read())).platforms)"
    )
    assert outside(code, exported("stablehlo")).stdout.strip() == "('cpu', 'cuda')"


@pytest.mark.parametrize("target", ["safetensors", "timm", "hf", "stablehlo", pytest.param("onnx", marks=WITH_ONNX)])
def test_a_mean_and_deviation_of_pixels_are_carried_by_every_export(experiment_run, tmp_path, target):
    plain = load.read(experiment_run)
    source = dataclasses.replace(plain, mean=(0.2,), std=(0.3,))
    sample = TARGETS[target].sample(source, source.config)
    inputs = sample["inputs"] if not TARGETS[target].torch else sample["inputs"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(inputs, (sample["images"] / 255 - 0.2) / 0.3, atol=1e-5)
    assert np.abs(sample["logits"] - classifier.from_source(plain).logits(sample["images"])).max() > 0.01
    assert TARGETS[target].export(tmp_path, source, sample) < 1e-4
    card = model_card.write(source, {}, TARGETS[target], [])
    assert "`(pixels / 255 - 0.2) / 0.3` of 8-bit pixels" in card
    if target not in ("stablehlo", "onnx"):
        again = load.read(tmp_path)
        assert (again.mean, again.std) == ((0.2,), (0.3,))
        np.testing.assert_allclose(jvitmoe.load(tmp_path).logits(sample["images"]), sample["logits"], atol=1e-5)
    if target == "timm":
        told = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
        assert (told["mean"], told["std"]) == ([0.2], [0.3])
    if target == "hf":
        told = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert (told["image_mean"], told["image_std"]) == ([0.2], [0.3])


@pytest.mark.parametrize("target", ["timm", "hf"])
def test_what_they_would_load_reads_back_to_our_logits(exported, target):
    out = exported(target)
    sample = np.load(out / "sample.npz")
    again = jvitmoe.load(out)
    np.testing.assert_allclose(again.logits(sample["images"]), sample["logits"], atol=1e-6)
    assert again.names == tuple("0123456789")
    assert again.config.norm_epsilon == Config().model.norm_epsilon


def test_the_card_tells_data_recipe_seed_accuracy_hardware_versions_and_licence(exported, experiment_run):
    result = json.loads((experiment_run / "result.json").read_text())
    for target in ("safetensors", "timm", "hf"):
        card = (exported(target) / "README.md").read_text()
        for row in result["rows"]:
            assert f"| {row['model']} | {row['accuracy']:.2%} |" in card
        for wanted in (
            "`digits`, trained on its training split",
            "| `routing.experts` | `4` |",
            "Seed 0, checkpoint at step 44",
            result["hardware"],
            f"jax {result['versions']['jax']}",
            "CC BY 4.0",
            "4 experts per MLP, averaged into one",
        ):
            assert wanted in card, wanted
        assert "data.dir" not in card
        assert card.startswith("---\nlicense: unknown\nlibrary_name: ")
        for file in exported(target).iterdir():
            assert str(file.parent).encode() not in file.read_bytes(), file.name
    assert "Not known to jvitmoe" not in card


def test_a_run_that_was_not_tested_says_so(exported, experiment_run):
    source = dataclasses.replace(load.read(experiment_run), step=3)
    source.config.data.name = "my_set"
    card = model_card.write(source, {}, TARGETS["onnx"], ["a remark"])
    assert "Not tested." in card
    assert "Not known to jvitmoe" in card
    assert "- a remark" in card
    result = {"rows": [{"model": "merged", "accuracy": 0.5, "nll": 1.0, "images": 2}], "step": 9, "seed": 0}
    card = model_card.write(source, {**result, "active_parameters": 1}, TARGETS["onnx"], [])
    assert "The exported checkpoint is another one, at step 3" in card


@pytest.mark.parametrize(("name", "shown"), [("hf:/home/me/private/set?label=x", "hf:set"), ("hf:me/set", "hf:me/set")])
def test_the_card_names_a_local_set_without_its_folder(experiment_run, name, shown):
    source = load.read(experiment_run)
    source.config.data.name = name
    card = model_card.write(source, {}, TARGETS["onnx"], [])
    assert card.count(shown) == 3
    assert "private" not in card


@pytest.mark.parametrize(("start", "base"), [("hf://a/vit@main", "a/vit"), ("timm://vit_x", "timm/vit_x")])
def test_the_card_names_the_public_vit_that_training_started_from(experiment_run, start, base):
    source = load.read(experiment_run)
    source.config.init.source = start
    card = model_card.write(source, {}, TARGETS["timm"], [])
    assert f"- jvitmoe\nbase_model: {base}\n---" in card
    assert f"| `init.source` | `{start}` |" in card
    assert f"Training started from `{base}`, so its licence applies too." in card
    source.config.init.source = "/home/me/vit"
    card = model_card.write(source, {}, TARGETS["timm"], [])
    assert "base_model" not in card
    assert "/home/me" not in card


def config_of(**model: object) -> Config:
    config = Config()
    config.model = dataclasses.replace(config.model, **model)
    return config


@pytest.mark.parametrize(
    ("target", "model", "flags"),
    [
        ("timm", {"head_hidden": 8}, "--config.model.head_hidden=0"),
        ("timm", {"pool": "seq"}, "--config.model.pool=cls"),
        ("timm", {"stem": "conv"}, "--config.model.stem=patch"),
        ("hf", {"registers": 1}, "--config.model.registers=0"),
        ("hf", {"pool": "mean"}, "--config.model.pool=cls"),
        ("hf", {"pool": "mean", "head_hidden": 8}, "--config.model.head_hidden=0 --config.model.pool=cls"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_config_that_has(target, model, flags):
    with pytest.raises(UserError, match="nothing was written") as caught:
        TARGETS[target].examine(config_of(**model))
    assert flags in str(caught.value)
    assert "\n" not in str(caught.value)
    assert TARGETS["stablehlo"].examine(config_of(**model)) == []


@pytest.mark.parametrize("target", ["safetensors", "stablehlo", pytest.param("onnx", marks=WITH_ONNX)])
@pytest.mark.parametrize(
    "parts",
    [
        {"stem": "conv", "pool": "seq"},
        {"stem": "strided", "pool": "seq", "qk_norm": True},
        {"registers": 2, "pool": "cls_mean", "layer_scale": 0.1},
    ],
    ids=["conv", "strided", "registers"],
)
def test_a_model_of_any_parts_is_the_same_where_it_goes(parts, target, tmp_path, capfd):
    model = config_of(image_size=8, channels=3, patch=4, width=16, hidden=24, depth=2, heads=2, **parts).model
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * random.standard_normal(x.shape, "f"), vit.init(vit.build(model), jax.random.key(0))
    )
    source = load.Source(Path("run"), "run", weight_names.flatten(params), model)
    pixels = random.integers(0, 256, (5, 8, 8, 3), np.uint8)
    logits = classifier.from_source(source).logits(pixels)
    capfd.readouterr()
    run = TARGETS[target].write(tmp_path, source, model)
    assert capfd.readouterr().out == ""
    for count in (1, 5):
        found = run((pixels[:count] / 127.5 - 1).astype("f"))
        np.testing.assert_allclose(found, logits[:count], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "model", "remark"),
    [
        ("timm", {}, "no_embed_class"),
        ("hf", {}, "it is zeros"),
        ("timm", {"norm_epsilon": 1e-3}, "not model.norm_epsilon=0.001"),
        ("timm", {"positions": "sincos2d"}, "positions are computed here"),
        pytest.param("onnx", {}, "operator set 23 of ONNX", marks=WITH_ONNX),
    ],
)
def test_what_differs_there_is_said(target, model, remark):
    assert any(remark in line for line in TARGETS[target].examine(config_of(**model)))


class Toy(base.Target):
    """All that a new target needs: one class."""

    name = library = "toy"
    fields = base.FIELDS - {"pool"}
    use = "See the format's own page."
    check = 'sample["logits"]'

    def write(self, out, source, model):
        np.savez(out / "toy.npz", **classifier.dense_arrays(source))
        with np.load(out / "toy.npz") as file:
            again = classifier.from_source(dataclasses.replace(source, params={**source.params, **file}))
        return lambda inputs: again.logits(np.rint((inputs + 1) * 127.5).astype(np.uint8))


def test_a_target_takes_one_class(experiment_run, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "toy", Toy())
    code, out, err = call(export.main, f"--workdir={experiment_run}", "--to=toy", f"--out={tmp_path / 'x'}")
    assert (code, err) == (0, "")
    assert "as toy" in out
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "README.md",
        "classes.json",
        "sample.npz",
        "toy.npz",
    ]
    assert "library_name: toy" in (tmp_path / "x" / "README.md").read_text()
    with pytest.raises(UserError, match=r"toy has no counterpart of model\.pool=mean; .*--config\.model\.pool=cls, or"):
        TARGETS["toy"].examine(config_of(pool="mean"))


@dataclasses.dataclass
class WithPart(ModelConfig):
    """A model with a part of which exports and imports know nothing."""

    part: str = ""


def test_a_new_field_of_the_model_is_refused_by_targets_that_do_not_list_it():
    config = config_of()
    config.model = WithPart(part="new")
    for name in ("timm", "hf"):
        with pytest.raises(UserError, match=r"no counterpart of model\.part=new"):
            TARGETS[name].examine(config)


def test_the_original_is_refused_by_timm_and_nothing_is_written(experiment_run, tmp_path, monkeypatch):
    real = load.read

    def read(path, **rest):
        found = real(path, **rest)
        found.config.model.head_hidden = 8
        return found

    monkeypatch.setattr(load, "read", read)
    code, out, err = call(export.main, f"--workdir={experiment_run}", "--to=timm", f"--out={tmp_path / 'x'}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "timm has no counterpart of model.head_hidden=8" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to=timm", "--out={new}"), "--workdir is missing"),
        (("--workdir={run}", "--to=tim", "--out={new}"), "it must be one of hf, onnx, safetensors"),
        (("--workdir={run}", "--to=timm"), "--out is missing"),
        (("--workdir={run}", "--to=timm", "--out={run}"), "which is not a new or empty folder"),
        (("--workdir={run}", "--to=timm", "--out=."), "which is not a new or empty folder"),
        (("--workdir=no/where", "--to=timm", "--out={new}"), "'no/where' does not exist; give the folder that"),
        (("--workdir={run}", "--to=timm", "--out={new}", "--checkpoint=9"), "checkpoint '9' does not exist"),
    ],
)
def test_export_refuses_in_one_line(experiment_run, tmp_path, arguments, message):
    places = {"run": experiment_run, "new": tmp_path / "new"}
    code, _, err = call(export.main, *(a.format(**places) for a in arguments))
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [export.main, evaluate.main], ids=["export", "evaluate"])
def test_data_that_have_moved_are_looked_for_by_the_flag_of_the_command(tmp_path, experiment_run, command):
    run = shutil.copytree(experiment_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"name": "folder", "dir": str(tmp_path / "gone")}
    (run / "config.json").write_text(json.dumps(config))
    for meta in run.glob("checkpoints/*/meta/metadata"):
        kept = json.loads(meta.read_text())
        kept["config"]["data"] = config["data"]
        kept.pop("checksum")
        meta.write_text(json.dumps(kept | {"checksum": files.checksum(kept)}))
    more = ["--to=safetensors", f"--out={tmp_path / 'out'}"] if command is export.main else []
    code, _, err = call(command, f"--workdir={run}", *more)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path / 'gone' / 'train'} is not a folder" in err
    assert "set --data_dir=..." in err


def test_a_folder_beside_the_export_stays(experiment_run, tmp_path):
    (tmp_path / "x.part").mkdir()
    (tmp_path / "x.part" / "mine").touch()
    export.main(["export", f"--workdir={experiment_run}", "--to=safetensors", f"--out={tmp_path / 'x'}"])
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "README" not in path.name) == (
        sorted(["x", "x.part", "x.part/mine", "x/classes.json", "x/config.json", "x/model.safetensors", "x/sample.npz"])
    )


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(experiment_run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(base.np, "savez", full)
    code, _, err = call(export.main, f"--workdir={experiment_run}", "--to=timm", f"--out={tmp_path / 'x'}")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be written: No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_folder_is_refused_before_the_work(experiment_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="which is not a new or empty folder"):
        export.main(["export", f"--workdir={experiment_run}", "--to=timm", f"--out={tmp_path / 'link'}"])


def test_logits_that_are_no_numbers_do_not_pass(experiment_run, tmp_path, monkeypatch):
    real = base.Target.sample

    def with_nan(*arguments):
        sample = real(*arguments)
        sample["logits"][3] = np.nan
        return sample

    monkeypatch.setattr(base.Target, "sample", with_nan)
    with pytest.raises(UserError, match="logits are nan from ours"):
        export.main(["export", f"--workdir={experiment_run}", "--to=timm", f"--out={tmp_path / 'x'}"])


def test_an_export_that_computes_something_else_is_not_finished(experiment_run, tmp_path, monkeypatch):
    real = weight_names.write

    def wrong(*arguments, **rest):
        arrays = real(*arguments, **rest)
        arrays["head.bias"] = arrays["head.bias"] + 0.01
        return arrays

    monkeypatch.setattr(weight_names, "write", wrong)
    with pytest.raises(UserError, match="from ours, more than"):
        export.main(["export", f"--workdir={experiment_run}", "--to=timm", f"--out={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


def test_without_jax2onnx_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jvitmoe\[export\]'"):
        TARGETS["onnx"].examine(Config())


@WITH_ONNX
def test_more_parameters_than_a_message_of_protobuf_holds_are_refused_at_once():
    with pytest.raises(UserError, match=r"the parameters have 2,5\d\d,.* bytes; --to=onnx writes at most 2,146,4"):
        TARGETS["onnx"].examine(config_of(image_size=224, patch=14, channels=3, width=1280, hidden=5120, depth=32))


def test_a_safetensors_file_that_does_not_fit_its_config_is_refused(exported, tmp_path):
    out = exported("safetensors")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    about = json.loads((tmp_path / "config.json").read_text())
    about["model"]["hidden"] = 99
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"'blocks\.mlp\.down' has shape \(2, 12, 8\); it must be \(2, 99, 8\)"):
        jvitmoe.load(tmp_path)
    about["model"]["no_such"] = 1
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises((ConfigError, UserError), match="is not a field"):
        jvitmoe.load(tmp_path)
