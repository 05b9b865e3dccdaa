"""Archives of kept runs, and results/: nothing of a run is lost, and a report can be made again."""

import csv
import gzip
import re
import sys
from pathlib import Path

import archive
import pytest

import processes
from jvitmoe.commands import report
from jvitmoe.errors import UserError
from jvitmoe.runs import safe_io
from run_folders import snapshot
from tested_runs import write_tested_run

RESULTS = processes.ROOT / "results"
ARCHIVES = sorted(RESULTS.glob(f"**/{archive.FILE}"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Returns a function that runs the script and returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["archive.py", *map(str, arguments)])
        archive.main()
        return capsys.readouterr().out

    return run


def of_results(path: Path) -> bool:
    return "runs" not in path.relative_to(RESULTS).parts  # unpacked ones, which git ignores


@pytest.mark.parametrize("experiment", ["routers_again", "study/D_pretrained", "digits_demo"])
def test_unpacking_and_packing_give_every_byte_back(experiment, command, tmp_path):
    kept = RESULTS / experiment / archive.FILE
    command("unpack", kept, "--out", tmp_path / "runs")
    command("pack", tmp_path / "runs", "--out", tmp_path / "packed")
    before, after = (sorted(gzip.decompress(file.read_bytes()).splitlines()) for file in (kept, tmp_path / "packed"))
    assert before == after
    command("unpack", tmp_path / "packed", "--out", tmp_path / "again")
    first = snapshot(tmp_path / "runs")
    assert first == snapshot(tmp_path / "again")
    assert len(first) == len(archive.read(kept)) * (2 if experiment == "digits_demo" else 3)


def test_files_of_a_run_come_back_byte_for_byte_and_its_archive_depends_on_nothing_else(command, tmp_path):
    for folder, names in (("a", "xy"), ("b", "z")):
        (tmp_path / folder).mkdir()
        for name in names:
            write_tested_run(tmp_path / folder / name, float("nan") if name == "y" else 1 / 3, rate=1e-7)
    (tmp_path / "a" / "x" / safe_io.METRICS).unlink()  # no history was kept
    (tmp_path / "a" / "unfinished").mkdir()
    for out in ("one", "other"):
        command("pack", tmp_path / "a", tmp_path / "b", "--out", tmp_path / out)
        command("unpack", tmp_path / out, "--out", tmp_path / f"{out} runs")
    (tmp_path / "a" / "unfinished").rmdir()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert (tmp_path / "one").read_bytes()[3:8] == bytes(5)  # flags, so no name, and time
    assert snapshot(tmp_path / "one runs") == snapshot(tmp_path / "a") | snapshot(tmp_path / "b")
    assert list(archive.read(tmp_path / "one")) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *((safe_io.RESULT, text) for text in (None, "{}", '{"a": 1, "a": 1}\n')),  # the second without a line break
        *((safe_io.METRICS, text) for text in ('{"step":1}\n', '{"step"')),
        (safe_io.CONFIG, None),
    ],
)
def test_a_file_whose_bytes_would_be_lost_is_refused(file, text, tmp_path):
    path = write_tested_run(tmp_path / "run") / file
    path.unlink()
    if text:
        path.write_text(text)
    with pytest.raises(UserError):
        archive.pack([tmp_path])


def test_two_runs_of_one_name_and_what_is_no_archive_are_refused_in_one_line(command, tmp_path):
    write_tested_run(tmp_path / "run")
    with pytest.raises(UserError):
        archive.pack([tmp_path, tmp_path])
    packed = ARCHIVES[0].read_bytes()
    named = gzip.compress(b'{"name": "../run"}\n')
    for content in (b"", b"x", packed[:-9], packed[:99] + b"?" + packed[100:], gzip.compress(b"[]\n"), named):
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(SystemExit, match="damaged is no archive"):
            command("unpack", tmp_path / "damaged", "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="there is no "):
        command("list", tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_the_lists_have_every_tested_model_but_single_experts(command):
    rows = list(csv.DictReader(command("list", "--csv", *ARCHIVES).splitlines()))
    printed = command("list", *ARCHIVES).splitlines()[2:]
    runs = {f"{path.parent}/{name}": run for path in ARCHIVES for name, run in archive.read(path).items()}
    tested = [(name, row) for name, run in runs.items() for row in run["result"]["rows"]]
    tested = [(name, row) for name, row in tested if not re.fullmatch(r"expert \d+", row["model"])]
    assert len(rows) == len(printed) == len(tested)
    for row, line, (name, model) in zip(rows, printed, tested, strict=True):
        assert (f"{row['folder']}/{row['run']}", row["model"]) == (name, model["model"])
        assert float(row["accuracy"]) == model["accuracy"]
        assert row["train.seed"] == str(runs[name]["config"]["train"]["seed"])
        assert line.startswith(f"| {name} | {model['model']} | {model['accuracy']:.2%}")


def test_a_report_on_the_runs_of_an_archive_is_the_one_beside_it(tmp_path):
    """All of it but the command."""
    folders = archive.unpack(archive.read(RESULTS / "routers_again" / archive.FILE), tmp_path / "runs")
    report.main(["report", *map(str, folders), f"--out={tmp_path / 'out'}"])
    kept = (RESULTS / "routers_again" / "report.md").read_text()
    made = re.sub("Command: .*", "", (tmp_path / "out" / "report.md").read_text())
    assert kept.startswith("# Runs\n")
    assert re.sub("Command: .*", "", kept).startswith(made)


def test_results_are_few_and_small_and_hold_no_picture_that_no_page_shows():
    found = [path for path in RESULTS.rglob("*") if path.is_file() and of_results(path)]
    assert len(found) <= 150
    assert sum(path.stat().st_size for path in found) <= 10_000_000
    pages = [processes.ROOT / "README.md", *processes.ROOT.glob("docs/*.md")]
    pages += [path for path in found if path.suffix == ".md"]
    shown = {(page.parent / link).resolve() for page in pages for link in re.findall(r"\]\((\S+?)\)", page.read_text())}
    pictures = {path for path in found if path.suffix == ".png"}
    assert pictures <= shown
    assert {path for path in shown if path.suffix == ".png"} - pictures == set()
