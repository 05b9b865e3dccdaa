"""Names and shapes of the same ViT elsewhere: timm, Hugging Face transformers, google-research's .npz; and the config
files that they load from. NumPy only.

Every function is a pure map of dicts. Ours are flat here: "blocks.mlp.up" is the leaf up of mlp of blocks,
[L, D, F].

L layers · D width · H heads · K head width · F hidden width · T patches of an image · P patch side · c channels
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jvitmoe.config import ModelConfig, UserError

Arrays = Mapping[str, np.ndarray]
Dict = dict[str, np.ndarray]

# (ours, timm's, Hugging Face's, google-research's, kind); timm's q, k and v are one array, told apart here by name.
OUTER = (
    (
        *("patches.kernel", "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
        *("embedding/kernel", "convolution"),
    ),
    (
        *("patches.bias", "patch_embed.proj.bias", "embeddings.patch_embeddings.projection.bias"),
        *("embedding/bias", "vector"),
    ),
    ("norm.scale", "norm.weight", "layernorm.weight", "Transformer/encoder_norm/scale", "vector"),
    ("norm.bias", "norm.bias", "layernorm.bias", "Transformer/encoder_norm/bias", "vector"),
    ("head.logits.kernel", "head.weight", "classifier.weight", "head/kernel", "linear"),
    ("head.logits.bias", "head.bias", "classifier.bias", "head/bias", "vector"),
)
BLOCK = (
    ("norm1.scale", "norm1.weight", "layernorm_before.weight", "LayerNorm_0/scale", "vector"),
    ("norm1.bias", "norm1.bias", "layernorm_before.bias", "LayerNorm_0/bias", "vector"),
    *(
        (f"attention.{name}.{ours}", f"attn.{name}.{theirs}", f"attention.attention.{name}.{theirs}", google, kind)
        for name in ("query", "key", "value")
        for ours, theirs, google, kind in (
            ("kernel", "weight", f"MultiHeadDotProductAttention_1/{name}/kernel", "linear into heads"),
            ("bias", "bias", f"MultiHeadDotProductAttention_1/{name}/bias", "heads"),
        )
    ),
    (
        *("attention.out.kernel", "attn.proj.weight", "attention.output.dense.weight"),
        *("MultiHeadDotProductAttention_1/out/kernel", "linear from heads"),
    ),
    (
        *("attention.out.bias", "attn.proj.bias", "attention.output.dense.bias"),
        *("MultiHeadDotProductAttention_1/out/bias", "vector"),
    ),
    ("norm2.scale", "norm2.weight", "layernorm_after.weight", "LayerNorm_2/scale", "vector"),
    ("norm2.bias", "norm2.bias", "layernorm_after.bias", "LayerNorm_2/bias", "vector"),
    ("mlp.up", "mlp.fc1.weight", "intermediate.dense.weight", "MlpBlock_3/Dense_0/kernel", "linear"),
    ("mlp.up_bias", "mlp.fc1.bias", "intermediate.dense.bias", "MlpBlock_3/Dense_0/bias", "vector"),
    ("mlp.down", "mlp.fc2.weight", "output.dense.weight", "MlpBlock_3/Dense_1/kernel", "linear"),
    ("mlp.down_bias", "mlp.fc2.bias", "output.dense.bias", "MlpBlock_3/Dense_1/bias", "vector"),
)
TIMM, HF, GOOGLE = "timm", "hf", "google"
COLUMN = {TIMM: 1, HF: 2, GOOGLE: 3}
BLOCKS = {TIMM: "blocks.{}.", HF: "encoder.layer.{}.", GOOGLE: "Transformer/encoderblock_{}/"}
CLS = {TIMM: "cls_token", HF: "embeddings.cls_token", GOOGLE: "cls"}
POSITIONS = {
    TIMM: "pos_embed",
    HF: "embeddings.position_embeddings",
    GOOGLE: "Transformer/posembed_input/pos_embedding",
}
# What may be left over in a file: heads of other tasks. Anything else left over would change what the model computes.
SPARE = re.compile(r"(head|fc|pre_logits|head_dist|pooler|classifier|decoder|dist_token|mask_token)\b.*")

# timm's config.json cannot set the epsilon of LayerNorm: the architecture implies it. For each epsilon, an architecture
# whose other arguments ours undo.
TIMM_NORMS = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
# Heads of timm's and google-research's sizes, where nothing else tells them.
HEADS = {"tiny": 3, "xsmall": 4, "small": 6, "medium": 8, "betwixt": 10, "base": 12}
HEADS |= dict.fromkeys(("large", "huge", "giant", "gigantic"), 16)


class FormatError(UserError):
    """Arrays that are no ViT of ours under the names they have; one line that names the array."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Dict:
    """Returns {"a.b": array} of a nested tree, as NumPy arrays."""
    flat: Dict = {}
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            flat |= flatten(branch, f"{prefix}{name}.")
        else:
            flat[prefix + name] = np.asarray(branch)
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested tree that `flatten` came from."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = leaf
    return tree


def write(ours: Arrays, style: str, cls_row: bool) -> Dict:
    """Returns the arrays of a dense pre-norm ViT with a one-layer head as `style` names them, float32, C-contiguous.

    Args:
        ours: the flat dense tree, with "positions" [T, D] of the patches.
        style: "timm", "hf" or "google".
        cls_row: whether the table of positions begins with that of CLS; it is zeros where CLS has none.
    """
    theirs: Dict = {}
    for name, own, kind in _names(style, _depth(ours["blocks.norm1.scale"])):
        leaf = ours[own[0]] if own[1] is None else ours[own[0]][own[1]]
        theirs[name] = leaf if style == GOOGLE else _to_torch(leaf, kind)
    table_TD = ours["positions"]
    if "cls" in ours:
        theirs[CLS[style]] = ours["cls"][None, None]
    if cls_row:
        row_D = ours.get("cls_position", np.zeros_like(ours["cls"]))
        table_TD = np.concatenate([row_D[None], table_TD])
    theirs[POSITIONS[style]] = table_TD[None]
    if style == TIMM:
        theirs = dict(_joined(theirs))
        if "cls" not in ours:
            theirs = {re.sub(r"^norm\.", "fc_norm.", name): leaf for name, leaf in theirs.items()}
    elif style == HF:
        theirs = {name if name.startswith("classifier") else f"vit.{name}": leaf for name, leaf in theirs.items()}
    return {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in theirs.items()}


def read(theirs: Arrays, style: str, heads: int, cls_row: bool) -> tuple[Dict, list[str]]:
    """Returns (ours, names of arrays that were left over): `write` backwards.

    Args:
        theirs: arrays under the names of `style`.
        style: "timm", "hf" or "google".
        heads: H, which the arrays of timm and Hugging Face do not tell.
        cls_row: whether the table of positions begins with that of CLS.

    A head that is not there is left out. Raises FormatError for an array that is missing, has another shape or has no
    place in our ViT.
    """
    named = {name.removeprefix("vit."): leaf for name, leaf in theirs.items()} if style == HF else dict(theirs)
    if style == TIMM:
        named = dict(_split({re.sub(r"^fc_norm\.", "norm.", name): leaf for name, leaf in named.items()}))
    depth = 1 + max((int(m[1]) for m in map(_block_pattern(style).match, named) if m), default=-1)
    layers: dict[str, list[np.ndarray]] = {}
    ours: Dict = {}
    for name, (own, layer), kind in _names(style, depth):
        if name not in named:
            if own.startswith("head."):
                continue
            raise FormatError(f"the array {name!r} is missing; the file must hold a plain ViT")
        leaf = np.asarray(named.pop(name))
        leaf = leaf if style == GOOGLE else _from_torch(leaf, kind, heads, name)
        if layer is None:
            ours[own] = leaf
        else:
            layers.setdefault(own, []).append(leaf)
    for own, leaves in layers.items():
        if len({leaf.shape for leaf in leaves}) > 1:
            raise FormatError(f"the layers of {own!r} differ in shape; a ViT of ours has equal layers")
        ours[own] = np.stack(leaves)
    if POSITIONS[style] not in named:
        raise FormatError(f"the array {POSITIONS[style]!r} is missing; the ViT must have a table of positions")
    table_TD = np.asarray(named.pop(POSITIONS[style]))[0]
    if CLS[style] in named:
        ours["cls"] = np.asarray(named.pop(CLS[style])).reshape(-1)
        if cls_row:
            ours["cls_position"], table_TD = table_TD[0], table_TD[1:]
    ours["positions"] = table_TD
    left = sorted(named)
    odd = [name for name in left if not SPARE.fullmatch(name)]
    if odd:
        raise FormatError(f"the array {odd[0]!r} has no place in a plain ViT ({len(odd)} such); use another source")
    return {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in ours.items()}, left


def style_of(names: Any) -> str | None:
    """Returns whose names these are, "timm", "hf" or "google"; None for nobody's."""
    for style, patches in ((TIMM, OUTER[0][1]), (HF, OUTER[0][2]), (GOOGLE, OUTER[0][3])):
        if patches in names or f"vit.{patches}" in names:
            return style
    return None


def timm_config(model: ModelConfig, classes: Sequence[str], crop: str) -> dict[str, Any]:
    """Returns timm's config.json: the architecture whose LayerNorm epsilon is nearest to ours, and every argument that
    makes it ours; `crop` is the run's `data.crop`."""
    cls = model.pool == "cls"
    args = {
        **{"img_size": model.image_size, "patch_size": model.patch, "in_chans": model.channels},
        **{"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads},
        **{"mlp_ratio": _ratio(model.hidden, model.width), "pre_norm": False, "class_token": cls},
        **{"no_embed_class": not model.cls_position, "global_pool": "token" if cls else "avg"},
    }
    pixels = {"mean": [0.5] * model.channels, "std": [0.5] * model.channels}
    cfg = {
        **{"num_classes": model.classes, "input_size": [model.channels, model.image_size, model.image_size], **pixels},
        **{"interpolation": "bilinear" if crop == "resized" else "bicubic", "crop_mode": "center"},
        **{"crop_pct": 7 / 8 if crop == "resized" else 1.0, "fixed_input_size": True, "pool_size": None},
        **{"first_conv": "patch_embed.proj", "classifier": "head"},
    }
    return {
        "architecture": TIMM_NORMS[min(TIMM_NORMS, key=lambda epsilon: abs(epsilon - model.norm_epsilon))],
        **{"num_classes": model.classes, "num_features": model.width, "global_pool": args["global_pool"]},
        **{"model_args": args, "pretrained_cfg": cfg, **({"label_names": list(classes)} if classes else {})},
    }


def read_timm_config(about: Mapping[str, Any]) -> tuple[int, float]:
    """Returns (heads, or 0 where it does not tell; the epsilon of LayerNorm) of the model that timm's config.json
    describes. Raises FormatError for other activations and norms than ours, which the arrays would not show.

    timm's ViTs have 1e-6, those after CLIP 1e-5 (and, but for the quickgelu ones, the same GELU).
    """
    args, architecture = about.get("model_args") or {}, str(about.get("architecture", ""))
    words = architecture.partition(".")[0].split("_")
    for name, ours in (("act_layer", "gelu"), ("norm_layer", "layernorm")):
        if args.get(name, ours) not in (ours, None):
            raise FormatError(f"its {name} is {args[name]!r}; it must be {ours!r}")
    if args.get("act_layer") is None and "quickgelu" in words:
        raise FormatError(f"its architecture is {architecture!r}, whose act_layer is not 'gelu'; use a plain ViT")
    heads = args.get("num_heads") or next((HEADS[word] for word in words if word in HEADS), 0)
    clip = "clip" in words and args.get("norm_layer") is None
    return int(heads), float(about.get("norm_epsilon", 1e-5 if clip else 1e-6))


def hf_config(model: ModelConfig, classes: Sequence[str]) -> dict[str, Any]:
    """Returns Hugging Face's config.json of a ViTForImageClassification."""
    names = list(classes) or [str(label) for label in range(model.classes)]
    return {
        **{"architectures": ["ViTForImageClassification"], "model_type": "vit", "dtype": "float32"},
        **{"image_size": model.image_size, "patch_size": model.patch, "num_channels": model.channels},
        **{"hidden_size": model.width, "intermediate_size": model.hidden, "num_hidden_layers": model.depth},
        **{"num_attention_heads": model.heads, "hidden_act": "gelu", "layer_norm_eps": model.norm_epsilon},
        **{"qkv_bias": True, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


def hf_preprocessor(model: ModelConfig, crop: str) -> dict[str, Any]:
    """Returns Hugging Face's preprocessor_config.json; `crop` is the run's `data.crop`.

    The processor is DINOv2's: transformers 4's slow ViTImageProcessor can neither keep the aspect ratio nor crop.
    """
    side = model.image_size
    return {
        **{"image_processor_type": "BitImageProcessor", "do_convert_rgb": model.channels == 3, "do_resize": True},
        **{"size": {"shortest_edge": side * 8 // 7 if crop == "resized" else side}},
        **{"resample": 2 if crop == "resized" else 3},  # Pillow's bilinear, bicubic
        **{"do_center_crop": True, "crop_size": {"height": side, "width": side}},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        **{"image_mean": [0.5] * model.channels, "image_std": [0.5] * model.channels},
    }


def our_config(model: ModelConfig, classes: Sequence[str], crop: str) -> dict[str, Any]:
    """Returns the config.json of our own export; `crop` is the run's `data.crop`."""
    return {"format": "jvitmoe", "model": dataclasses.asdict(model), "classes": list(classes), "crop": crop}


def _ratio(hidden: int, width: int) -> float:
    """Returns the ratio r with int(width * r) = hidden, which is how timm counts."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _names(style: str, depth: int) -> Iterator[tuple[str, tuple[str, int | None], str]]:
    """Yields (their name, (our name, layer or None), kind) of every array but CLS and positions."""
    column = COLUMN[style]
    for row in OUTER:
        yield row[column], (row[0], None), row[-1]
    for layer in range(depth):
        for row in BLOCK:
            yield BLOCKS[style].format(layer) + row[column], (f"blocks.{row[0]}", layer), row[-1]


def _block_pattern(style: str) -> re.Pattern[str]:
    return re.compile(re.escape(BLOCKS[style]).replace(r"\{\}", r"(\d+)"))


def _depth(leaf_L: np.ndarray) -> int:
    return leaf_L.shape[0]


def _to_torch(leaf: np.ndarray, kind: str) -> np.ndarray:
    """Returns the array as PyTorch lays it out: linear weights [out, in], convolutions [out, in, rows, columns]."""
    match kind:
        case "convolution":
            return leaf.transpose(3, 2, 0, 1)
        case "linear":
            return leaf.T
        case "heads":
            return leaf.reshape(-1)
        case "linear into heads":
            return leaf.reshape(leaf.shape[0], -1).T
        case "linear from heads":
            return leaf.reshape(-1, leaf.shape[-1]).T
    return leaf


def _from_torch(leaf: np.ndarray, kind: str, heads: int, name: str) -> np.ndarray:
    """Returns the array as Flax lays it out. Raises FormatError where the heads do not divide it."""
    if "heads" in kind and leaf.shape[0] % heads:
        raise FormatError(f"the array {name!r} has {leaf.shape[0]} rows; they must be a multiple of the {heads} heads")
    match kind:
        case "convolution":
            return leaf.transpose(2, 3, 1, 0)
        case "linear":
            return leaf.T
        case "heads":
            return leaf.reshape(heads, -1)
        case "linear into heads":
            return leaf.T.reshape(leaf.shape[1], heads, -1)
        case "linear from heads":
            return leaf.T.reshape(heads, -1, leaf.shape[0])
    return leaf


def _joined(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Yields timm's arrays with query, key and value as one, in this order."""
    for name, leaf in arrays.items():
        block, part, kind = name.partition(".attn.query.")
        if part:
            yield f"{block}.attn.qkv.{kind}", np.concatenate([arrays[f"{block}.attn.{n}.{kind}"] for n in QKV])
        elif ".attn.key." not in name and ".attn.value." not in name:
            yield name, leaf


def _split(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Yields timm's arrays with query, key and value apart."""
    for name, leaf in arrays.items():
        block, part, kind = name.partition(".attn.qkv.")
        if part and len(leaf) % 3 == 0:
            yield from zip((f"{block}.attn.{n}.{kind}" for n in QKV), np.split(np.asarray(leaf), 3), strict=True)
        else:
            yield name, leaf


QKV = ("query", "key", "value")
