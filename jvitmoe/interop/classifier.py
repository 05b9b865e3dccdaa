"""A trained ViT as an object that classifies: `jvitmoe.load("runs/X")(["cat.png"])`.

N images · H, W rows and columns · c channels · C classes
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jvitmoe.config import ModelConfig
from jvitmoe.data import augment
from jvitmoe.data import images as images_lib
from jvitmoe.errors import UserError
from jvitmoe.interop import load as load_lib
from jvitmoe.interop import weight_names
from jvitmoe.models import vit

BATCH = 64  # images that run at once; the last batch is filled up, so that one program serves them all


@dataclasses.dataclass(frozen=True)
class Prediction:
    label: int
    name: str  # of the class, or its number where no names are known
    probability: float


class Classifier:
    """A dense ViT. What it takes are arrays, uint8 [N, H, W, c] or [H, W, c] of the model's size, or files of any size.

    Args:
        model: the architecture; it runs in float32.
        params: the dense tree.
        names: of the classes, in the order of labels; () calls them by number.
        crop: how pictures in files are cut, as `data.crop` of the run.
    """

    def __init__(self, model: ModelConfig, params: Any, names: Sequence[str] = (), crop: str = "pad") -> None:
        self.crop = crop
        self.config = dataclasses.replace(model, dtype="float32")
        self.names = tuple(names) if len(names) == model.classes else tuple(map(str, range(model.classes)))
        self.params = jax.tree.map(jnp.asarray, params)
        net = vit.build(self.config)
        self._run = jax.jit(lambda p, x: vit.logits(net, p, augment.normalize(x)))

    def __call__(self, inputs: Any, top: int = 5) -> list[list[Prediction]]:
        """Returns the `top` most probable classes of each input, most probable first.

        Args:
            inputs: a uint8 array, or a path, or a sequence of paths; of a folder, the images in it.
            top: at most this many.

        Raises UserError for arrays of another shape, and for files that cannot be read.
        """
        probability_NC = self.probabilities(inputs)
        order_NC = np.argsort(-probability_NC, axis=1, kind="stable")[:, :top]
        return [
            [Prediction(int(c), self.names[c], float(p_C[c])) for c in order_C]
            for p_C, order_C in zip(probability_NC, order_NC, strict=True)
        ]

    def probabilities(self, inputs: Any) -> np.ndarray:
        """Returns float32 probabilities [N, C]; inputs as `__call__`."""
        logits_NC = self.logits(inputs)
        shifted_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        return shifted_NC / shifted_NC.sum(axis=1, keepdims=True)

    def logits(self, inputs: Any) -> np.ndarray:
        """Returns float32 logits [N, C]; inputs as `__call__`."""
        images_NHWc = self._images(inputs)
        logits_NC = np.empty((len(images_NHWc), self.config.classes), np.float32)
        for start in range(0, len(images_NHWc), BATCH):
            part = images_NHWc[start : start + BATCH]
            filled = np.concatenate([part, np.zeros((BATCH - len(part), *part.shape[1:]), np.uint8)])
            with jax.default_matmul_precision("highest"):  # a GPU would otherwise round products to TF32
                logits_NC[start : start + len(part)] = np.asarray(self._run(self.params, filled))[: len(part)]
        return logits_NC

    def read(self, path: str | Path) -> np.ndarray:
        """Returns the picture in a file as the model sees it, uint8 [H, W, c]. Raises UserError."""
        return images_lib.read(path, self.config.image_size, self.config.channels, self.crop)

    def _images(self, inputs: Any) -> np.ndarray:
        size, channels = self.config.image_size, self.config.channels
        if isinstance(inputs, str | Path):
            inputs = [inputs]
        if isinstance(inputs, list | tuple) and all(isinstance(path, str | Path) for path in inputs):
            files, complaints = images_lib.find(inputs)
            if complaints:
                raise UserError(complaints[0])
            images = [self.read(path) for path in files]
            return np.stack(images) if images else np.zeros((0, size, size, channels), np.uint8)
        array = np.asarray(inputs)
        array = array[None] if array.ndim == 3 else array
        if array.dtype != np.uint8 or array.shape[1:] != (size, size, channels):
            raise UserError(
                f"the images are {array.dtype} {array.shape}; they must be uint8 (N, {size}, {size}, {channels}) "
                "with pixels from 0 to 255"
            )
        return array


def load(path: str | Path, checkpoint: str = "latest") -> Classifier:
    """Returns the Classifier of a run folder (experts merged), an exported folder, or a ViT of timm, Hugging Face or
    google-research whose heads are known. Arguments as `load.read`. Raises UserError where there is none.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))  # Orbax warns that a folder opened read-only is read-only
    try:
        source = load_lib.read(path, checkpoint=checkpoint)
    finally:
        logging.set_verbosity(verbosity)
    if "head.logits.kernel" not in source.params:
        raise UserError(f"{path} has no head, so it classifies nothing; train one with --config.init.source={path}")
    return from_source(source)


def from_source(source: load_lib.Source) -> Classifier:
    """Returns the Classifier of what was read."""
    model = dataclasses.replace(source.model, position_rows=0)
    return Classifier(model, weight_names.unflatten(dense_arrays(source)), source.classes, source.crop)


def dense_arrays(source: load_lib.Source) -> weight_names.Dict:
    """Returns the flat tree of the source's model with position_rows = 0: positions that are computed are left out."""
    computed = source.model.positions == "sincos2d"
    return {name: leaf for name, leaf in source.params.items() if not (computed and name == "positions")}
