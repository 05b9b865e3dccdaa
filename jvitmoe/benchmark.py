"""Times a training step of every router beside dense, all in one run:

    python -m jvitmoe.benchmark --config configs/cifar10_dense.py --config.train.batch_size=64 [--peer torch]

The config gives the dense model, the batch and the devices. Routers have the active FLOPs of the dense model. Images
are random numbers of the config's shape. `dense again` is the dense case a second time: its ratio to `dense` is the
error of the measurement. Writes benchmark.json, report.md and benchmark.png.
"""

import copy
import dataclasses
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from jvitmoe import cli
from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.data import augment, batches
from jvitmoe.data.splits import Split
from jvitmoe.errors import UserError
from jvitmoe.experts import build, routes
from jvitmoe.experts.cost import count_parameters, flops_per_image
from jvitmoe.experts.routes import Purpose
from jvitmoe.runs import checkpoints, files, plots, results, tables
from jvitmoe.runs.console import console
from jvitmoe.runtime import compilation, devices, timing
from jvitmoe.training import step
from jvitmoe.training.plan import StepPlan
from jvitmoe.training.state import TrainState, make_state

PRODUCT_SIDE = 2048  # the product of two square matrices of this side measures the peak of the machine
NO_TORCH = "install torch, or name a Python that has it with --peer_python"
PEERS = {"PyTorch dense": "1 eager", "PyTorch random": "4 eager", "PyTorch compiled": "1 compiled"}  # torch_vit.py's


def cases(config: Config) -> dict[str, Config]:
    """Returns name -> config. Every router has the active FLOPs of the dense model: capacity is an even share of the
    tokens, and of two experts per token each has half the hidden width."""
    experts = max(config.routing.experts, 4)
    settings: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("dense", "dense again")},
        **{name: {"experts": experts, "granularity": name} for name in ("batch", "sample", "token")},
        "switch": {"experts": experts, "router": "switch", "capacity": 1.0},
        "top2": {"experts": experts, "router": "topk", "top_k": 2, "capacity": 1.0},
        "soft": {"experts": experts, "router": "soft"},
    }
    found = {}
    for name, values in settings.items():
        case = copy.deepcopy(config)
        case.routing = config_lib.RoutingConfig(init="shared", **values)
        if name == "top2":
            case.model.hidden //= 2
        found[name] = case.validate()
    return found


def forward_flops(config: Config) -> float:
    """Returns the FLOPs per image of a forward pass in training, those of a learned router included."""
    model = build.make_model(config, "cpu")
    if model.router is None:
        return flops_per_image(model.plain(), config.train.batch_size)
    settings = dataclasses.replace(model.router, eval_capacity=model.router.capacity)
    return flops_per_image(model.clone(router=settings), config.train.batch_size)


class Case:
    """The compiled step of one config, and its state."""

    def __init__(self, name: str, config: Config, mesh: Mesh, images: batches.Images) -> None:
        self.name, self._mesh, self._config, self._images = name, mesh, config, images
        platform, batch = mesh.devices.flat[0].platform, config.train.batch_size
        model = build.make_model(config, platform)
        self.dtype, self.batch = model.dtype.name, batch
        key = routes.address(jax.random.key(config.train.seed), Purpose.ORDER)
        order = batches.TrainOrder(len(images.labels_N), batch, key, mesh, config.slots)
        self._index_SB = order.epoch(0)
        train_step = step.make_train_step(config, model, mesh, order.steps_per_epoch)
        self._state = make_state(config, model, mesh)
        began = time.perf_counter()
        self._step = train_step.lower(self._state, self._images, self._index_SB).compile()
        self.compile_seconds = time.perf_counter() - began
        self._state, _ = jax.block_until_ready(self._step(self._state, self._images, self._index_SB))  # warm
        active, total = count_parameters(config)
        self.facts = {
            "parameters": active,
            "total_parameters": total,
            "compile_seconds": self.compile_seconds,
            "planned_bytes": compilation.planned_bytes(self._step),
            # A backward pass costs two forward passes: gradients of the weights and of the activations.
            "flops": 3 * batch * forward_flops(config),
        }
        self._plan = StepPlan(config, model, mesh, order.steps_per_epoch)

    def text(self) -> str:
        """Returns the HLO text of the compiled step."""
        return str(self._step.as_text())

    def seconds(self, steps: int) -> float:
        """Returns the mean seconds of a step over several."""
        began = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._images, self._index_SB)
            devices.settle(self._mesh, metrics)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / steps

    def update_seconds(self, repeats: int = 5) -> float:
        """Returns the median seconds of a step's optimiser, pull and EMA, compiled apart from the gradients."""
        plan, picked = self._plan, step.draw_routes(self._plan, jnp.int32(0))
        active = step.take(plan, self._state, picked).params
        grads = jax.block_until_ready(jax.tree.map(lambda x: x * 1e-3, active))

        def after_gradients(before: TrainState, grads: Any) -> TrainState:
            return step.apply_gradients(plan, before, step.take(plan, before, picked), picked, jnp.float32(0), grads)[0]

        program = jax.jit(after_gradients, donate_argnums=0)
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            self._state = jax.block_until_ready(program(self._state, grads))
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def read_seconds(self, repeats: int = 5) -> float:
        """Returns the median seconds of a step's input: selecting and augmenting a batch, compiled apart, and a step's
        share of drawing the order of an epoch."""
        config = self._config

        @jax.jit
        def read(split: batches.Images, index_B: jax.Array) -> jax.Array:
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(len(index_B)))
            targets_BC = jax.nn.one_hot(split.labels_N[index_B], config.model.classes)
            images, _ = augment.augment(config.data, key_B, split.images_NHWc[index_B], targets_BC)
            return augment.normalize(images)

        key = jax.random.key(0)
        order = batches.TrainOrder(len(self._images.labels_N), config.train.batch_size, key, self._mesh, config.slots)
        shares: tuple[tuple[Callable[[], Any], int], ...] = (
            (lambda: read(self._images, self._index_SB[0]), 1),
            (lambda: order.epoch(1), order.steps_per_epoch),
        )
        return sum(_median_seconds(work, repeats) / steps for work, steps in shares)


class Torch:
    """The original in PyTorch, in a process that sleeps while this one computes (`scripts/torch_vit.py`)."""

    def __init__(self, python: str, config: Config) -> None:
        worker = Path(__file__).parents[1] / "scripts" / "torch_vit.py"
        if not worker.is_file():
            raise UserError(f"--peer=torch needs {worker}, which is part of the repository; run it in a checkout")
        command = [python, "-P", str(worker)]  # -P: files in scripts/ must not shadow modules
        env = os.environ | {"OMP_WAIT_POLICY": "passive"}  # its threads must not spin while others are timed
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        except OSError as error:
            raise UserError(f"{python} cannot be run: {error.strerror}; {NO_TORCH}") from error
        model = config_lib.to_dict(config)["model"]
        settings = {"settings": model, "batch": config.train.batch_size, "dropout": config.model.dropout}
        try:
            self.about = self._ask(json.dumps(settings))
        except UserError:
            self.close()
            raise

    def seconds(self, model: str, dtype: str, steps: int) -> float:
        """Returns the mean seconds of a step of "EXPERTS eager" or "EXPERTS compiled"."""
        return float(self._ask(f"{model} {dtype} {steps}"))

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(f"the PyTorch peer ended; {NO_TORCH}")
        return json.loads(answer)


def main(argv: list[str]) -> None:
    """Measures, prints one table, and writes it with its figures and its picture."""
    values = cli.parse(argv, define_flags, config=True)
    config = cli.experiment(values)
    chosen = cases(config)
    if unknown := set(values.only) - set(chosen):
        raise UserError(f"--only is {', '.join(sorted(unknown))}; it must name some of {', '.join(chosen)}")
    chosen = {name: case for name, case in chosen.items() if not values.only or name in values.only}
    by_dtype = {dtype: {name: _in_dtype(case, dtype) for name, case in chosen.items()} for dtype in values.dtypes}
    if values.rounds < 1:
        raise UserError(f"--rounds is {values.rounds}; it must be at least 1")
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    mesh = devices.make_mesh(config.train)
    images = random_images(config, values.images, mesh)
    console.print(f"devices     {devices.describe(mesh)}")
    console.print(f"cases       {', '.join(chosen)}, each in {' and '.join(values.dtypes)}")
    rows, peaks, torch_version = [], {}, {}
    for dtype, configs in by_dtype.items():
        measured = [_compiled(name, case, mesh, images) for name, case in configs.items()]
        peaks[dtype] = _peak(dtype, mesh)
        with _peer(values.peer, values.peer_python, config) as torch:
            rows += _measure(measured, torch, dtype, values.rounds, peaks[dtype])
            torch_version = {"torch": torch.about["version"]} if torch else {}
    result = {
        "command": "python -m jvitmoe.benchmark " + shlex.join(argv[1:]),
        "hardware": devices.describe(mesh),
        "versions": checkpoints.versions() | torch_version,
        "xla": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            **{dtype: compilation.options(jnp.dtype(dtype), mesh.devices.flat[0].platform) for dtype in values.dtypes},
        },
        "batch": config.train.batch_size,
        "rounds": values.rounds,
        "peak_flops_per_second": peaks,
        "config": config_lib.flatten(config),
        "rows": rows,
    }
    _write(result, Path(values.out))


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/benchmark", "Folder for the results.", flag_values=values)
    flags.DEFINE_list("only", [], "Cases to measure, such as dense,batch. Default: all.", flag_values=values)
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.", flag_values=values)
    flags.DEFINE_integer("rounds", 11, "Number of rounds; each visits every case once.", flag_values=values)
    flags.DEFINE_integer("images", 50_000, "Number of random images.", flag_values=values)
    flags.DEFINE_enum("peer", "", ["", "torch"], "Another implementation to measure.", flag_values=values)
    flags.DEFINE_string("peer_python", sys.executable, "A Python that has the peer.", flag_values=values)


def random_images(config: Config, count: int, mesh: Mesh) -> batches.Images:
    """Returns `count` random images of the config's shape, on the devices."""
    rng, model = np.random.default_rng(0), config.model
    shape = count, model.image_size, model.image_size, model.channels
    pixels, labels = rng.integers(0, 256, shape, np.uint8), rng.integers(0, model.classes, shape[:1], np.int32)
    return batches.put(Split(pixels, labels), mesh)


def _compiled(name: str, config: Config, mesh: Mesh, images: batches.Images) -> Case:
    case = Case(name, config, mesh, images)
    console.print(f"compiled    {name} {case.dtype} in {case.compile_seconds:.1f} s")
    return case


def _in_dtype(config: Config, dtype: str) -> Config:
    config = copy.deepcopy(config)
    config.model.dtype = dtype
    return config.validate()


def _measure(
    measured: Sequence[Case], torch: Torch | None, dtype: str, rounds: int, peak: float
) -> list[dict[str, Any]]:
    """Returns a row per case and peer."""
    work: dict[str, timing.Work] = {case.name: case.seconds for case in measured}
    if torch:
        work |= {name: functools.partial(torch.seconds, model, dtype) for name, model in PEERS.items()}
    times = timing.interleave(
        work,
        rounds,
        progress=lambda number, left: console.print(f"round       {number} of {rounds}, {left:.0f} s left"),
    )
    cases_by_name, rows = {case.name: case for case in measured}, []
    for name, values in times.items():
        median = statistics.median(values)
        row: dict[str, Any] = {
            "model": name,
            "dtype": dtype,
            "seconds": median,
            "images_per_second": measured[0].batch / median,
            "seconds_per_round": values,
        }
        if "dense" in times:
            row["times_dense"], *row["times_dense_interval"] = timing.ratio(values, times["dense"])
        if case := cases_by_name.get(name):
            rate = case.facts["flops"] / median
            row |= case.facts | {
                "flops_per_second": rate,
                "share_of_peak": rate / peak,
                "update_share": case.update_seconds() / median,
                "input_share": case.read_seconds() / median,
            }
        rows.append(row)
    return rows


def _peak(dtype: str, mesh: Mesh) -> float:
    """Returns the FLOP/s of a large matrix product, the best of several."""
    device = mesh.devices.flat[0]
    x = jax.device_put(jnp.ones((PRODUCT_SIDE, PRODUCT_SIDE), dtype), device)
    product = jax.jit(jnp.matmul, compiler_options=compilation.options(jnp.dtype(dtype), device.platform))
    return 2 * PRODUCT_SIDE**3 / min(_seconds(lambda: product(x, x)) for _ in range(12)) * mesh.size


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def _median_seconds(work: Callable[[], Any], repeats: int) -> float:
    _seconds(work)
    return statistics.median(_seconds(work) for _ in range(repeats))


def _write(result: dict[str, Any], out: Path) -> None:
    """Writes what was measured as JSON, as a table and as a picture, and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "benchmark.json", json.dumps(result, indent=1) + "\n")
    plots.throughput(result["rows"], out / "benchmark.png")
    rows = [_cells(row) for row in result["rows"]]
    peak = ", ".join(f"{tables.quantity(flops)}FLOP/s in {d}" for d, flops in result["peak_flops_per_second"].items())
    text = (
        f"# A training step\n\n{results.made_with([result])} n (rounds): {result['rounds']}.\n\n"
        f"{tables.markdown(rows)}\n{NOTE}\n\n![images per second](benchmark.png)\n\n"
        f"- peak: products of two square matrices, side {PRODUCT_SIDE}: {peak}\n"
        f"- batch {result['batch']}, dropout {result['config']['model.dropout']}, "
        f"XLA options: {json.dumps(result['xla'])}\n\n"
        f"`{result['command']}`\n"
    )
    files.write_text(out / "report.md", text)
    tables.show(rows, "a training step")
    console.print(f"written     {out / 'report.md'}")


NOTE = (
    "Step: median over rounds, with the fastest and the slowest. Times dense: median of the ratio to the dense step of "
    "the same round, with a 95 % interval. `dense again` is the dense case once more: its ratio is the error of the "
    "measurement. FLOP/s: three forward passes as XLA counts them. Memory: planned by XLA. Update: optimiser, pull and "
    "EMA, compiled apart. Input: selecting and augmenting a batch, and its share of drawing the order."
)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Returns the text cells of a row; "-" where a peer has no value."""

    def cell(name: str, form: Callable[[float], str]) -> str:
        return form(row[name]) if name in row else "-"

    low, high = (1e3 * edge(row["seconds_per_round"]) for edge in (min, max))
    between = row.get("times_dense_interval")
    return {
        "model": row["model"],
        "dtype": row["dtype"],
        "step, ms": f"{1e3 * row['seconds']:,.1f} ({low:,.1f} to {high:,.1f})",
        "times dense": f"{row['times_dense']:.3f} ({between[0]:.3f} to {between[1]:.3f})" if between else "-",
        "images/s": f"{row['images_per_second']:,.0f}",
        "FLOP/s": cell("flops_per_second", tables.quantity),
        "of peak": cell("share_of_peak", "{:.0%}".format),
        "compile": cell("compile_seconds", "{:.1f} s".format),
        "memory": cell("planned_bytes", lambda x: tables.quantity(x) + "B"),
        "update": cell("update_share", "{:.1%}".format),
        "input": cell("input_share", "{:.1%}".format),
        "parameters": cell("parameters", "{:,}".format),
        "total": cell("total_parameters", "{:,}".format),
    }


@contextmanager
def _peer(name: str, python: str, config: Config) -> Iterator[Torch | None]:
    torch = Torch(python, config) if name else None
    try:
        yield torch
    finally:
        if torch:
            torch.close()


if __name__ == "__main__":
    cli.run(main)
