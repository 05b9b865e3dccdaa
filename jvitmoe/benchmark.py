"""Times a training step of every router beside dense, all in one run:

    python -m jvitmoe.benchmark --config configs/cifar10_dense.py --config.train.batch_size=64 [--peer torch]

The config gives the dense model, the batch and the devices. Routers have the active FLOPs of the dense model. Images
are random numbers of the config's shape. `dense again` is the dense case a second time: its ratio to `dense` is the
error of the measurement. Writes benchmark.json, report.md and benchmark.png.
"""

import copy
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags

from jvitmoe import cli
from jvitmoe import config as config_lib
from jvitmoe.config import Config, ModelConfig
from jvitmoe.errors import UserError
from jvitmoe.runs import files, results, tables
from jvitmoe.runs.console import console
from jvitmoe.runtime import memory, timing

DTYPES = ["float32", "bfloat16"]
NO_TORCH = "install torch, or name a Python that has it with --peer_python"
# Fields of the model that PyTorch's ViT has; all others must have their default.
PEER_FIELDS = {"image_size", "channels", "classes", "patch", "width", "hidden", "depth", "heads", "norm", "pool"}
PEER_FIELDS |= {"position_rows", "head_hidden", "dropout", "init_layers", "dtype", "attention", "unroll"}
PEERS = {"PyTorch dense": "1 eager", "PyTorch random": "4 eager", "PyTorch compiled": "1 compiled"}  # torch_vit.py's


def cases(config: Config, only: Collection[str] = ()) -> dict[str, Config]:
    """Returns name -> config of all cases, or of those in `only`. Every router has the active FLOPs of the dense model:
    capacity is an even share of the tokens, and of two experts per token each has half the hidden width.

    Raises UserError for a name that is no case, and where the config of a case breaks a rule.
    """
    experts = max(config.routing.experts, 4)
    settings: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("dense", "dense again")},
        **{name: {"experts": experts, "granularity": name} for name in ("batch", "sample", "token")},
        "switch": {"experts": experts, "router": "switch", "capacity": 1.0},
        "top2": {"experts": experts, "router": "topk", "top_k": 2, "capacity": 1.0},
        "soft": {"experts": experts, "router": "soft"},
    }
    if unknown := set(only) - set(settings):
        raise UserError(f"--only is {', '.join(sorted(unknown))}; it must name some of {', '.join(settings)}")
    found = {}
    for name, values in settings.items():
        if only and name not in only:
            continue
        case = copy.deepcopy(config)
        case.data.stream, case.data.crop = False, "pad"  # the images are made up, on the devices
        case.data.plain_last = case.train.distil_last = 0.0  # the last part of a run has another step
        case.routing = config_lib.RoutingConfig(init="shared", **values)
        if name == "top2":
            case.model.hidden //= 2
        found[name] = case.validate()
    return found


def check_peer(model: ModelConfig) -> None:
    """Raises UserError for a model that PyTorch's ViT cannot be."""
    if odd := model.set_beyond(PEER_FIELDS) + ["pool"] * (model.pool not in ("cls", "mean")):
        found = ", ".join(f"model.{name}={getattr(model, name)}" for name in odd)
        raise UserError(f"--peer=torch has no counterpart of {found}; leave --peer out")


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
        try:
            return json.loads(answer)
        except ValueError as error:
            raise UserError(f"the PyTorch peer printed {answer.strip()!r}; it must print numbers only") from error


def main(argv: list[str]) -> None:
    """Measures, prints one table, and writes it with its figures and its picture."""
    values = cli.parse(argv, define_flags, config=True)
    config = cli.experiment(values)
    chosen = cases(config, values.only)
    if not values.dtypes:
        raise UserError("--dtypes is empty; name one or more, such as float32,bfloat16")
    if unknown := set(values.dtypes) - set(DTYPES):
        raise UserError(f"--dtypes is {', '.join(sorted(unknown))}; it must name some of {', '.join(DTYPES)}")
    if values.images < config.train.batch_size:
        raise UserError(f"--images is {values.images}; it must be at least a batch, {config.train.batch_size}")
    by_dtype = {dtype: {name: _in_dtype(case, dtype) for name, case in chosen.items()} for dtype in values.dtypes}
    if values.rounds < 1:
        raise UserError(f"--rounds is {values.rounds}; it must be at least 1")
    if values.peer:
        check_peer(config.model)
    files.make_folder(Path(values.out))  # before the measurement, which takes minutes
    # Not above: these import JAX, and --help need not wait for that.
    import jax

    from jvitmoe.runs import checkpoints
    from jvitmoe.runtime import compilation, devices
    from jvitmoe.training import timed_step

    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    mesh = devices.make_mesh(config.train)
    platform = mesh.devices.flat[0].platform
    images = timed_step.random_images(config, values.images, mesh)
    console.print(f"devices     {devices.describe(mesh)}")
    console.print(f"cases       {', '.join(chosen)}, each in {' and '.join(values.dtypes)}")
    rows, peaks, torch_version = [], {}, {}
    for dtype, configs in by_dtype.items():
        measured = []
        for name, case in configs.items():
            measured.append(timed_step.TimedStep(name, case, mesh, images))
            console.print(f"compiled    {name} {dtype} in {measured[-1].compile_seconds:.1f} s")
        peaks[dtype] = timed_step.peak_flops(dtype, mesh)
        with _peer(values.peer, values.peer_python, config) as torch:
            rows += _measure(measured, torch, dtype, values.rounds, peaks[dtype])
            torch_version = {"torch": torch.about["version"]} if torch else {}
    result = {
        "command": "python -m jvitmoe.benchmark " + shlex.join(argv[1:]),
        "hardware": devices.describe(mesh),
        "versions": checkpoints.versions() | torch_version,
        "xla": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            **{dtype: compilation.options(jax.numpy.dtype(dtype), platform) for dtype in values.dtypes},
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
    flags.DEFINE_list("dtypes", DTYPES, "Compute dtypes.", flag_values=values)
    flags.DEFINE_integer("rounds", 11, "Number of rounds; each visits every case once.", flag_values=values)
    flags.DEFINE_integer("images", 50_000, "Number of random images.", flag_values=values)
    flags.DEFINE_enum("peer", "", ["", "torch"], "Another implementation to measure.", flag_values=values)
    flags.DEFINE_string("peer_python", sys.executable, "A Python that has the peer.", flag_values=values)


def _in_dtype(config: Config, dtype: str) -> Config:
    config = copy.deepcopy(config)
    config.model.dtype = dtype
    return config.validate()


def _measure(
    measured: Sequence[Any], torch: Torch | None, dtype: str, rounds: int, peak: float
) -> list[dict[str, Any]]:
    """Returns a row per `TimedStep` and peer."""
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


def _write(result: dict[str, Any], out: Path) -> None:
    """Writes what was measured as JSON, as a table and as a picture, and prints the table."""
    files.write_text(out / "benchmark.json", json.dumps(result, indent=1) + "\n")
    from jvitmoe.runs import figures  # imports matplotlib
    from jvitmoe.training import timed_step

    figures.save(figures.throughput(result["rows"]), out / "benchmark.png")
    rows = [_cells(row) for row in result["rows"]]
    peak = ", ".join(f"{tables.quantity(flops)}FLOP/s in {d}" for d, flops in result["peak_flops_per_second"].items())
    text = (
        f"# A training step\n\n{results.made_with([result])} n (rounds): {result['rounds']}.\n\n"
        f"{tables.markdown(rows)}\n{NOTE}\n\n![images per second](benchmark.png)\n\n"
        f"- peak: products of two square matrices, side {timed_step.PRODUCT_SIDE}: {peak}\n"
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
    "EMA, compiled apart. Input: time to select and augment one batch, plus the time to draw an epoch's order over its "
    "steps."
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
    memory.use_huge_pages()
    cli.run(main)
