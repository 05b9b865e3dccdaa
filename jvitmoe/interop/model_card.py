"""The model card of an export: data, recipe, accuracy, how to use and check it. All facts come from the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.data.sources.hugging_face import is_local
from jvitmoe.interop import manifest
from jvitmoe.interop.formats.base import Target
from jvitmoe.interop.load import Source, is_on_hub, repository_of
from jvitmoe.reports import results
from jvitmoe.runs import checkpoints
from jvitmoe.runs.console import markdown_table

# Licences of data sets, by `data.name`.
LICENCES = {
    "digits": "UCI's hand-written digits as scikit-learn carries them, under CC BY 4.0: name the source.",
    "cifar10": "CIFAR-10 comes with no licence; its authors ask to be cited (Krizhevsky, 2009).",
    "cifar100": "CIFAR-100 comes with no licence; its authors ask to be cited (Krizhevsky, 2009).",
}
UNKNOWN = "Not known to jvitmoe. Before you publish this model, look up what it says of models trained on the data."

USE = f"""All code runs in this folder. This checks its files, as `sha256sum -c {manifest.NAME}` does:

```python
import hashlib
from pathlib import Path

for line in Path("{manifest.NAME}").read_text().splitlines():
    digest, name = line.split("  ", 1)
    assert hashlib.sha256(Path(name).read_bytes()).hexdigest() == digest, name
```"""

# The Hugging Face hub reads this. The owner of the weights chooses their licence, so none is chosen here.
HEADER = """---
license: unknown
library_name: {library}
pipeline_tag: image-classification
tags:
- vit
- jvitmoe
{base}---"""


def write(source: Source, result: Mapping[str, Any], target: Target, remarks: Sequence[str]) -> str:
    """Returns the card of an export as Markdown. `result` is the result.json of a run, {} if it was not tested;
    `remarks` are differences of this export from the source's model."""
    model, classes = source.model, source.classes
    title, kind, base, about = _of_run(source, result) if source.kind == "run" else _of_export(source)
    layout = "[N, channels, rows, columns]" if target.torch else "[N, rows, columns, channels]"
    size = f"{model.image_size} x {model.image_size} x {model.channels}"
    torch = "import torch\n" if target.torch else ""
    listed = f": {', '.join(classes)}" if len(classes) <= 100 else ""
    sections = [
        HEADER.format(library=target.library, base=f"base_model: {base}\n" if base else ""),
        f"# {title}\n\nA plain Vision Transformer for images of {size} and {model.classes} classes, "
        f"made with jvitmoe: {kind}. It is dense: no router, no experts, the cost of one ViT.",
        *(f"- {remark}" for remark in remarks),
        f"## Use\n\n{USE}\n\nThen:\n\n{target.use}",
        f"Inputs are float32 {layout}, `{_normalised(source)}` of 8-bit pixels, at exactly {size}. Outputs are logits."
        + (f" Their classes in order are in `classes.json`{listed}." if classes else ""),
        "## Check\n\n`sample.npz` contains images (8 bits; with the label -1 they are noise), the model's `inputs` for "
        "them, their `labels` and the `logits` that JAX computed in float32.\n\n"
        f'```python\nimport numpy as np\n{torch}\nsample = np.load("sample.npz")\n'
        f'assert np.abs({target.check} - sample["logits"]).max() < 1e-4\n```',
        *about,
    ]
    return "\n\n".join(sections) + "\n"


def _of_run(source: Source, result: Mapping[str, Any]) -> tuple[str, str, str, list[str]]:
    """Returns (title, how it was made, the model on the hub that it started from or "", sections) of a run's card."""
    assert source.config is not None, "a run has a config"
    config = source.config
    experts, data, base = config.routing.experts, _public_name(config.data.name), _base_model(config)
    what = "whole models" if config.routing.part == "model" else "experts per MLP"
    kind = f"{experts} {what}, averaged into one" if experts > 1 else "trained dense"
    sections = [
        f"## Accuracy\n\n{_accuracy(result, source)}",
        f"## Data\n\n`{data}`, trained on its training split"
        + (f" without {config.data.validation:,} images held out to choose on" if config.data.validation else "")
        + f". Licence of the data: {LICENCES.get(config.data.name.partition(':')[0], UNKNOWN)} "
        "No licence is chosen for these weights: choose one and write it as `license` at the top of this card."
        + (f" Training started from `{base}`, so its licence applies too." if base else ""),
        f"## Recipe\n\nSeed {config.train.seed}, checkpoint at step {source.step:,}. "
        f"Fields that differ from the defaults:\n\n{_recipe(config)}",
        f"## Made with\n\n{_made_with(result)}",
    ]
    return f"{data} ViT", kind, base, sections


def _of_export(source: Source) -> tuple[str, str, str, list[str]]:
    """Returns what `_of_run` returns for a start, a mean of models, or an export of ours that is exported again."""
    if not source.averaged:
        kind = "a start, from which several runs begin" if source.config else "exported again"
        return "ViT", kind, "", []
    rows = [
        {"model": one["model"], "weight": f"{one['weight']:.1%}", "hash": one["hash"]} for one in source.averaged["of"]
    ]
    text = f"## Mean of\n\n{markdown_table(rows)}\n{source.averaged['verdict']} `report.md` has all figures."
    return "Averaged ViT", f"the mean of {len(rows)} models that were trained apart from one start", "", [text]


def _normalised(source: Source) -> str:
    if (source.mean, source.std) == ((0.5,), (0.5,)):
        return "pixels / 127.5 - 1"
    mean, std = (list(values) if len(values) > 1 else values[0] for values in (source.mean, source.std))
    return f"(pixels / 255 - {mean}) / {std}"


def _accuracy(result: Mapping[str, Any], source: Source) -> str:
    if not result.get("rows"):
        return "Not tested. `python -m jvitmoe evaluate --workdir …` measures it; export again to have it here."
    text = markdown_table(results.result_rows(result))
    text += f"\nTest split, checkpoint at step {result['step']:,}, seed {result['seed']}: one run, no deviation known."
    if result["step"] != source.step:
        text += f" **The exported checkpoint is another one, at step {source.step:,}.**"
    (name,) = {row["model"] for row in result["rows"]} & ({"EMA"} if source.ema else {"dense", "merged"})
    return f"{text} This export is the row `{name}`."


def _public_name(data: str) -> str:
    """Returns `data.name` without the folders that a local set of Hugging Face lies in."""
    name = data.removeprefix("hf:").partition("?")[0]
    return f"hf:{Path(name).name}" if data.startswith("hf:") and is_local(name) else data


def _base_model(config: Config) -> str:
    """Returns the name on the hub of the ViT that training started from, or ""."""
    source = config.init.source
    return repository_of(source)[0] if is_on_hub(source) else ""


def _recipe(config: Config) -> str:
    default, fields = config_lib.flatten(Config()), config_lib.flatten(config)
    fields["data.name"] = _public_name(config.data.name)
    paths = {"data.dir"} if _base_model(config) else {"data.dir", "init.source"}  # of the machine it was trained on
    rows = [f"| `{k}` | `{v}` |" for k, v in fields.items() if v != default[k] and k not in paths]
    start = "It started from another trained ViT (`init.source`).\n\n" if config.init.source else ""
    return start + "\n".join(["| field | value |", "|---|---|", *rows])


def _made_with(result: Mapping[str, Any]) -> str:
    trained = results.trained_on(result) or "hardware that was not recorded"
    then = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    now = ", ".join(f"{name} {version}" for name, version in checkpoints.versions().items())
    return f"Trained on {trained}. Tested with {then or 'nothing yet'}. Exported with {now}."
