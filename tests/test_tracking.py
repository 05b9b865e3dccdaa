"""The log of a run: each step once, torn lines repaired, files whole or absent."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from jvitmoe.errors import UserError
from jvitmoe.runs import console, files, history, metrics_log, results, tables
from jvitmoe.runs.metrics_log import MetricsLog

VALUES = {"loss": 1.0, "accuracy": 0.5, "grad_norm": 2.0, "learning_rate": 0.1}


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_past_the_restored_step_and_a_torn_last_line_are_dropped(tmp_path):
    with MetricsLog(tmp_path, start=0, total=10, batch_size=4) as log:
        for step in range(1, 7):
            log.train(step, VALUES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "ki')
    assert [line["step"] for line in history.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    with MetricsLog(tmp_path, start=4, total=10, batch_size=4) as log:
        log.train(5, VALUES)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_pauses_do_not_count_as_training_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    with MetricsLog(tmp_path, start=0, total=10, batch_size=4) as log:
        assert log.images_per_second(1) == 0.0
        log.started(1, 0.5)
        now[0] += 2.0
        assert log.images_per_second(6) == 5 * 4 / 2.0
        now[0] += 50.0
        log.paused(50.0)
        assert log.images_per_second(6) == 5 * 4 / 2.0


def printed(renderable, width):
    wide = Console(width=width, file=io.StringIO(), color_system=None)
    wide.print(renderable)
    return [line.rstrip() for line in wide.file.getvalue().splitlines()]


def test_the_progress_line_drops_its_last_parts_where_the_terminal_is_narrow(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    parts = ["1:02:03 left", "step 4200/390000", "loss 0.5010", "accuracy 100.0%", "6,634 images/s"]
    line = console.ProgressLine(parts, done=3, total=4)
    now[0] = 75.0
    whole = "  ".join([*parts, "1:15 elapsed"])
    (wide,) = printed(line, 120)
    assert wide.startswith(f"{whole}  ━━━")
    assert printed(line, 80) == ["  ".join(parts)]
    assert printed(line, 60) == ["  ".join(parts[:4])]
    assert printed(line, 45) == ["  ".join(parts[:3])]
    assert printed(line, 31) == ["  ".join(parts[:2])]
    assert printed(line, 20) == ["1:02:03 left"]


def test_the_first_step_is_shown_with_its_time_and_the_time_left_for_all(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    with MetricsLog(None, start=0, total=201, batch_size=4) as log:
        assert log.is_due()
        log.started(1, 25.0)
        log.show(1, VALUES)
        assert capsys.readouterr().out == "1:23:20 left  step 1/201  loss 1.0000  accuracy 50.0%  first step 25.0 s\n"
        now[0] += 19.0
        assert not log.is_due()
        now[0] += 2.0
        assert log.is_due()
        log.show(2, VALUES)
        assert "1:09:39 left  step 2/201" in capsys.readouterr().out
        assert not log.is_due()


@pytest.mark.parametrize("columns", ["60", ""])
def test_a_table_in_a_file_is_as_wide_as_columns_says(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    tables.show([{"model": "merged" * 10, "accuracy": "word " * 10, "nll": "1"}], "title")
    out = capsys.readouterr().out
    widest = max(map(len, out.splitlines()))
    assert widest == 60 if columns else widest > 120
    assert "".join(out.split()).count("word") == 10


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricsLog(tmp_path, start=0, total=10, batch_size=4, trackers=["tensorboard"]) as log:
        log.train(1, VALUES)
        log.evaluation(1, "test", {"accuracy": 0.25, "nll": 1.5})
    events = b"".join(path.read_bytes() for path in (tmp_path / "tb").iterdir())
    for tag in (b"train/loss", b"train/learning_rate", b"test/accuracy", b"test/nll"):
        assert tag in events


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    files.write_text(tmp_path / "a", "one")
    files.write_text(tmp_path / "a", "two")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "two")]


def test_a_file_is_never_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("a", "a.part"):
        (tmp_path / name).write_text("mine")
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    files.write_text(tmp_path / "run" / "a", "new")
    assert (tmp_path / "run" / "a").read_text() == "new"
    assert not (tmp_path / "run" / "a").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("a", "a.part")] == ["mine", "mine"]


def test_names_are_printed_as_they_are(capsys):
    console.console.print("run [bold]x[/y]")
    tables.show([{"model": "[red]cat[/dog]", "nll": "1"}], "runs/[a][/b]")
    out = capsys.readouterr().out
    for name in ("run [bold]x[/y]", "[red]cat[/dog]", "runs/[a][/b]"):
        assert name in out


def test_markdown_has_a_row_for_each_model():
    result = {
        "active_parameters": 1234,
        "rows": [{"model": "merged", "accuracy": 0.5, "nll": 1.0, "images": 10}],
    }
    text = tables.markdown(results.result_rows(result))
    assert text.splitlines()[2] == "| merged | 50.00% | 1.0000 | 10 | 1,234 |"


READERS = {
    "metrics.jsonl": lambda run: history.read_metrics(run / "metrics.jsonl"),
    "result.json": results.read_result,
    "classes.json": files.read_classes,
    "images.json": files.read_images,
}
DAMAGES = (
    '{"train": 1e400}',
    "[" * 100_000,
    "[]",
    "3",
    '{"train": true}',
    '["1", 2]',
    "\x00",
    "9" * 5000,
    '{"rows": [[]]}',
)


@pytest.mark.parametrize("name", ["result.json", "classes.json", "images.json"])
@pytest.mark.parametrize("text", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name) as caught:
        READERS[name](tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read_is_one_line_that_names_it(tmp_path, name, monkeypatch):
    assert not READERS[name](tmp_path)  # there is none
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} cannot be read: Is a directory; make it readable"):
        READERS[name](tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied; make it readable"):
        READERS[name](tmp_path)


def test_the_checksum_of_a_history_is_the_same_while_it_grows_and_when_it_is_read_again(tmp_path):
    (tmp_path / "classes.json").write_text("[]")
    with MetricsLog(tmp_path, start=0, total=10, batch_size=4) as log:
        for step in range(1, 7):
            log.train(step, VALUES | {"loss": step / 3 if step % 2 else float("nan")})
            assert log.sync() == history.checksums(tmp_path, step)
    with MetricsLog(tmp_path, start=4, total=10, batch_size=4) as log:
        assert log.sync() == history.checksums(tmp_path, 4)
        log.train(5, VALUES)
        assert log.sync() == history.checksums(tmp_path, 5) != history.checksums(tmp_path, 4)
