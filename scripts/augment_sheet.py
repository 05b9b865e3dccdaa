"""Draws images of CIFAR-10 after every operation of `data/augment.py`: `python scripts/augment_sheet.py`.

Writes results/augment/sheet.png, a row per operation.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from jvitmoe.config import DataConfig, ModelConfig
from jvitmoe.data import augment, sources, splits

IMAGES, ZOOM, LABEL, GAP, SEED = 8, 2, 150, 4, 0
SETTINGS: dict[str, dict[str, Any]] = {  # row -> settings of the augmentations drawn as in training
    "crop, flip": {"crop_padding": 4, "flip": True},
    "3-Augment": {"augment": "three"},
    "erasing": {"erase": 1.0},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "all": {
        "crop_padding": 4,
        "flip": True,
        "augment": "three",
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
}


def rows(images_BHWc: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (label, images) of every row of the sheet."""
    yield "original", images_BHWc
    on_device_BHWc, radius_B = jnp.asarray(images_BHWc), jnp.linspace(*augment.RADIUS, IMAGES)
    for kind, name in enumerate(augment.THREE):
        yield f"3-Augment: {name}", np.asarray(augment.one_of_three(jnp.full(IMAGES, kind), radius_B, on_device_BHWc))
    key_B, key = jax.random.split(jax.random.key(SEED), IMAGES), jax.random.key(SEED)
    batch = augment.Draws(key_B, key, augment.reversed_rows)
    for name, settings in SETTINGS.items():
        yield name, np.asarray(augment.augment(DataConfig(**settings), batch, on_device_BHWc, jnp.eye(IMAGES))[0])


def draw(drawn: list[tuple[str, np.ndarray]], out: Path) -> None:
    """Writes the sheet."""
    side = drawn[0][1].shape[1] * ZOOM + GAP
    sheet = Image.new("RGB", (LABEL + IMAGES * side, len(drawn) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, images_BHWc) in enumerate(drawn):
        pen.text((GAP, row * side + side // 3), label, fill="black")
        for column, image_HWc in enumerate(np.clip(np.rint(images_BHWc), 0, 255).astype(np.uint8)):
            large = image_HWc.repeat(ZOOM, 0).repeat(ZOOM, 1)
            sheet.paste(Image.fromarray(large), (LABEL + column * side, row * side))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="", help="where TFDS keeps CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("results/augment/sheet.png"))
    values = parser.parse_args()
    data, model = DataConfig(name="cifar10", dir=values.data_dir), ModelConfig(image_size=32, channels=3)
    records = sources.browse(data, model).test.select(np.arange(IMAGES))
    draw(list(rows(splits.decode(records).images_NHWc)), values.out)


if __name__ == "__main__":
    main()
