"""Images per second of a streamed image folder against torchvision's ImageFolder and PyTorch's DataLoader.

    python scripts/bench_input.py --torch .venv-peers/bin/python [--data FOLDER] [--rounds 9] [--workers 2]

Both read the same JPEG files, crop at random, resize to `--side` and give uint8 batches. They take turns, one pass over
the images each, in the same process for all rounds. The figure is the median ratio of a round and the interval that
holds the true median with 95 % confidence (order statistics). Needs an idle machine. Without --data, 2,000 files of
500x375 pixels are made in a temporary folder: noise with the spectrum of photographs (1/f), and shapes.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH = 375, 500
CLASSES = 10


def write_photographs(folder: Path, count: int) -> None:
    """Writes JPEG files of about 95 kB, as ImageNet's."""
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
        path = folder / str(number % CLASSES) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def serve_torch(data: str, side: int, batch: int, workers: int) -> None:
    """Answers each line on standard input with the seconds of one pass; run by the Python that has PyTorch."""
    import torch
    from torchvision import datasets
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.PILToTensor()])
    images = datasets.ImageFolder(str(Path(data) / "train"), transform)
    loader = torch.utils.data.DataLoader(
        images, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    for _ in sys.stdin:
        began = time.perf_counter()
        for pixels, _labels in loader:
            assert pixels.dtype == torch.uint8
        print(time.perf_counter() - began, flush=True)


def our_passes(data: str, side: int, batch: int):
    """Yields the seconds of one pass over the images, again and again."""
    import jax

    from jvitmoe.config import Config, DataConfig, ModelConfig, TrainConfig
    from jvitmoe.data import datasets, stream
    from jvitmoe.data.batches import TrainOrder
    from jvitmoe.runtime.devices import make_mesh

    classes = sum(path.is_dir() for path in (Path(data) / "train").iterdir())
    config = Config(
        DataConfig(name="folder", dir=data, stream=True, crop="resized"),
        ModelConfig(image_size=side, channels=3, classes=classes),
        train=TrainConfig(batch_size=batch, devices=1, platform="cpu"),
    )
    mesh, records = make_mesh(config.train), datasets.browse(config.data, config.model).train
    order = TrainOrder(len(records), batch, jax.random.key(0), mesh)
    start = 0
    while True:
        began, end = time.perf_counter(), start + order.steps_per_epoch
        for images in stream.train_batches(records, order, config, mesh, start, end):
            jax.block_until_ready(images)
        yield time.perf_counter() - began
        start = end


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Returns (median, lower, upper) with at least 95 % confidence if there are 6 values or more."""
    values, n = sorted(values), len(values)
    tail = [sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]
    skip = max([k + 1 for k in range(n // 2) if tail[k] <= 0.025], default=0)
    return statistics.median(values), values[max(skip - 1, 0)], values[n - max(skip, 1)]


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
    with tempfile.TemporaryDirectory() as temporary:
        if not args.data:
            args.data = temporary
            for split, count in (("train", 2000), ("test", CLASSES)):
                write_photographs(Path(temporary) / split, count)
        command = [args.torch, __file__, "--serve", f"--data={args.data}", f"--side={args.side}"]
        command += [f"--batch={args.batch}", f"--workers={args.workers}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as torch:
            ours, rounds = our_passes(args.data, args.side, args.batch), []
            for number in range(args.rounds + 1):
                print("go", file=torch.stdin, flush=True)
                rounds.append((float(torch.stdout.readline()), next(ours)))
                print(f"round {number}: PyTorch {rounds[-1][0]:.2f} s, jvitmoe {rounds[-1][1]:.2f} s", file=sys.stderr)
            torch.stdin.close()
        train = sum(1 for _ in (Path(args.data) / "train").rglob("*.jpg")) // args.batch * args.batch
    (theirs, seconds), (ratio, lower, upper) = (
        [statistics.median(column) for column in zip(*rounds[1:], strict=True)],
        median_interval([theirs / ours for theirs, ours in rounds[1:]]),
    )
    numbers = {"torch": train / theirs, "jvitmoe": train / seconds, "ratio": ratio, "lower": lower, "upper": upper}
    print(json.dumps({name: round(value, 3) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
