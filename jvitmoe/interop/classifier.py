"""A trained ViT as an object that classifies: `jvitmoe.load("runs/X")(["cat.png"])`.

N images · H, W rows and columns · c colour channels · C classes
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jvitmoe.config import ModelConfig
from jvitmoe.data import augment
from jvitmoe.data import pictures as images_lib
from jvitmoe.errors import UserError, first_few
from jvitmoe.interop import load as load_lib
from jvitmoe.interop import weight_names
from jvitmoe.machine import compilation
from jvitmoe.models import vit

BATCH = 64  # images per call


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A class of an input, and its probability."""

    label: int
    name: str  # of the class; its number if the names are unknown
    probability: float


class Classifier:
    """A dense ViT. Inputs are arrays, uint8 [N, H, W, c] or [H, W, c] of the model's size, or pictures of any size:
    paths, or the bytes in a file. It runs in float32.

    `model` is the Flax Linen module, `params` its tree in nested dicts, and `names` are those of the classes in the
    order of labels, or their numbers; `crop`, `mean` and `std` are those of `data` in the run. `notes` say what was
    left out or assumed of files that are no run.
    """

    def __init__(self, source: load_lib.Source) -> None:
        self.crop, self.mean, self.std = source.crop, source.mean, source.std
        self.notes = () if source.kind == "run" else source.notes
        self.config = as_it_runs(source.model)
        numbers = tuple(map(str, range(source.model.classes)))
        self.names = source.classes if len(source.classes) == len(numbers) else numbers
        self.params = jax.tree.map(jnp.asarray, weight_names.unflatten(dense_arrays(source)))
        self.model = vit.build(self.config)
        self._run = compilation.jit(lambda p, x: vit.logits(self.model, p, augment.normalize(x, self.mean, self.std)))

    def __repr__(self) -> str:
        size, channels = self.config.image_size, self.config.channels
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        names = first_few(self.names)
        return f"Classifier({len(self.names)} classes: {names}; {size}x{size}x{channels}; {count:,} parameters)"

    def __call__(self, inputs: Any, top: int = 5) -> list[list[Prediction]]:
        """Returns the `top` most probable classes of each input, most probable first.

        Args:
            inputs: a uint8 array, or one or a sequence of paths and bytes; a folder stands for the images in it.
            top: largest number of classes per input.

        Raises UserError for arrays of another type or shape, and for pictures that cannot be read.
        """
        found = []
        for probability_C in self.probabilities(inputs):
            best = np.argsort(-probability_C, kind="stable")[:top]
            found.append([Prediction(int(c), self.names[c], float(probability_C[c])) for c in best])
        return found

    def probabilities(self, inputs: Any) -> np.ndarray:
        """Returns float32 probabilities [N, C]; inputs as `__call__`."""
        return np.asarray(jax.nn.softmax(self.logits(inputs)))

    def logits(self, inputs: Any) -> np.ndarray:
        """Returns float32 logits [N, C]; inputs as `__call__`."""
        images_NHWc = self._images(inputs)
        logits_NC = np.empty((len(images_NHWc), self.config.classes), np.float32)
        for start in range(0, len(images_NHWc), BATCH):
            batch = images_NHWc[start : start + BATCH]
            size = 1 << (len(batch) - 1).bit_length()  # a power of two, so there are at most seven compiled programs
            padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), np.uint8)])
            with jax.default_matmul_precision("highest"):  # a GPU would otherwise round products to TF32
                logits_NC[start : start + len(batch)] = np.asarray(self._run(self.params, padded))[: len(batch)]
        return logits_NC

    def read(self, picture: str | Path | bytes) -> np.ndarray:
        """Returns a picture, a path or the bytes in a file, as the model sees it, uint8 [H, W, c]. Raises UserError."""
        return images_lib.read(picture, self.config.image_size, self.config.channels, self.crop)

    def nnx(self) -> Any:
        """Returns a module of Flax NNX with these weights, by Flax's own bridge. As `model` it takes float32 images
        [N, H, W, c], which are (pixels / 255 - mean) / std, and returns float32 logits [N, C]."""
        return vit.as_nnx(self.model, self.params)

    def _images(self, inputs: Any) -> np.ndarray:
        size, channels = self.config.image_size, self.config.channels
        if isinstance(inputs, str | Path | bytes):
            inputs = [inputs]
        if isinstance(inputs, list | tuple) and all(isinstance(entry, str | Path | bytes) for entry in inputs):
            found: list[Any] = [([one], []) if isinstance(one, bytes) else images_lib.find([one]) for one in inputs]
            if complaints := [complaint for _, complaints in found for complaint in complaints]:
                raise UserError(complaints[0])
            pixels = [self.read(picture) for pictures, _ in found for picture in pictures]
            return np.array(pixels, np.uint8).reshape(-1, size, size, channels)
        rule = f"they must be uint8 (N, {size}, {size}, {channels}) with pixels from 0 to 255"
        try:
            array = np.asarray(inputs)
        except ValueError as error:
            raise UserError(f"the images have several sizes; {rule}") from error
        array = array[None] if array.ndim == 3 else array
        if array.dtype != np.uint8 or array.shape[1:] != (size, size, channels):
            raise UserError(f"the images are {array.dtype} {array.shape}; {rule}")
        return array


def load(path: str | Path, checkpoint: str | int = "latest", ema: bool = False) -> Classifier:
    """Returns the Classifier of a run folder (experts merged), an exported folder, or a ViT of timm or Hugging
    Face whose files have the number of heads. Arguments and errors as `load.read`."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))  # Orbax warns that a folder opened read-only is read-only
    try:
        source = load_lib.read(path, checkpoint=checkpoint, ema=ema)
    finally:
        logging.set_verbosity(verbosity)
    if "head.logits.kernel" not in source.params:
        raise UserError(f"{path} has no head, so it classifies nothing; train one with --config.init.source={path}")
    return Classifier(source)


def as_it_runs(model: ModelConfig) -> ModelConfig:
    """Returns the settings of the module that takes `dense_arrays`, in float32."""
    return dataclasses.replace(model, init="independent", dtype="float32")


def dense_arrays(source: load_lib.Source) -> weight_names.Dict:
    """Returns the flat tree of the source's model with one position per patch, without positions that are computed."""
    computed = source.model.positions == "sincos2d"
    return {name: leaf for name, leaf in source.params.items() if not (computed and name == "positions")}
