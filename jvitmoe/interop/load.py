"""Reads dense ViTs as our dense tree: run folders, exports, safetensors of timm and Hugging Face (or from its hub).
Nothing here unpickles.

T patches of an image · D width
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.config import Config, ModelConfig
from jvitmoe.errors import UserError, one_line
from jvitmoe.experts import merge
from jvitmoe.experts.params import from_dict
from jvitmoe.interop import config_files, download, manifest, weight_names
from jvitmoe.interop.weight_names import Dict
from jvitmoe.machine import devices
from jvitmoe.models import layers, vit
from jvitmoe.runs import safe_io
from jvitmoe.runs.checkpoints import Checkpoints

SHIPPED = Path(__file__).parents[1] / "weights"  # exported models that come with the package, by name
OURS = "jvitmoe"  # the format of our own exports, named in their config.json
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
ANSWER_SECONDS = 30.0  # longest wait for the hub to answer at all
MADE_OF = (("model", str), ("hash", str), ("weight", float))  # what a mean says of each of its models
MOST_PIXEL = 1e6  # of mean and deviation of another library's pixels, from 0 to 1
Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation, each one number or one per channel


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A dense ViT that was read.

    `params` is flat ("blocks.mlp.up") and always has "positions" [T, D] of the patches; `notes` lists what was changed
    to fit our ViT.
    """

    path: Path
    kind: str  # run | jvitmoe | timm | hf
    params: Dict
    model: ModelConfig
    classes: tuple[str, ...] = ()  # names
    notes: tuple[str, ...] = ()
    config: Config | None = None  # of a run; of a start, those of its runs
    crop: str = "exact"  # how pictures in files are cut for it, as `data.crop`
    mean: tuple[float, ...] = (0.5,)  # of its pixels, as `data.mean`
    std: tuple[float, ...] = (0.5,)  # of its pixels, as `data.std`
    step: int = 0  # of a run's checkpoint
    ema: bool = False  # True if the parameters are a run's EMA
    start: str = ""  # hash of the start that it was trained from (`starts.digest`)
    images: int = 0  # that training showed it, each time counted; 0: not known
    averaged: dict[str, Any] | None = None  # of which models it is the mean, and what is known of it


def read(path: Path | str, heads: int = 0, checkpoint: str | int = "latest", ema: bool = False) -> Source:
    """Returns the dense ViT in a run folder, an exported folder or a .safetensors file.

    Args:
        path: folder or file, a name on the hub (`fetch`), or that of a model that comes with jvitmoe, such as
            "cifar10_cct"; the config.json beside a .safetensors is read too.
        heads: number of attention heads, for files that do not have it.
        checkpoint: of a run folder: "latest", "best" (on validation) or a step.
        ema: of a run folder that has one, the EMA of the weights, not the last weights.

    Raises UserError (one line with the path) if the path is missing or damaged, or its ViT differs from ours.
    """
    devices.start()
    if is_on_hub(path):
        folder = fetch(str(path))
        source = read(folder, heads, checkpoint, ema)
        return dataclasses.replace(source, notes=(f"{path} is commit {folder.name}", *source.notes))
    given, path = str(path), Path(os.path.expanduser(path))
    if str(path) in shipped() and not os.path.lexists(path):
        path = SHIPPED / path
    if os.path.isdir(path / safe_io.CHECKPOINTS):  # unlike Path's, these raise for no name
        return _read_run(path, checkpoint, ema)
    if os.path.isdir(path):
        path = path / WEIGHTS
    if not os.path.isfile(path):
        known = f"a .safetensors file, or a model that comes with jvitmoe ({', '.join(shipped())})"
        where = given if "://" in given else str(path)
        raise UserError(f"{where!r} is not a file; give a run folder, a folder with {WEIGHTS}, {known}")
    if path.suffix != ".safetensors":
        raise UserError(f"{str(path)!r} is no .safetensors; convert it with safetensors first")
    if ema or checkpoint != "latest":
        raise UserError(f"{str(path)!r} is no run folder, so it holds one model; leave --checkpoint and --ema out")
    try:
        return _read_file(path, heads)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file may contain anything
        raise UserError(f"{path}: its {CONFIG} or its arrays are not those of a ViT ({one_line(error)})") from error


def shipped() -> list[str]:
    """Returns the names of the models that come with jvitmoe."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{WEIGHTS}"))


def is_on_hub(source: Path | str) -> bool:
    """True for a name on the hub, hf://OWNER/NAME[@REVISION] or timm://NAME for a model of timm; False for a path."""
    return str(source).startswith(("hf://", "timm://"))


def repository_of(name: str) -> tuple[str, str]:
    """Returns (OWNER/NAME on the hub, revision or "") of a name on the hub."""
    scheme, _, rest = name.partition("://")
    repository, _, revision = rest.partition("@")
    return f"timm/{repository}" if scheme == "timm" else repository, revision


def fetch(name: str) -> Path:
    """Returns the folder in the hub's cache that holds the files of a model, downloaded once; its name is the commit.
    Only safetensors, their JSON files and checksums are fetched. Raises UserError."""
    repository, revision = repository_of(name)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{name!r} is not a name on the hub; write hf://OWNER/NAME@REVISION or timm://NAME")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(f"{name!r} needs huggingface_hub; install it with pip install 'jvitmoe[hf]'") from error

    revision, wanted = revision or "main", [WEIGHTS, CONFIG, PROCESSOR, manifest.NAME]
    try:
        folder = download.run(repository, revision, wanted, ANSWER_SECONDS)
    except OSError as error:
        try:  # as it was fetched before
            folder = Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
        except Exception:  # of the hub's client
            raise UserError(f"{name!r} cannot be fetched ({error}); give a folder that you have") from error
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{name!r} holds no {WEIGHTS}; only safetensors are read")
    return folder


def _read_run(path: Path, checkpoint: str | int, ema: bool) -> Source:
    # Each process reads it on its own: one that cannot raises an error, and must not leave others waiting.
    saved = Checkpoints(path / safe_io.CHECKPOINTS).read(checkpoint)
    config = config_lib.from_dict(saved.meta["config"])
    if ema and saved.ema is None:
        raise UserError(f"{path} has no EMA; leave --ema out, or train with --config.train.ema=0.999")
    flat = weight_names.flatten(saved.ema if ema else jax.device_get(merge.dense_tree(from_dict(saved.params))))
    flat["positions"] = positions(config.model, flat)
    notes: tuple[str, ...] = ("averaged the experts",) if config.routing.experts > 1 else ()
    notes += ("folded LoRA and adapters into the MLP",) if config.trains_adapters_only else ()
    model, classes, data = config.model.plain(), safe_io.read_classes(path), config.data
    pixels, images = (data.crop, data.mean, data.std), saved.step * config.train.batch_size
    start = config.init.start
    return Source(path, "run", flat, model, classes, notes, config, *pixels, saved.step, ema, start, images)


def positions(model: ModelConfig, flat: Dict) -> np.ndarray:
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
    """Returns the arrays of a .safetensors file. Raises UserError if it cannot be read."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
        arrays = {}
        for name in file.keys():  # noqa: SIM118
            header, read = file.get_slice(name), functools.partial(file.get_tensor, name)
            arrays[name] = _Stored(tuple(header.get_shape()), header.get_dtype(), read)
        return arrays
    except Exception as error:  # of safetensors, and OSError
        raise UserError(f"cannot be read as {path.suffix} ({one_line(error)}); restore it from a copy") from error


def _read_file(path: Path, heads: int) -> Source:
    """Returns the ViT of a .safetensors file."""
    is_listed = manifest.check(path, (CONFIG, PROCESSOR))
    arrays, about, processor = _open(path), read_json(path.with_name(CONFIG)), read_json(path.with_name(PROCESSOR))
    if about.get("format") == OURS:
        unlisted = f"no {manifest.NAME} beside it lists it, so it is not checked"
        return _read_ours(path, arrays, about, () if is_listed else (unlisted,))
    style = weight_names.style_of(arrays)
    if style is None:
        raise UserError("its arrays have no names of timm's or Hugging Face's ViTs; use a plain ViT")
    values = config_files.READERS[style](arrays, about, processor)
    values = values._replace(heads=values.heads or heads)
    if not values.heads:
        raise UserError(f"nothing tells its number of heads; put the {CONFIG} that belongs to it beside it")
    model = weight_names.model_of(arrays, style, values)
    flat, unused = weight_names.read(arrays, style, model, _shapes(model))
    notes = [f"skipped {', '.join(unused)}"] if unused else []
    if any(name.startswith("pre_logits") for name in unused):
        notes.append("skipped the head: it needs pre_logits, a tanh layer that our ViT does not have")
    if not about:
        notes.append(f"took {values.epsilon:g} for LayerNorm's epsilon: no {CONFIG} beside it tells")
    if values.mean is None or values.std is None:
        notes.append(f"took 0.5 for mean or deviation of pixels: no {CONFIG} or {PROCESSOR} beside it has them")
    mean, std = _checked_pixels(values, model.channels)
    classes = values.classes if len(values.classes) == model.classes else ()
    if values.classes and not classes:
        notes.append(f"left out its {len(values.classes)} names of classes: it has {model.classes} classes")
    crop, differs = config_files.crop_of(about, processor, model.image_size)
    notes += [differs] if differs else []
    return Source(path, style, flat, model, classes, tuple(notes), crop=crop, mean=mean, std=std)


def read_json(path: Path) -> Any:
    content = safe_io.read_bytes(path, follow=True)  # the hub's cache holds links
    return {} if content is None else json.loads(content)


def _read_ours(path: Path, arrays: weight_names.Arrays, about: dict[str, Any], notes: tuple[str, ...]) -> Source:
    data: Any = {name: about[name] for name in ("crop", "mean", "std") if name in about}  # older versions wrote none
    model = about["model"] | {"init": "independent"}  # an export has a position per patch, however its run started
    config = rules.check(config_lib.from_dict({"model": model, "data": data | {"stream": True}}))
    model, data, classes = config.model, config.data, about.get("classes", [])
    are_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not are_names or len(classes) not in (0, model.classes):
        raise UserError(f"its {CONFIG} has the classes {classes!r}; they must be {model.classes} names")
    shapes = _shapes(model)
    if odd := sorted(arrays.keys() - shapes.keys()):
        raise UserError(f"the array {odd[0]!r} has no place in the model of its {CONFIG}; restore both from a copy")
    loaded = weight_names.load(arrays, shapes)
    loaded["positions"] = positions(model, loaded)
    start, images, averaged = about.get("start", ""), about.get("images", 0), about.get("averaged")
    if averaged is not None:
        made_of = [{name: kind(one[name]) for name, kind in MADE_OF} for one in averaged["of"]]
        averaged = {"of": made_of, "verdict": str(averaged["verdict"])}
    if not isinstance(start, str) or type(images) is not int or not 0 <= images < 2**63:
        raise UserError(f"its {CONFIG} has no valid start or number of images; restore it from a copy")
    settings = config_lib.from_dict(about["settings"]) if "settings" in about else None
    if settings:  # with the start as their source, which LoRA and adapters must have
        rules.check(dataclasses.replace(settings, init=dataclasses.replace(settings.init, source=str(path))))
    pixels = data.crop, data.mean, data.std
    return Source(
        path, OURS, loaded, model, tuple(classes), notes, settings, *pixels, 0, False, start, images, averaged
    )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's flat dense tree."""
    leaves = jax.tree.leaves_with_path(vit.shapes(vit.build(model)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def _checked_pixels(values: weight_names.ConfigValues, channels: int) -> Pixels:
    """Returns (mean, std) of pixels from 0 to 1, 0.5 where the config values have none. Raises UserError for impossible
    ones."""
    mean, std = (0.5 if value is None else value for value in (values.mean, values.std))
    if not 0 < values.scale < np.inf:
        raise UserError(f"its rescale_factor is {values.scale / 255!r}; it must be above 0: correct its {PROCESSOR}")
    try:
        mean_c, std_c = (np.atleast_1d(np.asarray(value, float)) / values.scale for value in (mean, std))
    except (ValueError, TypeError):
        mean_c = std_c = np.full(1, np.nan)
    fits = mean_c.shape in ((1,), (channels,)) and std_c.shape in ((1,), (channels,))
    if not (fits and np.all(abs(mean_c) <= MOST_PIXEL) and np.all((std_c >= 1 / MOST_PIXEL) & (std_c <= MOST_PIXEL))):
        rule = f"one number or one for each of {channels} channels, deviations above 0: correct its {CONFIG}"
        raise UserError(f"its pixels have mean {mean!r} and deviation {std!r}; they must be {rule} or {PROCESSOR}")
    return tuple(mean_c.tolist()), tuple(std_c.tolist())
