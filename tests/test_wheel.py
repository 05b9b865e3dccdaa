"""A stranger's path: the package built and installed from the registry, outside any checkout."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import processes

ENV = processes.environment()  # one device
pytestmark = [pytest.mark.process, pytest.mark.long]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Returns an environment that has the wheel and what it depends on, in the versions of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    pip = [folder / "env" / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder / "dist", processes.ROOT], check=True)
    (wheel,) = (folder / "dist").glob("jvitmoe-*.whl")
    pins = [f"{d.name}=={d.version}" for d in importlib.metadata.distributions() if d.name.lower() != "jvitmoe"]
    (folder / "constraints.txt").write_text("\n".join(pins))
    subprocess.run([*pip, "install", "-c", folder / "constraints.txt", wheel], check=True)
    return folder / "env" / "bin"


def test_the_installed_command_trains_reports_predicts_and_exports(installed, tmp_path):
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [installed / "jvitmoe", *arguments], capture_output=True, text=True, cwd=tmp_path, env=ENV
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "digits_random" in run("configs")
    assert "test split" in run("train", "--config=digits_random", "--config.train.epochs=3", "--workdir=runs/a")
    run("train", "--config=digits_dense", "--config.train.epochs=3", "--workdir=runs/b")
    run("report", "runs/a", "runs/b", "--out=runs/report")
    assert "| merged |" in (tmp_path / "runs" / "report" / "report.md").read_text()
    run("export", "--workdir=runs/a", "--to=safetensors", "--out=exports/a")
    program = "import jvitmoe, numpy; print(jvitmoe.load('exports/a').logits(numpy.zeros((1, 8, 8, 1), 'uint8')).shape)"
    done = subprocess.run([installed / "python", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "(1, 10)\n", done.stderr


def test_type_checkers_see_its_types(installed):
    program = "import jvitmoe, pathlib; print((pathlib.Path(jvitmoe.__file__).parent / 'py.typed').is_file())"
    done = subprocess.run([installed / "python", "-c", program], capture_output=True, text=True, cwd="/")
    assert done.stdout == "True\n"
