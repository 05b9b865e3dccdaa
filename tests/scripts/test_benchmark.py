"""The scripts that measure: cases of equal cost, timed in turns, and what a step spends its time on."""

import json
import re
import subprocess
import sys

import benchmark
import pytest
import timed_step

import processes
from jvitmoe.config import Config, ModelConfig, TrainConfig
from jvitmoe.errors import UserError
from run_folders import write_experiment

SMALL = Config(
    model=ModelConfig(width=16, hidden=32, depth=2, heads=2, patch=4), train=TrainConfig(batch_size=8, devices=1)
)


class Machine:
    """Cases whose first step after another case is slow, on a machine that becomes slower with every step."""

    def __init__(self, cold: float, drift: float) -> None:
        self.cold, self.drift, self.steps, self.last, self.visits = cold, drift, 0, None, []

    def case(self, name, seconds):
        def run(steps):
            total = 0.0
            for _ in range(steps):
                self.steps += 1
                total += seconds * (1 + self.drift * self.steps) * (self.cold if self.last != name else 1)
                self.last = name
            self.visits.append((name, steps))
            return total / steps

        return run


def test_cold_caches_and_drift_do_not_reach_the_ratio():
    machine = Machine(cold=3.0, drift=1e-4)
    work = {name: machine.case(name, seconds) for name, seconds in (("a", 0.3), ("b", 0.6), ("a again", 0.3))}
    seconds = timed_step.interleave(work, rounds=11)
    assert timed_step.ratio(seconds["a again"], seconds["a"])[0] == pytest.approx(1, rel=0.005)
    assert timed_step.ratio(seconds["b"], seconds["a"])[0] == pytest.approx(2, rel=0.005)


def test_the_interval_has_the_ranks_of_the_binomial_distribution():
    """Ranks of the 95 % interval of a median, as tabled by Conover (A3 at p = 0.5)."""
    for rounds, outside in ((1, 0), (5, 0), (6, 0), (9, 1), (10, 1), (15, 3), (20, 5)):
        seconds = [float(n) for n in range(1, rounds + 1)]
        expected = (rounds + 1) / 2, 1 + outside, rounds - outside
        assert timed_step.ratio(seconds, [1.0] * rounds) == expected


@pytest.mark.slow
def test_learned_routers_are_measured_at_the_flops_of_dense_and_what_routing_adds():
    model = ModelConfig(width=64, hidden=512, depth=2, patch=1)
    found = benchmark.cases(Config(model=model, train=TrainConfig(batch_size=8)), ["dense", "switch", "top2"])
    flops = {name: timed_step.step_flops(case) for name, case in found.items()}
    for name in ("switch", "top2"):
        assert flops["dense"] <= flops[name] <= 1.1 * flops["dense"]


def test_the_cases_that_are_measured_must_fit_the_config_and_have_their_images_on_the_devices():
    config = Config(train=TrainConfig(batch_size=30))
    config.data.stream, config.data.crop = True, "resized"
    found = benchmark.cases(config, ["dense", "batch"])
    assert list(found) == ["dense", "batch"]
    assert not found["dense"].data.stream
    for wrong in ((), ["dense", "sparse"]):  # all, whose experts do not divide the batch; and one that is none
        with pytest.raises(UserError):
            benchmark.cases(config, *[wrong] * bool(wrong))


@pytest.mark.long
def test_every_case_is_measured_in_every_round_and_beside_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(timed_step, "PRODUCT_SIDE", 256)
    monkeypatch.setattr(timed_step, "VISIT_SECONDS", 0.05)
    out = tmp_path / "out"
    experiment = write_experiment(tmp_path / "small.py", SMALL)
    arguments = [f"--config={experiment}", f"--out={out}", "--dtypes=float32", "--rounds=2"]
    benchmark.main(["benchmark.py", *arguments, "--only=dense,dense again,batch,sample"])
    result, text = json.loads((out / "benchmark.json").read_text()), (out / "report.md").read_text()
    assert all(part in text for part in (result["command"], result["hardware"], f"jax {result['versions']['jax']}"))
    assert (out / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "dense again", "batch", "sample"]
    assert rows["dense"]["times_dense"] == 1.0
    assert rows["dense again"]["flops"] == rows["dense"]["flops"]
    for row in rows.values():
        assert len(row["seconds_per_round"]) == 2
        assert min(row["seconds_per_round"]) <= row["seconds"] <= max(row["seconds_per_round"])
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        peak = result["peak_flops_per_second"]["float32"]
        assert row["share_of_peak"] == pytest.approx(row["flops"] / row["seconds"] / peak)
        assert row["planned_bytes"] > 4 * row["total_parameters"]


@pytest.mark.process
@pytest.mark.long
def test_the_profile_says_where_a_step_goes(tmp_path):
    """Both passes are in it, and what is in it takes about the step: on several cores instructions run side by side."""
    command = [sys.executable, "scripts/profile_step.py"]
    command += [f"--config={write_experiment(tmp_path / 'small.py', SMALL)}"]
    # Large enough that times do not vanish in the rounding to 0.1 ms.
    command += ["--steps=3", "--rows=1000", "--config.train.batch_size=64", "--config.model.width=64"]
    said = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, check=True).stdout
    step = float(re.search(r"([\d.]+) ms a step, float32", said)[1])
    rows = re.findall(r"^\| (forward|backward|around) \| .*? \| ([\d.]+) \|", said, re.MULTILINE)
    assert {part for part, _ in rows} == {"forward", "backward", "around"}
    assert {"attention", "mlp"} <= set(re.findall(r"^\| forward \| (\w+) \|", said, re.MULTILINE))
    assert 0.3 * step < sum(float(ms) for _, ms in rows) < 2.5 * step
