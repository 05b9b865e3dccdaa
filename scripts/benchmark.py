"""Times a training step of random and learned routers beside dense, all in one run:

    python scripts/benchmark.py --config cifar10_dense --config.train.batch_size=64 [--peer .venv-peers/bin/python]

The config gives the dense model, the batch and the devices. Routers have the active FLOPs of the dense model. Images
are random numbers of the config's shape. `dense again` is the dense case a second time: its ratio to `dense` is the
error of the measurement. Writes benchmark.json, report.md and benchmark.png.
"""

import contextlib
import copy
import functools
import json
import os
import shlex
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timed_step
from absl import flags
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jvitmoe import config as config_lib
from jvitmoe import routing, rules
from jvitmoe.commands import cli
from jvitmoe.config import Config, ModelConfig
from jvitmoe.errors import UserError
from jvitmoe.machine import compilation, devices, memory, programs
from jvitmoe.reports import figures, results
from jvitmoe.runs import checkpoints, safe_io
from jvitmoe.runs.console import console, markdown_table, quantity, show_table

DTYPES = ["float32", "bfloat16"]
# Fields of the model that PyTorch's ViT has; all others must have their default.
PEER_FIELDS = {"image_size", "channels", "classes", "patch", "width", "hidden", "depth", "heads", "pool"}
PEER_FIELDS |= {"head_hidden", "dropout", "init", "dtype"}
PEERS = {"PyTorch dense": "1 eager", "PyTorch random": "4 eager", "PyTorch compiled": "1 compiled"}  # torch_vit.py's
NOTE = (
    "Step: median over rounds, with the fastest and the slowest. Times dense: median of the ratio to the dense step of "
    "the same round, with a 95 % interval. `dense again` is the dense case once more: its ratio is the error of the "
    "measurement. FLOP/s: three forward passes as XLA counts them. Memory: planned by XLA."
)


def cases(config: Config, only: Collection[str] = ()) -> dict[str, Config]:
    """Returns name -> config of all cases, or of those in `only`. Every router has the active FLOPs of the dense model:
    capacity is an even share of the tokens, and of two experts per token each has half the hidden width.

    Raises UserError for a name that is no case, and where the config of a case breaks a rule.
    """
    experts = {"experts": max(config.routing.experts, 4)}
    even = {"capacity": 1.0, "eval_capacity": 1.0}
    settings: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("dense", "dense again")},
        **{name: experts | {"kind": name} for name in ("batch", "sample", "token")},
        "switch": experts | even | {"kind": "switch"},
        "top2": experts | even | {"kind": "topk", "top_k": 2},
        "soft": experts | {"kind": "soft"},
    }
    if unknown := set(only) - set(settings):
        raise UserError(f"--only is {', '.join(sorted(unknown))}; it must name some of {', '.join(settings)}")
    found = {}
    for name in only or settings:
        case = copy.deepcopy(config)
        case.data.stream, case.data.crop = False, "exact"  # the images are made up, on the devices
        case.data.plain_at_end = 0.0  # the last part of a run has another step
        case.routing = config_lib.RoutingConfig(init="shared", **settings[name])
        if name == "top2":
            case.model.hidden //= 2
        found[name] = rules.check(case)
        routing.find(case)
    return found


def check_peer(model: ModelConfig) -> None:
    """Raises UserError for a model that PyTorch's ViT cannot be."""
    if odd := model.set_beyond(PEER_FIELDS) + ["pool"] * (model.pool not in ("cls", "mean")):
        found = ", ".join(f"model.{name}={getattr(model, name)}" for name in odd)
        raise UserError(f"--peer has no counterpart of {found}; leave --peer out")


@contextlib.contextmanager
def torch_peer(python: str, config: Config) -> Iterator[timed_step.Peer | None]:
    """Yields torch_vit.py, the original in PyTorch, which knows the model already; None without a Python for it."""
    if not python:
        yield None
        return
    check_peer(config.model)
    # -P: files in scripts/ must not shadow modules.
    with contextlib.closing(timed_step.Peer(python, "-P", str(Path(__file__).with_name("torch_vit.py")))) as peer:
        model = config_lib.to_dict(config)["model"]
        job = {"settings": model, "batch": config.train.batch_size, "dropout": config.model.dropout}
        peer.about = peer.ask(json.dumps(job))
        yield peer


def peer_seconds(torch: timed_step.Peer, about: str, steps: int) -> float:
    """Returns the mean seconds of a step of "EXPERTS eager DTYPE" or "EXPERTS compiled DTYPE"."""
    return float(torch.ask(f"{about} {steps}"))


def main(argv: list[str]) -> None:
    """Measures, prints one table, and writes it with its figures and its picture."""
    values = cli.parse(argv, define_flags, config=True)
    config, out = cli.experiment(values), Path(values.out)
    chosen = cases(config, values.only)
    if not values.dtypes or not set(values.dtypes) <= set(DTYPES) or values.rounds < 1:
        raise UserError(f"--dtypes must be some of {', '.join(DTYPES)}, and --rounds at least 1")
    safe_io.make_folder(out)  # before the measurement, which takes minutes
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    mesh = devices.make_mesh(config.train)
    platform = mesh.devices.flat[0].platform
    console.print(f"devices     {devices.describe(mesh)}")
    peaks, rows = {dtype: timed_step.peak_flops(dtype, mesh) for dtype in values.dtypes}, []
    with torch_peer(values.peer, config) as torch:
        for dtype in values.dtypes:
            rows += measure(chosen, torch, dtype, values.rounds, mesh, peaks[dtype])
    result = {
        "command": "python scripts/benchmark.py " + shlex.join(argv[1:]),
        "hardware": devices.describe(mesh),
        "versions": checkpoints.versions() | ({"torch": torch.about["version"]} if torch else {}),
        "xla": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            **{dtype: compilation.of_training(jax.numpy.dtype(dtype), platform) for dtype in values.dtypes},
        },
        "batch": config.train.batch_size,
        "rounds": values.rounds,
        "peak_flops_per_second": peaks,
        "config": config_lib.flatten(config),
        "rows": rows,
    }
    write(result, out)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/benchmark", "Folder for the results.", flag_values=values)
    flags.DEFINE_list("only", [], "Cases to measure, such as dense,batch. Default: all.", flag_values=values)
    flags.DEFINE_list("dtypes", DTYPES, "Compute dtypes.", flag_values=values)
    flags.DEFINE_integer("rounds", 11, "Number of rounds; each visits every case once.", flag_values=values)
    flags.DEFINE_string("peer", "", "A Python that has PyTorch: times the original in it too.", flag_values=values)


def measure(
    configs: Mapping[str, Config], torch: timed_step.Peer | None, dtype: str, rounds: int, mesh: Mesh, peak: float
) -> list[dict[str, Any]]:
    """Returns a row per case and peer."""
    facts, work = {}, dict[str, timed_step.Work]()
    for name, config in configs.items():
        case = copy.deepcopy(config)
        case.model.dtype = dtype
        timed = timed_step.TimedStep(rules.check(case), mesh)
        active, total = routing.find(case).count_parameters()
        facts[name] = {
            "parameters": active,
            "total_parameters": total,
            "compile_seconds": timed.compile_seconds,
            "planned_bytes": programs.planned_bytes(timed.compiled),
            "flops": timed_step.step_flops(case),
        }
        work[name] = timed.seconds
        console.print(f"compiled    {name} {dtype} in {timed.compile_seconds:.1f} s")
    if torch:
        work |= {name: functools.partial(peer_seconds, torch, f"{model} {dtype}") for name, model in PEERS.items()}
    times = timed_step.interleave(
        work,
        rounds,
        progress=lambda number, left: console.print(f"round       {number} of {rounds}, {left:.0f} s left"),
    )
    batch, rows = next(iter(configs.values())).train.batch_size, []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row: dict[str, Any] = {"model": name, "dtype": dtype, "seconds": median, "seconds_per_round": seconds}
        row["images_per_second"] = batch / median
        if "dense" in times:
            row["times_dense"], *row["times_dense_interval"] = timed_step.ratio(seconds, times["dense"])
        if name in facts:
            rate = facts[name]["flops"] / median
            row |= facts[name] | {"flops_per_second": rate, "share_of_peak": rate / peak}
        rows.append(row)
    return rows


def write(result: dict[str, Any], out: Path) -> None:
    """Writes what was measured as JSON, as a table and as a picture, and prints the table."""
    safe_io.write_text(out / "benchmark.json", json.dumps(result, indent=1) + "\n")
    figures.save(throughput(result["rows"]), out / "benchmark.png")
    rows = [cells(row) for row in result["rows"]]
    peak = ", ".join(f"{quantity(flops)}FLOP/s in {d}" for d, flops in result["peak_flops_per_second"].items())
    text = (
        f"# A training step\n\n{results.made_with([result])} n (rounds): {result['rounds']}.\n\n"
        f"{markdown_table(rows)}\n{NOTE}\n\n![images per second](benchmark.png)\n\n"
        f"- peak: products of two square matrices, side {timed_step.PRODUCT_SIDE}: {peak}\n"
        f"- batch {result['batch']}, dropout {result['config']['model.dropout']}, "
        f"XLA options: {json.dumps(result['xla'])}\n\n"
        f"`{result['command']}`\n"
    )
    safe_io.write_text(out / "report.md", text)
    show_table(rows, "a training step")
    console.print(f"written     {out / 'report.md'}")


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text cells of a row; "-" where a peer has no value."""
    low, high = (1e3 * edge(row["seconds_per_round"]) for edge in (min, max))
    found = {
        "model": row["model"],
        "dtype": row["dtype"],
        "step, ms": f"{1e3 * row['seconds']:,.1f} ({low:,.1f} to {high:,.1f})",
        "times dense": "-",
        "images/s": f"{row['images_per_second']:,.0f}",
        **dict.fromkeys(("FLOP/s", "of peak", "compile", "memory", "parameters", "total"), "-"),
    }
    if "times_dense" in row:
        low, high = row["times_dense_interval"]
        found["times dense"] = f"{row['times_dense']:.3f} ({low:.3f} to {high:.3f})"
    if "flops" in row:
        found |= {
            "FLOP/s": quantity(row["flops_per_second"]),
            "of peak": f"{row['share_of_peak']:.0%}",
            "compile": f"{row['compile_seconds']:.1f} s",
            "memory": f"{quantity(row['planned_bytes'])}B",
            "parameters": f"{row['parameters']:,}",
            "total": f"{row['total_parameters']:,}",
        }
    return found


@figures.in_style
def throughput(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns a figure of a benchmark's rows: images per second of each model and dtype, and, if dense was measured,
    the time of a step relative to the dense step of the same dtype and round."""
    dtypes, models = (list(dict.fromkeys(row[name] for row in rows)) for name in ("dtype", "model"))
    dense = {row["dtype"]: np.array(row["seconds_per_round"]) for row in rows if row["model"] == "dense"}
    figure, grid = figures.subplots(1, 2 if dense else 1, (10, 1.5 + 0.28 * len(models) * len(dtypes)), sharey=True)
    height = 0.8 / len(dtypes)
    for row in rows:
        number, seconds = dtypes.index(row["dtype"]), np.array(row["seconds_per_round"])
        y = models.index(row["model"]) + (number - (len(dtypes) - 1) / 2) * height
        style = {"color": figures.COLOURS[number], "label": row["dtype"] if row["model"] == models[0] else "_"}
        low, rate, high = np.quantile(row["images_per_second"] * row["seconds"] / seconds, (0.25, 0.5, 0.75))
        grid[0, 0].barh(y, rate, height, xerr=[[rate - low], [high - rate]], error_kw={"elinewidth": 1}, **style)
        text = f"{rate:,.{1 if rate < 100 else 0}f}"
        grid[0, 0].annotate(text, (high, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
        if row["dtype"] in dense:
            low, ratio, high = np.quantile(seconds / dense[row["dtype"]], (0.25, 0.5, 0.75))
            grid[0, 1].errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], fmt="o", **style)
    grid[0, 0].set_yticks(range(len(models)), models)
    grid[0, 0].set(title="Training speed", xlabel="images/s (right is better)", ylim=(len(models) - 0.5, -0.5))
    grid[0, 0].margins(x=0.15)
    if dense:
        grid[0, 1].axvline(1, color="black", linewidth=1)
        grid[0, 1].set(title="Time of a step", xlabel="time / time of dense (left is better)")
    for axes in grid[0]:
        axes.grid(axis="y", visible=False)
    title = f"median and quartiles, n = {len(rows[0]['seconds_per_round'])} rounds"
    figure.legend(*grid[0, 0].get_legend_handles_labels(), title=title, loc="outside lower center", ncols=len(dtypes))
    return figure


if __name__ == "__main__":
    memory.use_huge_pages()
    cli.run(main)
