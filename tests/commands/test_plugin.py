"""What an experiment file registers: docs/extending.md is run, and nothing is executed that no user has named."""

import contextlib
import importlib
import py_compile
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jvitmoe
from jvitmoe import api, experiments
from jvitmoe.commands import average, evaluate, export, report, train
from jvitmoe.errors import UserError
from jvitmoe.models.routers import ROUTERS
from processes import ROOT, call, refused, succeed

pytestmark = pytest.mark.slow

FILE, COMMANDS, _ = re.findall(r"```(?:python|bash)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """In its body files may register; after it the registries are as before."""
    found = [getattr(importlib.import_module(f"jvitmoe.{file}"), name) for name, file in experiments.REGISTRIES.items()]
    before = [dict(registry) for registry in found]
    try:
        yield
    finally:
        for registry, entries in zip(found, before, strict=True):
            registry.clear()
            registry.update(entries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder in which the commands of the page were run."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my.py").write_text(FILE)
    with contextlib.chdir(folder):
        for _, command, *arguments in map(shlex.split, COMMANDS.splitlines()):
            alone = ["--config.train.devices=1"] if command == "train" else []
            with registered():  # as each command is a process
                succeed(importlib.import_module(f"jvitmoe.commands.{command}").main, *arguments, *alone)
    return folder


@pytest.fixture(autouse=True)
def _names_are_forgotten() -> Iterator[None]:
    with registered():
        yield


def test_every_block_of_the_page_runs(folder):
    for kind in ("turns", "round_robin"):
        assert (folder / "runs" / kind / "experiment.py").read_text() == FILE
        assert jvitmoe.Run(folder / "runs" / kind).config.routing.kind == kind
    assert jvitmoe.load(folder / "exports" / "turns").names == ("rows", "columns")


def test_a_command_that_needs_the_file_says_so_in_one_line_and_the_others_do_not(folder, tmp_path):
    turns, routed = folder / "runs" / "turns", folder / "runs" / "round_robin"
    kept = routed / "experiment.py"
    error = refused(evaluate.main, f"--workdir={routed}")
    assert "config.routing.kind is 'round_robin'; it must be one of 'batch'" in error
    assert f"read {kept}, and give --plugin={kept}, which executes it" in error
    error = refused(export.main, f"--workdir={turns}", "--to=safetensors", f"--out={tmp_path / 'out'}")
    assert re.search(r"config.data.name is 'stripes'.*--plugin=.*experiment\.py", error)
    succeed(report.main, str(turns), str(routed), f"--out={tmp_path / 'report'}")
    assert jvitmoe.load(routed).config.classes == 2  # as predict loads it
    start, out = folder / "exports" / "turns", tmp_path / "mean"
    mean = [turns, routed, f"--start={start}", "--data=stripes", f"--out={out}"]
    assert re.search(rf"'stripes'.*--plugin={turns / 'experiment.py'}", refused(average.main, *mean))
    succeed(average.main, *mean, f"--plugin={turns / 'experiment.py'}")
    assert "'none.py', which is no file" in refused(evaluate.main, f"--workdir={turns}", "--plugin=none.py")


def test_a_run_goes_on_with_its_file_or_an_edited_one_and_not_without(folder, tmp_path):
    run = Path(shutil.copytree(folder / "runs" / "turns", tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "30")
    error = refused(train.main, f"--workdir={run}")
    assert re.search(r"config.routing.kind is 'turns'.*--plugin=.*experiment\.py", error)
    edited = tmp_path / "edited.py"
    edited.write_text(FILE + "# edited\n")
    out = succeed(train.main, f"--workdir={run}", f"--plugin={edited}")
    assert f"note        the experiment file differs from this run's last, {run / 'experiment.py'}" in out
    assert (run / "experiment.py").read_text() == edited.read_text()
    out = succeed(train.main, f"--workdir={run}")  # the names are still registered in this process
    assert "note        the experiment file of this run is not executed without --plugin" in out
    assert (run / "experiment.py").read_text() == edited.read_text()


def test_of_a_run_folder_only_the_file_that_was_named_is_executed(folder, tmp_path):
    """Not its neighbours, nor a compiled program that lies about it."""
    run = Path(shutil.copytree(folder / "runs" / "turns", tmp_path / "run"))
    bad, good, mark = tmp_path / "bad.py", run / "experiment.py", tmp_path / "executed"
    bad.write_text(f"open({str(mark)!r}, 'w')\n")
    cached = Path(importlib.util.cache_from_source(str(good)))
    py_compile.compile(str(bad), str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    for name in ("optax", "lookalike"):
        shutil.copy(bad, run / f"{name}.py")
    before = sys.modules["optax"]
    experiments.register(good)
    assert "round_robin" in ROUTERS
    assert sys.modules["optax"] is before
    assert not mark.exists()
    good.write_text("import lookalike\n")
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        experiments.register(good)
    assert not mark.exists()


def test_a_file_that_takes_a_name_of_ours_is_refused_and_the_name_stays_ours(tmp_path):
    ours, path = ROUTERS["switch"], tmp_path / "mine.py"
    path.write_text("from jvitmoe.models.routers import ROUTERS\n\nROUTERS['switch'] = ROUTERS['topk']\n")
    with pytest.raises(UserError, match=r"mine.py replaces 'switch' in ROUTERS, which is ours"):
        experiments.register(path)
    assert ROUTERS["switch"] is ours


def test_a_name_in_both_registries_of_routing_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from jvitmoe.models.routers import ROUTERS\n\nROUTERS['batch'] = ROUTERS['topk']\n")
    experiments.register(path)
    code, _, err = call(train.main, "--config=digits_random", f"--workdir={tmp_path / 'run'}")
    assert (code, err.count("\n")) == (2, 1)
    assert "config.routing.kind is 'batch', a name in ROUTINGS and in ROUTERS" in err


def test_a_training_from_python_keeps_the_file_too(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(api.launch, "launch", lambda *arguments: given.append(arguments[-1]))
    (tmp_path / "my.py").write_text(FILE)
    jvitmoe.train(f"{tmp_path / 'my.py'}:round_robin", workdir=tmp_path / "run")
    jvitmoe.train("digits_random", workdir=tmp_path / "run")
    assert given == [FILE.encode(), b""]


def test_of_our_experiments_no_copy_is_kept(tmp_path):
    assert experiments.text("digits_random") == experiments.text("") == b""
    assert experiments.text(ROOT / "configs" / "cifar10_fast.py:random") == b""
    (tmp_path / "my.py").write_text("# mine\n")
    assert experiments.text(f"{tmp_path / 'my.py'}:variant") == b"# mine\n"
