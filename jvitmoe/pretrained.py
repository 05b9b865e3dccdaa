"""Dense ViTs from elsewhere, as our dense tree: run folders, exports, safetensors of timm and Hugging Face, and .npz of
google-research. Nothing here unpickles.

T patches of an image · D width · P patch side · c channels · C classes
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from jvitmoe import config as config_lib
from jvitmoe import evaluation, formats, routing, tracking
from jvitmoe.checkpoint import Checkpoints
from jvitmoe.config import Config, ConfigError, ModelConfig, UserError
from jvitmoe.formats import Dict
from jvitmoe.models import vit
from jvitmoe.routing import Purpose

OURS = "jvitmoe"  # the format of our own exports, and the word that marks their config.json
WEIGHTS, CONFIG = "model.safetensors", "config.json"
HF_EPSILON, GOOGLE_EPSILON = 1e-12, 1e-6  # of LayerNorm, where no file says
MEAN_STD = ("mean", "std")
MUST_MATCH = ("width", "hidden", "depth", "heads", "norm", "pool")


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A dense ViT that was read.

    `params` is flat ("blocks.mlp.up") with "positions" [T, D] of the patches always in it; `model` says what it is,
    with heads = 0 where the files do not; `notes` tell what was changed to fit our ViT.
    """

    path: Path
    kind: str  # run | jvitmoe | timm | hf | google
    params: Dict
    model: ModelConfig
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: Config | None = None  # of a run
    crop: str = "pad"  # how pictures in files are cut for it, as `data.crop`
    step: int = 0  # of a run's checkpoint

    @property
    def grid(self) -> int:
        return self.model.image_size // self.model.patch


def read(path: Path | str, heads: int = 0, checkpoint: str = "latest") -> Source:
    """Returns the dense ViT in a run folder, an exported folder, a .safetensors or an .npz file.

    Args:
        path: where it lies; a config.json beside a .safetensors is read too.
        heads: H, for files that do not tell it.
        checkpoint: of a run folder: latest, best or a step.

    Raises UserError (one line with the path) for what is not there, is damaged, or is no ViT of ours.
    """
    path = Path(path).expanduser()
    if (path / "checkpoints").is_dir():
        return _read_run(path, checkpoint)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{str(path)!r} is not a file; give a run folder, a folder with {WEIGHTS}, a .safetensors or a .npz file"
        )
    try:
        if path.suffix == ".npz":
            return _read_google(path, _load_npz(path))
        if path.suffix == ".safetensors":
            return _read_safetensors(path, heads)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{str(path)!r} is neither .safetensors nor .npz; convert it with safetensors first")


def start(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Returns (the dense tree that `config.init.source` gives this run, lines that tell what was done).

    Raises ConfigError where the source is another ViT.
    """
    try:
        source = read(config.init.source, config.model.heads)
    except UserError as error:
        raise ConfigError(f"config.init.source cannot be read: {error}") from error
    wanted = dataclasses.replace(config.model, lora=0, adapter=0)
    model = vit.build(wanted)
    key = routing.address(jax.random.key(config.train.seed), Purpose.INIT)  # what is re-made, as a new run makes it
    fresh = formats.flatten(jax.device_get(jax.jit(lambda: vit.init(model, key))()))
    params, lines = adapt(source, wanted, fresh)
    return formats.unflatten(params), lines


def adapt(source: Source, model: ModelConfig, fresh: Dict) -> tuple[Dict, list[str]]:
    """Returns (the flat dense tree of `model`, lines that tell what was loaded, resized, re-made and skipped).

    Args:
        source: what was read.
        model: what is wanted.
        fresh: a flat dense tree of `model`, which keeps what the source cannot give.

    Positions go to another grid as timm takes them (cubic, antialiased), kernels of patches to another size by the
    pseudo-inverse (FlexiViT, arXiv 2212.08013). Raises ConfigError where the blocks are of another shape.
    """
    differ = [name for name in MUST_MATCH if getattr(source.model, name) != getattr(model, name)]
    if differ:
        flags = " ".join(f"--config.model.{name}={getattr(source.model, name)}" for name in differ)
        raise ConfigError(
            f"config.init.source is {str(source.path)!r}, a ViT whose {', '.join(f'model.{n}' for n in differ)} "
            f"differ from this run's; set {flags}"
        )
    old, params, changes = dict(source.params), dict(fresh), list(source.notes)
    _place_patches(old, source, model, changes)
    _place_positions(old, source, model, fresh, changes)
    cls_position = old.pop("cls_position", None)
    if "cls" in old and model.cls_position:
        old["cls_position"] = np.zeros_like(old["cls"]) if cls_position is None else cls_position
    elif cls_position is not None:
        old["cls"] = old["cls"] + cls_position
        changes.append("folded the position of CLS into CLS")
    head = {name for name in {*old, *fresh} if name.startswith("head.")}
    if any(name not in old or name not in fresh or old[name].shape != fresh[name].shape for name in head):
        changes.append(
            f"re-made the head for {model.classes} classes (the source has {source.model.classes or 'none'})"
        )
        old = {name: leaf for name, leaf in old.items() if name not in head}
    if source.model.norm_epsilon != model.norm_epsilon:
        changes.append(
            f"kept model.norm_epsilon={model.norm_epsilon:g}, where the source has {source.model.norm_epsilon:g}"
        )
    params |= {name: leaf.astype(np.float32) for name, leaf in old.items()}
    count = sum(leaf.size for leaf in old.values())
    total = sum(leaf.size for leaf in fresh.values())
    return params, [f"{source.path} ({source.kind}): {count:,} of {total:,} parameters loaded", *changes]


def resize_positions(table_TD: np.ndarray, grid: int) -> np.ndarray:
    """Returns positions [grid * grid, D] from those of another square grid: cubic, antialiased."""
    side, width = round(len(table_TD) ** 0.5), table_TD.shape[1]
    if side == grid:
        return table_TD
    square = table_TD.reshape(side, side, width).astype(np.float32)
    resized = jax.image.resize(square, (grid, grid, width), "cubic", antialias=True)
    return np.asarray(resized).reshape(grid * grid, width)


def resize_patches(kernel_PPcD: np.ndarray, patch: int) -> np.ndarray:
    """Returns kernels for patches of another side, [patch, patch, c, D]: on images that were enlarged the result gives
    what the kernel gave on the images before (FlexiViT, arXiv 2212.08013, eq. 4)."""
    side, _, channels, width = kernel_PPcD.shape
    if side == patch:
        return kernel_PPcD
    basis = np.eye(side * side, dtype=np.float32).reshape(side, side, -1)
    resize = np.asarray(jax.image.resize(basis, (patch, patch, side * side), "cubic", antialias=True))
    inverse = np.linalg.pinv(resize.reshape(patch * patch, side * side).T)
    resized = inverse.astype(np.float32).reshape(patch * patch, side * side) @ kernel_PPcD.reshape(side * side, -1)
    return resized.reshape(patch, patch, channels, width)


def _place_patches(old: Dict, source: Source, model: ModelConfig, changes: list[str]) -> None:
    kernel = old["patches.kernel"]
    if source.model.patch != model.patch:
        kernel = resize_patches(kernel, model.patch)
        changes.append(f"resized the kernel of patches from {source.model.patch} to {model.patch} pixels")
    if source.model.channels != model.channels:  # exact for grey images, whose channels are equal
        kernel = np.repeat(kernel.sum(2, keepdims=True) / model.channels, model.channels, axis=2)
        changes.append(f"shared the kernel of {source.model.channels} channels out over {model.channels}")
    old["patches.kernel"] = kernel


def _place_positions(old: Dict, source: Source, model: ModelConfig, fresh: Dict, changes: list[str]) -> None:
    if model.positions != "learned":
        changes.append("skipped the positions, which model.positions=sincos2d computes")
        del old["positions"]
        return
    grid = model.image_size // model.patch
    if source.grid != grid:
        old["positions"] = resize_positions(old["positions"], grid)
        changes.append(f"resized positions from {source.grid}x{source.grid} to {grid}x{grid}")
    old["positions"] = np.concatenate([old["positions"], fresh["positions"][grid * grid :]])


def _read_run(path: Path, checkpoint: str) -> Source:
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    try:
        saved = checkpoints.read(checkpoint)
    finally:
        checkpoints.close()
    config = config_lib.from_dict(saved.meta["config"])
    params = formats.unflatten(saved.params)
    flat = formats.flatten(jax.device_get(evaluation.dense_tree(config, params)))
    flat["positions"] = _table(config.model, flat)
    names = tracking.read_classes(path)
    notes: tuple[str, ...] = ("averaged the experts",) if config.routing.experts > 1 else ()
    notes += ("folded LoRA and adapters into the MLP",) if config.tuned else ()
    return Source(path, "run", flat, config.model.plain(), names, notes, config, config.data.crop, saved.step)


def _table(model: ModelConfig, flat: Dict) -> np.ndarray:
    """Returns the positions [T, D] that the model adds to patches, learned or not."""
    grid = model.image_size // model.patch
    return vit.sincos2d(grid, model.width) if model.positions == "sincos2d" else flat["positions"][: grid * grid]


def _read_safetensors(path: Path, heads: int) -> Source:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # its own errors, OSError, and TypeError for types NumPy lacks
        raise UserError(f"cannot be read as safetensors ({error}); restore it from a copy") from error
    beside = path.with_name(CONFIG)
    try:
        about = json.loads(beside.read_text()) if beside.is_file() else {}
        if about.get("format") == OURS:
            return _read_ours(path, arrays, about)
        style = formats.style_of(arrays)
        if style in (formats.HF, formats.TIMM):
            source = (_read_hf if style == formats.HF else _read_timm)(path, arrays, about, heads)
            guess = f"took {source.model.norm_epsilon:g} for LayerNorm's epsilon: no {CONFIG} beside it tells"
            return source if about else dataclasses.replace(source, notes=(*source.notes, guess))
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UserError(f"its {CONFIG} or its arrays are not those of a ViT ({error!r})") from error
    raise UserError("its arrays have neither timm's names nor Hugging Face's; use a plain ViT")


def _read_ours(path: Path, arrays: Dict, about: dict[str, Any]) -> Source:
    model = config_lib.from_dict({"model": about["model"]}).model
    wanted = jax.eval_shape(lambda: vit.init(vit.build(model), jax.random.key(0)))
    shapes = {".".join(str(entry.key) for entry in at): leaf.shape for at, leaf in jax.tree.leaves_with_path(wanted)}
    for name in sorted({*shapes, *arrays}):
        found = arrays[name].shape if name in arrays else None
        if found != shapes.get(name):
            raise UserError(f"the array {name!r} has shape {found}; its {CONFIG} says {shapes.get(name)}")
    arrays = arrays | {"positions": _table(model, arrays)}
    return Source(path, OURS, arrays, model, tuple(about.get("classes", ())), crop=about.get("crop", "pad"))


def _read_hf(path: Path, arrays: Dict, about: dict[str, Any], heads: int) -> Source:
    if about.get("model_type", "vit") != "vit" or about.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"its model_type is {about.get('model_type')!r} with hidden_act {about.get('hidden_act')!r}; "
            "they must be 'vit' and 'gelu'"
        )
    names = about.get("id2label", {})
    classes = tuple(str(names[key]) for key in sorted(names, key=int)) if "classifier.weight" in arrays else ()
    folder = path.parent / "preprocessor_config.json"
    pixels = json.loads(folder.read_text()) if folder.is_file() else {}
    mean, std = (pixels.get(f"image_{name}", 0.5) if pixels.get("do_normalize", True) else 0.5 for name in MEAN_STD)
    epsilon = float(about.get("layer_norm_eps", HF_EPSILON))
    known = int(about.get("num_attention_heads", 0))
    return _from_style(path, formats.HF, arrays, known or heads, epsilon, classes, mean, std)


def _read_timm(path: Path, arrays: Dict, about: dict[str, Any], heads: int) -> Source:
    mean_pooled = "cls_token" not in arrays
    if mean_pooled != ("fc_norm.weight" in arrays):
        raise UserError(
            "it pools otherwise than our ViT: by CLS after `norm`, or without CLS by the mean and `fc_norm`"
        )
    known, epsilon = formats.read_timm_config(about)
    cfg = about.get("pretrained_cfg") or {}
    names = tuple(map(str, about.get("label_names") or cfg.get("label_names") or ()))
    mean, std = (cfg.get(name, 0.5) for name in MEAN_STD)
    return _from_style(path, formats.TIMM, arrays, known or heads, epsilon, names, mean, std)


def _read_google(path: Path, arrays: Dict) -> Source:
    if formats.style_of(arrays) != formats.GOOGLE or formats.CLS[formats.GOOGLE] not in arrays:
        raise UserError("its arrays are not those of a google-research ViT with a CLS token; use another source")
    names = [name for name in arrays if name.endswith("/query/kernel")]
    heads = arrays[names[0]].shape[1] if names else 1
    return _from_style(path, formats.GOOGLE, arrays, heads, GOOGLE_EPSILON, (), 0.5, 0.5)


def _from_style(
    path: Path, style: str, arrays: Dict, heads: int, epsilon: float, names: tuple[str, ...], mean: Any, std: Any
) -> Source:
    if not heads:
        raise UserError(f"nothing tells its number of heads; put the {CONFIG} that belongs to it beside it")
    rows = arrays[_name(arrays, formats.POSITIONS[style])].shape[1] if _has(arrays, formats.POSITIONS[style]) else 0
    has_cls = _has(arrays, formats.CLS[style])
    cls_row = has_cls and round((rows - 1) ** 0.5) ** 2 == rows - 1
    flat, left = formats.read(arrays, style, heads, cls_row)
    patch, _, channels, width = flat["patches.kernel"].shape
    grid = round(len(flat["positions"]) ** 0.5)
    if grid * grid != len(flat["positions"]):
        raise UserError(f"its table has {len(flat['positions'])} positions; they must make a square")
    depth, _, hidden = flat["blocks.mlp.up"].shape
    classes = flat["head.logits.bias"].shape[0] if "head.logits.bias" in flat else 0
    model = ModelConfig(
        image_size=grid * patch,
        channels=channels,
        classes=classes,
        patch=patch,
        width=width,
        hidden=hidden,
        depth=depth,
        heads=heads,
        pool="cls" if has_cls else "mean",
        cls_position=cls_row,
        norm_epsilon=epsilon,
    )
    notes = [f"skipped {', '.join(left)}"] if left else []
    mean_c, std_c = (np.broadcast_to(np.asarray(value, np.float32), (channels,)) for value in (mean, std))
    if np.any(mean_c != 0.5) or np.any(std_c != 0.5):
        _fold_pixels(flat, mean_c, std_c)
        notes.append("folded its mean and deviation of pixels into the kernel of patches: ours take [-1, 1]")
    return Source(path, style, flat, model, names if len(names) == classes else (), tuple(notes))


def _fold_pixels(flat: Dict, mean_c: np.ndarray, std_c: np.ndarray) -> None:
    """Makes patches of pixels in [-1, 1] give what those of (pixels in [0, 1] - mean) / std gave; exact, for a patch
    sees no padding."""
    kernel_PPcD = flat["patches.kernel"]
    offset_c = (0.5 - mean_c) / std_c
    flat["patches.bias"] = flat["patches.bias"] + np.einsum("pqcd,c->d", kernel_PPcD, offset_c)
    flat["patches.kernel"] = kernel_PPcD / (2 * std_c)[None, None, :, None]


def _name(arrays: Dict, name: str) -> str:
    return name if name in arrays else f"vit.{name}"


def _has(arrays: Dict, name: str) -> bool:
    return _name(arrays, name) in arrays


def _load_npz(path: Path) -> Dict:
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile's, zlib's and NumPy's own
        raise UserError(f"cannot be read as .npz ({error}); restore it from a copy") from error
