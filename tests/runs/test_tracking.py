"""The log of a run: each step once, torn lines repaired, files whole or absent."""

import errno
import io
import json
import os
import tracemalloc
import warnings
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from jvitmoe.errors import UserError
from jvitmoe.runs import console, folder, metrics_log, safe_io
from jvitmoe.runs.console import markdown_table, show_table
from jvitmoe.runs.metrics_log import MetricsLog

VALUES = {"loss": 1.0, "accuracy": 0.5, "grad_norm": 2.0, "learning_rate": 0.1}


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list."""
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    return now


def test_lines_past_the_restored_step_and_a_torn_last_line_are_dropped_and_checksums_are_of_what_is_left(tmp_path):
    (tmp_path / "classes.json").write_text("[]")
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, start=0, total=10, batch_size=4) as log:
        for step in range(1, 7):
            log.train(step, VALUES | {"loss": step / 3 if step % 2 else float("nan")})
            assert log.sync() == safe_io.checksums(tmp_path, step)
    with path.open("a") as file:
        file.write('{"step": 7, "ki')
    assert [line["step"] for line in safe_io.read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    with MetricsLog(tmp_path, start=4, total=10, batch_size=4) as log:
        assert log.sync() == safe_io.checksums(tmp_path, 4)
        log.train(5, VALUES)
        assert log.sync() == safe_io.checksums(tmp_path, 5) != safe_io.checksums(tmp_path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_pauses_do_not_count_as_training_time(tmp_path, clock):
    with MetricsLog(tmp_path, start=0, total=10, batch_size=4) as log:
        assert log.images_per_second(1) == 0.0
        log.started(1, 0.5)
        clock[0] += 2.0
        assert log.images_per_second(6) == 5 * 4 / 2.0
        clock[0] += 50.0
        log.paused(50.0)
        assert log.images_per_second(6) == 5 * 4 / 2.0


def test_the_progress_line_drops_its_last_parts_where_the_terminal_is_narrow(clock):
    def printed(width):
        wide = Console(width=width, file=io.StringIO(), color_system=None)
        wide.print(line)
        return [text.rstrip() for text in wide.file.getvalue().splitlines()]

    parts = ["1 h 2 min left", "step 4200/390000", "loss 0.5010", "accuracy 100.0%", "6,634 images/s"]
    line = console.ProgressLine(parts, done=3, total=4)
    clock[0] += 75.0
    (wide,) = printed(120)
    assert wide.startswith(f"{'  '.join(parts)}  1:15 elapsed  ━━━")
    for width, left in ((80, 5), (62, 4), (47, 3), (33, 2), (20, 1)):
        assert printed(width) == ["  ".join(parts[:left])]


def test_the_first_step_is_shown_with_its_time_and_the_time_left_from_the_second_on(clock, capsys):
    with MetricsLog(None, start=0, total=201, batch_size=4) as log:
        assert log.is_due()
        assert capsys.readouterr().out == "compiling\n"
        log.started(1, 25.0)
        log.show(1, VALUES)
        assert capsys.readouterr().out == "step 1/201  loss 1.0000  accuracy 50.0%  first step 25.0 s\n"
        clock[0] += 19.0
        assert not log.is_due()
        clock[0] += 2.0
        assert log.is_due()
        log.show(2, VALUES)
        assert capsys.readouterr().out.startswith("1 h 9 min left  step 2/201")
        assert not log.is_due()


def test_a_terminal_keeps_no_line_of_a_run_that_has_stopped_and_times_the_test_alone(clock, monkeypatch):
    terminal = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(metrics_log, "console", terminal)
    with MetricsLog(None, start=0, total=9, batch_size=4) as log:
        clock[0] += 745.0
        log.testing()
        clock[0] += 3.0
        terminal.print(log._line)
    out = terminal.file.getvalue()
    assert "testing  0:03 elapsed" in out
    assert out.endswith("\x1b[1A\x1b[2K")  # the last line is erased


@pytest.mark.parametrize(("total", "left"), [(4000, "23 h 19 min"), (10_001, "2.4 days")])
def test_a_run_of_more_than_a_day_says_how_to_make_it_shorter_once(clock, capsys, total, left):
    with MetricsLog(None, start=0, total=total, batch_size=4) as log:
        log.started(1, 25.0)
        log.show(1, VALUES)
        capsys.readouterr()
        clock[0] += 21.0
        log.show(2, VALUES)
        log.show(3, VALUES)
    note, *others = capsys.readouterr().out.splitlines()
    if "days" in left:
        remedies = "a GPU, fewer --config.train.epochs, or a model of a smaller --config.model.width"
        assert note == f"note: this will take {left} on this machine; shorter: {remedies}"
        note = others[0]
    assert note.startswith(f"{left} left  step 2/{total}")
    assert "note" not in "".join(others)


@pytest.mark.parametrize("columns", ["60", ""])
def test_a_table_in_a_file_is_as_wide_as_columns_says(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    show_table([{"model": "merged" * 10, "accuracy": "word " * 10, "nll": "1"}], "title")
    out = capsys.readouterr().out
    widest = max(map(len, out.splitlines()))
    assert widest == 60 if columns else widest > 120
    assert "".join(out.split()).count("word") == 10


def test_a_table_says_how_many_columns_it_leaves_out_and_where_they_are(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    show_table([{f"column {n}": "a cell of text" for n in range(6)}], "title", "report.md")
    assert "title (2 more columns: report.md)" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all_and_never_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("a", "a.part"):
        (tmp_path / name).write_text("mine")
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    for text in ("one", "two"):
        safe_io.write_text(tmp_path / "run" / "a", text)
        assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [("a", text)]
    assert not (tmp_path / "run" / "a").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("a", "a.part")] == ["mine", "mine"]


def test_too_many_open_files_are_told_from_a_full_disk(tmp_path, monkeypatch):
    for number, remedy in ((errno.EMFILE, r"allow more open files \(ulimit -n\)"), (errno.ENOSPC, "make room")):

        def fail(*_, number=number, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(UserError, match=f"a cannot be written: {os.strerror(number)}; {remedy}"):
            safe_io.write_text(tmp_path / "a", "text")


def test_names_are_printed_as_they_are_and_control_neither_the_terminal_nor_a_table(capsys):
    name = "[bold]x[/y]:cat:\x1b[2Jcaf\udce9\r\u202e"
    console.console.print(f"run {name}")
    show_table([{"model": f"{name}\n"}], name)
    with console.warnings_as_lines():
        warnings.warn(name, RuntimeWarning, stacklevel=1)
    out = capsys.readouterr().out
    assert out.count(r"[bold]x[/y]:cat:\x1b[2Jcaf\udce9\r\u202e") == 4
    assert all(c.isprintable() or c == "\n" for c in out)
    assert markdown_table([{"run": "a\nb"}]).splitlines()[2:] == [r"| a\nb |"]


READERS = {
    "metrics.jsonl": lambda run: safe_io.read_metrics(run / "metrics.jsonl"),
    "result.json": safe_io.read_result,
    "classes.json": safe_io.read_classes,
    "images.json": safe_io.read_images,
}
BAD = ('{"train": 1e400}', "[" * 100_000, "[]", "3", '{"train": true}', '["1", 2]', "\0", "9" * 5000, '{"rows": [[]]}')


@pytest.mark.parametrize("name", ["result.json", "classes.json", "images.json"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name):
    for text in BAD:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}.{{,400}}$"):
            READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read_a_folder_a_pipe_a_link_and_a_file_that_is_too_long_are_one_line(
    tmp_path, name, monkeypatch
):
    def refused(reason):
        with pytest.raises(UserError, match=f"{name} cannot be read: {reason}.*; make it readable"):
            READERS[name](tmp_path)

    path = tmp_path / name
    assert not READERS[name](tmp_path)  # there is none
    path.mkdir()
    refused("Is a directory")
    path.rmdir()
    os.mkfifo(path)
    refused("it is no regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused("it is a link")
    path.unlink()
    path.touch()
    os.truncate(path, safe_io.MOST_HISTORY + 1)
    refused("its 4,294,967,297 bytes are more than")
    monkeypatch.setattr(safe_io.os, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    refused("Permission denied")


def test_a_history_that_ends_in_zeros_takes_little_memory_and_keeps_its_lines(tmp_path):
    line = {"step": 1, "kind": "train", "loss": 2.0}
    path = tmp_path / safe_io.METRICS
    path.write_text(json.dumps(line) + "\n")
    os.truncate(path, 2**27)  # a hole, as a power cut may leave one
    tracemalloc.start()
    try:
        assert safe_io.read_metrics(path) == [line]
        with pytest.raises(UserError, match="a line is damaged"):
            folder._check_metrics(tmp_path, {})
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
