"""Dense ViTs from elsewhere, as our dense tree: run folders, exports, safetensors of timm and Hugging Face, and .npz of
google-research. Nothing here unpickles.

T patches of an image · D width · P patch side · c channels · C classes
"""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from jvitmoe import config as config_lib
from jvitmoe.config import Config, ModelConfig
from jvitmoe.errors import ConfigError, UserError, one_line, printable
from jvitmoe.evaluation import models
from jvitmoe.experts import routes
from jvitmoe.experts.routes import Purpose
from jvitmoe.interop import weight_names
from jvitmoe.interop.weight_names import Dict
from jvitmoe.models import layers, vit
from jvitmoe.runs import files
from jvitmoe.runs.checkpoints import Checkpoints

OURS = "jvitmoe"  # the format of our own exports, and the word that marks their config.json
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
HF_EPSILON, GOOGLE_EPSILON = 1e-12, 1e-6  # of LayerNorm, where no file says
MOST_INFLATION = 20  # of an .npz: weights hardly compress, so more is an attack on memory
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


def read(
    path: Path | str,
    heads: int = 0,
    checkpoint: str = "latest",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Source:
    """Returns the dense ViT in a run folder, an exported folder, a .safetensors or an .npz file.

    Args:
        path: where it lies; a config.json beside a .safetensors is read too.
        heads: H, for files that do not tell it.
        checkpoint: of a run folder: latest, best or a step.
        mean: of pixels, one or one per channel, for files of other libraries; () takes what their config tells, or 0.5.
        std: their deviation, likewise.

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
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"{str(path)!r} is neither .safetensors nor .npz; convert it with safetensors first")
    try:
        return _read_file(path, heads, mean, std)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file may contain anything
        raise UserError(f"{path}: its {CONFIG} or its arrays are not those of a ViT ({one_line(error)})") from error


def start(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Returns (the dense tree that `config.init.source` gives this run, lines that tell what was done).

    Raises ConfigError where the source is another ViT.
    """
    try:
        source = read(config.init.source, config.model.heads, mean=config.init.mean, std=config.init.std)
    except UserError as error:
        raise ConfigError(f"config.init.source cannot be read: {error}") from error
    if (config.init.mean or config.init.std) and source.kind in ("run", OURS):
        raise ConfigError(
            f"config.init.mean is {config.init.mean} and config.init.std is {config.init.std}; they must be () for a "
            f"source of our own, {str(source.path)!r}, which takes pixels from -1 to 1"
        )
    wanted = dataclasses.replace(config.model, lora=0, adapter=0)
    model = vit.build(wanted)
    key = routes.address(jax.random.key(config.train.seed), Purpose.INIT)  # what is re-made, as a new run makes it
    fresh = weight_names.flatten(jax.device_get(jax.jit(lambda: vit.init(model, key))()))
    params, lines = adapt(source, wanted, fresh)
    return weight_names.unflatten(params), [printable(line) for line in lines]


def adapt(source: Source, model: ModelConfig, fresh: Dict) -> tuple[Dict, list[str]]:
    """Returns (the flat dense tree of `model`, lines that tell what was loaded, resized, re-made and skipped).

    `fresh` is a flat dense tree of `model`: it gives what the source cannot. Positions go to another grid as timm takes
    them (cubic, antialiased), kernels of patches to another size by the pseudo-inverse (FlexiViT, arXiv 2212.08013).
    Raises ConfigError where the blocks are of another shape.
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
            f"re-made the head for {model.classes} classes (the source has {source.model.classes or 'none'}): "
            f"{', '.join(sorted(head & fresh.keys()))}"
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
    was, grid = source.model.image_size // source.model.patch, model.image_size // model.patch
    if was != grid:
        old["positions"] = resize_positions(old["positions"], grid)
        changes.append(f"resized positions from {was}x{was} to {grid}x{grid}")
    old["positions"] = np.concatenate([old["positions"], fresh["positions"][grid * grid :]])


def _read_run(path: Path, checkpoint: str) -> Source:
    saved = Checkpoints(path / "checkpoints").read(checkpoint)
    config = config_lib.from_dict(saved.meta["config"])
    params = weight_names.unflatten(saved.params)
    flat = weight_names.flatten(jax.device_get(models.dense_tree(config, params)))
    flat["positions"] = _table(config.model, flat)
    names = files.read_classes(path)
    notes: tuple[str, ...] = ("averaged the experts",) if config.routing.experts > 1 else ()
    notes += ("folded LoRA and adapters into the MLP",) if config.tuned else ()
    return Source(path, "run", flat, config.model.plain(), names, notes, config, config.data.crop, saved.step)


def _table(model: ModelConfig, flat: Dict) -> np.ndarray:
    """Returns the positions [T, D] that the model adds to patches, learned or not."""
    grid = model.image_size // model.patch
    return layers.sincos2d(grid, model.width) if model.positions == "sincos2d" else flat["positions"][: grid * grid]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array in a file, of which only the header is read; `np.asarray` reads its values."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read()


def _open(path: Path) -> dict[str, _Stored]:
    """Returns the arrays of a .safetensors or .npz file. Raises UserError if it cannot be read, and for an .npz that
    expands to much more than weights do."""
    try:
        if path.suffix == ".safetensors":
            file = safetensors.safe_open(path, framework="numpy")
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: _Stored(tuple(part.get_shape()), part.get_dtype(), functools.partial(file.get_tensor, name))
                for name, part in parts.items()
            }
        archive = zipfile.ZipFile(path)
        inflated, packed = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if inflated > MOST_INFLATION * packed:
            raise ValueError(f"{packed:,} bytes expand to {inflated:,}; weights do not compress so well")
        return {entry.filename.removesuffix(".npy"): _npz_array(archive, entry) for entry in archive.infolist()}
    except Exception as error:  # of safetensors, zipfile, zlib and NumPy, and OSError
        raise UserError(f"cannot be read as {path.suffix} ({one_line(error)}); restore it from a copy") from error


def _npz_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Stored:
    def read() -> np.ndarray:
        with archive.open(entry) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
    return _Stored(shape, str(dtype), read)


def _read_file(path: Path, heads: int, mean: Any, std: Any) -> Source:
    """Returns the ViT of a .safetensors or .npz file. `mean` and `std` of pixels replace those of its config."""
    arrays, processor = _open(path), _json(path.with_name(PROCESSOR))
    about = _json(path.with_name(CONFIG)) if path.suffix == ".safetensors" else {}
    if about.get("format") == OURS:
        return _read_ours(path, arrays, about)
    style = weight_names.style_of(arrays)
    if style is None:
        raise UserError("its arrays have no names of timm's, Hugging Face's or google-research's ViTs; use a plain ViT")
    read_config = {weight_names.TIMM: _timm_config, weight_names.HF: _hf_config, weight_names.GOOGLE: _google_config}
    values, names, *pixels = read_config[style](arrays, about, processor)
    values = values._replace(heads=values.heads or heads)
    if not values.heads:
        raise UserError(f"nothing tells its number of heads; put the {CONFIG} that belongs to it beside it")
    model = weight_names.model_of(arrays, style, values)
    flat, left = weight_names.read(arrays, style, model, _shapes(model))
    notes = [f"skipped {', '.join(left)}"] if left else []
    if any(name.startswith("pre_logits") for name in left):
        notes.append("skipped the head: it needs pre_logits, a tanh layer that our ViT does not have")
    if not about and style != weight_names.GOOGLE:
        notes.append(f"took {values.epsilon:g} for LayerNorm's epsilon: no {CONFIG} beside it tells")
    mean, std = (given or found for given, found in zip((mean, std), pixels, strict=True))
    if mean is None or std is None:
        notes.append(
            "took 0.5 for mean or deviation of pixels: no config file has it; set init.mean, init.std to change"
        )
    _fold_pixels(flat, 0.5 if mean is None else mean, 0.5 if std is None else std, notes)
    classes = names if len(names) == model.classes else ()
    return Source(path, style, flat, model, classes, tuple(notes), crop=_crop(about, processor))


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_ours(path: Path, arrays: weight_names.Arrays, about: dict[str, Any]) -> Source:
    model = config_lib.from_dict({"model": about["model"]}).model
    Config(model=dataclasses.replace(model, attention="auto")).validate()  # cuDNN needs another dtype than exports have
    shapes = _shapes(model)
    odd = sorted(arrays.keys() - shapes.keys())
    if odd:
        raise UserError(f"the array {odd[0]!r} has no place in the model of its {CONFIG}; restore both from a copy")
    loaded = weight_names.load(arrays, shapes)
    loaded["positions"] = _table(model, loaded)
    return Source(path, OURS, loaded, model, tuple(about.get("classes", ())), crop=about.get("crop", "pad"))


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's flat dense tree."""
    tree = jax.eval_shape(lambda: vit.init(vit.build(model), jax.random.key(0)))
    return {jax.tree_util.keystr(at, simple=True, separator="."): x.shape for at, x in jax.tree.leaves_with_path(tree)}


# From config files: (values of the architecture, names of classes, mean and deviation of pixels or None).
_Values = tuple[weight_names.ConfigValues, tuple[str, ...], Any, Any]


def _hf_config(arrays: weight_names.Arrays, about: dict[str, Any], processor: dict[str, Any]) -> _Values:
    kind, act = about.get("model_type", "vit"), about.get("hidden_act", "gelu")
    if (kind, act) != ("vit", "gelu"):
        raise UserError(f"its model_type is {kind!r} with hidden_act {act!r}; they must be 'vit' and 'gelu'")
    labels = about.get("id2label", {})
    names = tuple(str(labels[key]) for key in sorted(labels, key=int)) if "classifier.weight" in arrays else ()
    mean, std = processor.get("image_mean"), processor.get("image_std")
    mean, std = (mean, std) if processor.get("do_normalize", True) else (0.0, 1.0)
    heads, epsilon = int(about.get("num_attention_heads", 0)), float(about.get("layer_norm_eps", HF_EPSILON))
    values = weight_names.ConfigValues(heads, epsilon, weight_names.image_size(about.get("image_size")), True)
    return values, names, mean, std


def _timm_config(arrays: weight_names.Arrays, about: dict[str, Any], processor: dict[str, Any]) -> _Values:
    has_cls = weight_names.CLS[weight_names.TIMM] in arrays
    if has_cls == ("fc_norm.weight" in arrays):
        raise UserError(
            "it pools otherwise than our ViT: by CLS after `norm`, or without CLS by the mean and `fc_norm`"
        )
    cfg = about.get("pretrained_cfg") or {}
    names = tuple(map(str, about.get("label_names") or cfg.get("label_names") or ()))
    return weight_names.read_timm_config(about, has_cls), names, cfg.get("mean"), cfg.get("std")


def _google_config(arrays: weight_names.Arrays, about: dict[str, Any], processor: dict[str, Any]) -> _Values:
    if weight_names.CLS[weight_names.GOOGLE] not in arrays:
        raise UserError("its arrays are those of a google-research ViT without a CLS token; use another source")
    heads = next((array.shape[1] for name, array in arrays.items() if name.endswith("/query/kernel")), 1)
    return weight_names.ConfigValues(heads, GOOGLE_EPSILON, None, True), (), 0.5, 0.5


def _crop(about: dict[str, Any], processor: dict[str, Any]) -> str:
    """Returns the `data.crop` whose test pictures timm's config, or Hugging Face's processor beside it, describes."""
    pixels = processor or about.get("pretrained_cfg") or {}
    timm = pixels.get("interpolation") == "bilinear" and pixels.get("crop_pct") == 7 / 8
    return "resized" if timm or (pixels.get("resample") == 2 and pixels.get("do_center_crop")) else "pad"


def _fold_pixels(flat: Dict, mean: Any, std: Any, notes: list[str]) -> None:
    """Makes patches of pixels in [-1, 1] give what those of (pixels in [0, 1] - mean) / std gave; exact, for a patch
    sees no padding."""
    kernel_PPcD = flat["patches.kernel"]
    channels = kernel_PPcD.shape[2]
    try:
        mean_c, std_c = (np.broadcast_to(np.asarray(value, np.float32), (channels,)) for value in (mean, std))
    except (ValueError, TypeError):
        mean_c = std_c = np.full(channels, np.nan)
    if not (np.isfinite(mean_c).all() and np.isfinite(std_c).all() and np.all(std_c > 0)):
        raise UserError(
            f"its pixels have mean {mean!r} and deviation {std!r}; they must be finite, one number or one for "
            f"each of {channels} channels, and deviations above 0: set init.mean and init.std"
        )
    if np.any(mean_c != 0.5) or np.any(std_c != 0.5):
        offset_c = (0.5 - mean_c) / std_c
        flat["patches.bias"] = flat["patches.bias"] + np.einsum("pqcd,c->d", kernel_PPcD, offset_c)
        flat["patches.kernel"] = kernel_PPcD / (2 * std_c)[None, None, :, None]
        notes.append("folded its mean and deviation of pixels into the kernel of patches: ours take [-1, 1]")
