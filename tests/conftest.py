"""JAX set strict before anything imports it, and the few fixtures that several files share."""

# ruff: noqa: E402
import hashlib
import os
from importlib import metadata
from pathlib import Path

# Programs are compiled once for all tests and later runs of the suite, by the versions and the processor that they are
# made for. Nothing is left in the user's own cache.
CPUINFO = Path("/proc/cpuinfo")
PROCESSOR = [line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")] if CPUINFO.exists() else []
MADE_FOR = metadata.version("jax"), metadata.version("jaxlib"), *PROCESSOR[:1]
COMPILED = Path(__file__).parents[1] / "build" / "compiled" / hashlib.sha256(repr(MADE_FOR).encode()).hexdigest()[:12]
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
CACHED_SECONDS = 0.3
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(CACHED_SECONDS)

# Tests of tiny models are nearly all compilation; without LLVM's optimisation it takes half the time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("GLIBC_TUNABLES", "")  # processes that were forked must not be replaced by fresh ones
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import collections
import contextlib
import dataclasses
import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.config import Config
from jvitmoe.data.batches import Batch, resident_batches
from jvitmoe.data.pictures import Picture
from jvitmoe.data.splits import Record, Records, Split, in_memory
from jvitmoe.machine import signals
from jvitmoe.machine.devices import make_mesh
from jvitmoe.training import build, loop
from jvitmoe.training.state import Plan, TrainState, make_state
from jvitmoe.training.step import Metrics, make_train_step

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

TINY = {
    "model": {"width": 8, "hidden": 12, "depth": 2, "heads": 2, "patch": 4, "classes": 3},
    "train": {"batch_size": 8, "epochs": 4, "devices": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_files_are_let_go() -> Iterator[None]:
    """Each compiled program holds several memory maps, and a process may have 65,530: all files' are more than that."""
    yield
    jax.clear_caches()
    gc.collect()
    # Off since a bfloat16 program was compiled with `compilation.options`; none is left.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHED_SECONDS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs a whole run as slow."""
    for item in items:
        if "experiment_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


TALLY = "tally: "


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Returns what adds to a figure of docs/reliability.md, which the suite prints at its end: tally("kills", 20)."""
    return lambda figure, count: record_property(TALLY + figure, count)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    figures: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, count in report.user_properties:
            if name.startswith(TALLY):
                figures[name.removeprefix(TALLY)] += count
    for figure, count in figures.items():
        terminalreporter.write_line(f"{count:6,} {figure}")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """Returns a maker of small valid configs: tiny_config(routing={"experts": 4}, train={"devices": 2})."""

    def make(**overrides: dict[str, Any]) -> Config:
        sections = {*TINY, *overrides}
        return rules.check(config_lib.from_dict({s: TINY.get(s, {}) | overrides.get(s, {}) for s in sections}))

    return make


@pytest.fixture(scope="session")
def tiny_split() -> Split:
    """Returns 26 images of three classes that can be learned: noise, and a bright quarter that tells the class."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 3, 26).astype(np.int32)
    images_NHWc = rng.integers(0, 128, (26, 8, 8, 1)).astype(np.uint8)
    for image_HWc, label in zip(images_NHWc, labels_N, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image_HWc[row : row + 4, column : column + 4] += 100
    return Split(images_NHWc, labels_N)


@pytest.fixture
def damaged_7(tiny_split: Split) -> Records:
    """Returns the tiny split as records, of which picture 7 cannot be read."""

    def read(numbers: Sequence[int]) -> list[Record]:
        found = in_memory(tiny_split).read(numbers)
        return [(Picture(f"picture {n}", b""), 0) if n == 7 else one for n, one in zip(numbers, found, strict=True)]

    return dataclasses.replace(in_memory(tiny_split), read=read, labels_N=None)


@dataclasses.dataclass
class Training:
    """One run, set up as `jvitmoe.train` sets it up."""

    plan: Plan
    split: Split
    step: jax.stages.Wrapped
    state: TrainState  # on the devices
    history: list[TrainState] = dataclasses.field(default_factory=list)  # copies on the host: [k] after k steps
    metrics: list[Metrics] = dataclasses.field(default_factory=list)  # on the host: [k] of the step after history[k]
    _next: int = -1  # step of the next batch

    def batch(self, number: int) -> Batch:
        """Returns the batch of a step."""
        if self._next != number:
            self._batches = resident_batches(self.split, self.plan.order, number, 10**6)
        self._next = number + 1
        return next(self._batches)

    def run(self, steps: int) -> "Training":
        """Goes on for `steps` steps and returns itself."""
        self.history = self.history or [host_copy(self.state)]
        for _ in range(steps):
            # Waited for at every step: on JAX 0.10 collectives of two programs in flight can deadlock on a CPU.
            batch = self.batch(int(self.state.step))
            self.state, metrics = jax.block_until_ready(self.step(self.state, batch))
            self.history.append(host_copy(self.state))
            self.metrics.append(host_copy(metrics))
        return self


def host_copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


@pytest.fixture(scope="session")
def training(tiny_split: Split) -> Callable[[Config], Training]:
    """Returns a maker of runs over the tiny split: training(config).run(5)."""

    def make(config: Config) -> Training:
        plan = build.plan_for(config, make_mesh(config.train), len(tiny_split))
        return Training(plan, tiny_split, make_train_step(plan), make_state(plan))

    return make


@pytest.fixture(scope="session")
def experiment_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a finished run of four experts on digits, tiny, with an EMA: what exports and predictions
    start from."""
    workdir = tmp_path_factory.mktemp("exported") / "run"
    config = config_lib.from_dict(
        {
            "model": {**TINY["model"], "classes": 10},
            "routing": {"experts": 4, "init": "shared"},
            "optim": {"learning_rate": 1e-2},
            "train": {**TINY["train"], "batch_size": 64, "epochs": 2, "eval_every": 2, "ema": 0.9},
        }
    )
    with contextlib.ExitStack() as held:
        run = build.build(rules.check(config), build.choose(config))
        loop.fit(run, workdir, held.enter_context(signals.Stop()), held)
    return workdir


class Peers:
    """The real libraries, asked by name: peers("make_timm", folder=…)."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("peers.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"},
        )

    def __call__(self, action: str, **arguments: object) -> dict:
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        self._process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process of the peers has died"}')
        assert "error" not in answer, answer["error"]
        return answer["ok"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    """Returns the real libraries, in the Python that JVITMOE_PEERS names or in this one."""
    python = os.environ.get("JVITMOE_PEERS")
    if not python:
        if any(importlib.util.find_spec(name) is None for name in ("torch", "timm", "transformers")):
            pytest.skip("needs torch, timm and transformers: `make test` installs them, or set JVITMOE_PEERS")
        python = sys.executable
    peers = Peers(python)
    yield peers
    peers.close()
