"""Exports: what is written gives our logits where it goes; what has no counterpart is refused and nothing written."""

import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jvitmoe
from jvitmoe.commands import evaluate, export, predict
from jvitmoe.config import Config, DataConfig, ModelConfig, RoutingConfig
from jvitmoe.data import pictures, sources
from jvitmoe.errors import UserError
from jvitmoe.interop import classifier, load, model_card, weight_names
from jvitmoe.interop.formats import TARGETS, base
from jvitmoe.runs import safe_io
from processes import call, refused, succeed
from run_folders import saved

pytestmark = pytest.mark.slow

WITH_ONNX = pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is None, reason="needs jvitmoe[export]")
EVERY_TARGET = ["safetensors", "timm", "hf", "stablehlo", pytest.param("onnx", marks=WITH_ONNX)]


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
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", block + code], env=environment, cwd=folder, capture_output=True, text=True, timeout=200
    )


def codes_of(card: Path) -> list[str]:
    """Returns the blocks of a card: the checksums, loading it, and the check."""
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


@pytest.mark.parametrize(("target", "apart"), [("safetensors", 0), ("timm", 1e-6), ("hf", 1e-6)])
def test_an_export_reads_back_to_our_logits_on_the_test_images_of_its_sample(
    exported, experiment_run, monkeypatch, target, apart
):
    out, test = exported(target), sources.load(Config().data, Config().model).test
    sample, again, first = np.load(out / "sample.npz"), jvitmoe.load(out), jvitmoe.load(experiment_run)
    np.testing.assert_array_equal(sample["images"], test.images_NHWc[:16])
    np.testing.assert_array_equal(sample["labels"], test.labels_N[:16])
    inputs = sample["inputs"].transpose(0, 2, 3, 1) if TARGETS[target].torch else sample["inputs"]
    np.testing.assert_allclose(inputs, sample["images"] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(first.logits(sample["images"]), sample["logits"])
    np.testing.assert_allclose(again.logits(sample["images"]), sample["logits"], rtol=0, atol=apart)
    assert again.names == first.names == tuple("0123456789")
    assert again.config.norm_epsilon == Config().model.norm_epsilon
    if target == "safetensors":
        monkeypatch.chdir(out)
        exec("".join(codes_of(out / "README.md")).replace('print(model(["picture.png"]))', ""), {})


def test_the_ema_of_a_run_is_exported_and_classifies_as_it_was_tested(experiment_run, exported, tmp_path, monkeypatch):
    rows = {row["model"]: row for row in jvitmoe.Run(experiment_run).results["rows"]}
    test = sources.load(Config().data, Config().model).test
    out = jvitmoe.Run(experiment_run).export("safetensors", tmp_path / "ema", ema=True)
    logits = jvitmoe.load(out).logits(test.images_NHWc)
    np.testing.assert_array_equal(logits, jvitmoe.Run(experiment_run).classifier(ema=True).logits(test.images_NHWc))
    assert (logits.argmax(1) == test.labels_N).mean() == pytest.approx(rows["EMA"]["accuracy"])
    assert (logits != jvitmoe.load(experiment_run).logits(test.images_NHWc)).any()
    assert "This export is the row `EMA`." in (out / "README.md").read_text()
    assert "This export is the row `merged`." in (exported("safetensors") / "README.md").read_text()
    monkeypatch.setattr(load.Checkpoints, "read", lambda *_: READ(*_)._replace(ema=None))
    for place in (out, experiment_run):
        with pytest.raises(UserError, match=r"leave .*--ema out"):
            jvitmoe.load(place, ema=True)


READ = load.Checkpoints.read


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
    sample = TARGETS["onnx"].sample(source, base.sample_images(source))
    files = sorted((tmp_path / "test").rglob("*.png"))[:16]
    for image, file in zip(sample["images"], files, strict=True):
        np.testing.assert_array_equal(image, pictures.centre_crop(pictures.Picture("", file), 8, 1))
    np.testing.assert_array_equal(sample["labels"], np.arange(16) // 3)
    TARGETS["safetensors"].write(tmp_path, source, source.model)
    again = jvitmoe.load(tmp_path)
    np.testing.assert_array_equal(again.logits(files), sample["logits"])
    whole = classifier.Classifier(dataclasses.replace(source, crop="exact"))
    assert (whole.logits(files) != sample["logits"]).any()


@pytest.mark.parametrize("target", ["stablehlo", pytest.param("onnx", marks=WITH_ONNX)])
def test_in_a_fresh_process_without_jvitmoe_the_code_of_the_card_runs_at_any_batch(exported, target):
    out = exported(target)
    *blocks, check = codes_of(out / "README.md")
    code = "".join([*blocks, check])
    code += "assert np.abs(run(sample['inputs'][:7]) - sample['logits'][:7]).max() < 1e-4\n"
    if target == "onnx":  # without padding, onnxruntime 1.30 ends by SIGFPE here
        code += "assert run(sample['inputs'][:0]).shape == (0, 10)\n"
    else:
        code += "assert model.platforms == ('cpu', 'cuda')\n"
    wrong = textwrap.indent(check.replace('sample["logits"]', 'sample["logits"] + 0.01'), "    ")
    done = outside(f"{code}try:\n{wrong}\nexcept AssertionError:\n    print('noticed')\n", out)
    assert (done.returncode, done.stdout) == (0, "noticed\n"), done.stderr


@pytest.mark.parametrize("target", ["safetensors", "timm", "hf", "stablehlo"])
def test_a_mean_and_deviation_of_pixels_are_carried_by_every_export(experiment_run, tmp_path, target):
    """ONNX takes the inputs that StableHLO takes."""
    plain = load.read(experiment_run)
    source = dataclasses.replace(plain, mean=(0.2,), std=(0.3,))
    sample = TARGETS[target].sample(source, base.sample_images(source))
    inputs = sample["inputs"] if not TARGETS[target].torch else sample["inputs"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(inputs, (sample["images"] / 255 - 0.2) / 0.3, atol=1e-5)
    assert np.abs(sample["logits"] - classifier.Classifier(plain).logits(sample["images"])).max() > 0.01
    assert TARGETS[target].export(tmp_path, source, sample) < 1e-4
    card = model_card.write(source, {}, TARGETS[target], [])
    assert "`(pixels / 255 - 0.2) / 0.3` of 8-bit pixels" in card
    if target != "stablehlo":
        again = load.read(tmp_path)
        assert (again.mean, again.std) == ((0.2,), (0.3,))
        np.testing.assert_allclose(classifier.Classifier(again).logits(sample["images"]), sample["logits"], atol=1e-5)


def test_the_card_tells_data_recipe_seed_accuracy_hardware_versions_and_licence(exported, experiment_run):
    result = json.loads((experiment_run / "result.json").read_text())
    wanted = [f"| {row['model']} | {row['accuracy']:.2%} |" for row in result["rows"]]
    wanted += [result["hardware"], f"jax {result['versions']['jax']}", "Seed 0, checkpoint at step 44", "CC BY 4.0"]
    wanted += ["`digits`, trained on its training split", "| `routing.experts` | `4` |", "averaged into one"]
    for target in ("safetensors", "timm", "hf"):
        card = (exported(target) / "README.md").read_text()
        assert not [part for part in wanted if part not in card]
        assert card.startswith("---\nlicense: unknown\nlibrary_name: ")
        for file in exported(target).iterdir():
            assert str(file.parent).encode() not in file.read_bytes(), file.name


def test_a_card_says_what_is_not_known_what_a_run_started_from_and_no_folder_of_its_user(experiment_run):
    source = dataclasses.replace(load.read(experiment_run), step=3)

    def card(name="digits", start="", result=None):
        source.config.data.name, source.config.init.source = name, start
        return model_card.write(source, result or {}, TARGETS["timm"], ["a remark"])

    assert all(part in card("my_set") for part in ("Not tested.", "Not known to jvitmoe", "- a remark"))
    rows = [{"model": "merged", "accuracy": 0.5, "nll": 1.0, "images": 2}]
    other = card(result={"rows": rows, "step": 9, "seed": 0, "active_parameters": 1})
    assert "The exported checkpoint is another one, at step 3" in other
    assert "Not known to jvitmoe" not in other
    for name, shown in (("hf:/home/me/set?label=x", "hf:set"), ("hf:me/set", "hf:me/set")):
        assert card(name).count(shown) == 3
    for start, public in (("hf://a/vit@main", "a/vit"), ("timm://vit_x", "timm/vit_x")):
        assert f"- jvitmoe\nbase_model: {public}\n---" in card(start=start)
        assert card(start=start).count(public) > 1  # its licence applies too
    assert not [part for part in ("base_model", "/home/me") if part in card("hf:/home/me/set", "/home/me/vit")]


def config_of(**model: object) -> Config:
    config = Config()
    config.model = dataclasses.replace(config.model, **model)
    return config


@pytest.mark.parametrize(
    ("target", "model", "flags"),
    [
        ("timm", {"pool": "seq", "stem": "conv"}, "--config.model.stem=patch --config.model.pool=cls"),
        ("hf", {"registers": 1}, "--config.model.registers=0"),
        ("hf", {"pool": "mean", "head_hidden": 8}, "--config.model.head_hidden=0 --config.model.pool=cls"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_config_that_has(target, model, flags):
    with pytest.raises(UserError, match=flags):
        TARGETS[target].examine(config_of(**model))
    assert TARGETS["stablehlo"].examine(config_of(**model)) == []


@pytest.mark.parametrize("target", ["timm", "hf"])
def test_a_merged_model_goes_where_a_dense_one_of_its_width_goes(target):
    routed = config_of(pool="cls", expert_hidden=24, shared_hidden=8)
    routed.routing = RoutingConfig(experts=4, kind="topk")
    (remark, *others) = TARGETS[target].examine(routed)
    assert remark == "the router (topk) is left behind: this is the mean of the experts"
    assert others == TARGETS[target].examine(config_of(pool="cls", hidden=32))
    routed.routing = RoutingConfig(experts=4, kind="token")  # nothing to leave behind: chance chose
    assert TARGETS[target].examine(routed) == others


@pytest.mark.parametrize("target", ["timm", "hf"])
def test_a_new_field_of_the_model_is_refused_by_targets_that_do_not_list_it(target):
    config, new = Config(), dataclasses.make_dataclass("WithPart", [("part", str, "")], bases=(ModelConfig,))
    config.model = new(part="new")
    with pytest.raises(UserError, match=r"no counterpart of model\.part=new"):
        TARGETS[target].examine(config)


@pytest.mark.parametrize(
    "parts",
    [
        {"stem": "conv", "pool": "seq", "qk_norm": True},
        {"stem": "strided", "registers": 2, "pool": "cls_mean", "layer_scale": 0.1},
    ],
    ids=["conv", "strided"],
)
def test_a_model_of_any_parts_is_the_same_where_it_goes(parts, tmp_path, capfd):
    model = small(channels=3, **parts)
    source = untrained(model)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    logits = classifier.Classifier(source).logits(pixels)
    assert np.ptp(logits) > 0.1
    capfd.readouterr()
    for target in ("safetensors", "stablehlo", *["onnx"] * (importlib.util.find_spec("jax2onnx") is not None)):
        run = TARGETS[target].write(tmp_path, source, model)
        assert capfd.readouterr().out == ""
        for count in (1, 5):
            found = run((pixels[:count] / 127.5 - 1).astype("f"))
            np.testing.assert_allclose(found, logits[:count], rtol=0, atol=1e-5)


def small(**model: object) -> ModelConfig:
    sizes = {"image_size": 8, "patch": 4, "width": 16, "hidden": 24, "depth": 2, "heads": 2, "norm_epsilon": 1e-6}
    return config_of(**sizes | model).model


def untrained(model: ModelConfig) -> load.Source:
    """Returns a run of random numbers."""
    rng = np.random.default_rng(0)
    params = {name: 0.2 * rng.normal(size=shape).astype("f") for name, shape in load._shapes(model).items()}
    return load.Source(Path("run"), "run", params, model, tuple("abcdefghij"))


@pytest.fixture
def written(tmp_path) -> Path:
    """Returns our own export of a small model that was never trained."""
    source = untrained(small())
    (tmp_path / "out").mkdir()
    TARGETS["safetensors"].write(tmp_path / "out", source, source.model)
    return tmp_path / "out"


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_one_flipped_bit_in_any_file_of_an_export_is_noticed_by_loading_and_by_the_code_of_its_card(
    exported, tmp_path, monkeypatch, target
):
    out = shutil.copytree(exported(target), tmp_path / target)
    monkeypatch.chdir(out)
    names = sorted({path.name for path in out.iterdir()} - {"README.md", "SHA256SUMS"})
    assert [line[66:] for line in (out / "SHA256SUMS").read_text().splitlines()] == names
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], check=True)
    check = codes_of(out / "README.md")[0]
    exec(check, {})
    is_read, random = target not in ("stablehlo", "onnx"), np.random.default_rng(0)
    for name in names:
        sound = (out / name).read_bytes()
        for at in random.integers(len(sound), size=3):
            content = bytearray(sound)
            content[at] ^= 1 << random.integers(8)
            (out / name).write_bytes(content)
            with pytest.raises(AssertionError, match=name):
                exec(check, {})
            if is_read and name not in ("sample.npz", "classes.json"):  # of which nothing is computed
                with pytest.raises(UserError, match=f"{name} is not the file that SHA256SUMS lists"):
                    load.read(out)
        (out / name).write_bytes(sound)
    exec(check, {})
    if is_read:
        (out / "config.json").unlink()
        with pytest.raises(UserError, match=r"config\.json is not the file that SHA256SUMS lists"):
            load.read(out)


def test_an_export_without_checksums_says_so_and_files_of_others_need_none(exported, tmp_path):
    assert load.read("cifar10_cct").notes == ()
    out = shutil.copytree(exported("safetensors"), tmp_path / "out")
    assert load.read(out).notes == ()
    (out / "SHA256SUMS").write_text(f"{64 * '0'}  other.iso\n")  # of a folder of downloads
    assert jvitmoe.load(out).notes == ("no SHA256SUMS beside it lists it, so it is not checked",)
    theirs = shutil.copytree(exported("timm"), tmp_path / "timm")
    (theirs / "SHA256SUMS").unlink()
    assert load.read(theirs).notes == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("mean", "std") for value in ([float("nan")], [1e300], "0.5")),
        *(("std", [0.0]), ("mean", [0.1, 0.2]), ("mean", None), ("crop", "middle"), ("model", {"width": "16"})),
        *(("classes", value) for value in (["a"], "abcdefghij", [*range(10)], None, {})),
    ],
)
def test_a_value_in_the_config_of_an_export_that_no_run_has_is_refused(written, name, value):
    path = written / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=name):
        load.read(written)


def test_positions_that_no_array_shows_are_bounded_before_they_are_computed(tmp_path):
    source = untrained(small(positions="sincos2d"))
    TARGETS["safetensors"].write(tmp_path, source, source.model)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    about["model"]["image_size"] = 30_000
    path.write_text(json.dumps(about))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"model\.image_size is 30000"):
        load.read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27  # of which 2**26 are the longest config.json that is read


def test_a_damaged_checkpoint_is_a_line_of_warning_and_not_in_the_json(experiment_run, tmp_path):
    run, picture = shutil.copytree(experiment_run, tmp_path / "run"), tmp_path / "picture.png"
    newest = saved(run)[-1]
    shutil.copytree(newest, newest.with_name("999"))
    Image.effect_noise((8, 8), 20).save(picture)
    code, out, err = call(predict.main, f"--workdir={run}", "--json", picture)
    assert (code, err.count("\n"), len(json.loads(out))) == (0, 1, 1)
    assert err.startswith("warning: checkpoint 999 skipped: ")
    out = succeed(export.main, f"--workdir={run}", "--to=safetensors", f"--out={tmp_path / 'out'}")
    assert "warning: checkpoint 999 skipped: " in out


def test_names_that_were_swapped_in_a_run_folder_are_not_exported(experiment_run, tmp_path):
    run = shutil.copytree(experiment_run, tmp_path / "run")
    names = json.loads((run / "classes.json").read_text())
    (run / "classes.json").write_text(json.dumps([names[1], names[0], *names[2:]]))
    said = refused(export.main, f"--workdir={run}", "--to=safetensors", f"--out={tmp_path / 'out'}")
    assert "classes.json does not match its checksum" in said
    assert not (tmp_path / "out").exists()


class Toy(base.Target):
    """All that a new target needs: one class."""

    name = library = "toy"
    fields = base.FIELDS - {"pool"}
    use = "See the format's own page."
    check = 'sample["logits"]'

    def write(self, out, source, model):
        np.savez(out / "toy.npz", **classifier.dense_arrays(source))
        with np.load(out / "toy.npz") as file:
            again = classifier.Classifier(dataclasses.replace(source, params={**source.params, **file}))
        return lambda inputs: again.logits(np.rint((inputs + 1) * 127.5).astype(np.uint8))


def test_a_target_takes_one_class_and_a_folder_beside_its_export_stays(experiment_run, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "toy", Toy())
    monkeypatch.setattr(export, "FORMATS", (*export.FORMATS, "toy"))
    (tmp_path / "x.part").mkdir()
    (tmp_path / "x.part" / "mine").touch()
    out = succeed(export.main, f"--workdir={experiment_run}", "--to=toy", f"--out={tmp_path / 'x'}")
    assert "checked     read back by jvitmoe: logits of 16 images within " in out
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    written = ("README.md", "SHA256SUMS", "classes.json", "sample.npz", "toy.npz")
    assert found == {"x.part/mine", *(f"x/{name}" for name in written)}
    assert [path.name for path in (tmp_path / "x.part").iterdir()] == ["mine"]
    assert "library_name: toy" in (tmp_path / "x" / "README.md").read_text()
    with pytest.raises(UserError, match=r"--config\.model\.pool=cls, or"):
        TARGETS["toy"].examine(config_of(pool="mean"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--to=timm --out={new}", "--workdir"),
        ("--workdir={run} --to=tim --out={new}", "hf, onnx, safetensors, stablehlo, timm; did you mean 'timm'?"),
        ("--workdir={run} --to=timm", "--out"),
        *((f"--workdir={{run}} --to=timm --out={out}", "new or empty folder") for out in ("{run}", ".", "{link}")),
        ("--workdir={run} --to=timm --out=gs://bucket/x", "'gs://bucket/x', a URL"),
        ("--workdir=no/where --to=timm --out={new}", "no/where"),
        ("--workdir={run} --to=timm --out={new} --checkpoint=9", "checkpoint '9'"),
    ],
)
def test_export_refuses_in_one_line(experiment_run, tmp_path, arguments, named):
    places = {"run": experiment_run, "new": tmp_path / "new", "link": tmp_path / "link"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert named in refused(export.main, *arguments.format(**places).split())
    assert not (tmp_path / "new").exists()
    assert {*export.FORMATS} == TARGETS.keys()


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
        meta.write_text(json.dumps(kept | {"checksum": safe_io.checksum(kept)}))
    more = ["--to=safetensors", f"--out={tmp_path / 'out'}"] if command is export.main else []
    assert "set --data_dir=..." in refused(command, f"--workdir={run}", *more)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def with_head(source: load.Source) -> load.Source:
    source.config.model.head_hidden = 8
    return source


def with_epsilon(source: load.Source) -> load.Source:
    if source.config is None:  # what was written, read back
        return source
    source.config.model.norm_epsilon = 1e-3
    return dataclasses.replace(source, model=dataclasses.replace(source.model, norm_epsilon=1e-3))


def with_nan(sample: weight_names.Dict) -> weight_names.Dict:
    sample["logits"][3] = np.nan
    return sample


@pytest.mark.parametrize(
    ("place", "name", "fault", "named"),
    [
        (load, "read", with_head, "model.head_hidden=8"),
        (load, "read", with_epsilon, "model.norm_epsilon=0.001"),
        (base.Target, "sample", with_nan, "nan from ours"),
        (weight_names, "write", lambda x: x | {"head.bias": x["head.bias"] + 0.01}, "from ours"),
        (base.np, "savez", None, "No space left on device"),
    ],
)
def test_an_export_that_cannot_be_made_or_computes_something_else_is_one_line_and_leaves_nothing(
    experiment_run, tmp_path, monkeypatch, place, name, fault, named
):
    real = getattr(place, name)
    monkeypatch.setattr(place, name, (lambda *args, **rest: fault(real(*args, **rest))) if fault else full)
    assert named in refused(export.main, f"--workdir={experiment_run}", "--to=timm", f"--out={tmp_path / 'x'}")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_told_to_end_leaves_nothing(experiment_run, tmp_path, monkeypatch):
    monkeypatch.setattr(base.Target, "export", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = call(export.main, f"--workdir={experiment_run}", "--to=timm", f"--out={tmp_path / 'x'}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert (code, err) == (143, "")
    assert list(tmp_path.iterdir()) == []


def test_without_jax2onnx_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jvitmoe\[export\]'"):
        TARGETS["onnx"].examine(Config())


@WITH_ONNX
def test_more_parameters_than_a_message_of_protobuf_holds_are_refused_at_once():
    with pytest.raises(UserError, match=r"the parameters have 2,5\d\d,.* bytes"):
        TARGETS["onnx"].examine(config_of(image_size=224, patch=14, channels=3, width=1280, hidden=5120, depth=32))
