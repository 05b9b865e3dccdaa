"""What a newcomer meets before any code runs: the Makefile, and lint in a checkout that has been used."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs_csv

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.process
def test_make_alone_lists_the_targets_and_installs_nothing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    listed = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in listed for target in ("help", "demo", "test", "test-fast", "test-long", "check"))
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


@pytest.mark.process
def test_lint_is_the_same_whatever_folders_the_user_has_made(tmp_path):
    """Ruff sorts imports by where a module comes from: a folder `runs/` must not make a module of it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    for name in ("runs", "data", "build", "processes", "run_folders", "numpy"):
        (tmp_path / name).mkdir()
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=I", "tests"]
    found = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_ci_runs_the_readme_s_commands_in_its_order_and_the_long_tests():
    readme = (ROOT / "README.md").read_text()
    commands = [line.split("#")[0].strip() for line in readme.splitlines() if line.startswith("make ")]
    script = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert script == [*commands, "make test-long"]


def test_the_flat_file_of_all_runs_is_that_of_the_results():
    """After new results: python scripts/runs_csv.py results results/runs.csv."""
    assert (ROOT / "results" / "runs.csv").read_text() == runs_csv.text(ROOT / "results")
