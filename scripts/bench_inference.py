"""Times the merged model beside timm and onnxruntime on the same weights, and `jvitmoe predict` from files:
`python scripts/bench_inference.py --peer_python .venv-peers/bin/python [--rounds 9] [--threads 2]`.

All compute in float32 on the same cores, every other engine in a process of its own that waits passively. Needs timm in
the peer's Python, and the extra "export" in this one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

BATCHES = (1, 64)


def engine(name: str, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the exported model as "timm eager", "timm compiled" or "onnxruntime" runs it, of channels-last inputs."""
    if name == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), options)
        return lambda inputs: np.asarray(session.run(None, {"images": inputs})[0])
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    run = torch.compile(model) if name == "timm compiled" else model
    return torch.inference_mode()(lambda inputs: run(torch.from_numpy(inputs).movedim(3, 1)).numpy())


def seconds(logits: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        logits(inputs)
    return (time.perf_counter() - began) / steps


def work(name: str, folder: Path) -> None:
    """Answers each line "BATCH STEPS" with `seconds`, if the engine's logits are ours."""
    logits, inputs = engine(name, folder), np.load(folder / "inputs.npy")
    np.testing.assert_allclose(logits(inputs), np.load(folder / "logits.npy"), rtol=0, atol=1e-4)
    for batch, steps in (map(int, line.split()) for line in sys.stdin):
        print(seconds(logits, inputs[:batch], steps), flush=True)


def measure(peer: str, rounds: int, threads: int, folder: Path) -> None:
    """Prints our images/s, their ratios to those of the engines with 95 % intervals, and the seconds of `predict`."""
    import jax
    import timed_step
    from PIL import Image

    from jvitmoe.config import ModelConfig
    from jvitmoe.interop import classifier, load, weight_names
    from jvitmoe.interop.formats import TARGETS
    from jvitmoe.models import vit

    def asked(engine: timed_step.Peer, batch: int, steps: int) -> float:
        return engine.ask(f"{batch} {steps}")

    model = ModelConfig(
        32, channels=3, classes=10, patch=4, width=300, hidden=1024, depth=12, heads=12
    )  # the original's
    params = weight_names.flatten(jax.device_get(vit.init(vit.build(model), jax.random.key(0))))
    for target in ("safetensors", "timm", "onnx"):
        (folder / target).mkdir()
        TARGETS[target].write(folder / target, load.Source(folder, "run", params, model), model)
    ours = classifier.load(folder / "safetensors")
    images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 32, 32, 3), np.uint8)
    np.save(folder / "inputs.npy", (images / 127.5 - 1).astype("f"))
    np.save(folder / "logits.npy", ours.logits(images))
    engines = {"timm eager": peer, "timm compiled": peer, "onnxruntime": sys.executable}
    peers = {
        name: timed_step.Peer(python, __file__, f"--threads={threads}", "--work", name, str(folder))
        for name, python in engines.items()
    }
    for batch in BATCHES:
        cases = {name: partial(asked, process, batch) for name, process in peers.items()}
        cases["jvitmoe"] = partial(seconds, ours.logits, images[:batch])
        times = timed_step.interleave(cases, rounds)
        print(f"batch {batch}: {batch / np.median(times['jvitmoe']):,.0f} images/s", flush=True)
        for name in peers:
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*timed_step.ratio(times[name], times["jvitmoe"]))
            print(f"  {ratio} x the images/s of {name}", flush=True)
    for process in peers.values():
        process.close()
    (folder / "pictures").mkdir()
    for n in range(1000):
        Image.fromarray(images[n % len(images)]).save(folder / "pictures" / f"{n}.png")
    command = [sys.executable, "-m", "jvitmoe", "predict", "--workdir", str(folder / "safetensors"), "--json"]
    for pictures in ("pictures/0.png", "pictures"):
        began = time.perf_counter()
        found = subprocess.check_output([*command, str(folder / pictures)])
        print(f"predict: {len(json.loads(found)):,} files in {time.perf_counter() - began:.1f} s, start included")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--peer_python", default=sys.executable, help="a Python that has timm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="cores that every engine may use")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # engine and folder of a process that this starts
    chosen = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.threads])  # before JAX counts them
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    if chosen.work:
        work(chosen.work[0], Path(chosen.work[1]))
        sys.exit()
    with tempfile.TemporaryDirectory() as temporary:
        measure(chosen.peer_python, chosen.rounds, chosen.threads, Path(temporary))
