"""The model of step time on many GPUs: its laws, its bytes against compiled programs, and the page that shows it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scaling_check
import scaling_model

import processes
from jvitmoe.config import ModelConfig, TrainConfig
from jvitmoe.experts import cost
from jvitmoe.machine import programs
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import vit

PAGE = processes.ROOT / "docs" / "scaling.md"
RESULTS = processes.ROOT / "results" / "scaling"


@pytest.mark.slow
def test_a_compiled_step_reduces_the_bytes_of_the_model_and_moves_no_image(monkeypatch):
    variant, devices = "random, batch", 8
    monkeypatch.setattr(scaling_check, "MODEL", ModelConfig(patch=4, width=16, hidden=24, depth=2, heads=2))
    mesh = make_mesh(TrainConfig(devices=devices))
    lowered, *_ = scaling_check.timed_step.lower(scaling_check.config(variant, devices), mesh)
    text = programs.for_reading(lowered).as_text()
    assert programs.reduced_bytes(text, mesh.shape) == scaling_check.predicted_bytes(variant, devices)


def test_flops_of_the_model_are_those_of_the_forward_pass_that_xla_counts():
    model = ModelConfig(width=384, hidden=1536, depth=2, heads=6, pool="mean")
    w = scaling_model.work(model, 2, 1)
    counted = 3 * cost.flops_per_image(vit.build(model), 4)
    assert 1 < counted / (w.flops_trunk + w.flops_expert) < 1.05  # XLA counts the head, norms and GELU too


def test_what_is_in_results_and_on_the_page_is_what_the_script_computes():
    machine = scaling_model.Machine()
    tables = {title: scaling_model.table(w, machine) for title, w in scaling_model.CASES.items()}
    saved = json.loads((RESULTS / "model.json").read_text())["rows"]
    for title, rows in tables.items():
        for row, kept in zip(rows, saved[title], strict=True):
            assert row.keys() == kept.keys()
            for name, value in row.items():  # Python 3.12 adds floats up more exactly than 3.11
                assert value == (kept[name] if isinstance(value, str) else pytest.approx(kept[name], rel=1e-12))
    assert (RESULTS / "model.md").read_text() == scaling_model.markdown(tables)
    numbers = [row for row in (RESULTS / "model.md").read_text().splitlines() if row.startswith("|") and "." in row]
    page = [row for row in PAGE.read_text().splitlines() if row.startswith("|")]
    assert len(numbers) == 2 * len(scaling_model.VARIANTS)
    for row in numbers:
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        cells[-1] += " GB"
        assert any([cell.strip() for cell in line.strip("|").split("|")][1:] == cells for line in page), row


def test_the_page_shows_the_check_as_it_was_measured():
    saved = json.loads((RESULTS / "check.json").read_text())
    rows, page = (RESULTS / "check.md").read_text().splitlines(), PAGE.read_text()
    assert sorted({row["processes"] for row in saved["found"]}) == [1, 2, 4, 8]
    for row in filter(None, rows):
        assert row in page
    for row in saved["rows"]:
        assert row["bytes"] == row["predicted_bytes"] == scaling_check.predicted_bytes(row["variant"], row["processes"])
    links, compared = scaling_check.compare(saved["found"])
    assert {str(count): list(link) for count, link in links.items()} == {
        count: pytest.approx(link) for count, link in saved["links"].items()
    }
    assert compared == [pytest.approx(row) for row in saved["rows"]]
    assert (RESULTS / "check.png").read_bytes().startswith(b"\x89PNG")
    assert saved["hardware"].split("(")[1].split(",")[0] in page
    assert saved["versions"]["jax"] in page


@pytest.mark.long
def test_the_check_runs_with_two_real_processes(tmp_path):
    command = [sys.executable, "scripts/scaling_check.py", "--counts=1,2", "--steps=2", f"--out={tmp_path}"]
    hurry = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # and not this process's 8 devices
    done = subprocess.run(
        command, cwd=processes.ROOT, env=hurry, capture_output=True, text=True, timeout=processes.HANGS
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert [row["bytes"] for row in found["rows"]] == [row["predicted_bytes"] for row in found["rows"]]
    assert len(found["rows"]) == 4
    assert all(row["predicted"] > row["work"] > 0 for row in found["rows"])
    table = (tmp_path / "check.md").read_text()
    assert len(re.findall(r"^\| random, batch \| [12] \|", table, re.M)) == 2
    assert Path(tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
