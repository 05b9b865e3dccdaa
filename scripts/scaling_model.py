"""Predicts the time of a training step on 1 to 1,024 GPUs for dense, learned and random routing, from stated inputs.

    python scripts/scaling_model.py            # writes results/scaling/{model.json,model.md,model.png}

The formulas and what they leave out are in docs/scaling.md; scripts/scaling_check.py holds them against this code.
"""

import dataclasses
import json
from pathlib import Path

from jvitmoe import routing, rules
from jvitmoe.config import Config, ModelConfig, RoutingConfig
from jvitmoe.reports import figures

OUT = Path(__file__).resolve().parents[1] / "results" / "scaling"
DEVICES = tuple(2**k for k in range(11))
FLOAT = 4  # bytes of a gradient: parameters and gradients are float32
HALF = 2  # bytes of an activation


@dataclasses.dataclass(frozen=True)
class Machine:
    """Per GPU and direction. Specifications are NVIDIA's for the H100 SXM and the DGX H100; the rest is assumed."""

    flops: float = 989e12  # bfloat16, dense: H100 data sheet
    node: int = 8  # GPUs that NVLink joins: DGX H100
    inside: float = 450e9  # bytes/s, NVLink 4, half of the 900 GB/s of both directions: H100 data sheet
    outside: float = 50e9  # bytes/s, one 400 Gb/s ConnectX-7 per GPU: DGX H100 data sheet
    achieved_flops: float = 0.40  # assumed share of the peak
    achieved_link: float = 0.80  # assumed share of a link's rate
    latency_inside: float = 5e-6  # s per step of a collective, assumed
    latency_outside: float = 15e-6


@dataclasses.dataclass(frozen=True)
class Work:
    """One model and its batch, counted from the config: nothing is measured."""

    trunk: int  # parameters that every image passes through
    expert: int  # of one expert, over all layers
    layers: int  # that hold experts
    width: int
    tokens: int  # of one image
    flops_trunk: float  # per image: forward and backward, a multiply-add is two
    flops_expert: float
    images: int  # per GPU
    experts: int
    capacity: float  # of a learned router, training


def work(model: ModelConfig, experts: int, images: int, capacity: float = 1.25) -> Work:
    """Returns the counts of a ViT whose MLPs are `experts` experts each."""
    config = rules.check(Config(model=model, routing=RoutingConfig(experts=experts)))
    active, total = routing.find(config).count_parameters()
    expert = (total - active) // (experts - 1)
    tokens, width, depth = model.tokens, model.width, model.depth
    mlp = 2 * tokens * 2 * width * model.hidden * depth
    attention = depth * (2 * tokens * 4 * width**2 + 2 * 2 * tokens**2 * width)
    patches = 2 * model.patches * model.channels * model.patch**2 * width
    return Work(
        active - expert, expert, depth, width, tokens, 3.0 * (attention + patches), 3.0 * mlp, images, experts, capacity
    )


def compute_seconds(w: Work, m: Machine, capacity: float = 1.0) -> float:
    """Returns the time of forward and backward; a capacity above 1 computes padding."""
    return w.images * (w.flops_trunk + capacity * w.flops_expert) / (m.flops * m.achieved_flops)


def all_reduce_seconds(size: float, devices: int, m: Machine, stride: int = 1) -> float:
    """Returns the time to sum `size` bytes over `devices` GPUs that lie `stride` apart, by rings: inside the node, then
    each GPU its share between nodes. Each of the two phases moves (n - 1) / n of its bytes twice."""
    n = max(1, min(devices, m.node // stride))
    nodes = devices // n
    inside, outside = m.inside * m.achieved_link, m.outside * m.achieved_link
    return (
        2 * (n - 1) / n * size / inside
        + 2 * (nodes - 1) / nodes * size / n / outside
        + 2 * (n - 1) * m.latency_inside
        + 2 * (nodes - 1).bit_length() * m.latency_outside  # a tree between nodes, for what is waited for only
    )


def all_to_all_seconds(size: float, devices: int, m: Machine) -> float:
    """Returns the time in which each of `devices` neighbours sends `size` bytes, spread evenly over all of them."""
    n = min(devices, m.node)
    to_node, to_others = (n - 1) / devices, (devices - n) / devices
    seconds = size * to_node / (m.inside * m.achieved_link) + (n > 1) * m.latency_inside
    return seconds + size * to_others / (m.outside * m.achieved_link) + (devices > n) * m.latency_outside


def reduced_bytes(w: Work, variant: str, devices: int, spread: int = 1, pulled: bool = False) -> int:
    """Returns the bytes of gradients, and of weights in a pull, that each GPU puts into all-reduces in one step.

    Args:
        variant: "dense"; "batch" or "sample", random routing; "learned".
        spread: GPUs that the experts are spread over, `train.expert_devices`; 1 holds all on each.
        pulled: whether the step ends with a pull. Each GPU gives it the mean of the experts that it holds.
    """
    if devices == 1:
        return 0
    if variant in ("dense", "batch"):
        return FLOAT * (w.trunk + w.expert)
    held = w.experts // spread
    experts = held * (devices > spread) + (pulled and spread > 1)
    return FLOAT * (w.trunk + experts * w.expert)


def step_seconds(
    w: Work, variant: str, devices: int, m: Machine, spread: int = 1, pulled: bool = False
) -> dict[str, float]:
    """Returns the seconds of one step by part, as of `reduced_bytes`. Nothing overlaps: this code reduces once, after
    the backward pass."""
    parts = {"compute": compute_seconds(w, m, w.capacity if variant == "learned" else 1.0)}
    if variant in ("dense", "batch"):
        parts["all-reduce"] = all_reduce_seconds(FLOAT * (w.trunk + w.expert), devices, m)
        return parts
    held = w.experts // spread
    parts["all-reduce"] = all_reduce_seconds(FLOAT * w.trunk, devices, m)
    parts["all-reduce"] += all_reduce_seconds(FLOAT * held * w.expert, devices // spread, m, spread)
    if pulled:
        parts["all-reduce"] += all_reduce_seconds(FLOAT * w.expert, spread, m)
    if variant == "learned" and spread > 1:
        size = HALF * w.capacity * w.images * w.tokens * w.width
        parts["all-to-all"] = 4 * w.layers * all_to_all_seconds(size, spread, m)  # there and back, twice
    return parts


VARIANTS = {  # name -> (variant, whether experts are spread over GPUs, whether every step ends with a pull)
    "dense": ("dense", False, False),
    "random, batch": ("batch", False, False),
    "random, sample, experts on every GPU": ("sample", False, False),
    "random, sample, expert axis": ("sample", True, False),
    "random, sample, expert axis, pull": ("sample", True, True),
    "learned, all-to-all": ("learned", True, False),
}
VIT_S = ModelConfig(
    image_size=224, channels=3, classes=1000, patch=16, width=384, hidden=1536, depth=12, heads=6, pool="mean"
)
VIT_L = dataclasses.replace(VIT_S, width=1024, hidden=4096, depth=24, heads=16)
CASES = {
    "ViT-S/16, 8 experts, 128 images per GPU": work(VIT_S, 8, 128),
    "ViT-L/16, 64 experts, 64 images per GPU": work(VIT_L, 64, 64),
}


def table(w: Work, m: Machine) -> list[dict]:
    """Returns one row per variant and number of GPUs."""
    rows = []
    for name, (variant, spreads, pulled) in VARIANTS.items():
        for devices in DEVICES:
            spread = min(w.experts, devices) if spreads else 1
            parts = step_seconds(w, variant, devices, m, spread, pulled)
            seconds = sum(parts.values())
            held = w.experts // spread if variant != "dense" else 1
            rows.append(
                {
                    **{"variant": name, "gpus": devices, "expert_devices": spread, "seconds": seconds, **parts},
                    "images_per_second": devices * w.images / seconds,
                    "efficiency": compute_seconds(w, m) / seconds,
                    "reduced_bytes": reduced_bytes(w, variant, devices, spread, pulled),
                    "state_bytes": 3 * FLOAT * (w.trunk + held * w.expert),  # parameters and Adam's two moments
                }
            )
    return rows


@figures.in_style
def draw(tables: dict[str, list[dict]], path: Path) -> None:
    figure, grid = figures.subplots(1, len(tables), (11, 5))
    for axes, (title, rows) in zip(grid[0], tables.items(), strict=True):
        for name, colour in zip(VARIANTS, ("black", *figures.COLOURS), strict=False):
            mine = [row for row in rows if row["variant"] == name]
            gpus, times = [row["gpus"] for row in mine], [1e3 * row["seconds"] for row in mine]
            dashed = "--" if name == "random, batch" else "-"  # it lies on dense
            axes.plot(gpus, times, dashed, color=colour, label=name)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="time of a step, ms", title=title)
        axes.set_xticks(DEVICES, [str(n) for n in DEVICES], fontsize=9)
        axes.minorticks_off()
        figures.plain_ticks(axes.yaxis)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Predicted, not measured: H100, 8 per node, batch grows with GPUs", fontsize=12)
    figures.save(figure, path)


def markdown(tables: dict[str, list[dict]]) -> str:
    chosen = (1, 8, 64, 256, 1024)
    lines = []
    for title, rows in tables.items():
        lines += [f"### {title}", "", "| ms per step on GPUs | " + " | ".join(map(str, chosen)) + " | state, GB |"]
        lines.append("| :-- |" + " --: |" * (len(chosen) + 1))
        for name in VARIANTS:
            mine = {row["gpus"]: row for row in rows if row["variant"] == name}
            cells = [f"{1e3 * mine[n]['seconds']:.1f}" for n in chosen]
            lines.append(f"| {name} | {' | '.join(cells)} | {mine[1024]['state_bytes'] / 1e9:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    machine = Machine()
    tables = {title: table(w, machine) for title, w in CASES.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    inputs = {"machine": dataclasses.asdict(machine), "work": {t: dataclasses.asdict(w) for t, w in CASES.items()}}
    (OUT / "model.json").write_text(json.dumps({**inputs, "rows": tables}, indent=1) + "\n")
    (OUT / "model.md").write_text(markdown(tables))
    draw(tables, OUT / "model.png")
    print(markdown(tables))


if __name__ == "__main__":
    main()
