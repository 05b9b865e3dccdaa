"""Names and shapes of the same ViT elsewhere: timm, Hugging Face transformers. NumPy only.

Our tree is flat here: "blocks.mlp.up" is the leaf up of mlp of blocks, [L, D, F]. Functions that read raise UserError,
one line that names the array, for arrays that are no ViT of ours.

L layers · D width · F hidden width · T patches of an image
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jvitmoe.config import ModelConfig
from jvitmoe.errors import UserError

Arrays = Mapping[str, Any]  # NumPy's, or with the same shape, dtype and __array__
Shapes = Mapping[str, tuple[int, ...]]
Dict = dict[str, np.ndarray]

LINEAR, NORM, BARE = (".kernel", ".bias"), (".scale", ".bias"), ("", "_bias")  # our names of a weight and a bias


def _rows(ours: str, timm: str, hf: str, names: tuple[str, str] = LINEAR) -> tuple[tuple[str, ...], ...]:
    """Returns (ours, timm's, Hugging Face's) names of the weight and of the bias of a module."""
    return ((ours + names[0], f"{timm}.weight", f"{hf}.weight"), (ours + names[1], f"{timm}.bias", f"{hf}.bias"))


OUTER = (
    *_rows("patches", "patch_embed.proj", "embeddings.patch_embeddings.projection"),
    *_rows("norm", "norm", "layernorm", NORM),
    *_rows("head.logits", "head", "classifier"),
)
BLOCK = (  # query, key and value are one array in timm's files, in this order
    *_rows("norm1", "norm1", "layernorm_before", NORM),
    *_rows("attention.query", "attn.qkv", "attention.attention.query"),
    *_rows("attention.key", "attn.qkv", "attention.attention.key"),
    *_rows("attention.value", "attn.qkv", "attention.attention.value"),
    *_rows("attention.out", "attn.proj", "attention.output.dense"),
    *_rows("norm2", "norm2", "layernorm_after", NORM),
    *_rows("mlp.up", "mlp.fc1", "intermediate.dense", BARE),
    *_rows("mlp.down", "mlp.fc2", "output.dense", BARE),
)
TIMM, HF = "timm", "hf"
# Leaves that the blocks of some of timm's ViTs have besides: (ours, timm's).
PARTS = (
    *(("layer_scale1", "ls1.gamma"), ("layer_scale2", "ls2.gamma")),
    *(("attention.query_norm.scale", "attn.q_norm.weight"), ("attention.query_norm.bias", "attn.q_norm.bias")),
    *(("attention.key_norm.scale", "attn.k_norm.weight"), ("attention.key_norm.bias", "attn.k_norm.bias")),
)
LAYER_SCALE = 1e-5  # timm's usual initial value, which a file does not tell
REGISTERS = "reg_token"  # timm's; of shape [1, registers, D]
COLUMN = {TIMM: 1, HF: 2}
BLOCKS = {TIMM: "blocks.{}.", HF: "encoder.layer.{}."}
CLS = {TIMM: "cls_token", HF: "embeddings.cls_token"}
POSITIONS = {TIMM: "pos_embed", HF: "embeddings.position_embeddings"}

# Arrays that a file may have besides: heads of other tasks. Any other array would change what the model computes.
SPARE = re.compile(r"(head|fc|pre_logits|pooler|classifier|decoder|(embeddings\.)?mask_token)\b.*")
FLOAT = re.compile(r"(float|F|BF)(16|32|64)")  # NumPy's and safetensors' names of types


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


def write(ours: Arrays, style: str, cls_row: bool, mean: bool = False) -> Dict:
    """Returns the arrays of a dense pre-norm ViT with a one-layer head as `style` names them, float32, C-contiguous.

    `ours` has "positions" [T, D] of the patches. With `cls_row` their table begins with the position of CLS, zeros
    if CLS has none; without, that position is added to CLS. `mean` says that the head takes the mean of the patches.
    """
    theirs: Dict = {}
    for name, members in _layout(style, len(ours["blocks.norm1.scale"]), _parts(ours)).items():
        leaves = [ours[our_name] if layer is None else ours[our_name][layer] for our_name, layer in members]
        leaves = [_to_torch(leaf, our_name) for leaf, (our_name, _) in zip(leaves, members, strict=True)]
        theirs[name] = np.concatenate(leaves)
    table_TD = ours["positions"]
    if "registers" in ours:
        theirs[REGISTERS] = ours["registers"][None]
    if "cls" in ours:
        theirs[CLS[style]] = (ours["cls"] + (0 if cls_row else ours.get("cls_position", 0)))[None, None]
    if cls_row:
        row_D = ours.get("cls_position", np.zeros_like(ours["cls"]))
        table_TD = np.concatenate([row_D[None], table_TD])
    theirs[POSITIONS[style]] = table_TD[None]
    if style == TIMM and mean:
        theirs = {re.sub(r"^norm\.", "fc_norm.", name): leaf for name, leaf in theirs.items()}
    elif style == HF:
        theirs = {name if name.startswith("classifier") else f"vit.{name}": leaf for name, leaf in theirs.items()}
    return {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in theirs.items()}


class ConfigValues(NamedTuple):
    """Values of config files that the arrays do not show."""

    heads: int  # 0 if unknown
    epsilon: float  # of every LayerNorm
    size: tuple[int, int] | None = None  # height and width of the images
    cls_row: bool | None = None  # True if the table of positions begins with a row for CLS
    classes: tuple[str, ...] = ()  # names in the order of labels
    mean: Any = None  # of pixels from 0 to `scale`
    std: Any = None
    scale: float = 1.0


def model_of(theirs: Arrays, style: str, config: ConfigValues) -> ModelConfig:
    """Returns the architecture of a ViT, from the shapes of its arrays; `classes` is 0 without a head that we can use.

    Raises UserError for shapes of another model, and if the number of positions fits several ViTs.
    """
    named = _plain_names(theirs, style)
    block = re.compile(re.escape(BLOCKS[style]).replace(r"\{\}", r"(\d+)"))
    layers = {match[1] for match in map(block.match, named) if match}
    depth = next(layer for layer in itertools.count() if str(layer) not in layers)
    has_cls, mean = CLS[style] in named, "fc_norm.weight" in theirs
    parts = [name for name, timm in PARTS if style == TIMM and BLOCKS[TIMM].format(0) + timm in named]
    has_head = any(row[COLUMN[style]] in named for row in OUTER if row[0].startswith("head."))
    has_head &= not any(name.startswith("pre_logits") for name in named)  # a tanh layer before the head
    known = {*_layout(style, depth, parts, has_head), POSITIONS[style], CLS[style]}
    known |= {REGISTERS} if style == TIMM else set()
    if odd := sorted(name for name in named.keys() - known if not SPARE.fullmatch(name)):
        raise UserError(f"the array {odd[0]!r} has no place in a plain ViT ({len(odd)} such); use another source")

    def shape(our_name: str, ndim: int) -> tuple[int, ...]:
        name = next(name for name, members in _layout(style, 1).items() if members[0][0] == our_name)
        return _from_torch(np.broadcast_to(np.float32(0), _shape(named, name, ndim))).shape

    patch, other, channels, width = shape("patches.kernel", 4)
    if patch != other:
        raise UserError(f"its patches have {patch}x{other} pixels; they must be square")
    if width % config.heads:
        raise UserError(f"its width is {width}; it must be a multiple of the {config.heads} heads")
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
        pool=("cls_mean" if mean else "cls") if has_cls else "mean",
        registers=_shape(named, REGISTERS, 3)[1] if style == TIMM and REGISTERS in named else 0,
        layer_scale=LAYER_SCALE if "layer_scale1" in parts else 0.0,
        qk_norm="attention.key_norm.scale" in parts,
        cls_position=cls_row,
        norm_epsilon=config.epsilon,
    )


def _grid(rows: int, has_cls: bool, patch: int, config: ConfigValues) -> tuple[int, bool]:
    """Returns (patches on a side, True if CLS has a row) of a table of positions. Raises UserError if the patches do
    not form a square, or may form another rectangle."""
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
        either = f"{side}x{side} patches, or CLS and a rectangle of patches"
        raise UserError(f"its {rows} positions may be {either}; put the config.json that belongs to it beside it")
    else:
        cls_row = rows > 1
    grid = round((rows - cls_row) ** 0.5)
    if height != width and patches == rows - cls_row:
        raise UserError(f"its images have {height}x{width} pixels; they must be square")
    if grid == 0 or grid * grid != rows - cls_row:
        raise UserError(f"its table has {rows - cls_row} positions of patches; they must make a square")
    return grid, cls_row


def read(theirs: Arrays, style: str, model: ModelConfig, shapes: Shapes) -> tuple[Dict, list[str]]:
    """Returns (our flat tree, names of arrays that are not used): the inverse of `write`.

    `model` is what `model_of` returned, and `shapes` are those of our arrays for it. Raises UserError as `load`.
    """
    named = _plain_names(theirs, style)
    wanted = _wanted(style, model, shapes)
    loaded = load(named, wanted)
    table_TD = loaded.pop(POSITIONS[style])[0]
    ours: Dict = {"registers": loaded.pop(REGISTERS)[0]} if model.registers else {}
    if CLS[style] in loaded:
        ours["cls"] = loaded.pop(CLS[style]).reshape(-1)
        if model.cls_position:
            ours["cls_position"], table_TD = table_TD[0], table_TD[1:]
    ours["positions"] = table_TD
    layers: dict[str, list[np.ndarray]] = {}
    for name, members in _layout(style, model.depth, _parts(shapes), model.classes > 0).items():
        for (our_name, layer), leaf in zip(members, np.split(loaded.pop(name), len(members)), strict=True):
            if layer is None:
                ours[our_name] = _from_torch(leaf).reshape(shapes[our_name])
            else:
                layers.setdefault(our_name, []).append(_from_torch(leaf).reshape(shapes[our_name][1:]))
    ours |= {our_name: np.stack(leaves) for our_name, leaves in layers.items()}
    return {name: np.ascontiguousarray(leaf) for name, leaf in ours.items()}, sorted(named.keys() - wanted.keys())


def load(arrays: Arrays, wanted: Shapes) -> Dict:
    """Returns the wanted arrays in float32. Raises UserError for an array that is missing or has another shape or type,
    before any values are read, and for values that are not finite."""
    for name, shape in wanted.items():
        if (theirs := _shape(arrays, name)) != shape:
            raise UserError(f"the array {name!r} has shape {theirs}; it must be {shape}")
        if not FLOAT.fullmatch(str(arrays[name].dtype)):
            raise UserError(f"the array {name!r} has type {arrays[name].dtype}; it must have a float type")
    loaded: Dict = {}
    for name in wanted:
        with np.errstate(over="ignore"):  # a float64 that is too large becomes infinite
            loaded[name] = np.asarray(arrays[name]).astype(np.float32, copy=False)
        if not np.isfinite(loaded[name]).all():
            raise UserError(f"the array {name!r} has NaN or infinite values; restore the file from a copy")
    return loaded


def style_of(names: Any) -> str | None:
    """Returns the style that has these names of arrays, "timm" or "hf"; None for other names."""
    patches = ((style, OUTER[0][column]) for style, column in COLUMN.items())
    return next((style for style, name in patches if name in names or f"vit.{name}" in names), None)


def _parts(ours: Arrays | Shapes) -> list[str]:
    """Returns the names in PARTS that the blocks of our flat tree have."""
    return [name for name, _ in PARTS if f"blocks.{name}" in ours]


def _layout(
    style: str, depth: int, parts: Sequence[str] = (), has_head: bool = True
) -> dict[str, list[tuple[str, int | None]]]:
    """Returns {their name: [(our name, layer or None)]} of every array except CLS, registers and positions. Several of
    our leaves in one of their arrays are concatenated along the first axis. `parts` are names in PARTS."""
    column = COLUMN[style]
    layout: dict[str, list[tuple[str, int | None]]] = {
        row[column]: [(row[0], None)] for row in OUTER if has_head or not row[0].startswith("head.")
    }
    for layer, row in itertools.product(range(depth), BLOCK):
        layout.setdefault(BLOCKS[style].format(layer) + row[column], []).append((f"blocks.{row[0]}", layer))
    for layer, (name, timm) in itertools.product(range(depth), PARTS):
        if name in parts:
            layout[BLOCKS[TIMM].format(layer) + timm] = [(f"blocks.{name}", layer)]
    return layout


def _plain_names(theirs: Arrays, style: str) -> Arrays:
    """Returns the arrays without Hugging Face's prefix of classifiers and timm's other name of the last norm."""
    old, new = (r"^fc_norm\.", "norm.") if style == TIMM else (r"^vit\.", "")
    return {re.sub(old, new, name): leaf for name, leaf in theirs.items()}


def _wanted(style: str, model: ModelConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Returns {their name: shape} of all arrays that `read` takes."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, members in _layout(style, model.depth, _parts(shapes), model.classes > 0).items():
        our_name, layer = members[0]
        shape = shapes[our_name] if layer is None else shapes[our_name][1:]
        rows, *rest = _to_torch(np.broadcast_to(np.float32(0), shape), our_name).shape
        wanted[name] = (rows * len(members), *rest)
    if model.has_cls:
        wanted[CLS[style]] = (1, 1, model.width)
    if model.registers:
        wanted[REGISTERS] = (1, model.registers, model.width)
    return wanted | {POSITIONS[style]: (1, model.patches + model.cls_position, model.width)}


def _shape(arrays: Arrays, name: str, ndim: int | None = None) -> tuple[int, ...]:
    if name not in arrays:
        raise UserError(f"the array {name!r} is missing; the file must hold a plain ViT")
    shape = tuple(arrays[name].shape)
    if ndim and (len(shape) != ndim or 0 in shape):
        raise UserError(f"the array {name!r} has shape {shape}; it must have {ndim} axes, none of length 0")
    return shape


def _to_torch(leaf: np.ndarray, our_name: str) -> np.ndarray:
    """Returns our array in PyTorch's layout: weights [out, in], of convolutions [out, in, rows, columns]."""
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)
    if leaf.ndim == 1 or our_name.endswith("bias"):
        return leaf.reshape(-1)
    return leaf.reshape((-1, leaf.shape[-1]) if our_name.endswith("out.kernel") else (len(leaf), -1)).T


def _from_torch(leaf: np.ndarray) -> np.ndarray:
    """Returns the array in Flax's layout, with all heads in one axis."""
    return leaf.transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.T
