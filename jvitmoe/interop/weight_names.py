"""Names and shapes of the same ViT elsewhere: timm, Hugging Face transformers, google-research's .npz. NumPy only.

Our tree is flat here: "blocks.mlp.up" is the leaf up of mlp of blocks, [L, D, F].

L layers · D width · H heads · K head width · F hidden width · T patches of an image · P patch side · c channels
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jvitmoe.config import ModelConfig
from jvitmoe.errors import UserError

Arrays = Mapping[str, Any]  # NumPy's, or with the same shape, dtype and __array__
Shapes = Mapping[str, tuple[int, ...]]
Dict = dict[str, np.ndarray]

LINEAR, NORM, BARE = (".kernel", ".bias"), (".scale", ".bias"), ("", "_bias")  # our names of a weight and a bias


def _rows(ours: str, timm: str, hf: str, google: str, names: tuple[str, str] = LINEAR) -> tuple[tuple[str, ...], ...]:
    """Returns (ours, timm's, Hugging Face's, google-research's) names of the weight and of the bias of a module."""
    return (
        (ours + names[0], f"{timm}.weight", f"{hf}.weight", f"{google}/{'scale' if names == NORM else 'kernel'}"),
        (ours + names[1], f"{timm}.bias", f"{hf}.bias", f"{google}/bias"),
    )


OUTER = (
    *_rows("patches", "patch_embed.proj", "embeddings.patch_embeddings.projection", "embedding"),
    *_rows("norm", "norm", "layernorm", "Transformer/encoder_norm", NORM),
    *_rows("head.logits", "head", "classifier", "head"),
)
BLOCK = (  # query, key and value are one array in timm's files, in this order
    *_rows("norm1", "norm1", "layernorm_before", "LayerNorm_0", NORM),
    *_rows("attention.query", "attn.qkv", "attention.attention.query", "MultiHeadDotProductAttention_1/query"),
    *_rows("attention.key", "attn.qkv", "attention.attention.key", "MultiHeadDotProductAttention_1/key"),
    *_rows("attention.value", "attn.qkv", "attention.attention.value", "MultiHeadDotProductAttention_1/value"),
    *_rows("attention.out", "attn.proj", "attention.output.dense", "MultiHeadDotProductAttention_1/out"),
    *_rows("norm2", "norm2", "layernorm_after", "LayerNorm_2", NORM),
    *_rows("mlp.up", "mlp.fc1", "intermediate.dense", "MlpBlock_3/Dense_0", BARE),
    *_rows("mlp.down", "mlp.fc2", "output.dense", "MlpBlock_3/Dense_1", BARE),
)
TIMM, HF, GOOGLE = "timm", "hf", "google"
COLUMN = {TIMM: 1, HF: 2, GOOGLE: 3}
BLOCKS = {TIMM: "blocks.{}.", HF: "encoder.layer.{}.", GOOGLE: "Transformer/encoderblock_{}/"}
CLS = {TIMM: "cls_token", HF: "embeddings.cls_token", GOOGLE: "cls"}
POSITIONS = {TIMM: "pos_embed", HF: "embeddings.position_embeddings"}
POSITIONS |= {GOOGLE: "Transformer/posembed_input/pos_embedding"}

# What may be left over in a file: heads of other tasks. Anything else left over would change what the model computes.
SPARE = re.compile(r"(head|fc|pre_logits|head_dist|pooler|classifier|decoder|dist_token|mask_token)\b.*")
FLOAT = re.compile(r"(float|F|BF)(16|32|64)")  # NumPy's and safetensors' names of types

# Heads of timm's and google-research's sizes, where nothing else tells them.
HEADS = {"tiny": 3, "xsmall": 4, "small": 6, "medium": 8, "betwixt": 10, "base": 12}
HEADS |= dict.fromkeys(("large", "huge", "giant", "gigantic"), 16)


class FormatError(UserError):
    """Arrays that are no ViT of ours under the names they have; one line that names the array."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Dict:
    """Returns {"a.b": array} of a nested tree, as NumPy arrays."""
    flat: Dict = {}
    for name, branch in tree.items():
        path = prefix + name
        flat |= flatten(branch, f"{path}.") if isinstance(branch, Mapping) else {path: np.asarray(branch)}
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

    `ours` has "positions" [T, D] of the patches. With `cls_row` their table begins with the position of CLS, zeros
    where CLS has none.
    """
    theirs: Dict = {}
    for name, places in _places(style, len(ours["blocks.norm1.scale"])).items():
        leaves = [ours[own] if layer is None else ours[own][layer] for own, layer in places]
        if style != GOOGLE:
            leaves = [_to_torch(leaf, own) for leaf, (own, _) in zip(leaves, places, strict=True)]
        theirs[name] = np.concatenate(leaves)
    table_TD = ours["positions"]
    if "cls" in ours:
        theirs[CLS[style]] = ours["cls"][None, None]
    if cls_row:
        row_D = ours.get("cls_position", np.zeros_like(ours["cls"]))
        table_TD = np.concatenate([row_D[None], table_TD])
    theirs[POSITIONS[style]] = table_TD[None]
    if style == TIMM and "cls" not in ours:
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
    has_head = any(name in named for name in _places(style, 0).keys() - _places(style, 0, has_head=False).keys())
    has_head &= not any(name.startswith("pre_logits") for name in named)  # a tanh layer before the head
    _check_names(named, style, depth, has_head)

    def shape(ours: str, ndim: int) -> tuple[int, ...]:
        name = next(name for name, places in _places(style, 1).items() if places[0][0] == ours)
        found = _shape(named, name, ndim)
        return found if style == GOOGLE else _from_torch(np.broadcast_to(np.float32(0), found)).shape

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
    """Returns (our flat tree, names of arrays that were left out): the inverse of `write`.

    `model` is what `model_of` returned, and `shapes` are those of our arrays for it. Raises FormatError as `load` does.
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
    layers: dict[str, list[np.ndarray]] = {}
    for name, places in _places(style, model.depth, model.classes > 0).items():
        for (own, layer), leaf in zip(places, np.split(loaded.pop(name), len(places)), strict=True):
            leaf = leaf if style == GOOGLE else _from_torch(leaf)
            if layer is None:
                ours[own] = leaf.reshape(shapes[own])
            else:
                layers.setdefault(own, []).append(leaf.reshape(shapes[own][1:]))
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
    patches = ((style, OUTER[0][column]) for style, column in COLUMN.items())
    return next((style for style, name in patches if name in names or f"vit.{name}" in names), None)


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


def _places(style: str, depth: int, has_head: bool = True) -> dict[str, list[tuple[str, int | None]]]:
    """Returns {their name: [(our name, layer or None)]} of every array but CLS and positions; what stands in one array
    there is concatenated along the first axis."""
    column = COLUMN[style]
    places: dict[str, list[tuple[str, int | None]]] = {}
    for row in OUTER:
        if has_head or not row[0].startswith("head."):
            places[row[column]] = [(row[0], None)]
    for layer, row in itertools.product(range(depth), BLOCK):
        places.setdefault(BLOCKS[style].format(layer) + row[column], []).append((f"blocks.{row[0]}", layer))
    return places


def _plain_names(theirs: Arrays, style: str) -> Arrays:
    """Returns the arrays without Hugging Face's prefix of classifiers and timm's other name of the last norm."""
    if style == GOOGLE:
        return theirs
    old, new = (r"^fc_norm\.", "norm.") if style == TIMM else (r"^vit\.", "")
    return {re.sub(old, new, name): leaf for name, leaf in theirs.items()}


def _check_names(named: Arrays, style: str, depth: int, has_head: bool) -> None:
    """Raises FormatError for an array that is missing, and for one that would change what a plain ViT computes."""
    wanted = [*_places(style, depth, has_head), POSITIONS[style]]
    for name in wanted:
        if name not in named:
            raise FormatError(f"the array {name!r} is missing; the file must hold a plain ViT")
    odd = sorted(name for name in named.keys() - {*wanted, CLS[style]} if not SPARE.fullmatch(name))
    if odd:
        raise FormatError(f"the array {odd[0]!r} has no place in a plain ViT ({len(odd)} such); use another source")


def _wanted(style: str, model: ModelConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Returns {their name: shape} of all arrays that `read` takes."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, places in _places(style, model.depth, model.classes > 0).items():
        own, layer = places[0]
        shape = shapes[own] if layer is None else shapes[own][1:]
        rows, *rest = shape if style == GOOGLE else _to_torch(np.broadcast_to(np.float32(0), shape), own).shape
        wanted[name] = (rows * len(places), *rest)
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


def _to_torch(leaf: np.ndarray, own: str) -> np.ndarray:
    """Returns our array as PyTorch lays it out: weights [out, in], of convolutions [out, in, rows, columns]."""
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)
    if own.endswith(("bias", "scale")):
        return leaf.reshape(-1)
    return leaf.reshape((-1, leaf.shape[-1]) if own.endswith("out.kernel") else (len(leaf), -1)).T


def _from_torch(leaf: np.ndarray) -> np.ndarray:
    """Returns the array as Flax lays it out, with all heads in one axis."""
    return leaf.transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.T
