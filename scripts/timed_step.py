"""What the benchmarks share: a compiled training step on random images, and interleaved timing.

Interleaved, because the ratio of two times taken one after the other is biased by a machine that drifts.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.stats import binom

from jvitmoe import routing
from jvitmoe.config import Config
from jvitmoe.data.batches import Batch, resident_batches
from jvitmoe.data.splits import Split
from jvitmoe.errors import UserError
from jvitmoe.experts import cost
from jvitmoe.machine import compilation, devices
from jvitmoe.training import build, step
from jvitmoe.training.state import TrainState, make_state

VISIT_SECONDS = 0.5  # least time that a visit measures
BATCHES = 10  # of random images
PRODUCT_SIDE = 2048  # the product of two square matrices of this side measures the peak of the machine
Work = Callable[[int], float]  # runs this many steps; returns the mean seconds of one


def interleave(
    work: Mapping[str, Work], rounds: int, progress: Callable[[int, float], None] = lambda number, left: None
) -> dict[str, list[float]]:
    """Returns name -> the seconds per step of each round.

    Every round visits all cases in a random order. The first step of a visit is not timed: it fills the caches that the
    case before it used. `progress` is called after each round with its number, from 1, and the seconds left.
    """
    steps = {}
    for name, run in work.items():
        run(1)  # includes work that is done once
        steps[name] = max(1, round(VISIT_SECONDS / run(1)))
    order, shuffle = list(work), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in work}
    began = time.monotonic()
    for number in range(1, rounds + 1):
        shuffle(order)
        for name in order:
            work[name](1)
            seconds[name].append(work[name](steps[name]))
        progress(number, (time.monotonic() - began) / number * (rounds - number))
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Returns (median, low, high) of the ratio of two cases of `interleave`, round by round.

    low and high bound the median with at least 95 % confidence for any distribution (order statistics; Conover,
    Practical Nonparametric Statistics, section 3.2). Below six rounds no such bounds exist, and they are the extremes.
    """
    ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
    outside = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return statistics.median(ratios), ratios[outside], ratios[-1 - outside]


class Peer:
    """Another program, which answers a line with one of JSON, and sleeps while this one computes."""

    def __init__(self, *command: str) -> None:
        self.about: Any = None  # what it says of itself
        env = os.environ | {"OMP_WAIT_POLICY": "passive"}  # its threads must not spin while others are timed
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        except OSError as error:
            raise UserError(
                f"{command[0]} cannot be run ({error.strerror}); give a Python that has the peer"
            ) from error

    def ask(self, line: str) -> Any:
        """Returns its answer. Raises UserError where it has ended."""
        assert self._process.stdin is not None  # both are pipes
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self.close()
        raise UserError("the peer has ended, see above; give a Python that has it")

    def close(self) -> None:
        self._process.communicate()


def random_split(config: Config) -> Split:
    """Returns BATCHES batches of random images of the config's shape."""
    rng, model = np.random.default_rng(0), config.model
    shape = BATCHES * config.train.batch_size, model.image_size, model.image_size, model.channels
    return Split(rng.integers(0, 256, shape, np.uint8), rng.integers(0, model.classes, shape[:1], np.int32))


def lower(config: Config, mesh: Mesh) -> tuple[Any, TrainState, Iterator[Batch]]:
    """Returns the training step, lowered for a mesh, and what it takes: the state, and batches of random images."""
    split = random_split(config)
    plan = build.plan_for(config, mesh, len(split))
    state, batches = make_state(plan), resident_batches(split, plan.order, 0, sys.maxsize)
    return step.make_train_step(plan).lower(state, next(batches)), state, batches


class TimedStep:
    """The compiled step of one config on random images, and its state."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._mesh = mesh
        lowered, self._state, self._batches = lower(config, mesh)
        began = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began

    def seconds(self, steps: int) -> float:
        """Returns the mean seconds of a step over several, each with a batch of its own."""
        began = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self.compiled(self._state, next(self._batches))
            devices.wait_on_cpu(self._mesh, metrics)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / steps


def step_flops(config: Config) -> float:
    """Returns the FLOPs of a step, of learned routers those of routing included: a backward pass costs two forward
    passes, one for the gradients of the weights and one for those of the activations."""
    batch, model = config.train.batch_size, routing.find(config).model()  # dense, but for learned routers
    return 3 * batch * cost.flops_per_image(model, batch)


def peak_flops(dtype: str, mesh: Mesh) -> float:
    """Returns the FLOP/s of a large matrix product, the best of several."""
    device = mesh.devices.flat[0]
    x = jax.device_put(jnp.ones((PRODUCT_SIDE, PRODUCT_SIDE), dtype), device)
    product = jax.jit(jnp.matmul, compiler_options=compilation.of_training(jnp.dtype(dtype), device.platform))

    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(product(x, x))
        return time.perf_counter() - began

    return 2 * PRODUCT_SIDE**3 / min(seconds() for _ in range(12)) * mesh.size
