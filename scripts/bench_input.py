"""Images per second of a streamed image folder against torchvision's ImageFolder and PyTorch's DataLoader.

    python scripts/bench_input.py --torch .venv-peers/bin/python [--data FOLDER] [--rounds 9] [--workers 2]

Both read the same JPEG files, crop at random, resize to `--side` and give batches of uint8. They are timed in turns, as
`timed_step.py` does: a pass over the images each. Prints the ratio with a 95 % interval. Run it on an idle
machine.
Without --data, 2,000 files of 500x375 pixels are made: noise with the spectrum of photographs (1/f), and shapes.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH, CLASSES = 375, 500, 10


def write_photographs(folder: Path, count: int) -> None:
    """Writes JPEG files of about 95 kB."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    noise = np.fft.rfft2(random.normal(size=(12, HEIGHT, WIDTH))) / np.maximum(frequency, 1 / WIDTH)
    textures = np.fft.irfft2(noise, s=(HEIGHT, WIDTH))
    textures /= textures.std()
    for number in range(count):
        shared, *colours = textures[random.integers(12, size=4)]
        pixels = np.stack([0.9 * shared + 0.3 * np.roll(colour, 99, 1) for colour in colours], -1)
        pixels = np.roll(pixels, tuple(random.integers(500, size=2)), (0, 1)) * 45 + 120
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        for x, y, w, h in random.integers((0, 0, 20, 20), (WIDTH, HEIGHT, 200, 200), size=(4, 4)).tolist():
            ImageDraw.Draw(image).ellipse((x, y, x + w, y + h), tuple(random.integers(256, size=3).tolist()))
        (folder / str(number % CLASSES)).mkdir(parents=True, exist_ok=True)
        image.save(folder / str(number % CLASSES) / f"{number:05}.jpg", quality=90)


def serve_torch(data: str, side: int, batch: int, workers: int) -> None:
    """Answers each line on standard input with the seconds of one pass; run by the Python that has PyTorch."""
    import torch
    from torchvision import datasets
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.PILToTensor()])
    images = datasets.ImageFolder(str(Path(data) / "train"), transform)
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = torch.utils.data.DataLoader(images, batch, shuffle=True, drop_last=True, **options)
    for _ in sys.stdin:
        began = time.perf_counter()
        for pixels, _labels in loader:
            assert pixels.dtype == torch.uint8
        print(time.perf_counter() - began, flush=True)


def our_passes(data: str, side: int, batch: int) -> Iterator[float]:
    """Yields the seconds of one pass over the images, again and again."""
    import jax

    from jvitmoe.config import Config, DataConfig, ModelConfig, TrainConfig
    from jvitmoe.data import sources, stream
    from jvitmoe.data.batches import TrainOrder
    from jvitmoe.machine.devices import make_mesh

    config = Config(
        DataConfig(name="folder", dir=data, stream=True, crop="resized"),
        ModelConfig(image_size=side, channels=3, classes=sum(path.is_dir() for path in Path(data, "train").iterdir())),
        train=TrainConfig(batch_size=batch, devices=1),
    )
    jax.config.update("jax_platforms", "cpu")
    mesh, records = make_mesh(config.train), sources.browse(config.data, config.model).train
    order = TrainOrder(len(records), batch, 0, mesh)
    start, steps = 0, order.steps_per_epoch
    while True:
        began = time.perf_counter()
        for images in stream.train_batches(records, order, start, start + steps):
            jax.block_until_ready(images)
        yield time.perf_counter() - began
        start += steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=".venv-peers/bin/python", help="Python with PyTorch and torchvision")
    parser.add_argument("--data", default="", help="an image folder")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    for name, default in (("rounds", 9), ("workers", 2), ("side", 224), ("batch", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.serve:
        serve_torch(args.data, args.side, args.batch, args.workers)
        return
    import timed_step

    from jvitmoe.data.pictures import is_image

    with tempfile.TemporaryDirectory() as temporary:
        if not args.data:
            args.data = temporary
            for split, count in (("train", 2000), ("test", CLASSES)):
                write_photographs(Path(temporary, split), count)
        sizes = (f"--{name}={getattr(args, name)}" for name in ("data", "side", "batch", "workers"))
        with contextlib.closing(timed_step.Peer(args.torch, __file__, "--serve", *sizes)) as torch:
            ours = our_passes(args.data, args.side, args.batch)

            def mean(one_pass: Callable[[], float]) -> timed_step.Work:
                return lambda passes: sum(one_pass() for _ in range(passes)) / passes

            work = {"torch": mean(lambda: torch.ask("go")), "jvitmoe": mean(lambda: next(ours))}
            seconds = timed_step.interleave(work, args.rounds, progress=lambda n, left: print(n, round(left), "s left"))
        images = sum(map(is_image, Path(args.data, "train").rglob("*"))) // args.batch * args.batch
    ratio, low, high = timed_step.ratio(seconds["torch"], seconds["jvitmoe"])
    rates = {name: round(images / np.median(values), 1) for name, values in seconds.items()}
    print(json.dumps(rates | {"ratio": round(ratio, 3), "low": round(low, 3), "high": round(high, 3)}))


if __name__ == "__main__":
    main()
