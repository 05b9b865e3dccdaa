"""Flags and exit codes: what a user mistypes ends in one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from jvitmoe import cli
from jvitmoe.config import UserError

DIGITS = str(Path(__file__).parents[1] / "configs" / "digits_random.py")


def experiment(*arguments: str):
    return cli.experiment(cli.parse(["train.py", *arguments], lambda values: None, config=True))


@pytest.mark.parametrize("arguments", [(f"--config={DIGITS}",), ("--config", DIGITS), ("-config", DIGITS)])
def test_overrides_reach_the_config_in_their_types(arguments):
    config = experiment(*arguments, "--config.train.epochs=3", "--config.data.flip", "--config.optim.warmup_epochs=1")
    assert (config.train.epochs, config.data.flip, config.optim.warmup_epochs) == (3, True, 1.0)
    assert type(config.optim.warmup_epochs) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config.train.epochs=3"], "--config is missing"),
        (["--config=no/such.py"], "'no/such.py' does not exist"),
        ([f"--config={DIGITS}", "--config.train.epoch=3"], "did you mean config.train.epochs?"),
        ([f"--config={DIGITS}", "--config.epochs=3"], "did you mean config.train.epochs?"),
        ([f"--config={DIGITS}", "--config.trian.epochs=3"], "did you mean config.train.epochs?"),
        ([f"--config={DIGITS}", "--config.zzz.yyy=3"], "the sections are data, model, routing, init, optim, train"),
        ([f"--config={DIGITS}", "--config.train.epochs=many"], "--config.train.epochs=many"),
        ([f"--config={DIGITS}", "--config.train.epochs=2.5"], "--config.train.epochs=2.5"),
        ([f"--config={DIGITS}", "--config.routing.experts=0"], "config.routing.experts is 0"),
        ([f"--config={DIGITS}", "--wordkir=x"], "wordkir"),
        ([f"--config={DIGITS}", "stray"], "'stray' is not a flag"),
    ],
)
def test_a_mistyped_command_line_is_one_clear_line(arguments, message):
    with pytest.raises(UserError) as caught:
        experiment(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return 3\n", "returns int; it must return jvitmoe.config.Config"),
        ("import nowhere_to_be_found\n", "nowhere_to_be_found"),
        ("def get_config(:\n", "SyntaxError"),
        ("x = 1\n", "get_config"),
    ],
)
def test_a_broken_experiment_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        experiment(f"--config={path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "code", "shown"), [(UserError("bad value"), 2, "error: bad value\n"), (KeyboardInterrupt(), 130, "")]
)
def test_run_turns_mistakes_into_exit_codes(monkeypatch, capsys, raised, code, shown):
    def main(argv):
        raise raised

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == shown


def test_a_bug_is_not_hidden_as_a_user_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 / 0)


def test_help_names_the_flags_and_exits_0(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(["train.py", "--help"], lambda values: None, config=True)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--config" in shown
    assert "--config.train.epochs=10" in shown


def test_of_several_failures_of_one_write_only_the_raised_one_is_shown():
    """Orbax writes a checkpoint's files as tasks of asyncio, which shows each failed one that nobody asked."""
    program = """
import asyncio
from jvitmoe import cli
from jvitmoe.config import UserError

async def fail():
    raise OSError("No space left on device")

async def write():
    tasks = [asyncio.create_task(fail()) for _ in range(3)]
    await asyncio.sleep(0.01)
    await tasks[0]

def main(argv):
    try:
        asyncio.run(write())
    except OSError as error:
        raise UserError(str(error))

cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("command", [["train", "--help"], ["report", "--help"], ["export", "--help"]])
def test_a_full_disk_behind_standard_output_is_one_line(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", f"jvitmoe.{command[0]}", command[1]], stdout=full, stderr=subprocess.PIPE, text=True
        )
    message = "error: standard output cannot be written: No space left on device; make room or send it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("program", ["console.print('x')", "print('x' * 100_000)", "print('x')"])
def test_what_is_printed_reaches_a_full_disk_at_once_or_at_the_end(program):
    program = f"from jvitmoe import cli; from jvitmoe.tracking import console; cli.run(lambda argv: {program})"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.strip("x")) == (0, "", "\n")
