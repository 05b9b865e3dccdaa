"""Times a training step of every router beside dense, all in one run:

    python -m jvitmoe.benchmark --config configs/cifar10_dense.py --config.train.batch_size=64 [--peer torch]

The config says the dense model, the batch and the devices. Routers get experts at the same active FLOPs. Steps of all
are interleaved, so that a machine that drifts drifts for all alike; ratios are of the same round. Images are random
numbers in the shape of the config's. Writes benchmark.json, report.md and benchmark.png.
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
from jvitmoe.experts import build, merge, routes
from jvitmoe.experts.cost import count_parameters, flops_per_image
from jvitmoe.experts.routes import Purpose
from jvitmoe.models import vit
from jvitmoe.runs import checkpoints, files, plots, tables
from jvitmoe.runs.console import console
from jvitmoe.runtime import compilation, devices
from jvitmoe.training import step
from jvitmoe.training.plan import StepPlan
from jvitmoe.training.state import TrainState, abstract_state, make_state

VISIT_SECONDS = 0.5  # of steps of one case, before the next one has its turn
PRODUCT_SIDE = 2048  # of the square matrices whose product is the machine's peak
SHALLOW = 2  # layers, that compiling the whole depth is compared with
NO_TORCH = "install torch, or name a Python that has it with --peer_python"
FEW_DEVICES = 2  # that the step is compiled for, to read what it reduces


def cases(config: Config) -> dict[str, Config]:
    """Returns name -> config of each router, at the active FLOPs of the dense one: capacity is an even share, and with
    two experts per token each has half the hidden width."""
    experts = max(config.routing.experts, 4)
    settings: dict[str, dict[str, Any]] = {
        "dense": {},
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
    """Returns the FLOPs per image of the forward pass in training: dense ones for random routes, or a router's."""
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
            # Three times the forward pass: gradients of weights and of activations cost a forward pass each.
            "flops": 3 * batch * forward_flops(config),
        }
        self._plan = StepPlan(config, model, mesh, order.steps_per_epoch)

    def text(self) -> str:
        """Returns the compiled program as HLO."""
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
        """Returns the median seconds of what follows the gradients in a step, as a program of its own."""
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
        """Returns the median seconds that input costs a step: of reading and augmenting a batch, as a program of its
        own, and of a step's share of drawing an epoch's order."""
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
    """The original in PyTorch, in a process that waits while others compute (`scripts/torch_vit.py`)."""

    def __init__(self, python: str, config: Config) -> None:
        worker = Path(__file__).parents[1] / "scripts" / "torch_vit.py"
        if not worker.is_file():
            raise UserError(f"--peer=torch needs {worker}, which is part of the repository; run it in a checkout")
        command = [python, "-P", str(worker)]  # not from its folder, whose files have the names of others
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise UserError(f"{python} cannot be run: {error.strerror}; {NO_TORCH}") from error
        model = config_lib.to_dict(config)["model"]
        settings = {"settings": model, "batch": config.train.batch_size, "dropout": config.model.dropout}
        try:
            self.about = self._ask(json.dumps(settings))
        except UserError:
            self.close()
            raise

    def seconds(self, experts: int, dtype: str, steps: int) -> float:
        return float(self._ask(f"{experts} {dtype} {steps}"))

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
    for dtype in values.dtypes:
        _in_dtype(config, dtype)
    if values.rounds < 1:
        raise UserError(f"--rounds is {values.rounds}; it must be at least 1")
    if values.reduced_only:
        print(json.dumps(_reduced_bytes(chosen)))
        return
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is one of the things timed
    mesh = devices.make_mesh(config.train)
    images = random_images(config, values.images, mesh)
    console.print(f"devices     {devices.describe(mesh)}")
    console.print(f"cases       {', '.join(chosen)}, each in {' and '.join(values.dtypes)}")
    reduced = _reduced_bytes_elsewhere(argv)
    measured = [case for dtype in values.dtypes for case in _compile_all(chosen, dtype, mesh, images)]
    peak = {dtype: _peak(dtype, mesh) for dtype in values.dtypes}
    with _peer(values.peer, values.peer_python, config) as torch:
        rows = _interleaved(measured, torch, values.dtypes, values.rounds)
    peak = {dtype: max(peak[dtype], _peak(dtype, mesh)) for dtype in values.dtypes}
    by_name = {(case.name, case.dtype): case for case in measured}
    for row in rows:
        case = by_name.get((row["model"], row["dtype"]))
        if case:
            row |= case.facts | {
                "flops_per_second": case.facts["flops"] / row["seconds"],
                "share_of_peak": case.facts["flops"] / row["seconds"] / peak[row["dtype"]],
                "update_share": case.update_seconds() / row["seconds"],
                "input_share": case.read_seconds() / row["seconds"],
                "reduced_bytes": reduced[row["model"]],
            }
    result = {
        "command": "python -m jvitmoe.benchmark " + shlex.join(argv[1:]),
        "hardware": devices.describe(mesh),
        "versions": checkpoints.versions() | ({"torch": torch.about["version"]} if torch else {}),
        "xla": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            **{dtype: compilation.options(jnp.dtype(dtype), mesh.devices.flat[0].platform) for dtype in values.dtypes},
        },
        "batch": config.train.batch_size,
        "rounds": values.rounds,
        "peak_flops_per_second": peak,
        "compile_growth": _compile_growth(chosen, mesh, images, values.dtypes[0]),
        "merged_evaluation": _evaluation_costs(chosen, config.train.batch_size),
        "config": config_lib.flatten(config),
        "rows": rows,
    }
    _write(result, Path(values.out))


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/benchmark", "Folder for what is measured.", flag_values=values)
    flags.DEFINE_list("only", [], "Cases, such as dense,batch; all by default.", flag_values=values)
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.", flag_values=values)
    flags.DEFINE_integer("rounds", 7, "Turns that each case has.", flag_values=values)
    flags.DEFINE_integer("images", 50_000, "Images of the random set.", flag_values=values)
    flags.DEFINE_enum("peer", "", ["", "torch"], "What else to measure.", flag_values=values)
    flags.DEFINE_string("peer_python", sys.executable, "A Python that has the peer.", flag_values=values)
    flags.DEFINE_bool("reduced_only", False, "Prints the bytes that steps reduce, as JSON.", flag_values=values)


def random_images(config: Config, count: int, mesh: Mesh) -> batches.Images:
    """Returns random numbers in the shape of the config's images, on the devices."""
    rng, model = np.random.default_rng(0), config.model
    shape = count, model.image_size, model.image_size, model.channels
    pixels, labels = rng.integers(0, 256, shape, np.uint8), rng.integers(0, model.classes, shape[:1], np.int32)
    return batches.put(Split(pixels, labels), mesh)


def _compile_all(chosen: dict[str, Config], dtype: str, mesh: Mesh, images: batches.Images) -> list[Case]:
    found = []
    for name, config in chosen.items():
        case = Case(name, _in_dtype(config, dtype), mesh, images)
        console.print(f"compiled    {name} {dtype} in {case.compile_seconds:.1f} s")
        found.append(case)
    return found


def _in_dtype(config: Config, dtype: str) -> Config:
    config = copy.deepcopy(config)
    config.model.dtype = dtype
    return config.validate()


def _interleaved(
    measured: Sequence[Case], torch: Torch | None, dtypes: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """Returns a row per case and peer: median step, spread, and median ratio to dense of the same dtype and round."""
    batch = measured[0].batch
    work: dict[tuple[str, str], Callable[[int], float]] = {(c.name, c.dtype): c.seconds for c in measured}
    if torch:
        for name, experts in (("PyTorch dense", 1), ("PyTorch random", 4)):
            for dtype in dtypes:
                work[name, dtype] = functools.partial(torch.seconds, experts, dtype)
    steps = {}
    for key, seconds in work.items():
        seconds(1)  # what a first time costs is nobody's step
        steps[key] = max(1, round(VISIT_SECONDS / seconds(1)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    began = time.monotonic()
    for number in range(rounds):
        order = list(work)[number % len(work) :] + list(work)[: number % len(work)]
        for key in order:
            times[key].append(work[key](steps[key]))
        left = (time.monotonic() - began) / (number + 1) * (rounds - number - 1)
        console.print(f"round       {number + 1} of {rounds}, {left:.0f} s left")
    rows = []
    for (name, dtype), values in times.items():
        median = statistics.median(values)
        row = {
            "model": name,
            "dtype": dtype,
            "seconds": median,
            "spread": (max(values) - min(values)) / median,
            "images_per_second": batch / median,
            "seconds_per_round": values,
        }
        if ("dense", dtype) in times:
            ratios = [value / dense for value, dense in zip(values, times["dense", dtype], strict=True)]
            row["times_dense"] = statistics.median(ratios)
        rows.append(row)
    return rows


def _peak(dtype: str, mesh: Mesh) -> float:
    """Returns the floating-point operations per second of a large square product, the best of several."""
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


def _compile_growth(
    chosen: dict[str, Config], mesh: Mesh, images: batches.Images, dtype: str
) -> dict[str, dict[str, float]]:
    """Returns name -> seconds to compile the step at 2 layers and at all, the lesser of two tries, and their ratio."""
    found: dict[str, dict[str, float]] = {}
    for name in [name for name in ("dense", "batch", "sample") if name in chosen]:
        shallow = _in_dtype(chosen[name], dtype)
        shallow.model.depth = SHALLOW
        few, many = (
            min(Case(name, config, mesh, images).compile_seconds for _ in range(2))
            for config in (shallow.validate(), _in_dtype(chosen[name], dtype))
        )
        found[name] = {"layers": chosen[name].model.depth, "shallow": few, "deep": many, "ratio": many / few}
    return found


def _evaluation_costs(chosen: dict[str, Config], batch: int) -> dict[str, dict[str, float]]:
    """Returns name -> FLOPs and bytes of the compiled evaluation of the model that ships, dense or merged."""
    found: dict[str, dict[str, float]] = {}
    for name in [name for name in ("dense", "batch", "sample") if name in chosen]:
        config = chosen[name]
        model = build.make_model(config, "cpu")
        params = jax.eval_shape(lambda m=model: vit.init(m, jax.random.key(0)))
        tree = params if name == "dense" else jax.eval_shape(merge.average_experts, params)
        size = config.model.image_size
        images = jax.ShapeDtypeStruct((batch, size, size, config.model.channels), jnp.float32)
        plain = model.plain()
        lowered = jax.jit(lambda p, x, net=plain: vit.logits(net, p, x)).lower(tree, images)
        cost = compilation.for_reading(lowered).cost_analysis()
        assert cost is not None
        found[name] = {"flops": float(cost["flops"]), "bytes": float(cost["bytes accessed"])}
    return found


def _reduced_bytes(chosen: dict[str, Config]) -> dict[str, int]:
    """Returns name -> bytes that a device gives to the sums of a step on two devices."""
    found = {}
    for name, config in chosen.items():
        config = _in_dtype(config, "float32")
        config.train.devices = FEW_DEVICES
        mesh = devices.make_mesh(config.train)
        model = build.make_model(config, "cpu")
        split = Split(
            np.zeros((config.train.batch_size, *[config.model.image_size] * 2, config.model.channels), np.uint8),
            np.zeros((config.train.batch_size,), np.int32),
        )
        order = batches.TrainOrder(len(split), config.train.batch_size, jax.random.key(0), mesh, config.slots)
        program = step.make_train_step(config, model, mesh, order.steps_per_epoch)
        given = abstract_state(config, model, mesh), batches.put(split, mesh), order.epoch(0)
        found[name] = compilation.reduced_bytes(compilation.for_reading(program.lower(*given)).as_text())
    return found


def _reduced_bytes_elsewhere(argv: Sequence[str]) -> dict[str, int]:
    """As `_reduced_bytes`, in a process that pretends to have two CPU devices: one device has nothing to reduce."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(FEW_DEVICES)}
    done = subprocess.run(
        [sys.executable, "-m", "jvitmoe.benchmark", *argv[1:], "--reduced_only", "--config.train.platform=cpu"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the step cannot be compiled for two devices: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _write(result: dict[str, Any], out: Path) -> None:
    """Writes what was measured as JSON, as a table and as a picture, and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "benchmark.json", json.dumps(result, indent=1) + "\n")
    plots.throughput(result["rows"], out / "benchmark.png")
    rows = [_cells(row) for row in result["rows"]]
    growth = "".join(
        f"- compiling {name}: {found['shallow']:.1f} s at {SHALLOW} layers, {found['deep']:.1f} s at "
        f"{found['layers']}, {found['ratio']:.2f} times\n"
        for name, found in result["compile_growth"].items()
    )
    costs = "".join(
        f"- evaluating {'dense' if name == 'dense' else f'the model merged from {name}'}: "
        f"{tables.quantity(cost['flops'])} FLOPs, {tables.quantity(cost['bytes'])} bytes\n"
        for name, cost in result["merged_evaluation"].items()
    )
    peak = ", ".join(f"{tables.quantity(flops)}FLOP/s in {d}" for d, flops in result["peak_flops_per_second"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = (
        f"# A training step\n\n{tables.markdown(rows)}\n{NOTE}\n\n![images per second](benchmark.png)\n\n"
        f"- the machine's own matrix products ({PRODUCT_SIDE} square): {peak}\n{growth}{costs}"
        f"- batch {result['batch']}, {result['rounds']} rounds, dropout {result['config']['model.dropout']}, "
        f"XLA's options: {json.dumps(result['xla'])}\n\n"
        f"`{result['command']}`\n\nHardware: {result['hardware']}. Versions: {versions}.\n"
    )
    files.write_text(out / "report.md", text)
    tables.show(rows, "a training step")
    console.print(f"written     {out / 'report.md'}")


NOTE = (
    "Step: median over rounds, ± half the distance from the fastest to the slowest. Times dense: median ratio to the "
    "dense step of the same dtype and round. FLOP/s: three forward passes as XLA counts them. Memory: planned by XLA. "
    "Update: what follows the gradients (optimiser, pull), as a program of its own. Input: reading, augmenting, order. "
    "Reduced: bytes that a device gives to sums over devices, in the program compiled for two."
)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Returns the text cells of a row; "-" where a peer says nothing."""

    def cell(name: str, form: Callable[[float], str]) -> str:
        return form(row[name]) if name in row else "-"

    return {
        "model": row["model"],
        "dtype": row["dtype"],
        "step": f"{1e3 * row['seconds']:,.1f} ± {500 * row['spread'] * row['seconds']:.1f} ms",
        "times dense": cell("times_dense", "{:.3f}".format),
        "images/s": f"{row['images_per_second']:,.0f}",
        "FLOP/s": cell("flops_per_second", tables.quantity),
        "of peak": cell("share_of_peak", "{:.0%}".format),
        "compile": cell("compile_seconds", "{:.1f} s".format),
        "memory": cell("planned_bytes", lambda x: tables.quantity(x) + "B"),
        "update": cell("update_share", "{:.1%}".format),
        "input": cell("input_share", "{:.1%}".format),
        "reduced": cell("reduced_bytes", lambda x: tables.quantity(x) + "B"),
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
