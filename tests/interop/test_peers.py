"""Round trips with the real libraries: what timm and transformers save, we read, and what we export, they read.

They run in a process of their own, in the Python that JVITMOE_PEERS names (`make test` makes one), or in this one's.
"""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jvitmoe import errors, rules
from jvitmoe.config import Config, ModelConfig, OptimConfig
from jvitmoe.data import augment
from jvitmoe.experts import merge
from jvitmoe.interop import classifier, load, manifest, model_card, pretrained, weight_names
from jvitmoe.interop.formats import TARGETS, base, weights
from jvitmoe.machine import devices
from jvitmoe.training import build
from jvitmoe.training.state import make_state

pytestmark = pytest.mark.process

SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
SMALL |= {"num_classes": 5}
SMALL_HF = {
    **{"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "num_labels": 5},
}
PARTS = {"init_values": 0.5, "qk_norm": True}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
CLOSE = 1e-5  # float32 logits and pixels
PROMISED = 1e-4  # by exports


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
        "timm_one_patch": {"patch_size": 8},
        "timm_one_patch_no_embed_class": {"patch_size": 8, "no_embed_class": True},
        "timm_parts": {**PARTS, "no_embed_class": True, "reg_tokens": 2, "global_pool": "avg"},
        "timm_reg_gap": {"reg_tokens": 1, "class_token": False, "no_embed_class": True, "global_pool": "avg"},
        "timm_dinov2": {"architecture": "vit_small_patch14_reg4_dinov2", "pretrained_cfg_overlay": HALF},
        "timm_flexivit": {"architecture": "flexivit_small"},  # no_embed_class by its architecture
        "timm_clip": {"architecture": "vit_base_patch16_clip_224", "pre_norm": False, "pretrained_cfg_overlay": HALF},
    }.items():
        peers("make_timm", folder=root / name, inputs=inputs, **SMALL | arguments)
    peers("make_hf", folder=root / "hf", inputs=inputs, **SMALL_HF)
    return root


NAMES = ("timm", "timm_no_embed_class", "timm_avg", "timm_clip", "hf")
NAMES += ("timm_parts", "timm_reg_gap", "timm_dinov2")
NAMES += ("timm_one_patch", "timm_one_patch_no_embed_class", "timm_flexivit")
EPSILONS = {"hf": 1e-12, "timm_clip": 1e-5}  # timm's others have 1e-6


def expected(folder: Path) -> np.ndarray:
    return np.load(folder / "expected.npz")["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_what_they_saved_gives_their_logits_here(made, pixels, name):
    model = classifier.load(made / name)
    np.testing.assert_allclose(model.logits(pixels), expected(made / name), atol=CLOSE)
    assert model.config.cls_position is (name in ("timm", "timm_clip", "timm_one_patch", "hf"))
    assert model.config.norm_epsilon == EPSILONS.get(name, 1e-6)
    assert np.abs(expected(made / name)).max() > 0.1


def upcycled_and_merged(source: load.Source, experts: int) -> dict:
    """Returns the dense tree that a run of experts from this source has at step 0, merged."""
    config = Config(model=source.model)
    config.routing.experts, config.init.source = experts, str(source.path)
    config.train.batch_size, config.train.devices = 8, 1
    plan = build.plan_for(rules.check(config), devices.make_mesh(config.train), 8)
    dense, _ = pretrained.start(config)
    state = make_state(plan, dense)
    assert state.params.experts
    return merge.dense_tree(state.params)


@pytest.mark.parametrize("name", NAMES)
def test_written_again_or_merged_at_step_0_a_file_holds_the_same_values(peers, made, inputs, tmp_path, name):
    source = load.read(made / name)
    style = "hf" if name == "hf" else "timm"
    flat = source.params
    if name == "timm_parts":  # which has most of the parameters that a model may have
        flat = weight_names.flatten(jax.device_get(upcycled_and_merged(source, 4)))
    (tmp_path / "out").mkdir()
    again = dataclasses.replace(source, params={**source.params, **flat}, classes=())
    TARGETS[style].write(tmp_path / "out", again, source.model)
    before, after = (load_file(folder / "model.safetensors") for folder in (made / name, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)
    epsilon = {} if style == "hf" else {"epsilon": source.model.norm_epsilon}
    peers(f"{style}_logits", folder=tmp_path / "out", inputs=inputs, out=tmp_path / "logits.npz", **epsilon)
    for logits in np.load(tmp_path / "logits.npz").values():
        np.testing.assert_allclose(logits, expected(made / name), atol=1e-6)


@pytest.mark.parametrize(
    ("style", "overrides"),
    [
        ("timm", {}),
        ("timm", {"patch": 8, "pool": "mean"}),
        ("timm", {"cls_position": True, "norm_epsilon": 1e-6}),
        ("timm", {"positions": "sincos2d", "width": 12, "hidden": 25, "pool": "mean"}),
        ("timm", {"norm_epsilon": 1e-3}),
        ("hf", {"norm_epsilon": 1e-3, "patch": 8}),
        ("hf", {"cls_position": True, "norm_epsilon": 1e-12, "init": "original"}),
    ],
)
def test_ours_gives_our_logits_there(peers, pixels, inputs, tmp_path, style, overrides):
    source = our_vit(**overrides)
    model = source.model
    wanted = classifier.Classifier(source).logits(pixels)
    out, found = tmp_path / "out", tmp_path / "logits.npz"
    out.mkdir()
    TARGETS[style].write(out, source, model)
    if style == "hf":
        answer = peers("hf_logits", folder=out, inputs=inputs, out=found)
        assert answer == {"labels": list("abcde"), "odd": [], "mean": [0.5] * 3}
        np.testing.assert_allclose(np.load(found)["logits"], wanted, atol=CLOSE)
    else:
        peers("timm_logits", folder=out, inputs=inputs, out=found, epsilon=model.norm_epsilon)
        np.testing.assert_allclose(np.load(found)["strict"], wanted, atol=CLOSE)
        if model.norm_epsilon in weights.NORMS:
            np.testing.assert_allclose(np.load(found)["by_config"], wanted, atol=CLOSE)
        else:  # what the note of the export warns of
            assert np.abs(np.load(found)["by_config"] - wanted).max() > CLOSE


def test_another_normalisation_of_pixels_is_kept(peers, pixels, tmp_path):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = (pixels / np.float32(255) - np.float32(mean)) / np.float32(std)
    np.savez(tmp_path / "inputs.npz", inputs=np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))
    overlay = {"mean": mean, "std": std}
    folder = tmp_path / "imagenet"
    peers("make_timm", folder=folder, inputs=tmp_path / "inputs.npz", **SMALL, pretrained_cfg_overlay=overlay)
    source = load.read(folder)
    assert (source.mean, source.std) == (tuple(mean), tuple(std))
    np.testing.assert_allclose(classifier.Classifier(source).logits(pixels), expected(folder), atol=CLOSE)


def test_tokens_far_from_zero_give_timms_logits(peers, pixels, inputs, tmp_path):
    """Their mean is 100 times their deviation, which LayerNorm removes."""
    for name, pool in (("cls", {}), ("mean", {"global_pool": "avg", "class_token": False})):
        peers("make_timm", folder=tmp_path / name, inputs=inputs, shift=100.0, **SMALL | pool)
        found = classifier.load(tmp_path / name).logits(pixels)
        np.testing.assert_allclose(found, expected(tmp_path / name), atol=1e-4)


@pytest.mark.parametrize(
    "processor",
    [
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},  # to [-1, 1]
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0] * 3},
    ],
)
def test_the_rescaling_of_hugging_faces_processor_is_applied(peers, made, pixels, tmp_path, processor):
    folder = shutil.copytree(made / "hf", tmp_path / "hf")
    np.save(tmp_path / "pixels.npy", pixels)
    peers("hf_from_pixels", folder=folder, pixels=tmp_path / "pixels.npy", out=tmp_path / "logits.npz", **processor)
    theirs = np.load(tmp_path / "logits.npz")["logits"]
    np.testing.assert_allclose(classifier.load(folder).logits(pixels), theirs, atol=3e-5)


@pytest.mark.parametrize(("pool", "norm"), [("token", "norm"), ("avg", "fc_norm")])
def test_layer_decay_is_timms_for_every_parameter(peers, pool, norm):
    theirs = peers("layer_scales", decay=0.75, **SMALL, global_pool=pool, class_token=pool == "token")
    model = ModelConfig(image_size=8, channels=3, classes=5, patch=2, width=16, hidden=24, depth=2, heads=2)
    model.pool = "cls" if pool == "token" else "mean"
    dense, updates = build.choose(Config(model=model, optim=OptimConfig(layer_decay=0.75)))
    ours = weight_names.flatten(updates.scales(dense.shapes()).trunk)
    names = {ours: theirs.replace("norm", norm) for ours, theirs, *_ in weight_names.OUTER}
    names |= {"cls": "cls_token", "positions": "pos_embed"}
    found = {names[name]: float(scale) for name, scale in ours.items() if not name.startswith("blocks.")}
    for ours_name, timms, *_ in weight_names.BLOCK:
        for layer, scale in enumerate(ours[f"blocks.{ours_name}"].ravel()):
            found[f"blocks.{layer}.{timms}"] = float(scale)
    assert found == pytest.approx(theirs, rel=1e-6)


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
    ("arguments", "named"),
    [
        ({"reg_tokens": 2}, "18 positions"),
        ({"scale_attn_norm": True}, "no place"),
        ({"fc_norm": True}, "global_pool"),
        ({"pre_norm": True}, "no place"),
        ({"norm_layer": "rmsnorm"}, "norm_layer"),
        ({"act_layer": "quick_gelu"}, "act_layer"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224", "pre_norm": False}, "act_layer"),
        ({"architecture": "vit_base_patch32_siglip_256", "global_pool": "avg"}, "act_layer"),
        ({"architecture": "vit_base_patch16_rpn_224", "qkv_bias": True}, "'rpn'"),
        ({"pool_include_prefix": True, "global_pool": "avg"}, "pool_include_prefix"),
        ({"global_pool": "map"}, "global_pool"),
        ({"global_pool": "avg", "class_token": False, "fc_norm": False}, "pooling"),
        ({"global_pool": "avgmax", "class_token": False}, "global_pool"),
        ({"patch_size": [2, 4]}, "2x4 pixels"),
        ({"img_size": [16, 4]}, "16x4 pixels"),  # 17 positions, as of 8x8 pixels
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "no place"),
    ],
)
def test_what_our_vit_has_no_place_for_is_refused(peers, tmp_path, arguments, named):
    arguments = SMALL | arguments
    size = arguments["img_size"] if isinstance(arguments["img_size"], list) else [arguments["img_size"]] * 2
    np.savez(tmp_path / "inputs.npz", inputs=np.zeros((1, 3, *size), "f"))
    peers("make_timm", folder=tmp_path / "odd", inputs=tmp_path / "inputs.npz", **arguments)
    with pytest.raises(errors.UserError, match=named):
        load.read(tmp_path / "odd")


def our_vit(**overrides: object) -> load.Source:
    """Returns a small ViT of ours with random parameters, as read from a run."""
    small = {"channels": 3, "classes": 5, "width": 16, "hidden": 24, "depth": 2, "heads": 2, "patch": 4}
    config = Config(model=dataclasses.replace(Config().model, **{**small, **overrides}))
    model, rng = rules.check(config).model, np.random.default_rng(4)
    flat = {name: 0.2 * rng.normal(size=shape).astype("f") for name, shape in load._shapes(model).items()}
    flat["positions"] = load.positions(model, flat)
    return load.Source(Path("ours"), "run", flat, model, tuple("abcde"), config=config)


def exported(source: load.Source, target: str, out: Path) -> float:
    """Exports a ViT of ours for digits, with a card and checksums. Returns how far its logits are from ours."""
    out.mkdir()
    source = dataclasses.replace(source, classes=tuple("0123456789"))
    bound = TARGETS[target].export(out, source, TARGETS[target].sample(source, base.sample_images(source)))
    (out / "README.md").write_text(model_card.write(source, {}, TARGETS[target], []))
    manifest.write(out)
    return bound


def test_erasing_is_timms(peers, tmp_path):
    """The rectangles that timm erases when it draws our numbers, but for the rounding of one image in a thousand."""
    images_BHWc = np.ones((1000, 32, 32, 3), np.uint8)

    def keys():
        return jax.random.split(jax.random.key(0), 1000)

    draws = augment.Draws(keys(), jax.random.key(1), augment.reversed_rows)
    ours = augment.erase(draws, images_BHWc, None, probability=1.0, mean=(0.0,))[0]
    draws_B4t = np.asarray(augment._uniform(keys(), 1 + 4 * augment.ERASING_TRIES))[1:].T.reshape(1000, 4, -1)
    np.savez(tmp_path / "in.npz", images=images_BHWc.transpose(0, 3, 1, 2).astype("f"), draws=draws_B4t)
    peers("erasing", arrays=tmp_path / "in.npz", out=tmp_path / "out.npz")
    theirs = np.load(tmp_path / "out.npz")["images"].transpose(0, 2, 3, 1)
    assert (ours != theirs).any((1, 2, 3)).sum() <= 1
    area_B, ratio_B = 32**2 * (0.02 + draws_B4t[:, 0, 0] * (1 / 3 - 0.02)), 0.3 ** (1 - 2 * draws_B4t[:, 1, 0])
    assert ((area_B * ratio_B > 32**2) | (area_B / ratio_B > 32**2)).any()  # a first try that does not fit


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms(peers, tmp_path, mixup, cutmix):
    rng = np.random.default_rng(0)
    images_BHWc, labels_B = rng.integers(0, 256, (6, 32, 24, 3)).astype("f"), np.array([0, 1, 2, 3, 4, 0])
    np.savez(tmp_path / "in.npz", images=images_BHWc.transpose(0, 3, 1, 2), labels=labels_B)
    targets_BC, kinds = 0.9 * jax.nn.one_hot(labels_B, 5) + 0.1 / 5, set()

    @jax.jit
    def mixed(key):
        draws = augment.Draws(jax.random.split(jax.random.key(0), 6), key, augment.reversed_rows)
        return augment.mix(draws, images_BHWc, targets_BC, mixup, cutmix)

    settings = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": 0.1, "num_classes": 5}
    for seed in range(6):
        images, targets = mixed(jax.random.key(seed))
        switch_key, share_key, box_key = jax.random.split(jax.random.key(seed), 3)
        cuts = bool(jax.random.bernoulli(switch_key)) if mixup and cutmix else cutmix > 0
        share = float(jax.random.beta(share_key, *[np.float32(cutmix if cuts else mixup)] * 2))
        draws = {"cuts": cuts, "share": share, "centre": jax.random.uniform(box_key, (2,)).tolist()}
        peers("mixing", arrays=tmp_path / "in.npz", out=tmp_path / "out.npz", **draws, **settings)
        theirs = np.load(tmp_path / "out.npz")
        np.testing.assert_allclose(images, theirs["images"].transpose(0, 2, 3, 1), atol=1e-3)  # of 255
        np.testing.assert_allclose(targets, theirs["targets"], atol=1e-6)
        kinds.add(cuts)
    assert len(kinds) == 1 + bool(mixup and cutmix)


# (height, width); in the last three transformers rounds the offset of a crop down and torchvision rounds it up. The
# first is resized by Pillow 12 and 13 to pixels that differ by up to 17 levels.
SIZES = ((75, 33), (32, 32), (50, 70), (70, 50), (33, 97), (300, 301), (640, 480), (481, 321), (257, 641), (100, 109))


@pytest.mark.parametrize("crop", ["exact", "resized", "whole"])
def test_predict_timm_and_transformers_see_the_same_picture(peers, tmp_path, crop):
    side = 32
    source = dataclasses.replace(our_vit(image_size=side), crop=crop)
    files, rng = [tmp_path / f"{height}x{width}.png" for height, width in SIZES], np.random.default_rng(0)
    for file, (height, width) in zip(files, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    for name in ("timm", "hf"):
        (tmp_path / name).mkdir()
        TARGETS[name].write(tmp_path / name, source, source.model)
    out = tmp_path / "seen.npz"
    folders = {"timm_folder": tmp_path / "timm", "hf_folder": tmp_path / "hf"}
    peers("pictures", **folders, files=list(map(str, files)), out=out)
    seen, ours = np.load(out), classifier.Classifier(source)
    shorter = side if crop == "exact" else side * 8 // 7
    shifts = 0
    for n, (file, size) in enumerate(zip(files, SIZES, strict=True)):
        picture, from_pil = (ours.read(file) / np.float32(127.5) - 1).transpose(2, 0, 1), seen["pil"][n]
        np.testing.assert_allclose(seen["timm"][n], picture, atol=CLOSE, err_msg=file.name)
        if crop == "whole":  # transformers does not pad
            continue
        if (int(shorter * max(size) / min(size)) - side) % 4 == 3:
            shifts += 1
            along = 1 if size[0] > size[1] else 2
            picture, from_pil = np.delete(picture, -1, along), np.delete(from_pil, 0, along)
        np.testing.assert_allclose(from_pil, picture, atol=CLOSE, err_msg=file.name)
        assert np.abs(seen["torchvision"][n] - seen["pil"][n]).max() < 2.01 / 127.5
    assert shifts or crop == "whole"
    for folder in [*folders.values()][: 1 if crop == "whole" else 2]:  # predict on an export sees what the run saw
        np.testing.assert_array_equal(classifier.load(folder).read(files[1]), ours.read(files[1]))


def test_the_pillow_of_the_real_libraries_is_the_one_of_both_constraints():
    root = Path(__file__).parents[2]
    files = ("requirements-peers.txt", "constraints.txt", "constraints-py311.txt")
    pins = {re.findall(r"^pillow\b[^\s#]*", (root / name).read_text(), re.MULTILINE)[0] for name in files}
    assert len(pins) == 1, pins
    assert pins.pop().startswith("pillow==")


def test_an_epsilon_that_timm_cannot_have_is_bounded(peers, tmp_path):
    """Or refused where it is too far: tests/interop/test_export.py."""
    out = tmp_path / "out"
    bound = exported(our_vit(channels=1, classes=10, norm_epsilon=1e-12), "timm", out)
    assert 0 < bound < PROMISED
    peers("timm_logits", folder=out, inputs=out / "sample.npz", out=tmp_path / "logits.npz", epsilon=1e-12)
    apart = np.abs(np.load(tmp_path / "logits.npz")["by_config"] - np.load(out / "sample.npz")["logits"]).max()
    assert apart < bound + 2e-6  # real timm, whose sums round otherwise


def test_without_its_config_a_table_of_positions_that_fits_two_vits_is_refused(made, peers, tmp_path):
    np.savez(tmp_path / "inputs.npz", inputs=np.zeros((1, 3, 224, 192), "f"))
    wide = SMALL | {"img_size": [224, 192], "patch_size": 16}
    peers("make_timm", folder=tmp_path / "wide", inputs=tmp_path / "inputs.npz", **wide)
    for folder, count in ((tmp_path / "wide", 169), (made / "timm_no_embed_class", 16)):
        weights = shutil.copy(folder / "model.safetensors", tmp_path)
        with pytest.raises(errors.UserError, match=f"its {count} positions may be .*config.json"):
            load.read(weights, heads=2)
    for name in ("timm", "timm_one_patch", "timm_one_patch_no_embed_class"):  # which fit one
        found = load.read(shutil.copy(made / name / "model.safetensors", tmp_path), heads=2)
        assert dataclasses.replace(found.model, norm_epsilon=1e-6) == load.read(made / name).model


@pytest.mark.parametrize(("target", "library"), [("timm", "timm"), ("hf", "transformers")])
def test_the_code_of_a_card_runs_there(peers, tmp_path, target, library):
    out = tmp_path / target
    exported(our_vit(channels=1, classes=10), target, out)
    peers("change_folder", folder=out)
    about = peers("card", folder=out)
    assert about["library_name"] == library
    assert about["license"] == "unknown"
    assert about["pipeline_tag"] == "image-classification"
    assert "vit" in about["tags"]
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3  # checksums, to load it, and the check
    peers("run_code", code="\n".join(blocks))
    sample = dict(np.load(out / "sample.npz"))
    sample["logits"] = sample["logits"] + 0.01
    np.savez(out / "sample.npz", **sample)
    with pytest.raises(AssertionError, match=r"(?m)^AssertionError: $"):  # raised there, by the check
        peers("run_code", code="\n".join(blocks[1:]))
