"""Names and shapes of the same ViT elsewhere: timm, Hugging Face transformers, google-research's .npz; and the config
files that they load from. NumPy only.

Every function is a pure map of dicts. Ours are flat here: "blocks.mlp.up" is the leaf up of mlp of blocks,
[L, D, F].

L layers · D width · H heads · K head width · F hidden width · T patches of an image · P patch side · c channels
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jvitmoe.config import ModelConfig, UserError

Arrays = Mapping[str, Any]  # NumPy's, or with the same shape, dtype and __array__
Shapes = Mapping[str, tuple[int, ...]]
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

FLOAT = re.compile(r"(float|F|BF)(16|32|64)")  # NumPy's and safetensors' names of types

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


class ConfigValues(NamedTuple):
    """Values of a config file that the arrays do not show."""

    heads: int  # 0 if unknown
    epsilon: float  # of every LayerNorm
    size: tuple[int, int] | None = None  # height and width of the images
    cls_row: bool | None = None  # whether the table of positions begins with a row for CLS


def model_of(theirs: Arrays, style: str, config: ConfigValues) -> ModelConfig:
    """Returns the architecture of a ViT, from the shapes of its arrays; `classes` is 0 without a head that we can use.

    Raises FormatError for shapes of another model, and if the number of positions fits several ViTs.
    """
    named = _plain_names(theirs, style)
    block = re.compile(re.escape(BLOCKS[style]).replace(r"\{\}", r"(\d+)"))
    layers = {match[1] for match in map(block.match, named) if match}
    depth = next(layer for layer in itertools.count() if str(layer) not in layers)
    has_cls = CLS[style] in named
    has_head = any(own.startswith("head.") and name in named for name, (own, _), _ in _names(style, 0))
    has_head &= not any(name.startswith("pre_logits") for name in named)  # a tanh layer before the head
    _check_names(named, style, depth, has_head)

    def shape(ours: str, ndim: int) -> tuple[int, ...]:
        name, kind = next((name, kind) for name, (own, _), kind in _names(style, 1) if own == ours)
        found = _shape(named, name, ndim)
        return found if style == GOOGLE else _from_torch(_empty(found), kind, config.heads).shape

    patch, other, channels, width = shape("patches.kernel", 4)
    if patch != other:
        raise FormatError(f"its patches have {patch}x{other} pixels; they must be square")
    if width % config.heads:
        raise FormatError(f"its width is {width}; it must be a multiple of the {config.heads} heads")
    grid, cls_row = _grid(_shape(named, POSITIONS[style], 3)[1], has_cls, patch, config)
    return ModelConfig(
        image_size=grid * patch,
        channels=channels,
        classes=shape("head.logits.kernel", 2)[1] if has_head else 0,
        patch=patch,
        width=width,
        hidden=shape("blocks.mlp.up_bias", 1)[0],
        depth=depth,
        heads=config.heads,
        pool="cls" if has_cls else "mean",
        cls_position=cls_row,
        norm_epsilon=config.epsilon,
    )


def _grid(rows: int, has_cls: bool, patch: int, config: ConfigValues) -> tuple[int, bool]:
    """Returns (patches on a side, whether CLS has a row) for a table of positions. Raises FormatError if they make no
    square, or may be another rectangle."""
    height, width = config.size or (0, 0)
    patches = (height // patch) * (width // patch) if config.size else -1
    side = round(rows**0.5)
    if not has_cls:
        cls_row = False
    elif config.cls_row is not None:
        cls_row = config.cls_row
    elif patches in (rows, rows - 1):
        cls_row = patches == rows - 1
    elif side * side == rows > 1:
        raise FormatError(
            f"its {rows} positions may be {side}x{side} patches, or CLS and a rectangle of patches; put the "
            "config.json that belongs to it beside it"
        )
    else:
        cls_row = rows > 1
    grid = round((rows - cls_row) ** 0.5)
    if height != width and patches == rows - cls_row:
        raise FormatError(f"its images have {height}x{width} pixels; they must be square")
    if grid == 0 or grid * grid != rows - cls_row:
        raise FormatError(f"its table has {rows - cls_row} positions of patches; they must make a square")
    return grid, cls_row


def read(theirs: Arrays, style: str, model: ModelConfig, shapes: Shapes) -> tuple[Dict, list[str]]:
    """Returns (ours, names of arrays that were left out): `write` backwards.

    Args:
        theirs: arrays under the names of `style`; all shapes are checked before any values are read.
        style: "timm", "hf" or "google".
        model: their architecture, as `model_of` returns it.
        shapes: of our arrays for this architecture.

    Raises FormatError for an array that is missing, has another shape or type, has no place in our ViT, or is not
    finite.
    """
    named = _plain_names(theirs, style)
    wanted = _wanted(style, model, shapes)
    loaded = load(named, wanted)
    table_TD = loaded.pop(POSITIONS[style])[0]
    ours: Dict = {}
    if CLS[style] in loaded:
        ours["cls"] = loaded.pop(CLS[style]).reshape(-1)
        if model.cls_position:
            ours["cls_position"], table_TD = table_TD[0], table_TD[1:]
    ours["positions"] = table_TD
    loaded = dict(_split(loaded)) if style == TIMM else loaded
    layers: dict[str, list[np.ndarray]] = {}
    for name, (own, layer), kind in _names(style, model.depth):
        if name in loaded:  # only a head may be absent here
            leaf = loaded.pop(name)
            ours[own] = leaf if style == GOOGLE else _from_torch(leaf, kind, model.heads)
            if layer is not None:
                layers.setdefault(own, []).append(ours[own])
    ours |= {own: np.stack(leaves) for own, leaves in layers.items()}
    return {name: np.ascontiguousarray(leaf) for name, leaf in ours.items()}, sorted(named.keys() - wanted.keys())


def load(arrays: Arrays, wanted: Shapes) -> Dict:
    """Returns the wanted arrays in float32. Raises FormatError for one that is missing or has another shape or type,
    before any values are read, and for one that is not finite."""
    for name, shape in wanted.items():
        if (found := _shape(arrays, name)) != shape:
            raise FormatError(f"the array {name!r} has shape {found}; it must be {shape}")
        if not FLOAT.fullmatch(str(arrays[name].dtype)):
            raise FormatError(f"the array {name!r} has type {arrays[name].dtype}; it must have a float type")
    loaded: Dict = {}
    for name in wanted:
        with np.errstate(over="ignore"):  # a float64 that is too large becomes infinite
            loaded[name] = np.asarray(arrays[name]).astype(np.float32, copy=False)
        if not np.isfinite(loaded[name]).all():
            raise FormatError(f"the array {name!r} has NaN or infinite values; restore the file from a copy")
    return loaded


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


def read_timm_config(about: Mapping[str, Any], has_cls: bool) -> ConfigValues:
    """Returns the values in timm's config.json. Raises FormatError for other activations, norms and pooling than ours,
    which the arrays would not show.

    timm's ViTs have an epsilon of 1e-6, those after CLIP 1e-5 (and, but for the quickgelu ones, the same GELU).
    """
    args, architecture = about.get("model_args") or {}, str(about.get("architecture", ""))
    words = architecture.partition(".")[0].split("_")
    args = {"global_pool": about.get("global_pool"), **args}
    ours = {"act_layer": "gelu", "norm_layer": "layernorm", "class_token": has_cls}
    for name, value in {**ours, "global_pool": "token" if has_cls else "avg"}.items():
        if args.get(name) not in (value, None):
            raise FormatError(f"its {name} is {args[name]!r}; it must be {value!r}")
    if args.get("act_layer") is None and "quickgelu" in words:
        raise FormatError(f"its architecture is {architecture!r}, whose act_layer is not 'gelu'; use a plain ViT")
    heads = args.get("num_heads") or next((HEADS[word] for word in words if word in HEADS), 0)
    clip = "clip" in words and args.get("norm_layer") is None
    size = image_size(args.get("img_size") or ((about.get("pretrained_cfg") or {}).get("input_size") or ())[1:])
    cls_row = None if args.get("no_embed_class") is None else not args["no_embed_class"]
    return ConfigValues(int(heads), 1e-5 if clip else 1e-6, size, cls_row)


def image_size(value: Any) -> tuple[int, int] | None:
    """Returns (height, width) of a config's size of images, which may be one number; None for an absent one."""
    height, width = value if isinstance(value, list | tuple) and value else (value or 0,) * 2
    return (int(height), int(width)) if height else None


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


def _stored(style: str, depth: int, has_head: bool) -> Iterator[tuple[str, tuple[str, int | None], str]]:
    """Yields what `_names` does, but query, key and value under the name of the one array that timm stores."""
    for name, own, kind in _names(style, depth):
        if has_head or not own[0].startswith("head."):
            yield re.sub(r"\.attn\.(query|key|value)\.", ".attn.qkv.", name), own, kind


def _plain_names(theirs: Arrays, style: str) -> Arrays:
    """Returns the arrays without Hugging Face's prefix of classifiers and timm's other name of the last norm."""
    if style == GOOGLE:
        return theirs
    old, new = (r"^fc_norm\.", "norm.") if style == TIMM else (r"^vit\.", "")
    return {re.sub(old, new, name): leaf for name, leaf in theirs.items()}


def _check_names(named: Arrays, style: str, depth: int, has_head: bool) -> None:
    """Raises FormatError for an array that is missing, and for one that would change what a plain ViT computes."""
    wanted = [*(name for name, _, _ in _stored(style, depth, has_head)), POSITIONS[style]]
    for name in wanted:
        if name not in named:
            raise FormatError(f"the array {name!r} is missing; the file must hold a plain ViT")
    odd = sorted(name for name in named.keys() - {*wanted, CLS[style]} if not SPARE.fullmatch(name))
    if odd:
        raise FormatError(f"the array {odd[0]!r} has no place in a plain ViT ({len(odd)} such); use another source")


def _wanted(style: str, model: ModelConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Returns {their name: shape} of all arrays that `read` takes."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (own, layer), kind in _stored(style, model.depth, model.classes > 0):
        shape = shapes[own] if layer is None else shapes[own][1:]
        rows, *rest = shape if style == GOOGLE else _to_torch(_empty(shape), kind).shape
        wanted[name] = (wanted.get(name, (0,))[0] + rows, *rest)
    if model.pool == "cls":
        wanted[CLS[style]] = (1, 1, model.width)
    return wanted | {POSITIONS[style]: (1, model.patches + model.cls_position, model.width)}


def _shape(arrays: Arrays, name: str, ndim: int | None = None) -> tuple[int, ...]:
    if name not in arrays:
        raise FormatError(f"the array {name!r} is missing; restore the file from a copy")
    shape = tuple(arrays[name].shape)
    if ndim and (len(shape) != ndim or 0 in shape):
        raise FormatError(f"the array {name!r} has shape {shape}; it must have {ndim} axes, none of length 0")
    return shape


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of this shape that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


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


def _from_torch(leaf: np.ndarray, kind: str, heads: int) -> np.ndarray:
    """Returns the array as Flax lays it out."""
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
        if part:
            yield from zip((f"{block}.attn.{n}.{kind}" for n in QKV), np.split(leaf, 3), strict=True)
        else:
            yield name, leaf


QKV = ("query", "key", "value")
