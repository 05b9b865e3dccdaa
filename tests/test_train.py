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
from jvitmoe import evaluate, predict, report, routing, train
from jvitmoe.evaluation import models
from jvitmoe.experts import merge
from jvitmoe.interop import pretrained
from jvitmoe.runs import metrics_log, results
from jvitmoe.runtime.devices import make_mesh
from jvitmoe.training import loop
from jvitmoe.training.state import make_state
from processes import call, wait_for_step
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


def test_killed_and_resumed_equals_uninterrupted(experiment, uninterrupted, tmp_path):
    workdir = tmp_path / "killed"
    one = processes.start(processes.train(experiment, workdir))
    wait_for_step(workdir, 9, one)
    one.process.kill()
    (ended,) = processes.collect([one])
    assert ended.code == -signal.SIGKILL
    ended = processes.run(processes.train(experiment, workdir))
    assert ended.code == 0, ended.err
    assert "resuming    from step" in ended.out
    assert_same_run(workdir, uninterrupted)


def test_asked_to_stop_it_saves_exits_within_ten_seconds_and_goes_on_to_the_same_bits(
    experiment, uninterrupted, tmp_path
):
    workdir, stopped_at = tmp_path / "stopped", 0
    for number in (signal.SIGTERM, signal.SIGINT):
        one = processes.start(processes.train(experiment, workdir, "--config.train.checkpoint_every=0"))
        wait_for_step(workdir, stopped_at + 2, one)
        asked = processes.seconds(one)
        one.process.send_signal(number)
        (ended,) = processes.collect([one])
        assert ended.code == 128 + number, ended.err
        assert ended.seconds - asked < 10
        before, stopped_at = stopped_at, int(final_state(workdir).step)
        assert before < stopped_at < STEPS
        assert f"stopped at step {stopped_at} by {number.name}" in ended.out
    ended = processes.run(processes.train(experiment, workdir))
    assert ended.code == 0, ended.err
    assert f"resuming    from step {stopped_at}" in ended.out
    assert_same_run(workdir, uninterrupted)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_signal_in_an_evaluation_ends_the_run_after_it_also_before_its_test(
    experiment, tmp_path, monkeypatch, epochs
):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    settings = f"--config.train.epochs={epochs}", "--config.train.eval_every=1"
    short = train.main, f"--config={experiment}", *settings, "--trackers="
    assert call(*short, f"--workdir={whole}")[0] == 0
    assert not (whole / "tb").exists()
    watch = models.evaluate_main

    def interrupted(*arguments):
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)  # a thread takes it
        return watch(*arguments)

    monkeypatch.setattr(models, "evaluate_main", interrupted)
    code, out, err = call(*short, f"--workdir={workdir}")
    assert (code, err) == (128 + signal.SIGTERM, "")
    assert "stopped at step 5 by SIGTERM; the same command goes on" in out
    assert not (workdir / "result.json").exists()
    monkeypatch.undo()
    assert call(*short, f"--workdir={workdir}")[0] == 0
    assert_same_run(workdir, whole)


def test_a_run_folder_reached_through_dots_and_links_trains_verifies_predicts_loads_and_starts_others(
    experiment, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "deep" / "folder")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    monkeypatch.chdir(tmp_path / "here")
    started = train.main, f"--config={experiment}", "--config.train.epochs=1"
    assert call(*started, "--workdir=../run")[::2] == (0, "")
    assert call(evaluate.main, "--workdir=../run", "--verify")[::2] == (0, "")
    assert call(predict.main, "--workdir=../run", "../black.png")[::2] == (0, "")
    black = np.zeros((1, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(jvitmoe.load("../run").logits(black), jvitmoe.load(tmp_path / "run").logits(black))
    # `..` of a link is beside its target.
    assert call(*started, "--workdir=link/../other", "--config.init.source=../run")[::2] == (0, "")
    assert {"checkpoints", "metrics.jsonl"} <= {path.name for path in (tmp_path / "deep" / "other").iterdir()}


def test_a_warm_up_longer_than_half_of_the_run_is_capped_with_a_line_and_resumes_to_the_same_bits(experiment, tmp_path):
    short = ("--config.train.epochs=1", "--config.optim.warmup_epochs=5")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, err = call(train.main, f"--config={experiment}", f"--workdir={whole}", *short)
    assert code == 0, err
    assert "warm-up     2 steps: at most half of all; config.optim.warmup_epochs is 5\n" in out
    assert json.loads((whole / "config.json").read_text())["optim"]["warmup_epochs"] == 5
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "5")
    _, out, _ = call(train.main, f"--config={experiment}", f"--workdir={cut}", *short)
    assert "resuming    from step 4" in out
    assert_same_run(cut, whole)


def test_a_finished_run_started_again_changes_nothing_and_tells_what_one_needs(experiment, uninterrupted, copy):
    code, out, _ = call(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert code == 0
    for wanted in (
        "devices     1 x cpu",
        "active",
        "total",
        "routing     3 experts per MLP: one is drawn for each batch; never pulled together",
        "1,337 train, 100 validation, 360 test",
        f"steps       {STEPS}",
        f"resuming    from step {STEPS}",
    ):
        assert wanted in out
    for row in ("merged", "expert 0", "expert 1", "expert 2", "random path"):
        assert row in out
    files = {"config.json", "metrics.jsonl", "checkpoints", "tb", "report.md", "result.json"}
    assert {path.name for path in copy.iterdir()} >= files
    assert history(copy) == history(uninterrupted)
    assert rows(copy) == rows(uninterrupted)


def test_steps_are_shown_where_none_was_for_long_and_the_history_stays_the_same(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log, "PLAIN_SECONDS", 0.0)
    shown = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(metrics_log, "SHOW_SECONDS", seconds)
        monkeypatch.setattr(loop, "SLOW_SECONDS", 1e9 if seconds else 0.0)
        workdir = tmp_path / str(seconds)
        arguments = (f"--config={experiment}", f"--workdir={workdir}", "--config.train.log_every=5")
        code, out, err = call(train.main, *arguments)
        assert code == 0, err
        shown.append([int(number) for number in re.findall(r"left  step (\d+)/", out)])
        assert re.search(rf"^\d+:\d\d left  step 1/{STEPS}  .*  first step \d+\.\d s$", out, re.MULTILINE)
    # Before a save all that was done is shown, and each step once the next one is on its way.
    assert shown == [list(range(1, STEPS + 1)), [1, *range(5, STEPS + 1, 5)]]
    assert history(tmp_path / "0.0") == history(tmp_path / "1000000000.0")


def test_each_step_stands_once_in_the_history(uninterrupted):
    lines = [(line["step"], line["kind"]) for line in history(uninterrupted)]
    assert len(lines) == len(set(lines))
    assert [number for number, kind in lines if kind == "train"] == list(range(2, STEPS + 1, 2))


def test_evaluate_needs_only_the_folder_and_any_number_of_devices(copy, monkeypatch):
    monkeypatch.setattr(models, "versions", lambda: {"jax": "of the test"})
    trained = json.loads((copy / "result.json").read_text())
    code, out, err = call(evaluate.main, f"--workdir={copy}", "--devices=8", "--paths=3")
    assert code == 0, err
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


def test_a_tested_run_that_is_trained_again_stays_as_evaluate_left_it(experiment, copy):
    code, _, err = call(evaluate.main, f"--workdir={copy}", "--devices=8", "--paths=2", "--knn=5")
    assert code == 0, err
    before = {path: path.read_bytes() for path in copy.iterdir() if path.suffix in (".json", ".jsonl", ".md", ".png")}
    assert {"result.json", "report.md", "confusion.png"} <= {path.name for path in before}
    code, out, err = call(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert code == 0, err
    assert "the run was trained and tested before; jvitmoe.evaluate tests it again" in out
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_whose_test_was_lost_is_tested_again_with_the_versions_of_its_training(
    experiment, uninterrupted, copy, monkeypatch
):
    monkeypatch.setattr(models, "versions", lambda: {"jax": "of the test"})
    (copy / "result.json").unlink()
    code, _, err = call(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert code == 0, err
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (uninterrupted, copy))
    assert after["rows"] == before["rows"]
    assert (after["trained_with"], after["versions"]) == (before["versions"], {"jax": "of the test"})


def test_a_report_lists_the_versions_that_trained_and_those_that_tested():
    run = {"hardware": "b", "trained_on": "a", "versions": {"jax": "2", "numpy": "1"}, "trained_with": {"jax": "1"}}
    assert results.made_with([run]) == "Hardware: a; b. Versions: jax 1, jax 2, numpy 1."


def test_a_run_with_an_expert_axis_is_tested_on_any_number_of_devices(experiment, tmp_path):
    arguments = ["--config.routing.kind=sample", "--config.train.epochs=1", "--config.train.batch_size=255"]
    arguments += ["--config.train.devices=3", "--config.train.expert_devices=3", f"--workdir={tmp_path / 'axis'}"]
    code, _, err = call(train.main, f"--config={experiment}", *arguments)
    assert code == 0, err
    (trained, *_) = json.loads((tmp_path / "axis" / "result.json").read_text())["rows"]
    for devices in ("--devices=1", "--devices=2"):
        code, _, err = call(evaluate.main, f"--workdir={tmp_path / 'axis'}", "--paths=0", devices)
        assert code == 0, err
        (found, *_) = json.loads((tmp_path / "axis" / "result.json").read_text())["rows"]
        assert (found["model"], found["accuracy"]) == (trained["model"], trained["accuracy"])


def test_evaluate_tests_any_checkpoint_and_training_again_tests_the_last(experiment, uninterrupted, copy):
    watched = {line["step"]: line["nll"] for line in history(copy) if line["kind"] == "validation"}
    best = min(watched, key=lambda step: (watched[step], -step))
    for which, step in (("best", best), (f"{STEPS - 2}", STEPS - 2)):
        code, out, err = call(evaluate.main, f"--workdir={copy}", f"--checkpoint={which}")
        assert code == 0, err
        assert json.loads((copy / "result.json").read_text())["step"] == step
        assert f"checkpoint at step {step}" in out
    # The result of an earlier step is not that of the run.
    code, _, err = call(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert code == 0, err
    assert json.loads((copy / "result.json").read_text())["step"] == STEPS
    assert rows(copy) == rows(uninterrupted)


def test_report_puts_runs_side_by_side(uninterrupted, tmp_path):
    code, out, err = call(report.main, uninterrupted, f"--out={tmp_path / 'r'}")
    assert code == 0, err
    assert "uninterrupted" in out
    assert (tmp_path / "r" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| merged |" in (tmp_path / "r" / "report.md").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.learning_rate=0.5", "optim.learning_rate was 0.001 and is 0.5 now"),
        ("--config.routing.experts=2", "routing.experts was 3 and is 2 now"),
        ("--config.train.batch_size=255", "train.batch_size was 256 and is 255 now"),
    ],
)
def test_a_folder_with_another_experiment_is_left_as_it_is(experiment, uninterrupted, override, message):
    before = snapshot(uninterrupted)
    code, _, err = call(train.main, f"--config={experiment}", f"--workdir={uninterrupted}", override)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert snapshot(uninterrupted) == before


def test_a_folder_with_other_things_and_a_file_are_refused(experiment, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("file")
    for name, message in (("photos", "holds other files than a run"), ("file", "is a file")):
        code, _, err = call(train.main, f"--config={experiment}", f"--workdir={tmp_path / name}")
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert snapshot(tmp_path) == {"photos/cat.jpg": b"cat", "file": b"file"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.epoch=3", "did you mean config.train.epochs?"),
        ("--config.model.width=9", "must be a multiple of model.heads"),
        ("--config.model.patch=3", "must divide model.image_size"),
        ("--config.train.batch_size=-1", "must be greater than 0"),
        ("--config.train.batch_size=2000", "must be at most the 1337 training images"),
        ("--config.routing.experts=0", "must be greater than 0"),
        ("--config.data.name=no_such_set", "must be digits, folder, hf:NAME or the name of a TFDS set"),
        ("--config.data.validation=5000", "below the number of training images"),
        ("--config.model.image_size=12", "images of digits are 8x8x1 but config.model expects 12x12x1"),
        ("--config.model.classes=9", "digits has 10 classes but config.model.classes is 9"),
        ("--config.train.devices=64 --config.train.batch_size=128", "must be at most 8"),
        ("--config.train.devices=3 --config.train.batch_size=128", "must be a multiple of train.devices"),
        ("--config.train.accumulate=3", "must be a multiple of the 1 devices x 3 parts of train.accumulate"),
        ("--config.data.name=folder --config.data.dir=no/such/folder", "no/such/folder"),
        ("--config.data.name=folder --config.optim.name=adamx", "config.optim.name is 'adamx'; it must be one of"),
        ("--config.data.crop_padding=9", "must be at most model.image_size, which is 8"),
        ("--config.train.seed=2147483648", "must be at most 2,147,483,647"),
        ("--config.train.epochs=2147483647", "it must make at most 2,147,483,647 steps, and an epoch has 5"),
        ("--config.model.depth=20000", "at most 10,000"),
        ("--config.model.width=2147483644", "they must be at most 1.0e+13"),
        ("--config.model.hidden=2000000000", "GiB of a device that has "),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_folder(experiment, tmp_path, override, message):
    workdir = tmp_path / "new"
    code, _, err = call(train.main, f"--config={experiment}", f"--workdir={workdir}", *override.split())
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not workdir.exists()


def test_a_batch_that_does_not_divide_over_all_devices_is_named(experiment, tmp_path):
    arguments = ("--config.train.devices=0", "--config.train.batch_size=255", f"--workdir={tmp_path / 'new'}")
    code, _, err = call(train.main, f"--config={experiment}", *arguments)
    assert code == 2
    assert "config.train.batch_size is 255; it must be a multiple of the 8 devices" in err


def test_a_real_process_shows_no_traceback(tmp_path):
    ended = processes.run(processes.train("no/such.py", tmp_path / "x"), cold=True)
    assert ended.code == 2
    assert (
        ended.err
        == "error: config file 'no/such.py' does not exist; give a file, or one of those that jvitmoe.configs lists\n"
    )


def test_a_run_that_blows_up_stops_and_names_step_value_and_last_good_checkpoint(experiment, tmp_path):
    arguments = ("--config.optim.learning_rate=1e30", f"--workdir={tmp_path / 'x'}")
    code, _, err = call(train.main, f"--config={experiment}", *arguments)
    assert code == 2
    assert "is nan at step" in err or "is inf at step" in err
    assert "checkpoint" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workdir is missing"),
        (("--workdir={run}", "--paths=-1"), "--paths is -1"),
        (("--workdir=no/such/run",), "'no/such/run' does not exist; give the folder that training wrote"),
        (("--workdir={run}", "--checkpoint=999"), "checkpoint '999' does not exist"),
        (("--workdir={run}", "--devices=-1"), "--devices is -1"),
        (("--workdir={run}", "--devices=64"), "error: --devices is 64; it must be at most 8"),
        (("--workdir={run}", "--platform=gpu"), "or set --platform=''"),
    ],
)
def test_evaluate_refuses_in_one_line(uninterrupted, arguments, message):
    code, _, err = call(evaluate.main, *(a.format(run=uninterrupted) for a in arguments))
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_upcycling_starts_from_the_dense_models_own_predictions_and_resumes_without_it(
    experiment, uninterrupted, tmp_path
):
    config = saved_config(uninterrupted)
    config.init.source, config.routing.experts = str(uninterrupted), 4
    mesh = make_mesh(config.validate().train)
    dense, told = pretrained.start(config)
    assert "(run): " in told[0]
    state = make_state(config, routing.find(config), mesh, dense)
    for route in ([3, 1], [0, 2]):
        chex.assert_trees_all_equal(merge.take_path(state.params, jax.numpy.array(route)), dense)
    source = tmp_path / "source"
    shutil.copytree(uninterrupted, source)
    arguments = (f"--config={experiment}", f"--config.init.source={source}")
    arguments += ("--config.train.epochs=1", f"--workdir={tmp_path / 'up'}")
    code, out, err = call(train.main, *arguments)
    assert code == 0, err
    assert f"source      {source} (run): " in out
    assert "source      averaged the experts" in out
    shutil.rmtree(source)  # from here on the checkpoint has all
    whole = shutil.copytree(tmp_path / "up", tmp_path / "whole")
    lose_newest(tmp_path / "up")
    code, out, err = call(train.main, *arguments)
    assert code == 0, err
    assert "resuming    from step 4" in out
    assert "source  " not in out
    assert_same_run(tmp_path / "up", whole)


@pytest.mark.parametrize(
    ("source", "override", "message"),
    [
        ("no/such", "--config.train.seed=0", "config.init.source cannot be read: 'no/such' is not a file"),
        ("{run}", "--config.model.depth=3", "set --config.model.depth=2"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_a_folder_is_made(
    experiment, uninterrupted, tmp_path, source, override, message
):
    arguments = (f"--config.init.source={source.format(run=uninterrupted)}", override, f"--workdir={tmp_path / 'x'}")
    code, _, err = call(train.main, f"--config={experiment}", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "x").exists()


def trained_and_resumed(experiment, workdir, *arguments):
    """Trains a run, and again from its last checkpoint but one, to the same bits."""
    arguments = train.main, f"--config={experiment}", f"--workdir={workdir}", *arguments
    code, _, err = call(*arguments)
    assert code == 0, err
    whole = shutil.copytree(workdir, workdir.with_name("whole"))
    lose_newest(workdir)
    code, out, err = call(*arguments)
    assert code == 0, err
    assert f"resuming    from step {saved(whole)[-2].name}" in out
    assert_same_run(workdir, whole)


def test_routing_by_sample_with_an_ema_trains_resumes_and_is_tested(experiment, tmp_path):
    arguments = ("--config.routing.kind=sample", "--config.train.batch_size=255", "--config.train.ema=0.9")
    trained_and_resumed(experiment, tmp_path / "slots", *arguments)
    code, out, err = call(evaluate.main, f"--workdir={tmp_path / 'slots'}")
    assert code == 0, err
    assert "EMA" in out


def test_a_learned_router_trains_resumes_and_is_tested_routed_and_merged(experiment, tmp_path):
    workdir = tmp_path / "switch"
    more = ("--config.train.epochs=1", "--config.data.validation=0")
    trained_and_resumed(experiment, workdir, "--config.routing.kind=switch", *more)
    code, _, err = call(evaluate.main, f"--workdir={workdir}")
    assert code == 0, err
    result = json.loads((workdir / "result.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert {"routed", "merged", "expert 0", "8 random paths", "ensemble"} <= rows.keys()
    assert rows["routed"]["flops_per_image"] > rows["merged"]["flops_per_image"]
    assert rows["routed"]["parameters"] > rows["merged"]["parameters"]
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert whole["images_per_second"] > 0  # the last step alone has none
    first = next(line for line in history(workdir) if line["kind"] == "train")
    assert "router/entropy/layer1" in first
    watched = [line for line in history(workdir) if line["kind"] == "test"][-1]
    assert watched["nll"] == pytest.approx(rows["routed"]["nll"], rel=1e-5)
    assert rows["routed"]["nll"] != pytest.approx(rows["merged"]["nll"], rel=1e-3)


def test_report_refuses_what_has_no_result(tmp_path):
    for arguments, message in (((), "no run folder was given"), ((tmp_path,), "holds no result.json")):
        code, _, err = call(report.main, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
