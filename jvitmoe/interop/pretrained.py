"""Starts a run from a trained ViT: fits the weights that `load` read to the run's model.

T patches of an image · D width · J side of a patch · c colour channels
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jvitmoe import rules
from jvitmoe.config import NEUTRAL, Config, DataConfig, ModelConfig
from jvitmoe.errors import ConfigError, UserError, printable
from jvitmoe.interop import weight_names
from jvitmoe.interop.load import Pixels, Source, read
from jvitmoe.interop.weight_names import Dict
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.models import vit
from jvitmoe.runs.console import warnings_as_lines

# Fields of the model that may differ from the source's: `adapt` fits what they change. All others must be equal.
FITTED = NEUTRAL | {"image_size", "channels", "classes", "patch", "positions", "cls_position", "head_hidden"}
FITTED |= {"norm_epsilon", "layer_scale"}


# Fields of the model that do not come from its source: how it is trained, and its head.
NOT_TAKEN = NEUTRAL | {"classes", "head_hidden", "expert_hidden", "shared_hidden"}


def complete(config: Config, saved: Config | None = None) -> None:
    """Fills in a model of `model.width=0`: each of its settings, and mean and deviation of pixels, that is at its
    default gets the value of `init.source`, or of the run that goes on, `saved`. Raises ConfigError."""
    if config.model.width:
        return
    is_set = {*config.model.set_beyond(())}
    source: Config | Source = saved or _read(config, config.model.heads if "heads" in is_set else 0)
    taken = {field.name for field in dataclasses.fields(ModelConfig)} - NOT_TAKEN
    for name in taken - is_set | {"width"}:
        setattr(config.model, name, getattr(source.model, name))
    pixels = source.data if isinstance(source, Config) else source
    for name in ("mean", "std"):
        if getattr(config.data, name) == getattr(DataConfig(), name):
            setattr(config.data, name, getattr(pixels, name))
    rules.check(config)


def _read(config: Config, heads: int) -> Source:
    try:
        with warnings_as_lines():
            return read(config.init.source, heads)
    except UserError as error:
        raise ConfigError(f"config.init.source cannot be read: {error}") from error


def start(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Returns (the dense tree that a run starts from, read from `config.init.source`; lines that say what was changed).

    Raises ConfigError if the source cannot be read or has other blocks.
    """
    source = _read(config, config.model.heads)
    wanted = dataclasses.replace(config.model, lora=0, adapter=0)
    params, lines = adapt(source, wanted, fresh(config), config.data)
    return weight_names.unflatten(params), [printable(line) for line in lines]


def fresh(config: Config) -> Dict:
    """Returns the flat dense tree of a new model of these settings."""
    model = vit.build(dataclasses.replace(config.model, lora=0, adapter=0))
    key = address(jax.random.key(config.train.seed), Purpose.INIT)
    return weight_names.flatten(jax.device_get(jax.jit(lambda: vit.init(model, key))()))


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
        rule = f"for model.stem={model.stem}, which pads with zeros, they must be the source's, {pixels}"
        raise ConfigError(f"config.data.mean and config.data.std are {wanted}; {rule}")
    _fit_positions(old, source.model, model, fresh, changes)
    _fit_cls(old, model, changes)
    _fit_head(old, source.model, model, fresh, changes)
    if (theirs := source.model.norm_epsilon) != model.norm_epsilon:
        changes.append(f"kept model.norm_epsilon={model.norm_epsilon:g}, where the source has {theirs:g}")
    loaded = {name: leaf.astype(np.float32) for name, leaf in old.items()}
    count, total = (sum(leaf.size for leaf in tree.values()) for tree in (loaded, fresh))
    lines = [f"{source.path} ({source.kind}): {count:,} of {total:,} parameters loaded", *changes]
    return {**fresh, **loaded}, lines


def _check_blocks(source: Source, model: ModelConfig) -> None:
    """Raises ConfigError, with the flags to change, if the blocks of the source do not fit the model."""
    fitted = FITTED - ({"patch", "channels"} if model.stem != "patch" else set())
    names = [field.name for field in dataclasses.fields(model) if field.name not in fitted]
    differ = [name for name in names if getattr(source.model, name) != getattr(model, name)]
    differ += ["layer_scale"] if bool(source.model.layer_scale) != bool(model.layer_scale) else []
    if differ:
        flags = " ".join(f"--config.model.{name}={getattr(source.model, name)}" for name in differ)
        raise ConfigError(f"config.init.source is {str(source.path)!r}, a ViT of other blocks; set {flags}")


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
    made = ", ".join(sorted(head & fresh.keys()))
    changes.append(f"re-made the head for {new.classes} classes (the source has {old.classes or 'none'}): {made}")


def _fold_pixels(flat: Dict, old: Pixels, new: Pixels) -> None:
    """Changes the patches from pixels of one mean and deviation to those of another; exact, because patches see no
    padding. Equal ones change no bit."""
    if _same_pixels(old, new):
        return
    kernel_JJcD = flat["patches.kernel"]
    ones_c = np.ones(kernel_JJcD.shape[2:3], np.float32)
    old_mean_c, old_std_c, new_mean_c, new_std_c = (ones_c * np.asarray(values, np.float32) for values in (*old, *new))
    offset_c = (new_mean_c - old_mean_c) / old_std_c
    flat["patches.bias"] = flat["patches.bias"] + np.einsum("pqcd,c->d", kernel_JJcD, offset_c)
    flat["patches.kernel"] = kernel_JJcD * (new_std_c / old_std_c)[None, None, :, None]


def _same_pixels(one: Pixels, other: Pixels) -> bool:
    """True if means and deviations are equal; one number stands for all channels."""
    return all(a == b or (len({*a, *b}) == 1) for a, b in zip(one, other, strict=True))
