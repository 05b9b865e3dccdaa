"""Round trips with the real libraries: what timm and transformers save, we read, and what we export, they read.

They run in a process of their own, in the Python that JVITMOE_PEERS names (`make test` makes one), or in this one's.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jvitmoe import classifier, evaluation, export, formats, merging, pretrained, step
from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.models import vit

SMALL = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 1.5,
    "num_classes": 5,
}
SMALL_HF = {
    **{"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "num_labels": 5},
}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
CLOSE = 1e-4  # the tolerance that exports promise


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def inputs(pixels, tmp_path_factory):
    """The images as PyTorch's models take them, normalised by 0.5, in a file."""
    path = tmp_path_factory.mktemp("inputs") / "inputs.npz"
    images = (pixels.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
    np.savez(path, inputs=np.ascontiguousarray(images))
    return path


@pytest.fixture(scope="module")
def made(peers, inputs, tmp_path_factory):
    """Folders of models that the real libraries made and saved, by name."""
    root = tmp_path_factory.mktemp("made")
    for name, arguments in {
        "timm": {},
        "timm_no_embed_class": {"no_embed_class": True},
        "timm_avg": {"global_pool": "avg", "class_token": False},
        "timm_clip": {"architecture": "vit_base_patch16_clip_224", "pre_norm": False, "pretrained_cfg_overlay": HALF},
    }.items():
        peers("make_timm", folder=root / name, inputs=inputs, **SMALL, **arguments)
    peers("make_hf", folder=root / "hf", inputs=inputs, **SMALL_HF)
    return root


NAMES = ("timm", "timm_no_embed_class", "timm_avg", "timm_clip", "hf")
EPSILONS = {"hf": 1e-12, "timm_clip": 1e-5}  # timm's others have 1e-6


def expected(folder: Path) -> np.ndarray:
    return np.load(folder / "expected.npz")["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_what_they_saved_gives_their_logits_here(made, pixels, name):
    model = classifier.load(made / name)
    np.testing.assert_allclose(model.logits(pixels), expected(made / name), atol=CLOSE)
    assert model.config.cls_position is (name in ("timm", "timm_clip", "hf"))
    assert model.config.norm_epsilon == EPSILONS.get(name, 1e-6)
    assert np.abs(expected(made / name)).max() > 0.1


def write(style: str, source: pretrained.Source, params: dict, out: Path) -> None:
    """Writes an export of this dense tree."""
    flat = formats.flatten(jax.device_get(params))
    again = dataclasses.replace(source, params={**source.params, **flat}, classes=())
    out.mkdir()
    {"timm": export._write_timm, "hf": export._write_hf}[style](out, again, source.model)


def upcycled_and_merged(source: pretrained.Source, experts: int) -> dict:
    """Returns the dense tree that a run of experts from this source has at step 0, merged."""
    config = Config(model=source.model)
    config.routing.experts, config.init.source = experts, str(source.path)
    config.train.batch_size, config.train.devices, config.train.platform = 8, 1, "cpu"
    mesh = step.make_mesh(config.validate().train)
    dense, _ = pretrained.start(config)
    state = step.make_state(config, step.make_model(config, "cpu"), mesh, dense)
    assert any(jax.tree.leaves(merging.stacked(state.params)))
    return evaluation.dense_tree(config, state.params)


@pytest.mark.parametrize("name", NAMES)
def test_upcycled_and_merged_at_step_0_the_file_holds_the_same_values(peers, made, inputs, tmp_path, name):
    source = pretrained.read(made / name)
    style = "hf" if name == "hf" else "timm"
    write(style, source, upcycled_and_merged(source, 4), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (made / name, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)
    if style == "hf":
        answer = peers("hf_logits", folder=tmp_path / "out", inputs=inputs, out=tmp_path / "logits.npz")
        assert answer["odd"] == []
        found = [np.load(tmp_path / "logits.npz")["logits"]]
    else:
        epsilon = source.model.norm_epsilon
        peers("timm_logits", folder=tmp_path / "out", inputs=inputs, out=tmp_path / "logits.npz", epsilon=epsilon)
        found = [np.load(tmp_path / "logits.npz")[way] for way in ("by_config", "strict")]
    for logits in found:
        np.testing.assert_allclose(logits, expected(made / name), atol=1e-6)


@pytest.mark.parametrize(
    ("style", "overrides"),
    [
        ("timm", {}),
        ("timm", {"pool": "mean"}),
        ("timm", {"cls_position": True, "norm_epsilon": 1e-6}),
        ("timm", {"positions": "sincos2d", "width": 12, "hidden": 25}),
        ("timm", {"norm_epsilon": 1e-3}),
        ("hf", {}),
        ("hf", {"cls_position": True, "norm_epsilon": 1e-12, "position_rows": 7}),
    ],
)
def test_ours_gives_our_logits_there(peers, pixels, inputs, tmp_path, style, overrides):
    model = Config().model
    for name, value in {
        "channels": 3,
        "classes": 5,
        "width": 16,
        "hidden": 24,
        "depth": 2,
        "heads": 2,
        "patch": 4,
        **overrides,
    }.items():
        setattr(model, name, value)
    Config(model=model).validate()
    params = jax.device_get(vit.init(vit.build(model), jax.random.key(3)))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(4)
    leaves = [np.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), np.float32) for leaf in leaves]
    flat = formats.flatten(jax.tree.unflatten(structure, leaves))
    wanted = np.asarray(vit.logits(vit.build(model), formats.unflatten(flat), pixels / np.float32(127.5) - 1))
    flat["positions"] = pretrained._table(model, flat)
    source = pretrained.Source(Path("ours"), "run", flat, model, tuple("abcde"))
    out, found = tmp_path / "out", tmp_path / "logits.npz"
    out.mkdir()
    if style == "hf":
        export._write_hf(out, source, model)
        answer = peers("hf_logits", folder=out, inputs=inputs, out=found)
        assert answer == {"labels": list("abcde"), "odd": [], "mean": [0.5] * 3}
        np.testing.assert_allclose(np.load(found)["logits"], wanted, atol=CLOSE)
    else:
        export._write_timm(out, source, model)
        peers("timm_logits", folder=out, inputs=inputs, out=found, epsilon=model.norm_epsilon)
        np.testing.assert_allclose(np.load(found)["strict"], wanted, atol=CLOSE)
        if model.norm_epsilon in formats.TIMM_NORMS:
            np.testing.assert_allclose(np.load(found)["by_config"], wanted, atol=CLOSE)
        else:  # what the note of the export warns of
            assert np.abs(np.load(found)["by_config"] - wanted).max() > CLOSE


def test_another_normalisation_of_pixels_is_folded_into_the_patches(peers, pixels, tmp_path):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = (pixels / np.float32(255) - np.float32(mean)) / np.float32(std)
    np.savez(tmp_path / "inputs.npz", inputs=np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))
    overlay = {"mean": mean, "std": std}
    folder = tmp_path / "imagenet"
    peers("make_timm", folder=folder, inputs=tmp_path / "inputs.npz", **SMALL, pretrained_cfg_overlay=overlay)
    source = pretrained.read(folder)
    assert "folded" in " ".join(source.notes)
    np.testing.assert_allclose(classifier.from_source(source).logits(pixels), expected(folder), atol=CLOSE)


def test_npz_of_google_research_reads_as_timm_reads_it(peers, made, pixels, inputs, tmp_path):
    source = pretrained.read(made / "timm")
    arrays = formats.write(source.params, formats.GOOGLE, cls_row=True)
    arrays["Transformer/encoderblock_0/LayerNorm_0/scale"] = arrays["Transformer/encoderblock_0/LayerNorm_0/scale"] * 2
    np.savez(tmp_path / "vit.npz", **arrays)
    peers("timm_npz", path=tmp_path / "vit.npz", inputs=inputs, out=tmp_path / "logits.npz", **SMALL)
    theirs = np.load(tmp_path / "logits.npz")["logits"]
    assert np.abs(theirs - expected(made / "timm")).max() > 1e-3
    np.testing.assert_allclose(classifier.load(tmp_path / "vit.npz").logits(pixels), theirs, atol=CLOSE)


@pytest.mark.parametrize(("grid", "patch"), [(7, 4), (3, 3), (8, 2)])
def test_positions_and_patches_are_resized_as_timm_resizes_them(peers, tmp_path, grid, patch):
    rng = np.random.default_rng(0)
    table_TD, kernel_PPcD = rng.normal(size=(25, 6)).astype(np.float32), rng.normal(size=(3, 3, 2, 6))
    torch_kernel = np.ascontiguousarray(kernel_PPcD.transpose(3, 2, 0, 1), np.float32)
    np.savez(tmp_path / "old.npz", positions=table_TD, kernel=torch_kernel)
    peers("resample", arrays=tmp_path / "old.npz", out=tmp_path / "new.npz", grid=grid, patch=patch)
    new = np.load(tmp_path / "new.npz")
    np.testing.assert_allclose(pretrained.resize_positions(table_TD, grid), new["positions"], atol=1e-5)
    resized = pretrained.resize_patches(kernel_PPcD.astype(np.float32), patch).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(resized, new["kernel"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_values": 0.1}, "no place in a plain ViT"),
        ({"reg_tokens": 2}, "no place in a plain ViT"),
        ({"qk_norm": True}, "no place in a plain ViT"),
        ({"pre_norm": True}, "must hold a plain ViT"),
        ({"qkv_bias": False}, "must hold a plain ViT"),
        ({"norm_layer": "rmsnorm"}, "its norm_layer is 'rmsnorm'"),
        ({"act_layer": "quick_gelu"}, "its act_layer is 'quick_gelu'"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224", "pre_norm": False}, "whose act_layer is not 'gelu'"),
        ({"global_pool": "map"}, "no place in a plain ViT"),
        ({"global_pool": "avg", "class_token": False, "fc_norm": False}, "pools otherwise"),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "must make a square"),
    ],
)
def test_what_our_vit_has_no_place_for_is_refused(peers, inputs, tmp_path, arguments, message):
    peers("make_timm", folder=tmp_path / "odd", inputs=inputs, **SMALL, **arguments)
    with pytest.raises(config_lib.UserError, match=message) as caught:
        pretrained.read(tmp_path / "odd")
    assert "\n" not in str(caught.value)


def test_the_code_of_a_card_runs_there(peers, experiment_run, tmp_path, monkeypatch):
    for target in ("timm", "hf"):
        out = tmp_path / target
        monkeypatch.setattr("sys.argv", ["export"])
        export.main(["export", f"--workdir={experiment_run}", f"--to={target}", f"--out={out}"])
        blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        assert len(blocks) == (3 if target == "timm" else 2)
        peers("run_code", code="\n".join(blocks[-2:]))  # the last way to load it, and the check
        if target == "timm":
            peers("run_code", code="\n".join((blocks[0], blocks[-1])))
        sample = dict(np.load(out / "sample.npz"))
        sample["logits"] = sample["logits"] + 0.01
        np.savez(out / "sample.npz", **sample)
        with pytest.raises(AssertionError):
            peers("run_code", code="\n".join(blocks[-2:]))


def test_shards_and_other_models_of_transformers_are_refused(made, tmp_path):
    about = json.loads((made / "hf" / "config.json").read_text())
    arrays = load_file(made / "hf" / "model.safetensors")
    for change, message in (({"model_type": "dinov2"}, "model_type"), ({"hidden_act": "gelu_new"}, "hidden_act")):
        save_file(arrays, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(about | change))
        with pytest.raises(config_lib.UserError, match=message):
            pretrained.read(tmp_path)
