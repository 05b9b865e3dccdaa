"""A stranger's path: the package built and installed from the registry, outside any checkout."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import processes

README = (processes.ROOT / "README.md").read_text()
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
    subprocess.run([*pip, "install", "--no-compile", "-c", folder / "constraints.txt", wheel], check=True)
    return folder / "env" / "bin"


def commands() -> list[str]:
    """Returns the README's commands from installing to the report of one's own pictures."""
    block = next(b for b in re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE) if "--html" in b)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


def test_five_commands_lead_from_pictures_to_a_page(installed, tmp_path):
    """All but the first, which the fixture stands for: with one epoch."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("disc", "ring", "square")):
            folder = tmp_path / "shapes" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (48 + 8 * label, 60 + number, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    first, *others = commands()
    assert first == "pip install -e ."
    assert [line.split()[:2] for line in others] == [
        ["jvitmoe", name] for name in ("train", "train", "evaluate", "report")
    ]
    for line in others:
        more = ["--config.train.epochs=1"] if " train " in line else []
        done = run(installed, tmp_path, *shlex.split(line)[1:], *more)
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "merged" in page
    assert 'alt="Lowest test error: ' in page


def test_what_the_command_lists_it_trains_and_exports_and_type_checkers_see_its_types(installed, tmp_path):
    def out(*arguments: str) -> str:
        done = run(installed, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "digits_random" in out("configs")
    assert "test split" in out("train", "--config=digits_random", "--config.train.epochs=3", "--workdir=runs/a")
    out("export", "--workdir=runs/a", "--to=safetensors", "--out=exports/a")
    Image.new("RGB", (60, 40), "skyblue").save(tmp_path / "sky.png")
    assert "airplane" in out("predict", "--model=cifar10_cct", "--top=10", "--json", "sky.png")
    program = "import jvitmoe, numpy; print(jvitmoe.load('exports/a').logits(numpy.zeros((1, 8, 8, 1), 'uint8')).shape)"
    program += "; import pathlib; print((pathlib.Path(jvitmoe.__file__).parent / 'py.typed').is_file())"
    done = subprocess.run([installed / "python", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "(1, 10)\nTrue\n", done.stderr


def test_a_file_of_the_user_trains_and_is_tested_outside_the_checkout(installed, tmp_path):
    """docs/extending.md, whose file has one of each kind."""
    page = (processes.ROOT / "docs" / "extending.md").read_text()
    file, lines, _ = re.findall(r"```(?:python|bash)\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my.py").write_text(file)
    for line in lines.splitlines():
        done = run(installed, tmp_path, *shlex.split(line)[1:])
        assert done.returncode == 0, done.stderr
    refused = run(installed, tmp_path, "evaluate", "--workdir=runs/round_robin")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--plugin=runs/round_robin/experiment.py" in refused.stderr


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Returns how the installed command ended in a folder."""
    return subprocess.run([installed / "jvitmoe", *arguments], capture_output=True, text=True, cwd=folder, env=ENV)
