"""Writes the model of a run as one that comes with jvitmoe, in float16:

python scripts/ship_weights.py --workdir runs/cifar10_fast --out jvitmoe/weights/cifar10_fast
"""

import argparse
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jvitmoe import export
from jvitmoe.interop import load

ROUNDED = "They are rounded to float16; the accuracy above is that of the float32 weights."

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run folder")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    export.main(["export", f"--workdir={options.workdir}", "--to=safetensors", f"--out={options.out}"])
    weights = options.out / load.WEIGHTS
    halves = {name: leaf.astype(np.float16) for name, leaf in load_file(weights).items()}
    for metadata in ({"format": "pt"}, {"format": "pt", load.CHECKSUM: ""}):
        if load.CHECKSUM in metadata:
            metadata[load.CHECKSUM] = load.sha256(weights)
        save_file(halves, weights, metadata)
    (options.out / "sample.npz").unlink()  # its logits are those of the float32 weights
    card = options.out / "README.md"
    text = re.sub(r"## Check\n.*?(?=\n## )", "", card.read_text(), flags=re.DOTALL)
    text = text.replace("license: unknown", "license: apache-2.0")
    text = re.sub(r"No licence is chosen .*?card\.", f"Licence of the weights: Apache-2.0. {ROUNDED}", text)
    card.write_text(text)
