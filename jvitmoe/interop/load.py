"""Reads dense ViTs as our dense tree: run folders, exports, safetensors of timm and Hugging Face, and .npz of
google-research. Nothing here unpickles.

T patches of an image · D width · J side of a patch · c colour channels
"""

import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from jvitmoe import config as config_lib
from jvitmoe.config import Config, DataConfig, ModelConfig
from jvitmoe.errors import ConfigError, UserError, one_line, printable
from jvitmoe.experts import build, routes
from jvitmoe.experts.routes import Purpose
from jvitmoe.interop import config_files, hub, weight_names
from jvitmoe.interop.weight_names import Dict
from jvitmoe.models import layers, vit
from jvitmoe.runs import files
from jvitmoe.runs.checkpoints import Checkpoints
from jvitmoe.runs.console import warnings_as_lines

OURS = "jvitmoe"  # the format of our own exports, named in their config.json
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
MOST_INFLATION = 20  # of an .npz: weights hardly compress, so a larger factor is an attack on memory
MUST_MATCH = ("width", "hidden", "depth", "heads", "norm", "pool", "stem", "registers", "qk_norm")
Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation, each one number or one per channel


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A dense ViT that was read.

    `params` is flat ("blocks.mlp.up") and always has "positions" [T, D] of the patches; `notes` lists what was changed
    to fit our ViT.
    """

    path: Path
    kind: str  # run | jvitmoe | timm | hf | google
    params: Dict
    model: ModelConfig
    classes: tuple[str, ...] = ()  # names
    notes: tuple[str, ...] = ()
    config: Config | None = None  # of a run
    crop: str = "pad"  # how pictures in files are cut for it, as `data.crop`
    mean: tuple[float, ...] = (0.5,)  # of its pixels, as `data.mean`
    std: tuple[float, ...] = (0.5,)  # of its pixels, as `data.std`
    step: int = 0  # of a run's checkpoint
    ema: bool = False  # True if the parameters are a run's EMA


def read(
    path: Path | str,
    heads: int = 0,
    checkpoint: str = "latest",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    ema: bool = False,
) -> Source:
    """Returns the dense ViT in a run folder, an exported folder, a .safetensors or an .npz file.

    Args:
        path: folder or file, or a name on the hub (`hub.fetch`); the config.json beside a .safetensors is read too.
        heads: number of attention heads, for files that do not have it.
        checkpoint: of a run folder: latest, best or a step.
        mean: of pixels, one or one per channel, for files of other libraries; () is that of their config, or 0.5.
        std: their standard deviation, likewise.
        ema: of a run folder that has one, the EMA of the weights, not the last weights.

    Raises UserError (one line with the path) if the path is missing or damaged, or its ViT differs from ours.
    """
    if hub.is_name(path):
        folder = hub.fetch(str(path))
        source = read(folder, heads, checkpoint, mean, std, ema)
        return dataclasses.replace(source, notes=(f"{path} is commit {folder.name}", *source.notes))
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path / files.CHECKPOINTS):  # unlike Path's, these raise for no name
        return _read_run(path, checkpoint, ema)
    if ema:
        raise UserError(f"{str(path)!r} is not a run folder, so it has no EMA; leave --ema out")
    if os.path.isdir(path):
        path = path / WEIGHTS
    if not os.path.isfile(path):
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
    """Returns (the dense tree that a run starts from, read from `config.init.source`; lines that say what was changed).

    Raises ConfigError if the source cannot be read or has other blocks.
    """
    try:
        with warnings_as_lines():
            source = read(config.init.source, config.model.heads, mean=config.init.mean, std=config.init.std)
    except UserError as error:
        raise ConfigError(f"config.init.source cannot be read: {error}") from error
    if (config.init.mean or config.init.std) and source.kind in ("run", OURS):
        raise ConfigError(
            f"config.init.mean is {config.init.mean} and config.init.std is {config.init.std}; they must be () for a "
            f"source of our own, {str(source.path)!r}, whose config has them"
        )
    wanted = dataclasses.replace(config.model, lora=0, adapter=0)
    model = vit.build(wanted)
    key = routes.address(jax.random.key(config.train.seed), Purpose.INIT)
    fresh = weight_names.flatten(jax.device_get(jax.jit(lambda: vit.init(model, key))()))
    params, lines = adapt(source, wanted, fresh, config.data)
    return weight_names.unflatten(params), [printable(line) for line in lines]


def adapt(source: Source, model: ModelConfig, fresh: Dict, data: DataConfig) -> tuple[Dict, list[str]]:
    """Returns (the flat dense tree of `model`, lines that say what was loaded, resized, re-made and skipped).

    `fresh` is the flat dense tree of a new model, used for what the source does not have. Positions are resized to
    another grid as in timm (cubic, antialiased), kernels of patches by the pseudo-inverse (`resize_patches`). If
    `data.mean` and `data.std` differ from the source's, the difference is folded into the patches.
    Raises ConfigError if the blocks have other shapes.
    """
    _check_blocks(source, model)
    old, changes = dict(source.params), list(source.notes)
    pixels, wanted = (source.mean, source.std), (data.mean, data.std)
    if model.stem == "patch":
        # Before patches are resized, and before channels are joined: theirs then have one mean.
        common = wanted if source.model.channels == model.channels else (DataConfig().mean, DataConfig().std)
        _fold_pixels(old, pixels, common)
        _fit_patches(old, source.model, model, changes)
        _fold_pixels(old, common, wanted)
        if not _same_pixels(pixels, wanted):
            changes.append("folded its mean and deviation of pixels into the patches: data.mean and data.std differ")
    elif not _same_pixels(pixels, wanted):
        raise ConfigError(
            f"config.data.mean is {data.mean} and config.data.std is {data.std}; for model.stem={model.stem}, which "
            f"pads with zeros, they must be the source's, {source.mean} and {source.std}"
        )
    _fit_positions(old, source.model, model, fresh, changes)
    _fit_cls(old, model, changes)
    _fit_head(old, source.model, model, fresh, changes)
    if source.model.norm_epsilon != model.norm_epsilon:
        changes.append(
            f"kept model.norm_epsilon={model.norm_epsilon:g}, where the source has {source.model.norm_epsilon:g}"
        )
    loaded = {name: leaf.astype(np.float32) for name, leaf in old.items()}
    count, total = (sum(leaf.size for leaf in tree.values()) for tree in (loaded, fresh))
    lines = [f"{source.path} ({source.kind}): {count:,} of {total:,} parameters loaded", *changes]
    return {**fresh, **loaded}, lines


def _check_blocks(source: Source, model: ModelConfig) -> None:
    """Raises ConfigError, with the flags to change, if the blocks of the source do not fit the model."""
    names = MUST_MATCH + (("patch", "channels") if model.stem != "patch" else ())
    differ = [name for name in names if getattr(source.model, name) != getattr(model, name)]
    differ += ["layer_scale"] if bool(source.model.layer_scale) != bool(model.layer_scale) else []
    if differ:
        flags = " ".join(f"--config.model.{name}={getattr(source.model, name)}" for name in differ)
        raise ConfigError(
            f"config.init.source is {str(source.path)!r}, a ViT whose {', '.join(f'model.{n}' for n in differ)} "
            f"differ from this run's; set {flags}"
        )


def resize_positions(table_TD: np.ndarray, grid: int) -> np.ndarray:
    """Returns positions [grid * grid, D] from those of another square grid: cubic, antialiased."""
    side, width = round(len(table_TD) ** 0.5), table_TD.shape[1]
    if side == grid:
        return table_TD
    square = table_TD.reshape(side, side, width).astype(np.float32)
    resized = jax.image.resize(square, (grid, grid, width), "cubic", antialias=True)
    return np.asarray(resized).reshape(grid * grid, width)


def resize_patches(kernel_JJcD: np.ndarray, patch: int) -> np.ndarray:
    """Returns kernels for patches of another side, [patch, patch, c, D]. On enlarged images they compute what the given
    kernels compute on the images before enlarging (FlexiViT, arXiv 2212.08013, eq. 4)."""
    side, _, channels, width = kernel_JJcD.shape
    if side == patch:
        return kernel_JJcD
    basis = np.eye(side * side, dtype=np.float32).reshape(side, side, -1)
    resize = np.asarray(jax.image.resize(basis, (patch, patch, side * side), "cubic", antialias=True))
    inverse = np.linalg.pinv(resize.reshape(patch * patch, side * side).T)
    resized = inverse.astype(np.float32).reshape(patch * patch, side * side) @ kernel_JJcD.reshape(side * side, -1)
    return resized.reshape(patch, patch, channels, width)


def _fit_patches(params: Dict, old: ModelConfig, new: ModelConfig, changes: list[str]) -> None:
    kernel = params["patches.kernel"]
    if old.patch != new.patch:
        kernel = resize_patches(kernel, new.patch)
        changes.append(f"resized the kernel of patches from {old.patch} to {new.patch} pixels")
    if old.channels != new.channels:  # exact for grey images, whose channels are equal
        kernel = np.repeat(kernel.sum(2, keepdims=True) / new.channels, new.channels, axis=2)
        changes.append(f"shared the kernel of {old.channels} channels out over {new.channels}")
    params["patches.kernel"] = kernel


def _fit_positions(params: Dict, old: ModelConfig, new: ModelConfig, fresh: Dict, changes: list[str]) -> None:
    if new.positions != "learned":
        changes.append("skipped the positions, which model.positions=sincos2d computes")
        del params["positions"]
        return
    old_grid, grid = old.image_size // old.patch, new.image_size // new.patch
    if old_grid != grid:
        params["positions"] = resize_positions(params["positions"], grid)
        changes.append(f"resized positions from {old_grid}x{old_grid} to {grid}x{grid}")
    params["positions"] = np.concatenate([params["positions"], fresh["positions"][grid * grid :]])


def _fit_cls(params: Dict, new: ModelConfig, changes: list[str]) -> None:
    position = params.pop("cls_position", None)
    if "cls" in params and new.cls_position:
        params["cls_position"] = np.zeros_like(params["cls"]) if position is None else position
    elif position is not None:
        params["cls"] = params["cls"] + position
        changes.append("folded the position of CLS into CLS")


def _fit_head(params: Dict, old: ModelConfig, new: ModelConfig, fresh: Dict, changes: list[str]) -> None:
    """Removes a head that does not fit; `adapt` then takes the fresh one."""
    head = {name for name in {*params, *fresh} if name.startswith("head.")}
    if all(name in params and name in fresh and params[name].shape == fresh[name].shape for name in head):
        return
    for name in head & params.keys():
        del params[name]
    changes.append(
        f"re-made the head for {new.classes} classes (the source has {old.classes or 'none'}): "
        f"{', '.join(sorted(head & fresh.keys()))}"
    )


def _read_run(path: Path, checkpoint: str, ema: bool) -> Source:
    # Each process reads it on its own: one that cannot raises an error, and must not leave others waiting.
    saved = Checkpoints(path / files.CHECKPOINTS, shared=False).read(checkpoint)
    config = config_lib.from_dict(saved.meta["config"])
    if not ema:
        flat = weight_names.flatten(jax.device_get(build.dense_tree(config, weight_names.unflatten(saved.params))))
    elif saved.ema is None:
        raise UserError(f"{path} has no EMA; leave --ema out, or train with --config.train.ema=0.999")
    else:
        flat = dict(saved.ema)
    flat["positions"] = _table(config.model, flat)
    notes: tuple[str, ...] = ("averaged the experts",) if config.routing.experts > 1 else ()
    notes += ("folded LoRA and adapters into the MLP",) if config.tuned else ()
    model, classes = config.model.plain(), files.read_classes(path)
    data = config.data
    return Source(path, "run", flat, model, classes, notes, config, data.crop, data.mean, data.std, saved.step, ema)


def _table(model: ModelConfig, flat: Dict) -> np.ndarray:
    """Returns the positions [T, D] that the model adds to patches, learned or computed."""
    grid = model.image_size // model.patch
    return layers.sincos2d(grid, model.width) if model.positions == "sincos2d" else flat["positions"][: grid * grid]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array in a file, of which only the header was read; `np.asarray` reads its values."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read()


def _open(path: Path) -> dict[str, _Stored]:
    """Returns the arrays of a .safetensors or .npz file. Raises UserError if it cannot be read, and for an .npz that
    expands too much."""
    try:
        if path.suffix == ".safetensors":
            file = safetensors.safe_open(path, framework="numpy")
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: _Stored(tuple(header.get_shape()), header.get_dtype(), functools.partial(file.get_tensor, name))
                for name, header in headers.items()
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
    values = config_files.READERS[style](arrays, about, processor)
    values = values._replace(heads=values.heads or heads, mean=mean or values.mean, std=std or values.std)
    if not values.heads:
        raise UserError(f"nothing tells its number of heads; put the {CONFIG} that belongs to it beside it")
    model = weight_names.model_of(arrays, style, values)
    flat, unused = weight_names.read(arrays, style, model, _shapes(model))
    notes = [f"skipped {', '.join(unused)}"] if unused else []
    if any(name.startswith("pre_logits") for name in unused):
        notes.append("skipped the head: it needs pre_logits, a tanh layer that our ViT does not have")
    if not about and style != weight_names.GOOGLE:
        notes.append(f"took {values.epsilon:g} for LayerNorm's epsilon: no {CONFIG} beside it tells")
    if values.mean is None or values.std is None:
        notes.append(
            "took 0.5 for mean or deviation of pixels: no config file has it; set init.mean, init.std to change"
        )
    mean, std = _checked_pixels(values, model.channels)
    classes, crop = (
        values.classes if len(values.classes) == model.classes else (),
        config_files.crop_of(about, processor),
    )
    return Source(path, style, flat, model, classes, tuple(notes), crop=crop, mean=mean, std=std)


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
    mean, std = (tuple(about.get(name, (0.5,))) for name in ("mean", "std"))  # older versions wrote none
    classes, crop = tuple(about.get("classes", ())), about.get("crop", "pad")
    return Source(path, OURS, loaded, model, classes, crop=crop, mean=mean, std=std)


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's flat dense tree."""
    leaves = jax.tree.leaves_with_path(vit.shapes(vit.build(model)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def _checked_pixels(values: weight_names.ConfigValues, channels: int) -> Pixels:
    """Returns (mean, std) of the config values, 0.5 where they have none. Raises UserError for impossible ones."""
    mean, std = (0.5 if value is None else value for value in (values.mean, values.std))
    try:
        mean_c, std_c = (np.atleast_1d(np.asarray(value, float)) for value in (mean, std))
    except (ValueError, TypeError):
        mean_c = std_c = np.full(1, np.nan)
    fits = mean_c.shape in ((1,), (channels,)) and std_c.shape in ((1,), (channels,))
    if not (fits and np.isfinite(mean_c).all() and np.isfinite(std_c).all() and np.all(std_c > 0)):
        raise UserError(
            f"its pixels have mean {mean!r} and deviation {std!r}; they must be finite, one number or one for "
            f"each of {channels} channels, and deviations above 0: set init.mean and init.std"
        )
    return tuple(mean_c.tolist()), tuple(std_c.tolist())


def _fold_pixels(flat: Dict, old: Pixels, new: Pixels) -> None:
    """Changes the patches from pixels of one mean and deviation to those of another; exact, because patches see no
    padding. Equal ones change no bit."""
    if _same_pixels(old, new):
        return
    kernel_JJcD = flat["patches.kernel"]
    channels = (kernel_JJcD.shape[2],)
    old_mean_c, old_std_c, new_mean_c, new_std_c = (
        np.broadcast_to(np.asarray(values, np.float32), channels) for values in (*old, *new)
    )
    offset_c = (new_mean_c - old_mean_c) / old_std_c
    flat["patches.bias"] = flat["patches.bias"] + np.einsum("pqcd,c->d", kernel_JJcD, offset_c)
    flat["patches.kernel"] = kernel_JJcD * (new_std_c / old_std_c)[None, None, :, None]


def _same_pixels(one: Pixels, other: Pixels) -> bool:
    """True if means and deviations are equal; one number stands for all channels."""
    return all(a == b or (len({*a, *b}) == 1) for a, b in zip(one, other, strict=True))
