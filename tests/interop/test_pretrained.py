"""Starting from a trained ViT: what is kept, resized, folded, re-made and told; and what is refused in one line."""

import copy
import dataclasses
import functools
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jvitmoe import rules
from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.data import augment
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.interop import classifier, load, pretrained, weight_names
from jvitmoe.interop.formats import weights
from jvitmoe.models import vit

MODEL = ModelConfig(channels=3, classes=5, patch=4, width=12, hidden=20, depth=2, heads=2, cls_position=True)


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {}  # of models, which take a while to find


def dense(model: ModelConfig, seed: int = 0) -> weight_names.Dict:
    """Returns a flat dense tree of random numbers."""
    rng, key = np.random.default_rng(seed), repr(model)
    SHAPES[key] = SHAPES.get(key) or load._shapes(model)
    return {name: (0.3 * rng.normal(size=shape)).astype("f") for name, shape in SHAPES[key].items()}


def logits(model: ModelConfig, flat: weight_names.Dict, images: np.ndarray) -> np.ndarray:
    run = jax.jit(functools.partial(vit.logits, vit.build(model)))
    return np.asarray(run(weight_names.unflatten(flat), images))


def source(model: ModelConfig, flat: weight_names.Dict) -> load.Source:
    return load.Source(Path("there"), "timm", dict(flat), model)


def adapted(model: ModelConfig, **changes: object) -> tuple[ModelConfig, weight_names.Dict, weight_names.Dict, str]:
    """Returns (the other config, its fresh tree, what a ViT of MODEL becomes there, what was told)."""
    other = dataclasses.replace(model, **changes)
    fresh = dense(other, 1)
    params, lines = pretrained.adapt(source(model, dense(model)), other, fresh, DataConfig())
    assert {n: x.shape for n, x in params.items()} == {n: x.shape for n, x in fresh.items()}
    return other, fresh, params, "\n".join(lines)


IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("f")


def test_a_model_of_width_0_is_that_of_its_source_but_for_what_is_set(tmp_path):
    write_timm(tmp_path)
    config = Config()
    config.model = ModelConfig(width=0, classes=3, drop_path=0.1, image_size=16)
    config.init.source = str(tmp_path)
    resumed = copy.deepcopy(config)
    pretrained.complete(rules.check(config))
    source = load.read(tmp_path)
    own = {"classes": 3, "drop_path": 0.1, "image_size": 16}
    assert config.model == dataclasses.replace(source.model, **own)
    assert (config.data.mean, config.data.std) == (source.mean, source.std)
    (tmp_path / "model.safetensors").unlink()
    pretrained.complete(resumed, saved=config)  # a run that goes on needs no source
    assert resumed == config
    for name, fault in (
        ("", "model.width is 0; it must be above 0 without init.source"),
        ("no/such", "cannot be read"),
    ):
        lacking = Config(model=ModelConfig(width=0))
        lacking.init.source = name
        with pytest.raises(ConfigError, match=fault):
            pretrained.complete(rules.check(lacking))


@pytest.mark.parametrize("classes", [5, 3])
def test_the_same_vit_is_taken_as_it_is_with_a_fresh_head_for_another_number_of_classes(classes):
    _, fresh, params, told = adapted(MODEL, classes=classes)
    old = dense(MODEL)
    for name in params:
        kept = fresh if name.startswith("head.") and classes != 5 else old
        np.testing.assert_array_equal(params[name], kept[name])
    count = sum(leaf.size for leaf in old.values())
    ended = f": {count:,} of {count:,} parameters loaded"
    assert told.endswith(ended) if classes == 5 else "re-made the head for 3 classes (the source has 5)" in told


def test_the_position_of_cls_is_folded_where_there_is_none_and_zeros_where_there_was_none():
    other, _, params, _ = adapted(MODEL, cls_position=False)
    np.testing.assert_allclose(logits(other, params, IMAGES), logits(MODEL, dense(MODEL), IMAGES), atol=1e-6)
    _, _, params, _ = adapted(dataclasses.replace(MODEL, cls_position=False), cls_position=True)
    assert not params["cls_position"].any()


def test_a_larger_image_gets_positions_resized_and_says_so():
    old = dense(MODEL)
    old["positions"][:] = old["positions"].mean(0)  # alike everywhere: they must stay so
    other = dataclasses.replace(MODEL, image_size=20, init="original")
    fresh = dense(other, 1)
    params, lines = pretrained.adapt(source(MODEL, old), other, fresh, DataConfig())
    assert params["positions"].shape == (300, 12)
    np.testing.assert_allclose(params["positions"][:25], np.repeat(old["positions"][:1], 25, 0), atol=1e-6)
    np.testing.assert_array_equal(params["positions"][25:], fresh["positions"][25:])
    assert "resized positions from 2x2 to 5x5" in "\n".join(lines)


def test_grey_images_give_through_one_channel_what_they_gave_through_three():
    other, _, params, told = adapted(MODEL, channels=1)
    grey = IMAGES[..., :1]
    wanted = logits(MODEL, dense(MODEL), np.repeat(grey, 3, -1))
    np.testing.assert_allclose(logits(other, params, grey), wanted, atol=1e-5)
    assert "3 channels out over 1" in told


def test_what_cannot_be_kept_is_told():
    assert "model.norm_epsilon=0.01" in adapted(MODEL, norm_epsilon=0.01)[3]
    assert "skipped the positions" in adapted(MODEL, positions="sincos2d")[3]


@pytest.mark.parametrize("change", [{"width": 24}, {"depth": 3}, {"hidden": 8}, {"heads": 3}, {"pool": "mean"}])
def test_blocks_of_another_shape_are_refused_with_the_flags_that_fit(change):
    other = dataclasses.replace(MODEL, cls_position=False, **change)
    (name,) = change
    with pytest.raises(ConfigError, match=f"--config.model.{name}={getattr(MODEL, name)}"):
        pretrained.adapt(source(MODEL, dense(MODEL)), other, {}, DataConfig())


def test_a_part_of_the_model_that_the_source_lacks_is_refused():
    with_part = dataclasses.make_dataclass("WithPart", [("part", str, "")], bases=(ModelConfig,))
    new, without = (with_part(**dataclasses.asdict(MODEL), part=part) for part in ("new", ""))
    with pytest.raises(ConfigError, match=r"--config\.model\.part="):
        pretrained.adapt(source(without, dense(MODEL)), new, dense(MODEL, 1), DataConfig())


def write_hf(folder, model=MODEL, **about):
    flat = dense(model)
    arrays = weight_names.write(flat, weight_names.HF, cls_row=True)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(weights.hf_config(model, list("abcde")) | about))
    return flat


def write_timm(folder, model=MODEL, **about):
    flat = dense(model)
    save_file(weight_names.write(flat, weight_names.TIMM, cls_row=model.cls_position), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(weights.timm_config(model, list("abcde"), "exact") | about))
    return flat


def test_a_folder_tells_everything_and_a_bare_file_needs_the_heads(tmp_path):
    flat = write_hf(tmp_path)
    found = load.read(tmp_path)
    assert (found.model, found.classes, found.kind) == (MODEL, tuple("abcde"), "hf")
    np.testing.assert_array_equal(found.params["blocks.attention.out.kernel"], flat["blocks.attention.out.kernel"])
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="number of heads"):
        load.read(tmp_path)
    bare = load.read(tmp_path / "model.safetensors", heads=2)
    assert (bare.model.heads, bare.model.norm_epsilon) == (2, 1e-12)
    assert len(bare.notes) == 2  # what was taken for LayerNorm's epsilon, and for the pixels


def test_another_mean_and_deviation_of_pixels_are_kept(tmp_path):
    write_hf(tmp_path)
    plain = load.read(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    usual = {"rescale_factor": 0.00392156862745098}  # which changes no bit
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual | {"image_mean": mean, "image_std": std}))
    other = load.read(tmp_path)
    assert (other.mean, other.std) == (tuple(mean), tuple(std))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    theirs = ((pixels / 255 - mean) / std).astype("f")
    np.testing.assert_allclose(
        classifier.Classifier(other).logits(pixels), logits(MODEL, plain.params, theirs), atol=1e-4
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    np.testing.assert_allclose(
        classifier.load(tmp_path).logits(pixels), logits(MODEL, plain.params, (pixels / 255).astype("f")), atol=1e-4
    )


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({"model_args": {"num_heads": 2, "attn_layer": "x"}}, "attn_layer"),
        ({"model_args": {"num_heads": 2}, "architecture": "beit3_base_patch16_224"}, "'beit3'"),
        ({"model_args": {}, "architecture": "vit_base_patch16_gap_224"}, "number of heads"),  # 16
        ({"model_args": {}, "architecture": "vit_base_patch16_plus_240"}, "number of heads"),  # 14
    ],
)
def test_what_timms_config_may_change_is_refused(tmp_path, about, named):
    """More of it, of real models: tests/interop/test_peers.py."""
    write_timm(tmp_path, **about)
    with pytest.raises(UserError, match=named):
        load.read(tmp_path)


@pytest.mark.parametrize(("channels", "patch"), [(3, 4), (3, 8), (1, 4)])
def test_a_run_with_other_means_than_its_source_folds_the_difference_into_the_patches(channels, patch):
    told = dataclasses.replace(source(MODEL, dense(MODEL)), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    other = dataclasses.replace(MODEL, channels=channels, patch=patch)
    pixels = np.repeat(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)), channels, -1).astype(np.float32)
    found = []
    for mean, std in (((0.5,), (0.5,)), ((0.3,), (0.7,)), ((0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels])):
        params, lines = pretrained.adapt(told, other, dense(other, 1), DataConfig(mean=mean, std=std))
        found.append(logits(other, params, augment.normalize(pixels, mean, std)))
        assert ("folded" in " ".join(lines)) == (mean != told.mean)
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    np.testing.assert_allclose(found[2], found[0], atol=1e-4)
    if other == MODEL:
        np.testing.assert_array_equal(params["patches.kernel"], told.params["patches.kernel"])
        np.testing.assert_array_equal(params["patches.bias"], told.params["patches.bias"])


def test_a_stem_that_pads_with_zeros_keeps_the_means_of_its_source():
    model = dataclasses.replace(MODEL, stem="conv")
    told = dataclasses.replace(source(model, dense(model)), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    params, _ = pretrained.adapt(told, model, dense(model, 1), DataConfig(mean=told.mean, std=told.std))
    np.testing.assert_array_equal(params["patches.conv0.kernel"], told.params["patches.conv0.kernel"])
    with pytest.raises(ConfigError, match=r"config\.data\.mean .* they must be the source's, \(\(0\.4, 0\.5, 0\.6\)"):
        pretrained.adapt(told, model, dense(model, 1), DataConfig())


ODD = [{"std": [0.0]}, {"mean": [0.1, 0.2]}, {"mean": ["x"]}, {"std": [1.0, -1.0, 1.0]}, {"mean": [1e300]}]


@pytest.mark.parametrize("odd", [*ODD, {"std": [1e300]}, {"std": [1e-30]}, {"mean": [float("nan")]}])
def test_a_mean_and_deviation_of_a_file_must_be_possible(tmp_path, odd):
    write_timm(tmp_path, pretrained_cfg={"mean": [0.4], "std": [0.2]} | odd)
    with pytest.raises(UserError, match=r"its pixels have mean .*correct its config\.json"):
        load.read(tmp_path)


@pytest.mark.parametrize("odd", [{"rescale_factor": 0}, {"rescale_offset": True}])
def test_a_processor_that_rescales_otherwise_is_refused(tmp_path, odd):
    write_hf(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(odd))
    with pytest.raises(UserError, match=f"its {next(iter(odd))} is"):
        load.read(tmp_path)


@pytest.mark.parametrize(
    ("style", "name", "change", "message"),
    [
        ("timm", "pos_embed", lambda x: x[..., :7], r"'pos_embed' has shape \(1, 5, 7\); it must be \(1, 5, 12\)"),
        ("timm", "pos_embed", lambda x: x[0], r"'pos_embed' has shape \(5, 12\); it must have 3 axes"),
        ("timm", "blocks.1.attn.qkv.weight", lambda x: x[:-1], r"' has shape \(35, 12\); it must be \(36, 12"),
        ("timm", "patch_embed.proj.weight", lambda x: x[:0], "must have 4 axes, none of length 0"),
        ("hf", "classifier.bias", lambda x: x[:3], r"'classifier.bias' has shape \(3,\); it must be \(5,\)"),
        ("hf", "classifier.bias", lambda x: x * np.nan, "'classifier.bias' has NaN or infinite values"),
        ("timm", "blocks.0.norm1.weight", lambda x: x.astype("d") * 1e300, "'blocks.0.norm1.weight' has NaN or infin"),
        ("timm", "pos_embed", lambda x: x.astype("i4"), "'pos_embed' has type I32; it must have a float type"),
        ("ours", "blocks.mlp.up", lambda x: x[:1], r"' has shape \(1, 12, 20\); it must be \(2, 12, 20\)"),
        ("ours", "cls", lambda x: None, "'cls' is missing"),
    ],
)
def test_a_damaged_array_is_named_with_the_shape_that_it_must_have(tmp_path, style, name, change, message):
    if style == "ours":
        arrays, about = dense(MODEL), weights.our_config(MODEL, (), "exact")
    else:
        arrays = weight_names.write(dense(MODEL), style, cls_row=True)
        about = (weights.hf_config if style == "hf" else lambda *_: {"model_args": {"num_heads": 2}})(MODEL, ())
    arrays[name] = change(arrays[name])
    arrays = {key: np.ascontiguousarray(leaf) for key, leaf in arrays.items() if leaf is not None}
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{message}"):
        load.read(path)


def test_a_head_that_needs_pre_logits_is_left_out_and_told(tmp_path):
    arrays = weight_names.write(dense(MODEL), weight_names.TIMM, cls_row=True)
    arrays["pre_logits.fc.weight"] = np.eye(12, dtype="f")
    path = tmp_path / "vit.safetensors"
    save_file(arrays, path)
    found = load.read(path, heads=2)
    assert "skipped the head: it needs pre_logits" in " ".join(found.notes)
    assert not any(name.startswith("head") for name in found.params)
    assert found.model.classes == 0
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 2}}))
    with pytest.raises(UserError, match="has no head"):
        classifier.load(path)
    fresh = dense(MODEL, 1)
    params, _ = pretrained.adapt(found, dataclasses.replace(MODEL, norm_epsilon=1e-6), fresh, DataConfig())
    np.testing.assert_array_equal(params["head.logits.kernel"], fresh["head.logits.kernel"])


def test_names_from_a_file_are_printed_escaped_and_cut(tmp_path):
    flat = write_hf(tmp_path)
    arrays = weight_names.write(flat, weight_names.HF, cls_row=True)
    save_file(arrays | {"decoder.\x1b[2J" + "x" * 20_000: np.zeros(3, "f")}, tmp_path / "model.safetensors")
    config = Config(model=dataclasses.replace(MODEL, norm_epsilon=1e-12))
    config.init.source = str(tmp_path)
    for line in pretrained.start(config)[1]:
        assert line.isprintable()
        assert len(line) < 1300


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


def damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yields (a source that is none, what the message says of it)."""
    timm = weight_names.write(dense(MODEL), weight_names.TIMM, cls_row=True)
    (folder / "pickled.safetensors").write_bytes(pickle.dumps(Hostile(folder / "executed")))
    save_file({"x": np.ones(3, "f")}, folder / "other.safetensors")
    save_file(timm | {"fc_norm.weight": timm["norm.weight"]}, folder / "two_norms.safetensors")
    yield folder / "nowhere", "is not a file"
    yield folder / "pickled.safetensors", "restore it"
    yield folder / "other.safetensors", "names"
    yield folder / "two_norms.safetensors", "pooling"
    for name, content in (("vit.bin", b"x"), ("torn.safetensors", b"\xff" * 30)):
        (folder / name).write_bytes(content)
        yield folder / name, "."
    (folder / "vit").mkdir()
    for content in (b"{", b"[" * 100_000, b'{"num_attention_heads": 1e400}', b'{"image_size": "\x1b"}', b"[]"):
        write_hf(folder / "vit")
        (folder / "vit" / "config.json").write_bytes(content)
        yield folder / "vit", "config.json"
    for about in (
        {"hidden_act": "relu"},
        {"model_type": "dinov2"},
        {"image_size": [16, 4]},
    ):  # patches as of 8x8 pixels
        write_hf(folder / "vit", **about)
        yield folder / "vit", "must be"
    ours = weights.our_config(MODEL, (), "exact")
    save_file(dense(MODEL), folder / "vit" / "model.safetensors")
    (folder / "vit" / "config.json").write_text(json.dumps(ours | {"model": ours["model"] | {"no_such": 1}}))
    yield folder / "vit", "no_such"


def test_damaged_and_foreign_sources_are_one_line_with_the_path(tmp_path):
    for path, said in damaged(tmp_path):
        with pytest.raises(UserError) as caught:
            load.read(path, heads=2)
        assert str(caught.value).count(str(path)) == 1 == len(str(caught.value).splitlines())
        assert said in str(caught.value), path
    assert not (tmp_path / "executed").exists()
    for path in ("a" * 300, "~no_such_user/run"):  # which no file can have
        with pytest.raises(UserError, match="is not a file"):
            load.read(path)
