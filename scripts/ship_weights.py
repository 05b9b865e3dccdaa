"""Writes the model of a run as one that comes with jvitmoe, in float16, with the test accuracy that it then has:

    python scripts/ship_weights.py --workdir runs/cifar10_cct --out jvitmoe/weights/cifar10_cct \\
        --copy "a copy as JPEG"

The data set must still be where the run had it.
"""

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import jvitmoe
from jvitmoe.data import sources
from jvitmoe.interop import load, manifest
from jvitmoe.reports import comparison


def replaced(text: str, start: str, end: str, new: str) -> str:
    """Returns the text with `new` in the place of what is from `start` up to `end`."""
    at = text.index(start)
    return text[:at] + new + text[text.index(end, at) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a run folder")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--copy", default="", help="what the copy of the data set was, in words, for the card")
    options = parser.parse_args()
    jvitmoe.Run(options.workdir).export("safetensors", options.out)
    weights = options.out / load.WEIGHTS
    halves = {name: leaf.astype(np.float16) for name, leaf in load_file(weights).items()}
    save_file(halves, weights, {"format": "pt"})
    weights.chmod(0o644)
    for name in ("sample.npz", "classes.json"):  # logits of the float32 weights; names that config.json has too
        (options.out / name).unlink()
    manifest.write(options.out)

    config = comparison.read_config(options.workdir)
    test = sources.load(config.data, config.model).test
    found = jvitmoe.load(options.out).logits(test.images_NHWc).argmax(-1)
    accuracy = np.mean(found == test.labels_N)
    card = options.out / "README.md"
    text = card.read_text().replace("license: unknown", "license: apache-2.0")
    text = text.replace("`classes.json`", "`config.json`")
    if options.copy:
        text = text.replace("`, trained on its", f"`, {options.copy}, trained on its")
    text = replaced(text, "## Check\n", "## Accuracy", "")
    text = replaced(text, "No licence is chosen", "\n\n## Recipe", "Licence of the weights: Apache-2.0.")
    rounded = f"These weights are rounded to float16. With them {accuracy:.2%} of {len(found):,} test images are right."
    card.write_text(text.replace("## Data", f"{rounded}\n\n## Data"))
    print(f"shipped     {options.out}, {weights.stat().st_size:,} bytes, {accuracy:.2%} of {len(found):,} test images")


if __name__ == "__main__":
    main()
