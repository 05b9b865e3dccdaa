"""Config files of other libraries' ViTs: what the arrays do not show, and what our ViT cannot express. No JAX.

A reader takes (arrays of the file, config.json, preprocessor_config.json; {} for a missing one), returns ConfigValues,
and raises UserError for a ViT that differs from ours.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from jvitmoe.errors import UserError
from jvitmoe.interop.weight_names import CLS, HF, TIMM, Arrays, ConfigValues

HF_EPSILON = 1e-12  # of LayerNorm, if no file has it
# Heads of timm's sizes, if no file has them.
HEADS = {"tiny": 3, "xsmall": 4, "small": 6, "medium": 8, "betwixt": 10, "base": 12}
HEADS |= dict.fromkeys(("large", "huge", "giant", "gigantic"), 16)
# Arguments of timm's VisionTransformer that the arrays show or that change no logit after training.
TIMM_ARGS = {"img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio"}
TIMM_ARGS |= {"qkv_bias", "proj_bias", "qk_norm", "init_values", "reg_tokens", "no_embed_class", "pre_norm", "fc_norm"}
TIMM_ARGS |= {"final_norm", "scale_attn_norm", "scale_mlp_norm", "dynamic_img_size", "dynamic_img_pad"}
TIMM_ARGS |= {"weight_init", "fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"}
TIMM_ARGS |= {"attn_drop_rate", "drop_path_rate"}
# Words of timm's architectures that stand for no other default that arrays do not show, as the block of "rpn" is.
TIMM_WORD = re.compile(
    r"vit|deit3?|eva|flexivit|tiny|wee|xsmall|little|small|medium|betwixt|base|large|huge|giant|gigantic|so\d+m2?|"
    r"mediumd|intern300m|patch\d+|\d+(x1)?|reg\d+|gap|plus|clip|quickgelu|siglip|dinov2|tipsv2|miil|distilled"
)

About = Mapping[str, Any]

CENTRE = "shorter side {} pixels, {}, centre cropped"  # a test transform: pixels of the shorter side, filter
BORDER = "longer side {} pixels, bicubic, padded"


def read_timm(arrays: Arrays, about: About, processor: About) -> ConfigValues:
    """timm's ViTs have an epsilon of 1e-6, those after CLIP 1e-5 (and, except the quickgelu ones, the same GELU)."""
    has_cls, mean = CLS[TIMM] in arrays, "fc_norm.weight" in arrays
    if (mean and "norm.weight" in arrays) or not (has_cls or mean):
        raise UserError("its pooling must be CLS after `norm`, or the mean and then `fc_norm`; use a plain ViT")
    args, architecture = about.get("model_args") or {}, str(about.get("architecture", ""))
    args = {"global_pool": about.get("global_pool"), **args}
    ours = {"act_layer": "gelu", "norm_layer": "layernorm", "class_token": has_cls, "pool_include_prefix": False}
    ours |= {"global_pool": "avg" if mean else "token", "pos_embed": "learn"}
    for name, value in ours.items():
        if args.get(name) not in (value, None):
            raise UserError(f"its {name} is {args[name]!r}; it must be {value!r}")
    for name in sorted(args.keys() - ours.keys() - TIMM_ARGS):
        if args[name] is not None:
            raise UserError(f"its argument {name} is {args[name]!r}, which may change what it computes; leave it out")
    words = architecture.partition(".")[0].split("_") if architecture else []
    if args.get("act_layer") is None and not {"quickgelu", "siglip"}.isdisjoint(words):  # siglip: of some
        raise UserError(f"its architecture is {architecture!r}, whose act_layer is not 'gelu'; use a plain ViT")
    if odd := [word for word in words if not TIMM_WORD.fullmatch(word)]:
        raise UserError(f"its architecture is {architecture!r}, and {odd[0]!r} may mean other blocks; use a plain ViT")
    other = {"base", "gap"} <= {*words} or "plus" in words  # 12 or 16 heads, and 14
    guesses = [] if other else [HEADS[word] for word in words if word in HEADS]
    pixels = about.get("pretrained_cfg") or {}
    return ConfigValues(
        heads=int(args.get("num_heads") or next(iter(guesses), 0)),
        epsilon=1e-5 if "clip" in words and args.get("norm_layer") is None else 1e-6,
        size=_image_size(args.get("img_size") or (pixels.get("input_size") or ())[1:]),
        cls_row=None if args.get("no_embed_class") is None else not args["no_embed_class"],
        classes=tuple(map(str, about.get("label_names") or pixels.get("label_names") or ())),
        mean=pixels.get("mean"),
        std=pixels.get("std"),
    )


def read_hf(arrays: Arrays, about: About, processor: About) -> ConfigValues:
    """Hugging Face's ViT; its table of positions always begins with CLS."""
    kind, act = about.get("model_type", "vit"), about.get("hidden_act", "gelu")
    if (kind, act) != ("vit", "gelu"):
        raise UserError(f"its model_type is {kind!r} with hidden_act {act!r}; they must be 'vit' and 'gelu'")
    labels, normalizes = about.get("id2label", {}), processor.get("do_normalize", True)
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if processor.get("rescale_offset"):
        raise UserError(f"its rescale_offset is {processor['rescale_offset']!r}; fold it into image_mean")
    return ConfigValues(
        heads=int(about.get("num_attention_heads", 0)),
        epsilon=float(about.get("layer_norm_eps", HF_EPSILON)),
        size=_image_size(about.get("image_size")),
        cls_row=True,
        classes=tuple(str(labels[k]) for k in sorted(labels, key=int)) if "classifier.weight" in arrays else (),
        mean=processor.get("image_mean") if normalizes else 0.0,
        std=processor.get("image_std") if normalizes else 1.0,
        scale=255 * float(factor),
    )


READERS = {TIMM: read_timm, HF: read_hf}


def crop_of(about: About, processor: About, side: int) -> tuple[str, str]:
    """Returns (`data.crop`, note) for images of `side` pixels: the test transform of timm's config or Hugging Face's
    processor or, with a note on the difference, the most similar of ours."""
    theirs = _hf_transform(processor) if processor else _timm_transform(about.get("pretrained_cfg") or {}, side)
    if theirs == BORDER.format(side):
        return "whole", ""
    ours = {"exact": (side, "bicubic"), "resized": (side * 8 // 7, "bilinear")}
    known = re.match(CENTRE.format(r"(\d+)", r"(\w+)"), theirs)
    shorter, name = (int(known[1]), known[2]) if known else ours["exact"]

    def distance(crop: str) -> tuple[float, bool]:
        return abs(math.log(shorter / ours[crop][0])), name != ours[crop][1]

    crop = min(ours, key=distance)
    if theirs in ("", nearest := CENTRE.format(*ours[crop])):
        return crop, ""
    return crop, f"its test transform is {theirs!r}; the nearest of ours is data.crop={crop}, {nearest!r}"


def _timm_transform(pixels: About, side: int) -> str:
    """Returns "" if the config tells none."""
    if not pixels.get("crop_pct"):
        return ""
    shorter, name = int(side / pixels["crop_pct"]), pixels.get("interpolation") or "bicubic"
    transform, mode = CENTRE.format(shorter, name), pixels.get("crop_mode") or "center"
    if (mode, shorter, name) == ("border", side, "bicubic"):
        return BORDER.format(side)
    return transform if mode == "center" else f"{transform}, crop_mode {mode}"


def _hf_transform(processor: About) -> str:
    """Returns "" if the processor tells none."""
    size, resample = processor.get("size"), processor.get("resample")
    if not size or resample is None:
        return ""
    name = {2: "bilinear", 3: "bicubic"}.get(resample, f"resample {resample}")
    if isinstance(size, Mapping) and "shortest_edge" in size:
        transform = CENTRE.format(size["shortest_edge"], name)
        return transform if processor.get("do_center_crop") else transform.removesuffix(", centre cropped")
    if isinstance(size, Mapping) and not {"height", "width"} <= size.keys():
        return f"size {dict(size)}, {name}"
    high, wide = (size["height"], size["width"]) if isinstance(size, Mapping) else _image_size(size) or (0, 0)
    return f"squeezed to {high} x {wide} pixels, {name}"


def _image_size(value: Any) -> tuple[int, int] | None:
    """Returns (height, width) of a config's image size, which may be one number; None without one."""
    height, width = value if isinstance(value, list | tuple) and value else (value or 0,) * 2
    return (int(height), int(width)) if height else None
