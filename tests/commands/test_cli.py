"""Flags and exit codes: what a user mistypes ends in one line and exit code 2."""

import functools
import os
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from absl import flags

import processes
from jvitmoe import experiments
from jvitmoe.commands import cli, evaluate, export, train
from jvitmoe.config import Config
from jvitmoe.errors import UserError, did_you_mean, first_few
from jvitmoe.runs import safe_io

DIGITS, FAST = (str(Path(__file__).parents[2] / "configs" / f"{name}.py") for name in ("digits_random", "cifar10_fast"))


def define(values):
    flags.DEFINE_string("workdir", "", "Run folder.", flag_values=values)
    flags.DEFINE_integer("top", 5, "Classes.", flag_values=values)


def experiment(*arguments: str):
    return cli.experiment(cli.parse(["train.py", *arguments], define, config=True))


def python(*arguments: str, **options: Any) -> tuple[int, str, str]:
    """Returns (exit code, stdout, stderr) of a process of this Python."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run([sys.executable, *arguments], **pipes | options)
    return done.returncode, done.stdout, done.stderr


def test_overrides_reach_the_config_in_their_types_wherever_they_stand_and_the_last_config_file_counts():
    overrides = ["--config.train.epochs=3", "--config.data.flip", "--config.optim.warmup_epochs=1"]
    for given in (
        [f"--config={DIGITS}", *overrides],
        ["--config", DIGITS, *overrides],
        [*overrides, "-config", DIGITS],
        ["--config=no/such.py", f"--config={DIGITS}", *overrides[1:], "--config.train.epochs", "3"],
    ):
        config = experiment(*given)
        assert (config.train.epochs, config.data.flip, config.optim.warmup_epochs) == (3, True, 1.0)
        assert type(config.optim.warmup_epochs) is float
        assert cli.config_path(["train.py", *given]) == DIGITS


def test_a_variant_of_an_experiment_is_its_argument_and_part_of_its_name(monkeypatch, tmp_path):
    """An experiment of ours needs no path."""
    monkeypatch.chdir(tmp_path)
    assert experiment(f"--config={FAST}:random").routing.experts == 4
    assert experiment(f"--config={FAST}:dense") == experiment(f"--config={FAST}")
    assert experiment("--config=cifar10_fast:random") == experiment(f"--config={FAST}:random")
    for path in (FAST, "cifar10_fast"):
        assert cli.experiment_name(["train.py", "--config", f"{path}:random"]) == "cifar10_fast_random"
        assert cli.experiment_name(["train.py", f"--config={path}"]) == "cifar10_fast"


def test_a_file_is_taken_only_by_a_name_that_ends_in_py_or_has_a_separator(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("digits_random", "mine"):
        (tmp_path / name).write_text(Path(FAST).read_text())
    assert experiment("--config=digits_random") == experiment(f"--config={DIGITS}")
    with pytest.raises(UserError, match=r"'mine' is no name of an experiment; for the file give --config=\./mine"):
        experiment("--config=mine")
    assert experiment("--config=./mine:random") == experiment(f"--config={FAST}:random")
    (tmp_path / "mine").rename("digits_random.py")
    assert experiment("--config=digits_random.py") == experiment(f"--config={FAST}")


def test_help_begins_with_what_most_people_need_and_ends_with_hosts_and_processes(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["train.py", "--help"], train.define_flags, config=True)
    own, _, _ = capsys.readouterr().out.partition("Settings,")
    listed = re.findall(r"^  --(?:\[no\])?([a-z_]+)", own, re.MULTILINE)
    assert listed[:4] == ["config", "workdir", "start", "trackers"]
    assert listed[-4:] == ["processes", "process", "join_seconds", "help"]


def test_of_many_things_a_message_names_a_few_and_counts_the_others():
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}) == "a, b, c and 2 more"


def test_a_name_in_another_case_is_meant_before_a_nearer_one():
    assert did_you_mean("adamW", ("adam", "adamw")) == "; did you mean 'adamw'?"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("def get_config():\n    return 3\n", "broken.py' returns int"),
        ("import nowhere_at_all\n", "broken.py:1: ModuleNotFoundError"),
        ("\n\ndef get_config(:\n", "broken.py:3: SyntaxError"),
        ("raise SystemExit(3)\n", "broken.py:1: SystemExit"),
        ("def get_config(which):\n    pass\n", "broken.py: TypeError"),
        ("\nimport unclosed\n", "unclosed.py:2: SyntaxError"),
        ("import failing\n\n\ndef get_config():\n    failing.divide()\n", "failing.py:2: ZeroDivisionError"),
    ],
)
def test_a_broken_experiment_file_is_one_line_with_the_place_that_fails(tmp_path, monkeypatch, text, place):
    path = tmp_path / "broken.py"
    path.write_text(text)
    (tmp_path / "unclosed.py").write_text("\nx = (\n")
    (tmp_path / "failing.py").write_text("def divide():\n    return 1 / 0\n")
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    with pytest.raises(UserError) as caught:
        experiment(f"--config={path}")
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_experiment_imports_the_files_of_its_folder_as_they_are_now(tmp_path):
    """Also where another experiment, or an earlier call, has imported a file of that name."""
    for folder, epochs in (("a", 2), ("b", 3), ("a", 4)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "base.py").write_text(f"EPOCHS = {epochs}  # {'x' * epochs}\n")
        text = "from base import EPOCHS\nfrom jvitmoe.config import Config, TrainConfig\n"
        (tmp_path / folder / "exp.py").write_text(text + "get_config = lambda: Config(train=TrainConfig(EPOCHS))\n")
        assert experiments.load(tmp_path / folder / "exp.py").train.epochs == epochs
        assert "base" not in sys.modules


def test_an_experiment_of_ours_takes_no_module_of_its_user_that_has_the_name_of_its_base(tmp_path, monkeypatch):
    before = experiment("--config=digits_random")
    theirs = types.ModuleType("digits_dense")
    monkeypatch.setitem(sys.modules, "digits_dense", theirs)
    assert experiment("--config=digits_random") == before
    assert sys.modules["digits_dense"] is theirs


def test_a_folder_may_be_given_by_home_and_a_run_folder_not_by_a_url(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert safe_io.run_folder("~/runs/x") == tmp_path / "runs" / "x"
    values = cli.parse(["export", "--out=~/x", "--to=a=~b"], export._define_flags)  # no shell expands --out=~/x
    assert (values.out, values.to) == (f"{tmp_path}/x", "a=~b")
    assert experiment("--config=digits_dense", "--config.data.dir=~/x").data.dir == "~/x"
    (tmp_path / "mine.py").write_text("from jvitmoe.config import Config as get_config")
    assert experiments.load("~/mine.py") == Config()
    (tmp_path / "10:00").mkdir()
    (tmp_path / "mine.py").rename(tmp_path / "10:00" / "mine.py")
    assert experiments.load("~/10:00/mine.py") == Config()
    for command, *arguments in ((train.main, "--config=digits_dense"), (evaluate.main,)):
        assert "'gs://bucket/x' is a URL" in processes.refused(command, *arguments, "--workdir=gs://bucket/x")


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (UserError("bad value"), 2, "error: bad value\n"),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile"), 2, "error: the memory of a device is too small"),
    ],
)
def test_run_turns_mistakes_into_exit_codes_and_hides_no_bug(raised, code, shown):
    def main(argv):
        raise raised

    ended, out, err = processes.call(main)
    assert (ended, out, err.count("\n")) == (code, "", bool(shown))
    assert err.startswith(shown)
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 / 0)


@pytest.mark.process
def test_help_and_wrong_flags_do_not_wait_for_the_import_of_jax():
    program = """
import importlib, sys
for command in ("train", "evaluate", "predict", "export", "report", "compile", "configs"):
    for argument in ("--help", "--no_such_flag"):
        try:
            importlib.import_module(f"jvitmoe.commands.{command}").main(["x.py", argument])
        except BaseException as error:
            assert type(error).__name__ in ("SystemExit", "UserError"), error
print(sorted({"jax", "matplotlib"} & sys.modules.keys()))
"""
    _, out, err = python("-c", program)
    assert out.splitlines()[-1] == "[]", err


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        ("train", ["--config=digits_random"], "starting    JAX\n"),
        ("evaluate", [], "reading     {}\n"),
        ("export", ["--out={}/new", "--to=timm"], "reading     {}\n"),
    ],
)
def test_a_command_says_what_it_does_before_it_imports_jax(tmp_path, command, arguments, line):
    (tmp_path / "checkpoints").mkdir()
    code = f"import sys; sys.modules['jax'] = None; from jvitmoe.commands import {command}; {command}.main(sys.argv)"
    _, out, err = python("-c", code, f"--workdir={tmp_path}", *(one.format(tmp_path) for one in arguments))
    assert out == line.format(tmp_path)
    assert "jax" in err.splitlines()[-1]


@pytest.mark.process
def test_a_terminal_that_has_closed_ends_no_command():
    master, terminal = os.openpty()
    os.close(master)
    with cli._Stdout(terminal, "w") as stdout:
        assert stdout.write(b"nobody reads this") == 17
        assert stdout.write(b"nor this") == 8


@pytest.mark.process
def test_the_package_run_as_a_module_lists_and_runs_its_commands():
    modules = {path.stem for path in (processes.ROOT / "jvitmoe" / "commands").glob("[!_]*.py")} - {"cli"}
    run = functools.partial(python, "-m", "jvitmoe", cwd=processes.ROOT)
    code, out, err = run()
    assert (code, err, set(re.findall(r"^  jvitmoe (\w+)", out, re.MULTILINE))) == (0, "", modules)
    assert run("--version") == (0, f"jvitmoe {metadata.version('jvitmoe')}\n", "")
    assert run("trian") == (2, "", "error: 'trian' is not a command; did you mean 'train'?\n")
    assert run("predict", "--help")[1].startswith("usage: jvitmoe predict [flags] IMAGE or FOLDER…\n\nClassifies ")


@pytest.mark.process
def test_of_writes_that_fail_or_never_begin_only_the_raised_error_is_shown():
    """Orbax writes a checkpoint's files as tasks of asyncio, which shows each failed one that nobody asked."""
    program = """
import asyncio
from jvitmoe.commands import cli
from jvitmoe.errors import UserError

async def fail():
    raise UserError("no room")

async def async_serialize_from_host(): ...

async def write():
    async_serialize_from_host()
    tasks = [asyncio.create_task(fail()) for _ in range(3)]
    await asyncio.sleep(0.01)
    await tasks[0]

cli.run(lambda argv: asyncio.run(write()))
"""
    assert python("-c", program) == (2, "", "error: no room\n")


@pytest.mark.process
def test_a_closed_standard_output_ends_no_command():
    program = """
import sys
from jvitmoe.commands import cli
from jvitmoe.runs.console import console
from jvitmoe.machine import memory

memory.use_huge_pages()
cli.run(lambda argv: (console.print("x"), print("y"), print("z", file=sys.stderr), sys.stdout.flush()))
"""
    done = subprocess.run(["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", program], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"z\n")
    closed = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", sys.executable, "-c", program])
    assert closed.returncode == 0


@pytest.mark.process
@pytest.mark.parametrize("program", ["console.print('x')", "print('x' * 100_000)"])
def test_a_full_disk_behind_standard_output_is_one_line_at_once_or_at_the_end(program):
    imports = "from jvitmoe.commands import cli; from jvitmoe.runs.console import console"
    with open("/dev/full", "w") as full:
        code, _, err = python("-c", f"{imports}; cli.run(lambda argv: {program})", stdout=full)
    assert (code, err.count("\n")) == (2, 1)
    assert "No space left on device" in err


@pytest.mark.process
def test_a_folder_whose_name_is_no_utf_8_in_this_process_is_refused_in_one_line(tmp_path):
    """As with PYTHONUTF8=0 in the C locale, where TensorStore cannot open it."""
    env = processes.environment() | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, _, err = python("-m", "jvitmoe", "train", "--config=digits_dense", f"--workdir={tmp_path / 'ä'}", env=env)
    assert (code, err.count("\n")) == (2, 1), err
    assert "is no UTF-8 here" in err


@pytest.mark.process
def test_a_file_that_a_library_leaves_open_on_a_full_disk_says_nothing_more():
    """Python 3.13 tells of it when the file is released."""
    leave = 'file = open("/dev/full", "wb"); file.write(b"x"); del file'
    program = f"from jvitmoe.commands import cli\n\ndef main(argv):\n    {leave}\n\ncli.run(main)"
    code, _, err = python("-c", program)
    assert (code, err) == (0, "")
    if sys.version_info >= (3, 13):
        assert "No space left" in python("-c", leave)[2]
