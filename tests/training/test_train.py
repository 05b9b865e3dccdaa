"""Whole runs, in this process and in real ones that are really killed: resuming, stopping, refusing."""

import json
import re
import shutil
import signal
import time

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import jvitmoe
import processes
from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.commands import evaluate, export, predict, train
from jvitmoe.data import sources
from jvitmoe.evaluation import evaluator
from jvitmoe.experts import merge
from jvitmoe.interop import pretrained
from jvitmoe.machine.devices import make_mesh
from jvitmoe.runs import metrics_log
from jvitmoe.runs.checkpoints import Checkpoints
from jvitmoe.training import build, loop, update
from jvitmoe.training.state import make_state
from processes import call, refused, succeed, wait_for_step
from run_folders import (
    assert_same_run,
    final_state,
    history,
    lose_newest,
    rows,
    saved,
    saved_config,
    snapshot,
    tiny,
    write_experiment,
)

pytestmark = pytest.mark.process

STEPS = 4 * (1337 // 256)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "tiny.py"
    return write_experiment(path, tiny(train={"epochs": 4, "log_every": 2, "eval_every": 2, "checkpoint_every": 2}))


@pytest.fixture(scope="module")
def uninterrupted(experiment):
    """An uninterrupted run, made by a fresh process."""
    ended = processes.run(processes.train(experiment, experiment.parent / "uninterrupted"), cold=True)
    assert ended.code == 0, ended.err
    return experiment.parent / "uninterrupted"


@pytest.fixture
def copy(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted, tmp_path / "copy")


def test_asked_to_stop_it_saves_exits_within_ten_seconds_and_goes_on_to_the_same_bits(
    experiment, uninterrupted, tmp_path
):
    workdir = tmp_path / "stopped"
    one = processes.start(processes.train(experiment, workdir, "--config.train.checkpoint_every=0"))
    wait_for_step(workdir, 2, one)
    asked = processes.seconds(one)
    one.process.send_signal(signal.SIGINT)
    (ended,) = processes.collect([one])
    assert ended.code == 128 + signal.SIGINT, ended.err
    assert ended.seconds - asked < 10
    stopped_at = int(final_state(workdir).step)
    assert 0 < stopped_at < STEPS
    assert re.search(r"^stopping after this (step \(about \d+ s\)|evaluation); again to", ended.out, re.MULTILINE)
    assert f"stopped at step {stopped_at} by SIGINT" in ended.out
    ended = processes.run(processes.train(experiment, workdir))
    assert ended.code == 0, ended.err
    assert f"resuming    from step {stopped_at}" in ended.out
    assert_same_run(workdir, uninterrupted)


DENSE = "--config.routing.experts=1", "--config.routing.kind=batch"  # its test has one row, so it takes less time


def test_a_signal_in_an_evaluation_ends_the_run_after_it_also_before_its_test(experiment, tmp_path, monkeypatch):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    settings = *DENSE, "--config.train.epochs=2", "--config.train.eval_every=1"
    short = train.main, f"--config={experiment}", *settings, "--trackers="
    succeed(*short, f"--workdir={whole}")
    assert not (whole / "tb").exists()
    watch = evaluator.evaluate_main

    def interrupted(*arguments):
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)  # a thread takes it
        return watch(*arguments)

    monkeypatch.setattr(evaluator, "evaluate_main", interrupted)
    for step in (5, 10):
        code, out, err = call(*short, f"--workdir={workdir}")
        assert (code, err) == (128 + signal.SIGTERM, "")
        assert f"stopped at step {step} by SIGTERM; the same command goes on" in out
        assert not (workdir / "result.json").exists()
    monkeypatch.undo()
    succeed(*short, f"--workdir={workdir}")
    assert_same_run(workdir, whole)


def test_a_run_goes_on_by_its_folder_alone_and_dots_and_links_lead_to_it(experiment, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "deep" / "folder")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    monkeypatch.chdir(tmp_path / "here")
    started = train.main, f"--config={experiment}", *DENSE, "--config.train.epochs=1"
    counted, browse, calls = (*started, "--config.model.classes=0"), sources.browse, []
    monkeypatch.setattr(sources, "browse", lambda *of: calls.append(of) or browse(*of))
    succeed(*counted, "--workdir=../run")
    assert len(calls) == 1  # to list a large folder takes minutes
    for again in (counted, counted[:1]):  # also by its folder alone
        assert "the run was trained and tested before" in succeed(*again, "--workdir=../run")
    assert saved_config(tmp_path / "run").model.classes == 10
    assert "train.seed was 0 and is 1 now" in refused(train.main, "--workdir=../run", "--config.train.seed=1")
    assert "--config is missing" in refused(train.main, f"--workdir={tmp_path}")
    succeed(evaluate.main, "--workdir=../run", "--verify")
    succeed(predict.main, "--workdir=../run", "../black.png")
    black = np.zeros((1, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(jvitmoe.load("../run").logits(black), jvitmoe.load(tmp_path / "run").logits(black))
    # `..` of a link is beside its target.
    succeed(*started, "--workdir=link/../other", "--config.init.source=../run")
    assert {"checkpoints", "metrics.jsonl"} <= {path.name for path in (tmp_path / "deep" / "other").iterdir()}


def test_a_batch_that_was_chosen_stays_that_of_the_run(experiment, tmp_path):
    chosen = *DENSE, "--config.train.batch_size=0", "--config.train.epochs=1", f"--workdir={tmp_path / 'run'}"
    succeed(train.main, f"--config={experiment}", *chosen, "--config.train.accumulate=64")
    assert saved_config(tmp_path / "run").train.batch_size == 64  # 32 without accumulation
    out = succeed(train.main, f"--config={experiment}", *chosen)
    assert "the run was trained and tested before" in out


def test_steps_are_shown_where_none_was_for_long_and_the_history_stays_the_same(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log, "PLAIN_SECONDS", 0.0)
    shown = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(metrics_log, "SHOW_SECONDS", seconds)
        monkeypatch.setattr(loop, "SLOW_SECONDS", 1e9 if seconds else 0.0)
        workdir = tmp_path / str(seconds)
        arguments = f"--workdir={workdir}", *DENSE, "--config.train.epochs=2", "--config.train.log_every=5"
        out = succeed(train.main, f"--config={experiment}", *arguments)
        shown.append([int(number) for number in re.findall(r"step (\d+)/\d+  loss", out)])
        assert re.search(r"^step 1/10  .*  first step \d+\.\d s$", out, re.MULTILINE)
    # Before a save all that was done is shown, and each step once the next one is on its way.
    assert shown == [list(range(1, 11)), [1, 5, 10]]
    assert history(tmp_path / "0.0") == history(tmp_path / "1000000000.0")


def test_evaluate_needs_only_the_folder_and_any_devices_and_training_again_tells_of_the_run_and_changes_nothing(
    experiment, copy, monkeypatch
):
    monkeypatch.setattr(evaluator, "versions", lambda: {"jax": "of the test"})
    trained = json.loads((copy / "result.json").read_text())
    out = succeed(evaluate.main, f"--workdir={copy}", "--devices=8", "--paths=3", "--few_shot=5")
    result = json.loads((copy / "result.json").read_text())
    expected = {row["model"]: row for row in trained["rows"]}
    found = {row["model"]: row for row in result["rows"]}
    assert list(found) == ["merged", "expert 0", "expert 1", "expert 2", "3 random paths", "ensemble"]
    assert "random path" in expected
    for name in found.keys() & expected.keys():
        near = {metric: pytest.approx(expected[name][metric], rel=1e-5) for metric in ("nll", "ece")}
        assert found[name] == expected[name] | near
    assert result["images_per_second"] == trained["images_per_second"]
    assert result["trained_on"] == trained["hardware"] != result["hardware"]
    assert (result["trained_with"], result["versions"]) == (trained["versions"], {"jax": "of the test"})
    why, text = result["mergeability"], (copy / "report.md").read_text()
    assert [len(why[name]) for name in ("spread", "cosine", "difference_cosine", "gap")] == [2] * 4
    # 360 test images are fewer than a thousand, so the line starts and ends at rows of the table.
    for expert, on_line in enumerate(why["barrier"]["losses"]):
        assert on_line[0] == pytest.approx(found[f"expert {expert}"]["nll"], rel=1e-5)
        assert on_line[-1] == pytest.approx(found["merged"]["nll"], rel=1e-5)
    assert (copy / "mergeability.png").read_bytes().startswith(b"\x89PNG")
    assert "(mergeability.png)" in text
    assert "merged" in out
    before = {name: text for name, text in snapshot(copy).items() if name != "lock"}
    assert {"config.json", "metrics.jsonl", "result.json", "report.md", "confusion.png"} <= before.keys()
    assert any(name.startswith("tb/") for name in before)
    out = succeed(train.main, f"--config={experiment}", f"--workdir={copy}")
    for wanted in (
        "devices     1 x cpu",
        "routing     3 experts per MLP: one is drawn for each batch and layer; never pulled together",
        "1,337 train, 100 validation, 360 test",
        f"steps       {STEPS}",
        f"resuming    from step {STEPS}",
        "the run was trained and tested before; jvitmoe evaluate tests it again",
        *("active", "total", "merged", "expert 0", "expert 1", "expert 2", "3 random paths"),
    ):
        assert wanted in out
    assert {name: text for name, text in snapshot(copy).items() if name != "lock"} == before


def test_evaluate_tests_any_checkpoint_and_training_again_tests_the_last(experiment, uninterrupted, copy):
    watched = {line["step"]: line["nll"] for line in history(copy) if line["kind"] == "validation"}
    best = min(watched, key=lambda step: (watched[step], -step))
    began = (copy / "config.json").stat().st_ctime
    for which, step in (("best", best), (f"{STEPS - 2}", STEPS - 2)):
        out = succeed(evaluate.main, f"--workdir={copy}", f"--checkpoint={which}")
        assert json.loads((copy / "result.json").read_text())["step"] == step
        assert f"checkpoint at step {step}" in out
        assert out.rstrip().endswith(f" in {copy}")
        for name in re.search(r"^written     (.*) in ", out, re.MULTILINE)[1].split(", "):
            assert (copy / name).stat().st_mtime >= began, name
    # The result of an earlier step is not that of the run.
    succeed(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert json.loads((copy / "result.json").read_text())["step"] == STEPS
    assert rows(copy) == rows(uninterrupted)


def test_after_its_end_a_run_is_trained_longer_and_its_history_kept(experiment, copy, tmp_path):
    """The learning rate goes on as in a run of the new length, and stopping on the way changes no bit."""
    longer = f"--config={experiment}", "--config.train.epochs=6", "--trackers="
    new = STEPS * 6 // 4
    before = history(copy)
    stopped = shutil.copytree(copy, tmp_path / "stopped")
    assert "learning rate goes on as that of a run of 6 epochs" in succeed(train.main, *longer, f"--workdir={copy}")
    lines = history(copy)
    assert lines[: len(before)] == before
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(2, new + 1, 2))
    config = saved_config(copy)
    plan = build.plan_for(config, make_mesh(config.train), 1337)
    assert plan.total == new
    (stopped / "config.json").write_text(config_lib.dumps(config))  # killed before its first checkpoint
    assert " sound" in succeed(evaluate.main, f"--workdir={stopped}", "--verify")
    for line in lines[len(before) :]:
        if line["kind"] == "train":
            expected = float(update.learning_rate(plan, line["step"] - 1))
            assert line["learning_rate"] == pytest.approx(expected, rel=1e-5)
    one = processes.start(processes.train(experiment, stopped, *longer[1:]))
    wait_for_step(stopped, STEPS + 2, one)
    one.process.kill()
    processes.collect([one])
    succeed(train.main, *longer, f"--workdir={stopped}")
    chex.assert_trees_all_equal(final_state(stopped), final_state(copy))


def test_a_folder_with_something_else_is_refused_and_left_as_it_is(experiment, uninterrupted, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("file")
    (tmp_path / "kept").mkdir()
    for name in ("config.json", "metrics.jsonl", "result.json"):
        shutil.copy(uninterrupted / name, tmp_path / "kept")
    for folder, override, message in (
        (tmp_path / "photos", "seed=0", "holds other files than a run"),
        (tmp_path / "kept", "seed=0", "holds the results of a run without its checkpoints; set --workdir"),
        (tmp_path / "file", "seed=0", "is a file"),
        (uninterrupted, "batch_size=255", "train.batch_size was 256 and is 255 now"),
        (uninterrupted, "epochs=3", "train.epochs was 4 and is 3 now; set --workdir to a new folder"),
    ):
        before = snapshot(folder.parent)
        arguments = f"--workdir={folder}", f"--config.train.{override}"
        assert message in refused(train.main, f"--config={experiment}", *arguments)
        assert snapshot(folder.parent) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=2000", "must be at most the 1337 training images; set --config.train.batch_size=1337"),
        ("model.classes=9", "digits has 10 classes but config.model.classes is 9"),
        (
            "train.devices=0 train.batch_size=255",
            "batch_size is 255; it must be a multiple of the 8 devices; set --config.train.batch_size=248",
        ),
        ("train.epochs=2147483647", "it must make at most 2,147,483,647 steps, and an epoch has 5"),
        ("model.width=2147483644", "they must be at most 1.0e+13"),
        ("model.hidden=2000000000", "GiB of a device that has "),
        ("init.source=no/such", "config.init.source cannot be read: 'no/such' is not a file"),
        ("init.source={run} model.depth=3", "set --config.model.depth=2"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_folder(experiment, uninterrupted, tmp_path, override, message):
    workdir = tmp_path / "new"
    settings = [f"--config.{one}" for one in override.format(run=uninterrupted).split()]
    assert message in refused(train.main, f"--config={experiment}", f"--workdir={workdir}", *settings)
    assert not workdir.exists()


def test_a_run_that_blows_up_stops_and_names_step_value_and_last_good_checkpoint(experiment, tmp_path):
    """A warm-up of two steps begins at learning rate 0: the second update, after step 2, makes all numbers huge."""
    settings = "optim.learning_rate=1e30", f"optim.warmup_epochs={2 / (1337 // 256)}", "train.checkpoint_every=1"
    arguments = f"--workdir={tmp_path}/x", *DENSE, *(f"--config.{setting}" for setting in settings)
    err = refused(train.main, f"--config={experiment}", *arguments)
    assert re.search("is (nan|inf) at step 3; it must be finite; the last good checkpoint is step 1; ", err)
    good = Checkpoints(tmp_path / "x" / "checkpoints").read("1")
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(good.params)) < 10


def trained_and_resumed(experiment, workdir, *arguments, between=lambda: None):
    """Trains a run, and again from its last checkpoint but one, to the same bits. Returns what was printed by each."""
    arguments = train.main, f"--config={experiment}", f"--workdir={workdir}", *arguments
    first = succeed(*arguments)
    whole = shutil.copytree(workdir, workdir.with_name("whole"))
    lose_newest(workdir)
    between()
    second = succeed(*arguments)
    assert f"resuming    from step {saved(whole)[-2].name}" in second
    assert_same_run(workdir, whole)
    return first, second


def test_upcycling_starts_from_the_dense_models_own_predictions_and_resumes_without_it(
    experiment, uninterrupted, tmp_path
):
    config = saved_config(uninterrupted)
    config.init.source, config.routing.experts = str(uninterrupted), 4
    mesh = make_mesh(config.train)
    dense, told = pretrained.start(config)
    assert "(run): " in told[0]
    state = make_state(build.plan_for(rules.check(config), mesh, 1337), dense)
    for route in ([3, 1], [0, 2]):
        chex.assert_trees_all_equal(merge.take_path(state.params, jax.numpy.array(route)), dense)
    config.routing.kind, config.routing.part = "sample", "model"
    copies = make_state(build.plan_for(config, mesh, 1337), dense).params
    chex.assert_trees_all_equal(merge.take_path(copies, jax.numpy.array([3])), dense)
    source = shutil.copytree(uninterrupted, tmp_path / "source")
    settings = f"--config.init.source={source}", "--config.train.epochs=1"
    # The checkpoint has all of the source.
    first, second = trained_and_resumed(experiment, tmp_path / "up", *settings, between=lambda: shutil.rmtree(source))
    assert f"source      {source} (run): " in first
    assert "source      averaged the experts" in first
    assert "source  " not in second


LOCAL = ("routing.part=model", "routing.pull=1", "routing.pull_every=3")


def test_whole_models_on_an_expert_axis_with_an_ema_train_resume_and_are_exported_and_tested_on_other_devices(
    experiment, tmp_path
):
    workdir = tmp_path / "slots"
    arguments = ("--config.routing.kind=sample", "--config.train.batch_size=255", "--config.train.ema=0.9")
    arguments += ("--config.train.devices=3", "--config.train.expert_devices=3", "--config.train.epochs=2")
    arguments += tuple(f"--config.{setting}" for setting in LOCAL)
    trained_and_resumed(experiment, workdir, *arguments)
    config = saved_config(workdir)
    counted = update.bytes_reduced(build.plan_for(config, make_mesh(config.train), 1337))
    logged = {line["step"]: line["reduced_bytes"] for line in history(workdir) if line["kind"] == "train"}
    assert logged == {step: counted(step) for step in range(2, 11, 2)}
    trained = {row["model"]: row["accuracy"] for row in rows(workdir)}
    out = succeed(evaluate.main, f"--workdir={workdir}", "--paths=0", "--devices=2")
    found = {row["model"]: row["accuracy"] for row in rows(workdir)}
    for name in ("merged", "EMA"):
        assert name in out
        assert found[name] == trained[name]
    merged = jvitmoe.load(workdir)
    succeed(export.main, f"--workdir={workdir}", "--to=safetensors", f"--out={tmp_path / 'out'}")
    chex.assert_trees_all_equal(jvitmoe.load(tmp_path / "out").params, merged.params)


def test_a_learned_router_trains_resumes_and_is_tested_routed_and_merged(experiment, tmp_path):
    """Its warm-up is capped at half of the run, with a line."""
    workdir = tmp_path / "switch"
    more = ("--config.train.epochs=1", "--config.data.validation=0", "--config.optim.warmup_epochs=5")
    out, _ = trained_and_resumed(experiment, workdir, "--config.routing.kind=switch", *more)
    assert "warm-up     2 steps: at most half of all; config.optim.warmup_epochs is 5\n" in out
    assert saved_config(workdir).optim.warmup_epochs == 5
    assert "experts.png" in succeed(evaluate.main, f"--workdir={workdir}")
    assert (workdir / "experts.png").read_bytes().startswith(b"\x89PNG")
    found = {row["model"]: row for row in rows(workdir)}
    assert {"routed", "merged", "merged, gated", "expert 0", "8 random paths", "ensemble"} <= found.keys()
    assert found["merged, gated"]["nll"] != pytest.approx(found["merged"]["nll"], rel=1e-3)
    for figure in ("flops_per_image", "parameters"):
        assert found["routed"][figure] > found["merged"][figure]
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert whole["images_per_second"] > 0  # the last step alone has none
    first = next(line for line in history(workdir) if line["kind"] == "train")
    assert "router/entropy/layer1" in first
    watched = [line for line in history(workdir) if line["kind"] == "test"][-1]
    assert watched["nll"] == pytest.approx(found["routed"]["nll"], rel=1e-5)
    assert found["routed"]["nll"] != pytest.approx(found["merged"]["nll"], rel=1e-3)
