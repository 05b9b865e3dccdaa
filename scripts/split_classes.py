"""Writes CIFAR-10 as two sets of six and four classes, for the study of fine-tuning: parquet files that hf:OUT/… reads.

    python scripts/split_classes.py --data_dir DIR --out runs/study/halves

`first` has the labels 0 to 5, `second` 6 to 9. The numbers of classes differ, so that a run on the second that starts
from a model of the first gets a new head.
"""

import argparse
from pathlib import Path

import datasets as hf
import numpy as np
from PIL import Image

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data import datasets
from jvitmoe.data.splits import Split

FIRST = 6


def write(split: Split, names: tuple[str, ...], start: int, path: Path) -> None:
    """Writes the images of the classes from `start` on, as many as there are names, each losslessly."""
    chosen_N = np.flatnonzero((split.labels_N >= start) & (split.labels_N < start + len(names)))
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(names))})
    columns = {
        "image": [Image.fromarray(split.images_NHWc[n]) for n in chosen_N],
        "label": (split.labels_N[chosen_N] - start).tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    hf.Dataset.from_dict(columns, features).to_parquet(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", default="", help="where TFDS keeps its sets")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cifar = datasets.load(DataConfig("cifar10", options.data_dir), ModelConfig(image_size=32, channels=3))
    for name, start, end in (("first", 0, FIRST), ("second", FIRST, 10)):
        for split in ("train", "test"):
            path = options.out / name / "data" / f"{split}-00000-of-00001.parquet"
            write(getattr(cifar, split), cifar.class_names[start:end], start, path)
            print(path, flush=True)
