"""docs/deploy.md is run: every block, in its order, in a folder of its own."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from jvitmoe.commands import evaluate, export, predict, train
from jvitmoe.config import Config
from jvitmoe.data import sources
from processes import call

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"(?<!-->\n)```(bash|python)\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
MAINS = {"train": train.main, "export": export.main, "predict": predict.main, "evaluate": evaluate.main}
THEIRS = re.compile(r"^(import|from) .*\b(timm|torch|transformers)\b", re.MULTILINE)
SHORT = ("--config.train.epochs=1", "--config.optim.warmup_epochs=0", "--config.train.eval_every=1")


def run(line: str) -> str:
    """Returns what one command of the page prints."""
    name, command, *arguments = shlex.split(line)
    assert name == "jvitmoe"
    code, out, err = call(MAINS[command], *arguments, *(SHORT if command == "train" else ()))
    assert code == 0, (line, err)
    return out


@pytest.mark.long
def test_every_block_of_the_page_runs(peers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "pictures").mkdir()
    test = sources.load(Config().data, Config().model).test
    for number in range(4):
        Image.fromarray(test.images_NHWc[number, ..., 0]).save(tmp_path / "pictures" / f"{number}.png")
    peers("change_folder", folder=tmp_path)
    out = ""
    for language, block in BLOCKS:
        if language == "bash":
            for line in block.strip().splitlines():
                out += run(line)
        elif THEIRS.search(block):
            peers("run_code", code=block)
        else:
            exec(block, {})
    assert "resized positions from 2x2 to 4x4" in out
    assert "resized the kernel of patches from 4 to 2 pixels" in out
