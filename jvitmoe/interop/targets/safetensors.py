"""Our own names of arrays, in a folder that `jvitmoe.load` reads."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.config import ModelConfig
from jvitmoe.interop import classifier, load
from jvitmoe.interop.targets import base


@base.register
class Safetensors(base.Target):
    name = "safetensors"
    library = "jvitmoe"
    use = """```python
import jvitmoe

model = jvitmoe.load(".")
print(model(["picture.png"]))
```"""
    check = 'model.logits(sample["images"])'

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> base.Run:
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in classifier.dense_arrays(source).items()}
        pixels = {"mean": list(source.mean), "std": list(source.std)}
        return base.save_weights(out, arrays, config_json(model, source.classes, source.crop) | pixels)


def config_json(model: ModelConfig, classes: Sequence[str], crop: str) -> dict[str, Any]:
    """Returns the config.json of our own export; `crop` is the run's `data.crop`."""
    return {"format": load.OURS, "model": dataclasses.asdict(model), "classes": list(classes), "crop": crop}
