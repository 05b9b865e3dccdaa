"""The page of jvitmoe.report --html: whole without a network, and working in a browser."""

import contextlib
import json
import re
import shutil
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import processes
from jvitmoe import config as config_lib
from jvitmoe import report
from jvitmoe.config import Config, RoutingConfig, TrainConfig
from jvitmoe.runs import page as page_lib

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
HOSTILE = "<b>&{{data}}<!--<script>"  # a name that is no markup


def write_run(folder: Path, seed: int, experts: int, accuracy: float) -> str:
    """Writes what a report reads of a run of two steps, and returns the folder's path."""
    folder.mkdir()
    config = Config(routing=RoutingConfig(experts=experts), train=TrainConfig(seed=seed))
    (folder / "config.json").write_text(config_lib.dumps(config))
    models = ("dense",) if experts == 1 else ("merged", "ensemble")
    row = {"nll": 1.0, "ece": 0.1, "images": 10, "parameters": 5, "confusion": [[4, 1], [2, 3]]}
    rows = [{"model": model, "accuracy": accuracy + n / 100, **row} for n, model in enumerate(models)]
    result = {"rows": rows, "data": "digits", "step": 2, "seed": 0}
    result |= {"active_parameters": 5, "total_parameters": 9, "hardware": "1 x cpu"}
    if experts > 1:
        rows.insert(0, {**rows[0], "model": "routed"})  # as of a learned router, whose matrix is not kept
        del rows[0]["confusion"]
        line = {"share": [0.0, 1.0], "losses": [[0.1, 0.2]] * (experts - 1) + [[0.1, float("nan")]], "height": 0.1}
        result["mergeability"] = {"layers": [0, 1], "gap": [0.1, 0.2], "barrier": line}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"step": s, "kind": k, "loss": 2.0 / s, "accuracy": s / 9} for s in (1, 2) for k in ("train", "test")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def write_runs(folder: Path, name: str) -> list[str]:
    """Writes a dense run of two seeds and a random one of that name, and returns their folders."""
    folders = [write_run(folder / f"dense-seed{seed}", seed, 1, 0.5 + seed / 10) for seed in (0, 1)]
    return [*folders, write_run(folder / name, 0, 4, 0.7)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Returns the page about two seeds of a dense run and one of random routing, whose name is hostile."""
    out = tmp_path_factory.mktemp("page")
    folders = write_runs(tmp_path_factory.mktemp("runs"), HOSTILE)
    code, _, err = processes.call(report.main, *folders, "--html", f"--out={out}")
    assert code == 0, err
    return out / "report.html"


def test_a_page_needs_nothing_else(page):
    text = page.read_text()
    assert len(text) < 5e6
    own = text.replace(re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1], "")  # Vega's scripts name addresses
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://(?!vega\.github\.io/schema)", own)
    assert len(re.findall("</script>", text)) == 3


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in QUIET])
        yield chromium
        chromium.close()


@pytest.mark.process
@pytest.mark.parametrize(("width", "scheme"), [(1600, "light"), (400, "dark")])
def test_the_page_works_in_a_browser(page, browser, width, scheme):
    tab, problems = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    lines = tab.locator("[data-title=accuracy] .mark-line path")
    tab.wait_for_selector("[data-title=accuracy] .mark-line path")
    assert lines.count() == 2

    def column(name):
        names = tab.locator("#table th").all_inner_texts()
        return tab.locator(f"#table tbody td:nth-child({names.index(name) + 1})").all_inner_texts()

    tab.locator("#table th", has_text="accuracy").click()
    rising = column("accuracy")
    tab.locator("#table th", has_text="accuracy").click()
    assert rising == column("accuracy")[::-1] == sorted(rising, key=lambda text: float(text.split("%")[0]))
    assert len(set(rising)) > 1

    tab.locator("#table input[data-run=dense]").first.uncheck()
    tab.wait_for_function("document.querySelectorAll('[data-title=accuracy] .mark-line path').length == 1")
    tab.locator("#all").click()
    tab.wait_for_function("document.querySelectorAll('[data-title=accuracy] .mark-line path').length == 2")

    assert tab.locator("#difference tbody tr td:first-child").all_inner_texts() == ["routing.experts"]
    tab.locator("#run").select_option(index=1)
    tab.wait_for_selector("#details .mark-line path")
    assert "straight line" in tab.locator("#details h3").first.inner_text()

    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert (tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
        scheme == "light"
    )
    assert not problems
    tab.close()


def going_on(folder: Path) -> Path:
    """Writes what a run has left before its end, and returns its folder."""
    write_run(folder, 3, 1, 0.5)
    (folder / "result.json").unlink()
    return folder


@contextlib.contextmanager
def served(*arguments: object):
    """Yields the address of a page that the command serves, in a process of its own."""
    server = processes.start([sys.executable, "-m", "jvitmoe.report", *arguments, "--serve", "--port=0"])
    try:
        processes.wait_for_output(server, "until Ctrl-C")
        yield re.search(r"http://127\.0\.0\.1:\d+", Path(server.out.name).read_text())[0]
    finally:
        server.process.send_signal(signal.SIGINT)
        (ended,) = processes.collect([server], 30)
    assert (ended.code, ended.err) == (0, "")


def answered(request: str | urllib.request.Request) -> tuple[int, str | None]:
    """Returns the status and the `Refresh` header of an answer, and closes its connection, also an error's."""
    try:
        answer = urllib.request.urlopen(request, timeout=10)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers["Refresh"]


@pytest.mark.process
def test_a_served_page_follows_a_run_until_its_end(browser, tmp_path):
    folders, run = write_runs(tmp_path, "random"), going_on(tmp_path / "later")
    with served(*folders, run) as address:
        tab, problems = browser.new_page(), []
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(address)
        row = "#table tr:has-text('later (training)')"
        assert "at step 2" in tab.locator(row).inner_text()
        tab.locator("#table input[data-run=random]").first.uncheck()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "kind": "train", "loss": 0.5, "accuracy": 0.6}\n')
        tab.wait_for_selector("#table tr:has-text('at step 3')", timeout=120_000)
        assert not tab.locator("#table input[data-run=random]").first.is_checked()  # a choice outlives the reload
        shutil.copy(Path(folders[0]) / "result.json", run / "result.part")
        (run / "result.part").rename(run / "result.json")  # whole at once, as a run does it
        tab.wait_for_selector("#table tr:has-text('at step 3')", state="detached", timeout=120_000)
        assert "Runs that have not ended: 0." in tab.locator("body").inner_text()
        assert not problems
        tab.close()


@pytest.mark.process
def test_a_page_is_served_to_this_machine_only(tmp_path):
    with served(going_on(tmp_path / "only")) as address:
        for host, path, code in (
            ("localhost", "/", 200),
            ("evil.example", "/", 403),
            ("127.0.0.1", "/config.json", 404),
        ):
            assert answered(urllib.request.Request(address + path, headers={"Host": host}))[0] == code
        port = address.rpartition(":")[2]
        taken, _, err = processes.call(report.main, tmp_path / "only", "--serve", f"--port={port}")
        assert taken == 2
        assert f"--port is {port}; it cannot be listened at" in err
        (tmp_path / "only" / "config.json").write_text("{")
        assert answered(address) == (503, "2")


def test_going_runs_of_one_folder_name_are_told_apart(tmp_path):
    for parent in "ab":
        (tmp_path / parent).mkdir()
    page = report._page({}, [going_on(tmp_path / a) for a in ("a/same", "b/same", "b/other")], "now")
    (data,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    names = [f"{tmp_path / 'a' / 'same'} (training)", f"{tmp_path / 'b' / 'same'} (training)", "other (training)"]
    assert json.loads(data)["names"] == names


def test_an_accuracy_of_zero_is_a_point_and_a_loss_that_is_not_finite_a_dash(tmp_path):
    lines = [{"step": 1, "kind": "test", "accuracy": 0.0}, {"step": 2, "kind": "test", "accuracy": 0.5}]
    assert [point["mean"] for point in page_lib._points([lines], training=False)] == [0.0, 0.5]
    run = going_on(tmp_path / "nan")
    (run / "metrics.jsonl").write_text(json.dumps(lines[0] | {"nll": None}) + "\n")
    row = report._row_so_far(run, "nan")
    assert (row["accuracy"], row["nll"]) == ("0.00%", "-")


def test_without_altair_the_option_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.delitem(sys.modules, "jvitmoe.runs.page", raising=False)
    monkeypatch.delattr("jvitmoe.runs.page", raising=False)
    folders = write_runs(tmp_path, "random")
    code, _, err = processes.call(report.main, *folders, "--html", f"--out={tmp_path / 'out'}")
    assert (code, err) == (2, "error: --html and --serve need Altair; install it with pip install 'jvitmoe[html]'\n")
