"""What a newcomer meets before any code runs: the Makefile, and lint in a checkout that has been used."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.process
def test_make_alone_lists_the_targets_and_installs_nothing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    listed = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in listed for target in ("help", "demo", "test", "test-fast", "test-long", "check"))
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


def test_ci_runs_the_readme_s_commands_in_its_order_and_the_long_tests():
    readme = (ROOT / "README.md").read_text()
    commands = [line.split("#")[0].strip() for line in readme.splitlines() if line.startswith("make ")]
    script = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert script == [*commands, "make test-long"]
