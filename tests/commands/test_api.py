"""Training from Python: what a run gives, and how it is interrupted."""

import ctypes
import itertools
import shutil
import signal
import subprocess
import sys
import threading
from concurrent import futures

import chex
import jax
import pytest
from absl import logging

import jvitmoe
import processes
from jvitmoe import api
from jvitmoe.data import pictures
from jvitmoe.errors import UserError
from jvitmoe.machine import compilation, signals
from run_folders import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config():
    return tiny(routing={"experts": 1, "kind": "batch"}, train={"epochs": 2})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Returns a run that another thread trained, as in a worker of Ray."""
    with futures.ThreadPoolExecutor() as threads:
        return threads.submit(jvitmoe.train, config, workdir=tmp_path_factory.mktemp("api") / "run").result()


def test_a_run_gives_its_config_history_results_classifier_and_report(run, config, monkeypatch):
    assert run.config == config
    losses = [line["loss"] for line in run.history if line["kind"] == "train"]
    assert len(losses) == run.results["step"] == run.history[-1]["step"]
    assert run.accuracy() == run.accuracy("dense") == run.results["rows"][0]["accuracy"]
    params = run.classifier().params
    chex.assert_trees_all_equal(jvitmoe.load(run.workdir, checkpoint=run.results["step"]).params, params)
    monkeypatch.setenv("HOME", str(run.workdir.parent))
    report = (run.report("~/run", "--help") / "report.md").read_text()  # a name that looks like a flag is a name
    assert "| run |" in report
    assert "| run (2) |" in report
    assert pictures.find(["~/run/config.json", "~/none.png"])[0] == [run.workdir / "config.json"]
    chex.assert_trees_all_equal(jvitmoe.load(run.export("safetensors", run.workdir / "out")).params, params)
    assert repr(run) == f"Run({str(run.workdir)!r})"
    nothing = jvitmoe.Run(run.workdir / "nothing")
    for mistake in (lambda: nothing.config, nothing.accuracy, lambda: run.accuracy("merged")):
        with pytest.raises(UserError):
            mistake()


def test_an_evaluation_takes_the_flags_of_the_command_and_is_refused_as_it_is(run, tmp_path, monkeypatch):
    for options, named in (({"few_shot": -1}, "--few_shot"), ({"paths": -1}, "--paths"), ({}, "does not exist")):
        with pytest.raises(UserError, match=named):
            jvitmoe.Run(tmp_path / "missing").evaluate(**options)
    given = []
    monkeypatch.setattr(api.evaluate, "evaluate", lambda *arguments: given.extend(arguments))
    assert run.evaluate("best", 3, 10, "here", 2) == run.results
    assert given == [run.workdir, "best", 3, 10, "here", 2]


def test_training_and_loading_log_nothing_below_the_verbosity_of_the_caller_and_keep_it(run, caplog):
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        jvitmoe.train(run.config, workdir=run.workdir)
        jvitmoe.load(run.workdir)
        assert caplog.messages == []
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(before)


def test_a_second_thread_that_trains_is_refused_in_one_line(config, tmp_path, monkeypatch):
    refused = []

    def train_again():
        try:
            jvitmoe.train(config, workdir=tmp_path)
        except UserError as error:
            refused.append(str(error))

    def launch(*_, **__):
        other = threading.Thread(target=train_again)
        other.start()
        other.join()

    monkeypatch.setattr(api.launch, "launch", launch)
    jvitmoe.train(config, workdir=tmp_path)
    jvitmoe.train(config, workdir=tmp_path)
    assert refused == 2 * ["another thread trains; wait for it, or train in a process of its own"]


def test_the_compilation_cache_of_the_caller_stays_as_it_was(run, config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name, before, seen = "jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir, []

    def use_cache(*_, **__):
        compilation.use_cache()
        seen.append(jax.config.jax_compilation_cache_dir)

    for command in ("launch", "evaluate", "export"):
        monkeypatch.setattr(getattr(api, command), command, use_cache)
    jax.config.update(name, None)
    try:
        for call in (lambda: jvitmoe.train(config, tmp_path / "x"), run.evaluate, lambda: run.export("timm", tmp_path)):
            call()
            assert jax.config.jax_compilation_cache_dir is None
        assert seen == 3 * [str(tmp_path / "jvitmoe" / "compiled")]
    finally:
        jax.config.update(name, before)


def test_verifying_a_run_tells_whether_it_is_sound(run, tmp_path):
    copy = jvitmoe.Run(shutil.copytree(run.workdir, tmp_path / "copy"))
    assert copy.verify()
    (copy.workdir / "classes.json").write_text("{")
    assert not copy.verify()


def test_settings_and_experiments_that_cannot_be_are_refused(config, tmp_path):
    for name, overrides, named in (
        (config, {"train.epochs": 0}, r"config\.train\.epochs is 0"),
        (config, {"train.epoch": 0}, r"did you mean 'train\.epochs'"),
        ("no_such", {}, "no_such"),
        (tmp_path / "no_such.py", {}, "no_such"),
    ):
        with pytest.raises(UserError, match=named):
            jvitmoe.train(name, workdir=tmp_path / "x", overrides=overrides)
    assert config.train.epochs == 2


def test_an_interrupt_saves_and_the_same_call_goes_on(run, config, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    asked, steps = api._Interrupts.asked, itertools.count(1)

    def press(self):
        if next(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return asked(self)

    monkeypatch.setattr(api._Interrupts, "asked", press)
    with pytest.raises(KeyboardInterrupt, match="train again to go on"):
        jvitmoe.train(config, workdir=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before
    monkeypatch.undo()
    resumed = jvitmoe.train(config, workdir=tmp_path / "run")
    assert [line["loss"] for line in resumed.history if line["kind"] == "train"] == [
        line["loss"] for line in run.history if line["kind"] == "train"
    ]
    chex.assert_trees_all_equal(resumed.classifier().params, run.classifier().params)


def test_an_interrupt_of_one_of_several_processes_tells_the_others_and_leaves_their_handler(monkeypatch):
    """JAX stops all of them together by its handler of SIGTERM, which C code has set."""
    told, libc = [], ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(told.append)
    address = ctypes.cast(handler, ctypes.c_void_p).value
    monkeypatch.setattr(signals.processes, "is_single", lambda: False)
    before = libc.signal(signal.SIGTERM, address)
    try:
        with api._Interrupts() as stop:
            stop.unsaved = True
            signal.raise_signal(signal.SIGINT)
        assert told == [signal.SIGTERM]
        assert libc.signal(signal.SIGTERM, address) == address
    finally:
        libc.signal(signal.SIGTERM, before)


@pytest.mark.process
def test_importing_the_package_imports_neither_jax_nor_a_reader_of_data():
    heavy = ("jax", "tensorflow_datasets", "tensorflow", "PIL", "sklearn")
    program = "import sys, jvitmoe, jvitmoe.train, jvitmoe.data.sources; "
    program += f"print([name for name in {heavy} if name in sys.modules]); jvitmoe.load; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=processes.ROOT)
    assert done.stdout == "[]\nTrue\n", done.stderr
    with pytest.raises(AttributeError):
        _ = jvitmoe.nothing
