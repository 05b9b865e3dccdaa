"""The base class of export targets: supported settings, the test sample, and the check of the written files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jvitmoe.config import NEUTRAL, Config, ModelConfig
from jvitmoe.data import augment, sources, splits
from jvitmoe.data.splits import Split
from jvitmoe.errors import UserError
from jvitmoe.interop import classifier, load, weight_names
from jvitmoe.models.routers import ROUTERS
from jvitmoe.runs import safe_io

SAMPLE, SAMPLE_FILE = 16, "sample.npz"  # images in it
CLOSE = 1e-4  # largest difference of logits that passes
FIELDS = frozenset(field.name for field in dataclasses.fields(ModelConfig))

Run = Callable[[np.ndarray], np.ndarray]  # inputs as the target takes them -> logits


class Target:
    """One format of exports."""

    name: str  # value of --to
    library: str  # that loads it, by its name on the Hugging Face Hub
    reader = "jvitmoe"  # the library that reads the export back after writing
    torch = False  # True if it runs in PyTorch: channels come before rows
    fields = FIELDS  # of ModelConfig that the format can express; all others must have their default
    use: str  # Markdown for the card: how to load the model
    check: str  # expression for the card: the logits of `sample`

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> Run:
        """Writes the model's files to `out`, reads them back, and returns the function that they compute."""
        raise NotImplementedError

    def remarks(self, config: Config) -> list[str]:
        """Returns what the user should know about this export, in sentences."""
        return []

    def differences(self, model: ModelConfig) -> list[str]:
        """Returns what the format cannot express exactly, in sentences."""
        return []

    def unsupported(self, model: ModelConfig) -> list[str]:
        """Returns the fields of the model that the format cannot express."""
        return model.set_beyond(self.fields | NEUTRAL)

    def examine(self, config: Config) -> list[str]:
        """Returns remarks on this export. Raises UserError, with the flags to change, for a merged model that the
        format cannot express."""
        model, kind = config.model.plain(), config.routing.kind
        default = type(model)()
        if odd := self.unsupported(model):
            found = ", ".join(f"model.{name}={getattr(model, name)}" for name in odd)
            flags = " ".join(f"--config.model.{name}={getattr(default, name)}" for name in odd)
            others = " or ".join(target.name for target in TARGETS.values() if not target.unsupported(model))
            raise UserError(f"{self.name} has no counterpart of {found}; train with {flags}, or export --to={others}")
        has_router = kind in ROUTERS and ROUTERS[kind].is_tested
        left = [f"the router ({kind}) is left behind: this is the mean of the experts"] if has_router else []
        return left + self.remarks(config)

    def sample(self, source: load.Source, images: Split) -> weight_names.Dict:
        """Returns the arrays of sample.npz: images, the target's inputs for them, labels, and our logits."""
        inputs = np.asarray(augment.normalize(jnp.asarray(images.images_NHWc), source.mean, source.std))
        if self.torch:
            inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
        logits_NC = classifier.Classifier(source).logits(images.images_NHWc)
        return {"images": images.images_NHWc, "inputs": inputs, "labels": images.labels_N, "logits": logits_NC}

    def export(self, out: Path, source: load.Source, sample: weight_names.Dict) -> float:
        """Writes the model and the sample. Returns the largest difference between the logits of the files and of the
        sample. Raises UserError if it exceeds the tolerance."""
        model = dataclasses.replace(source.model, init="independent", dtype="float32", dropout=0.0, drop_path=0.0)
        run = self.write(out, source, model)
        np.savez(out / SAMPLE_FILE, allow_pickle=False, **sample)
        if source.classes:
            safe_io.write_text(out / safe_io.CLASSES, json.dumps(source.classes) + "\n")
        counts = (1, len(sample["labels"]))
        apart = float(np.max([np.abs(run(sample["inputs"][:n]) - sample["logits"][:n]).max() for n in counts]))
        if not apart < CLOSE:
            cause = "".join(f" ({difference})" for difference in self.differences(model))
            exact = " or ".join(target.name for target in TARGETS.values() if target.fields == FIELDS)
            raise UserError(f"the logits there are {apart:.2g} from ours, above {CLOSE}{cause}; export --to={exact}")
        return apart


def sample_images(source: load.Source) -> Split:
    """Returns the images of an export's sample: test images of a run's data, those that came with an export of ours, or
    noise with the label -1. Raises UserError."""
    model, sample = source.model, source.path.with_name(SAMPLE_FILE)
    if source.kind == "run":
        assert source.config is not None, "a run has a config"
        config, may_lack = source.config, bool(source.start)
        test = sources.with_classes(sources.browse, config.data, config.model, source.classes, may_lack).test
        return splits.decode(test.select(np.arange(min(SAMPLE, len(test)))))
    if sample.is_file():
        with np.load(sample, allow_pickle=False) as arrays:
            return Split(arrays["images"], arrays["labels"])
    return noise(model)


def noise(model: ModelConfig) -> Split:
    """Returns images of noise, with the label -1, for a sample without pictures."""
    shape = SAMPLE, model.image_size, model.image_size, model.channels
    return Split(np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.full(SAMPLE, -1, np.int32))


TARGETS: dict[str, Target] = {}


def register(target: type[Target]) -> type[Target]:
    """Adds the class to the choices of --to."""
    TARGETS[target.name] = target()
    return target
