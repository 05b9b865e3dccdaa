import json
import re
import subprocess
import sys

import pytest

from jvitmoe import benchmark, cli
from jvitmoe.config import Config, ModelConfig, TrainConfig
from jvitmoe.errors import UserError
from jvitmoe.runtime import timing
from jvitmoe.training import timed_step

pytestmark = pytest.mark.slow

SMALL = """
from jvitmoe.config import Config, ModelConfig, TrainConfig
def get_config():
    return Config(
        model=ModelConfig(width=16, hidden=32, depth=2, heads=2, patch=4), train=TrainConfig(batch_size=8, devices=1)
    )
"""


def arguments(tmp_path, *flags):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return ["benchmark.py", f"--config={path}", f"--out={tmp_path / 'out'}", "--images=32", *flags]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed_step, "PRODUCT_SIDE", 256)
        patch.setattr(timing, "VISIT_SECONDS", 0.05)
        benchmark.main(arguments(folder, "--only=dense,dense again,batch,sample", "--dtypes=float32", "--rounds=2"))
    return json.loads((folder / "out" / "benchmark.json").read_text()), folder / "out"


def test_learned_routers_are_measured_at_the_flops_of_dense_and_what_routing_adds():
    config = Config(
        model=ModelConfig(width=64, hidden=512, depth=2, patch=1), train=TrainConfig(batch_size=8)
    ).validate()
    found = benchmark.cases(config)
    flops = {name: timed_step.forward_flops(case) for name, case in found.items()}
    for name in ("switch", "top2"):
        assert flops["dense"] <= flops[name] <= 1.1 * flops["dense"]


def test_only_the_cases_that_are_measured_must_fit_the_config():
    config = Config(train=TrainConfig(batch_size=30)).validate()
    assert list(benchmark.cases(config, ["dense", "batch"])) == ["dense", "batch"]
    with pytest.raises(UserError, match=r"train\.batch_size is 30; it must be a multiple of routing\.experts, 4"):
        benchmark.cases(config)


def test_a_config_that_streams_is_measured_on_images_that_live_on_the_devices():
    config = Config()
    config.data.stream, config.data.crop = True, "resized"
    (case,) = benchmark.cases(config.validate(), ["dense"]).values()
    assert not case.data.stream


def test_every_case_is_measured_in_every_round_and_beside_dense(measured):
    result, _ = measured
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "dense again", "batch", "sample"]
    assert rows["dense"]["times_dense"] == 1.0
    assert rows["dense again"]["flops"] == rows["dense"]["flops"]
    for row in rows.values():
        assert len(row["seconds_per_round"]) == 2
        assert min(row["seconds_per_round"]) <= row["seconds"] <= max(row["seconds_per_round"])
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert row["share_of_peak"] == pytest.approx(
            row["flops"] / row["seconds"] / result["peak_flops_per_second"]["float32"]
        )
        assert row["update_share"] > 0
        assert row["input_share"] > 0
        assert row["planned_bytes"] > 4 * row["total_parameters"]


def test_the_report_names_command_hardware_and_versions(measured):
    result, out = measured
    text = (out / "report.md").read_text()
    assert all(part in text for part in (result["command"], result["hardware"], f"jax {result['versions']['jax']}"))
    assert (out / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--only=dense,sparse", "--only is sparse; it must name some of dense, dense again, batch"),
        ("--rounds=0", "--rounds is 0; it must be at least 1"),
        ("--dtypes=float32,auto", "--dtypes is auto; it must name some of float32, bfloat16"),
        ("--dtypes=", "--dtypes is empty; name one or more"),
        ("--images=-1", "--images is -1; it must be at least a batch, 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, flag, says):
    with pytest.raises(UserError, match=says):
        benchmark.main(arguments(tmp_path, flag))


def test_a_model_that_the_peer_cannot_have_is_refused():
    model = ModelConfig(pool="seq", stem="strided")
    with pytest.raises(UserError, match=r"no counterpart of model\.stem=strided, model\.pool=seq; leave --peer out"):
        benchmark.check_peer(model)


def test_a_python_without_pytorch_is_refused_in_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -S -c 'import torch'\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match="install torch, or name a Python that has it"):
        benchmark.Torch(str(python), Config())
    with pytest.raises(UserError, match="install torch, or name a Python that has it"):
        benchmark.Torch(str(tmp_path / "nowhere"), Config())


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["benchmark.py", "--help"], benchmark.define_flags, config=True)
    assert "--peer_python" in capsys.readouterr().out


def test_the_profile_says_where_a_step_goes(tmp_path):
    """Both passes are in it, and what is in it takes about the step: on several cores instructions run side by side."""
    config, *_ = [part for part in arguments(tmp_path) if part.startswith("--config")]
    command = [sys.executable, "scripts/profile_step.py", config, "--steps=3", "--rows=1000"]
    # Large enough that times do not vanish in the rounding to 0.1 ms.
    command += ["--config.train.batch_size=64", "--config.model.width=64", "--config.model.hidden=128"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    step = float(re.search(r"([\d.]+) ms a step, float32", said)[1])
    rows = re.findall(r"^\| (forward|backward|around) \| .*? \| ([\d.]+) \|", said, re.MULTILINE)
    assert {part for part, _ in rows} == {"forward", "backward", "around"}
    assert {"attention", "mlp"} <= set(re.findall(r"^\| forward \| (\w+) \|", said, re.MULTILINE))
    assert 0.3 * step < sum(float(ms) for _, ms in rows) < 2.5 * step
