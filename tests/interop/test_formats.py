"""Names elsewhere: what `write` gives, `read` takes back to the bit; what is no ViT of ours is named."""

import dataclasses

import numpy as np
import pytest

from jvitmoe.config import ModelConfig
from jvitmoe.errors import UserError
from jvitmoe.interop import config_files, load, weight_names
from jvitmoe.interop.formats import weights

MODEL = ModelConfig(channels=3, classes=5, patch=4, width=12, hidden=20, depth=3, heads=2)


def tree(model: ModelConfig) -> dict[str, np.ndarray]:
    """Returns a flat dense tree whose every number is another."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype("f") for name, shape in load._shapes(model).items()}


def read(theirs: weight_names.Arrays, style: str, cls_row: bool | None, heads: int = MODEL.heads) -> tuple:
    """Returns (ours, names left over) of arrays, as `load` reads them."""
    model = weight_names.model_of(theirs, style, weight_names.ConfigValues(heads, MODEL.norm_epsilon, None, cls_row))
    return weight_names.read(theirs, style, model, load._shapes(model))


@pytest.mark.parametrize("style", ["timm", "hf"])
@pytest.mark.parametrize("cls_position", [False, True])
def test_reading_takes_back_what_writing_gave(style, cls_position):
    ours = tree(dataclasses.replace(MODEL, cls_position=cls_position))
    theirs = weight_names.write(ours, style, cls_row=cls_position)
    assert weight_names.style_of(theirs) == style
    again, left = read(theirs, style, cls_position)
    assert left == []
    assert again.keys() == ours.keys()
    for name in ours:
        np.testing.assert_array_equal(again[name], ours[name], err_msg=name)
    assert all(leaf.flags.c_contiguous and leaf.dtype == np.float32 for leaf in (*theirs.values(), *again.values()))


def test_a_mean_pooled_vit_has_timms_other_name_for_its_last_norm():
    ours = tree(dataclasses.replace(MODEL, pool="mean"))
    theirs = weight_names.write(ours, "timm", cls_row=False, mean=True)
    assert "fc_norm.weight" in theirs
    assert "norm.weight" not in theirs
    assert "cls_token" not in theirs
    again, _ = read(theirs, "timm", False)
    np.testing.assert_array_equal(again["norm.scale"], ours["norm.scale"])


def test_cls_without_a_position_gets_one_of_zeros_where_it_must_have_one():
    theirs = weight_names.write(tree(MODEL), "hf", cls_row=True)
    positions = theirs["vit.embeddings.position_embeddings"]
    assert positions.shape == (1, 5, 12)
    assert not positions[0, 0].any()
    assert positions[0, 1:].any()


def test_a_flat_tree_unflattens_to_itself():
    flat = tree(MODEL)
    again = weight_names.flatten(weight_names.unflatten(flat))
    assert list(again) == list(flat)
    assert all(np.array_equal(again[name], flat[name]) for name in flat)


def test_query_key_and_value_lie_in_this_order_and_head_by_head():
    ours = tree(MODEL)
    qkv = weight_names.write(ours, "timm", cls_row=False)["blocks.1.attn.qkv.weight"]
    kernel_DHK = ours["blocks.attention.key.kernel"][1]
    np.testing.assert_array_equal(qkv[12:24].reshape(2, 6, 12), kernel_DHK.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("change", "heads", "named"),
    [
        (lambda a: a.pop("blocks.1.mlp.fc1.weight"), 2, "'blocks.1.mlp.fc1.weight' is missing"),
        (lambda a: a.pop("pos_embed"), 2, "'pos_embed' is missing"),
        (lambda a: a.update({"norm_pre.weight": np.ones(12)}), 2, "'norm_pre.weight' has no place"),
        (dict, 5, "the 5 heads"),
    ],
)
def test_arrays_that_are_no_vit_of_ours_are_named(change, heads, named):
    arrays = weight_names.write(tree(MODEL), "timm", cls_row=False)
    change(arrays)
    with pytest.raises(UserError, match=named):
        read(arrays, "timm", False, heads)


def test_heads_of_other_tasks_are_left_over_and_told_and_a_vit_without_a_head_is_read_without_one():
    arrays = weight_names.write(tree(MODEL), "hf", cls_row=True)
    arrays |= {"vit.pooler.dense.weight": np.ones((12, 12), np.float32)}
    arrays |= {"vit.embeddings.mask_token": np.ones((1, 1, 12), np.float32)}
    del arrays["classifier.weight"], arrays["classifier.bias"]
    ours, left = read(arrays, "hf", True)
    assert left == ["embeddings.mask_token", "pooler.dense.weight"]
    assert not any(name.startswith("head") for name in ours)


@pytest.mark.parametrize(("width", "hidden"), [(64, 128), (300, 1000), (7, 23), (320, 1279)])
def test_timm_counts_the_hidden_width_as_we_have_it(width, hidden):
    ratio = weights.timm_config(ModelConfig(width=width, hidden=hidden), (), "exact")["model_args"]["mlp_ratio"]
    assert int(width * ratio) == hidden


@pytest.mark.parametrize(
    ("about", "heads", "epsilon"),
    [
        ({"architecture": "vit_base_patch16_clip_224.openai_ft_in1k"}, 12, 1e-5),
        ({"architecture": "vit_base_patch16_clip_224", "model_args": {"norm_layer": "layernorm"}}, 12, 1e-6),
        ({"architecture": "deit_tiny_patch16_224", "model_args": {"num_heads": 4, "act_layer": None}}, 4, 1e-6),
        ({"architecture": "flexivit_large", "model_args": None}, 16, 1e-6),
        ({}, 0, 1e-6),
    ],
)
def test_timms_config_tells_heads_and_epsilon(about, heads, epsilon):
    assert config_files.read_timm({"cls_token": None}, about, {})[:2] == (heads, epsilon)


@pytest.mark.parametrize(("epsilon", "nearest"), [(1e-5, 1e-5), (1e-6, 1e-6), (1e-3, 1e-5), (1e-12, 1e-6)])
def test_the_epsilon_that_reads_back_is_the_one_that_timm_has(epsilon, nearest):
    model = dataclasses.replace(MODEL, norm_epsilon=epsilon)
    told = config_files.read_timm({"cls_token": None}, weights.timm_config(model, (), "exact"), {})
    assert told[:4] == (model.heads, nearest, (model.image_size,) * 2, model.cls_position)


CENTRE = {"resample": 3, "do_center_crop": True}


@pytest.mark.parametrize(
    ("about", "processor", "crop", "theirs"),
    [
        ({"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "center"}, {}, "exact", ""),
        ({"crop_pct": 0.875, "interpolation": "bilinear"}, {}, "resized", ""),
        ({"crop_pct": 0.9, "interpolation": "bicubic"}, {}, "resized", "side 248 pixels, bicubic, centre cropped"),
        ({"crop_pct": 1.0, "interpolation": "bilinear"}, {}, "exact", "side 224 pixels, bilinear, centre cropped"),
        ({"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "border"}, {}, "whole", ""),
        ({"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"}, {}, "exact", "crop_mode squash"),
        ({}, {"size": {"shortest_edge": 256}} | CENTRE | {"resample": 2}, "resized", ""),
        ({}, {"size": {"shortest_edge": 224}} | CENTRE, "exact", ""),
        ({}, {"size": {"height": 224, "width": 224}, "resample": 2}, "exact", "squeezed to 224 x 224 pixels, bilinear"),
        ({}, {"size": {"longest_edge": 224}, "resample": 3}, "exact", "size {'longest_edge': 224}, bicubic"),
        ({}, {"size": [224, 200], "resample": 3}, "exact", "squeezed to 224 x 200 pixels, bicubic"),
        ({}, {"size": 224, "resample": 0}, "exact", "squeezed to 224 x 224 pixels, resample 0"),
        ({}, {}, "exact", ""),
    ],
)
def test_the_nearest_test_transform_is_taken_and_another_one_is_told(about, processor, crop, theirs):
    found, note = config_files.crop_of({"pretrained_cfg": about}, processor, 224)
    assert (found, bool(note)) == (crop, bool(theirs))
    assert theirs in note


@pytest.mark.parametrize(
    ("crop", "share", "filter"),
    [("exact", 1.0, "bicubic"), ("resized", 224 / 256, "bilinear"), ("whole", 1.0, "bicubic")],
)
def test_timm_is_told_how_the_run_cut_its_test_images(crop, share, filter):
    cfg = weights.timm_config(MODEL, (), crop)["pretrained_cfg"]
    assert (cfg["crop_pct"], cfg["interpolation"]) == (share, filter)
    assert config_files.crop_of({"pretrained_cfg": cfg}, {}, MODEL.image_size) == (crop, "")
