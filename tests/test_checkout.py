"""What a newcomer meets before any code runs: the Makefile, and lint in a checkout that has been used."""

import os
import shutil
import subprocess
import sys
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


@pytest.mark.process
def test_the_hooks_that_make_install_sets_up_refuse_a_long_subject_and_code_that_ruff_does_not_pass(tmp_path):
    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    env = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    assert run("git", "init").returncode == 0
    for setting in (("user.name", "A"), ("user.email", "a@b.c")):
        run("git", "config", *setting)
    assert run(sys.executable, "-m", "pre_commit", "install").returncode == 0
    (tmp_path / "one.py").write_text('"""One."""\n')
    run("git", "add", ".")
    refused = run("git", "commit", "-m", "x" * 73)
    assert refused.returncode, refused.stdout
    assert "commit subject of at most 72 characters" in refused.stderr + refused.stdout
    committed = run("git", "commit", "-m", "x" * 72, "-m", "y" * 73)
    assert committed.returncode == 0, committed.stderr
    (tmp_path / "two.py").write_text("import os\n")
    run("git", "add", ".")
    assert "F401" in (refused := run("git", "commit", "-m", "Add two")).stdout + refused.stderr
    assert refused.returncode
