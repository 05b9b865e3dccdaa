"""The README, the pages in docs/ and their site: what they point to exists, and their code runs."""

import contextlib
import glob
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import archive
import average_report
import draw_idea
import numpy as np
import pytest
import routers
import sweep
import verdicts
from markdown_it import MarkdownIt
from PIL import Image
from sweep import Variant

import jvitmoe
from jvitmoe import api
from jvitmoe.commands import cli, train
from jvitmoe.commands import sweep as sweep_command
from jvitmoe.runs.console import markdown_table
from processes import call, environment, succeed

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "results"
AVERAGING = RESULTS / "study" / "I"
VERDICTS = [path for path in sorted(RESULTS.glob("**/report.md")) if "\n## Arms\n" in path.read_text()]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md", *DOCS]

# The tests that run the Python and bash blocks of a page: one for each block, in their order, or one for all of them.
DEPLOY = "test_deploy_page.py::test_every_block_of_the_page_runs"
CI = "test_checkout.py::test_ci_runs_the_readme_s_commands_in_its_order_and_the_long_tests"
WHEEL = "test_wheel.py::test_five_commands_lead_from_pictures_to_a_page"
PYTHON = "test_docs.py::test_the_examples_in_python_run"
TUTORIAL = "test_docs.py::test_every_block_of_the_tutorial_runs_in_its_order"
EXPORT = "test_docs.py::test_the_readme_s_prediction_and_export_run"
SWEEP = "test_docs.py::test_the_sweep_of_routers_trains_each_kind_that_it_names"
MERGING = "test_docs.py::test_the_example_of_merging_runs"
AVERAGE = "commands/test_average.py::test_every_block_of_the_page_runs_in_its_order"
PLUGIN = "commands/test_plugin.py::test_every_block_of_the_page_runs"
NNX = "interop/test_nnx.py::test_the_example_of_the_page_runs_and_its_weights_go_back_into_an_export"
RUN_BY = {
    "docs/api.md": (NNX,),
    "docs/average.md": (AVERAGE,),
    "README.md": (CI, PYTHON, WHEEL, EXPORT, PYTHON, EXPORT),
    "docs/commands.md": (PYTHON,),
    "docs/deploy.md": (DEPLOY,),
    "docs/extending.md": (PLUGIN,),
    "docs/tutorial.md": (TUTORIAL,),
    "docs/routing.md": (SWEEP, SWEEP, MERGING),
}
COMMAND = r"^\s*(\$|>>>|(sudo|python3?|pip|make|jvitmoe|sbatch|kubectl|scripts/\S+|import|from)) "  # of a line of code

# Tags of the site. Any other one is a placeholder such as <name> that a page or docstring does not write as `code`.
TAGS = "html head meta title link script body header main footer article nav form input label button div span p br hr"
TAGS += " a code em img li ol pre small strong svg path ul table tbody td th thead tr h1 h2 h3 h4 h5 h6"


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere_and_files_named_in_it_exist(page):
    broken, text = [], page.read_text()
    named = re.findall(r"`((?:tests|scripts|configs|results|jvitmoe)/[\w/.-]+\.\w+)`", text)
    named += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)]
    assert not [name for name in named if not (ROOT / name).exists()]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert not broken


def test_the_readme_is_short_and_the_site_opens_as_it_does():
    readme, start = ((ROOT / page).read_text().splitlines() for page in ("README.md", "docs/index.md"))
    assert len(readme) <= 120
    assert readme[:3] == start[:3]  # the title and the sentence
    pictures = [re.search(r"^!\[(.+)\]\((?:docs/)?idea.svg\)$", "\n".join(page), re.M)[1] for page in (readme, start)]
    assert pictures[0] == pictures[1]
    drawn = ROOT / "docs" / "idea.svg"
    assert drawn.read_text() == draw_idea.drawing()


class Block(NamedTuple):
    language: str
    code: str
    reason: str  # why it is not run, from `<!-- not run: reason -->` before it; "" if a test runs it


def blocks(page: str) -> list[Block]:
    """Returns the blocks of code of a page."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    found = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type in ("fence", "code_block"):
            mark = before and before.type == "html_block" and re.fullmatch(r"<!-- not run: (.+) -->\s*", before.content)
            found.append(Block(token.info.strip(), token.content, mark[1] if mark else ""))
    return found


def code(page: str, test: str) -> list[str]:
    """Returns the blocks of a page that a test runs."""
    run = [block.code for block in blocks(page) if block.language in ("bash", "python") and not block.reason]
    tests = RUN_BY[page] if len(RUN_BY[page]) > 1 else RUN_BY[page] * len(run)
    return [text for text, runner in zip(run, tests, strict=True) if runner == test]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in DOCS)])
def test_every_block_of_code_is_run_by_a_test_or_says_why_not(page):
    found = blocks(page)
    assert {block.language for block in found} <= {"bash", "python", "text"}
    assert not [block for block in found if block.language == "text" and re.search(COMMAND, block.code, re.MULTILINE)]
    run = [block for block in found if block.language != "text" and not block.reason]
    tests = RUN_BY.get(page, ())
    assert len(run) == len(tests) or (run and len(tests) == 1), run
    for test in tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.slow
def test_the_example_of_merging_runs():
    (example,) = code("docs/routing.md", MERGING)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["logits"].shape == (2, 10)


def test_the_sweep_of_routers_trains_each_kind_that_it_names(monkeypatch, tmp_path):
    example, command = code("docs/routing.md", SWEEP)
    monkeypatch.chdir(tmp_path)
    Path("kinds.py").write_text(example)
    _, _, *arguments = shlex.split(command)
    lines = succeed(sweep_command.main, *arguments, "--dry_run").splitlines()
    parsed = [cli.parse(["train", *shlex.split(line)[3:]], train.define_flags, config=True) for line in lines]
    trained = [(one.config.routing.kind, one.config.routing.experts, one.config.train.seed) for one in parsed]
    kinds = [argument.partition(":")[2] for argument in arguments if argument.startswith("kinds.py")]
    wanted = [("batch", 1) if kind == "dense" else (kind, 4) for kind in kinds]
    assert trained == [(*one, seed) for seed in range(3) for one in wanted]


@pytest.fixture(scope="module")
def folder(experiment_run, tmp_path_factory) -> Path:
    """Returns a folder with what the examples begin with: a run under three names, and a picture."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("random", "demo/random", "digits"):
        shutil.copytree(experiment_run, folder / "runs" / name)
    (folder / "shapes" / "test" / "disc").mkdir(parents=True)
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / "shapes" / "test" / "disc" / "0.png")
    return folder


@pytest.mark.slow
def test_the_examples_in_python_run(folder, experiment_run, monkeypatch):
    """With a run that has ended: tests/commands/test_api.py trains."""
    monkeypatch.chdir(folder)

    def train(config: str, workdir: str) -> jvitmoe.Run:
        return jvitmoe.Run(shutil.copytree(experiment_run, workdir, dirs_exist_ok=True))

    monkeypatch.setattr(api, "train", train)
    names: dict[str, Any] = {}
    for example in code("README.md", PYTHON) + code("docs/commands.md", PYTHON):
        exec(example, names)
    assert (names["folder"] / "report.md").is_file()


@pytest.mark.slow
def test_the_readme_s_prediction_and_export_run(folder, monkeypatch, peers):
    """After the commands that tests/test_wheel.py runs, which leave runs/random."""
    monkeypatch.chdir(folder)
    commands, check = code("README.md", EXPORT)
    for line in commands.splitlines():
        jvitmoe, command, *words = shlex.split(line)
        assert jvitmoe == "jvitmoe"
        arguments = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        status, _, err = call(importlib.import_module(f"jvitmoe.commands.{command}").main, *arguments)
        assert status == 0, err
    peers("change_folder", folder=folder)
    peers("run_code", code=check)


@pytest.mark.long
def test_every_block_of_the_tutorial_runs_in_its_order(tmp_path, monkeypatch, capsys):
    """On fewer pictures, for one epoch, and with another port."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as ends:
        for block in [block for block in blocks("docs/tutorial.md") if not block.reason]:
            if block.language == "bash":
                for _, command, *arguments in map(shlex.split, block.code.splitlines()):
                    if command == "serve":
                        argv = [sys.executable, "-m", "jvitmoe", command, *arguments, f"--port={port}"]
                        server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment())
                        ends.enter_context(server)
                        ends.callback(server.terminate)
                        assert "serving" in server.stdout.readline()
                        continue
                    short = ["--config.train.epochs=1"] if command == "train" else []
                    status, _, err = call(
                        importlib.import_module(f"jvitmoe.commands.{command}").main, *arguments, *short
                    )
                    assert status == 0, err
                continue
            fewer = block.code.replace('("train", 200), ("test", 50)', '("train", 12), ("test", 4)')
            exec(fewer.replace("8000", port), {"__name__": "tutorial"})
    guesses = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {guess["name"] for guess in guesses} == {"disc", "ring", "square"}


def test_the_readme_s_results_are_those_of_the_report():
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = re.findall(r"([\d.]+) ± ([\d.]+) %", readme)
    report = (ROOT / "results" / "cifar10_fast" / "report.md").read_text()
    assert len(results) == 2
    assert not [(mean, deviation) for mean, deviation in results if f"{mean}% ± {deviation}%" not in report]


def test_the_picture_that_the_readme_classifies_is_a_ship():
    (best,), *_ = jvitmoe.load("cifar10_cct")([str(ROOT / "docs" / "ship.jpg")], top=1)
    shown = re.search(r"│ docs/ship.jpg │ (\w+) ([\d.]+)%", (ROOT / "README.md").read_text())
    assert best.name == shown[1] == "ship"
    assert 100 * best.probability == pytest.approx(float(shown[2]), abs=1)


@pytest.mark.parametrize(("page", "folders"), [("study", "study/*"), ("routing", "routers*"), ("average", "study/I")])
def test_differences_with_intervals_are_those_of_the_reports_that_their_section_names(page, folders):
    """Of all reports where a section names none."""
    every = sorted(RESULTS.glob(f"{folders}/report.md"))
    difference, unknown = r"([+-]\d+\.\d\d) \(([+-]\S+\s+to\s+[+-]\d+\.\d\d)\)", []
    sections = re.split(r"^## ", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.MULTILINE)
    for section in sections:
        named = [path for path in every if f"/{path.relative_to(RESULTS)}" in section]
        reports = "".join(path.read_text() for path in named or every)
        told = [(mean, " ".join(interval.split())) for mean, interval in re.findall(difference, section)]
        cells = [
            (f"| {mean} | {interval} |", f"| {mean} ({interval}) |", f" {mean} ({interval}) points")
            for mean, interval in told
        ]
        cells += [(f"| {cell} |",) for cell in re.findall(r"\d\d\.\d\d ± \d\.\d\d", section)]
        unknown += [forms for forms in cells if not any(form in reports for form in forms)]
    assert len(sections) > 3
    assert not unknown


@pytest.mark.parametrize("report", VERDICTS, ids=lambda report: report.parent.name)
def test_the_verdicts_of_a_report_follow_from_its_kept_runs(report):
    text = report.read_text()
    tested = text.partition("## Arms")[2].partition("## ")[0]
    against: dict[str, dict[str, None]] = {
        arm: {} for arm in re.findall(r"^\| (\S+) \| \w+ \| \d", tested, re.MULTILINE)
    }
    for arm, reference in re.findall(r"^\| (\S+) \| \w+ \| (\S+), \w+ \| \d", text, re.MULTILINE):
        against[arm][reference] = None
    arms = {arm: Variant({}, against=(*references,)) for arm, references in against.items()}
    assert any(against.values())
    assert verdicts.conclusion(report.parent, arms) in text


def study_tables() -> Iterator[tuple[Path, list[str], list[list[str]]]]:
    """Yields the folder, the columns and the rows of each table of arms; its report is named before it."""
    folder, columns, rows = Path(), list[str](), list[list[str]]()
    for line in [*(ROOT / "docs" / "study.md").read_text().splitlines(), ""]:
        if named := re.findall(r"\.\./results/(study/\w+)/report\.md", line):
            folder = RESULTS / named[-1]
        cells = [cell.strip(" `") for cell in line.replace("`", "").split("|")[1:-1]]
        if cells[:1] == ["arm"]:
            columns, rows = cells, []
        elif columns and cells and ":--" not in line:
            rows.append(cells)
        elif columns and not cells:
            yield folder, columns, rows
            columns = []


def study_cell(runs: archive.Runs, arm: str, column: str) -> str:
    """Returns what a table of the study says of an arm (a name, or a name and a model of its), from its kept runs."""
    name, _, model = arm.partition(", ")
    family = name.split("_")[0] if name.startswith(("lora", "adapter")) else "dense"
    references = {"the plain mean": name.replace("_outer", ""), "40 epochs": family, "80 epochs": f"{family}_80"}
    if column == "learning rate":
        return f"{runs[f'{name}-seed0']['config']['optim']['learning_rate']:g}"
    if column in ("GB", "saved"):
        reduced, most = (
            next(line["reduced_bytes"] for line in runs[f"{of}-seed0"]["metrics"][::-1] if "reduced_bytes" in line)
            for of in (name, "dense")
        )
        return f"{reduced / 1e9:.2f}" if column == "GB" else f"{100 * (1 - reduced / most):.0f} %"
    of_arm = sweep.accuracies(runs, name)
    by_seed = of_arm["EMA" if column == "its EMA, %" else model or verdicts.final(of_arm)]
    if column in ("accuracy, %", "its EMA, %"):
        return sweep.mean_cell(list(by_seed.values()))
    other = column.removeprefix("minus ")
    of_reference = sweep.accuracies(runs, references.get(other, other))
    its = of_reference[verdicts.final(of_reference)]
    found = verdicts.cells([value - its[seed] for seed, value in by_seed.items()])
    return f"{found['difference']} ({found['interval']})"


def test_every_cell_of_the_study_s_tables_is_that_of_the_kept_runs():
    tables = list(study_tables())
    assert {folder.name for folder, _, _ in tables} == {"A", "B", "C", "D", "D_adamix", "E", "F", "H", "H_again"}
    for folder, columns, rows in tables:
        runs = archive.kept(folder)
        for row in rows:
            cells = dict(zip(columns, row, strict=True))
            told = {column: cell for column, cell in cells.items() if cell and column != "arm"}
            assert told == {column: study_cell(runs, cells["arm"], column) for column in told}, folder.name


def test_the_router_tables_are_those_of_the_kept_runs_in_the_report_and_in_routing_md():
    """Also their row that can no longer be trained."""
    arms = routers.table(RESULTS, Path())
    gone = routers.gone(RESULTS / "routers", arms)
    assert list(gone) == ["frozen"]
    found = routers.tables(routers.rows(RESULTS / "routers", arms | gone, *arms["switch"].against))
    for name in ("results/routers/report.md", "docs/routing.md"):
        text = (ROOT / name).read_text()
        assert all(markdown_table(table) in text for table in found), name


UPCYCLED = r"has (\S+) points (less) than that source, with an interval from (\S+) to (\S+):"
TEN_SEEDS = r"\*\*All ten seeds together\*\* differ by (\S+) points, (with) an interval from (\S+) to (\S+)\."


@pytest.mark.parametrize(
    ("sentence", "folders", "arm", "reference"),
    [
        (UPCYCLED, ("routers",), "upcycled", "dense_half"),
        (TEN_SEEDS, ("routers", "routers_again"), "sample", "dense_rate2"),
    ],
    ids=["upcycled", "ten seeds"],
)
def test_two_intervals_that_no_table_has_follow_from_the_kept_runs(sentence, folders, arm, reference):
    text = " ".join((ROOT / "docs" / "routing.md").read_text().split())
    mean, less, low, high = re.search(sentence, text).groups()
    paired = []
    for runs in (archive.kept(RESULTS / folder) for folder in folders):
        own, its = (
            next(iter(sweep.accuracies(runs, name, ("routed", "merged", "dense")).values()))
            for name in (arm, reference)
        )
        paired += [value - its[seed] for seed, value in own.items()]
    sign = -1 if less == "less" else 1
    told = (sign * float(mean), float(low), float(high))
    assert told == tuple(round(value, 2) for value in (statistics.fmean(paired), *sweep.interval(paired)))


def test_what_the_pages_say_of_averaging_are_the_verdicts_and_tables_of_its_kept_runs():
    runs = archive.kept(AVERAGING)
    study, page, readme = ((ROOT / name).read_text() for name in ("docs/study.md", "docs/average.md", "README.md"))
    told = {name: " ".join(text.split()) for name, text in (("study", study), ("page", page), ("readme", readme))}
    for kind, mix in itertools.product(average_report.TITLES, average_report.MIXES):
        found = average_report.Found(runs, kind)
        for sentence in average_report.sentences(found, mix):
            assert sentence in told["study"]
        assert markdown_table(average_report.rows(found, mix)) in study
    assert all(sentence in told["study"] for sentence in average_report.of_soups(average_report.Found(runs, "same")))
    assert markdown_table(average_report.overview(runs)) in page
    report = (AVERAGING / "report.md").read_text()
    differences = re.findall(r"[+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", told["readme"])
    assert len(differences) == 2
    assert all(difference in report for difference in differences)
    lost = [
        -np.mean(average_report.minus(found.model(f"once_{mix}", "mean"), found.together()))
        for found in (average_report.Found(runs, kind) for kind in average_report.TITLES)
        for mix in average_report.MIXES
    ]
    for text in (told["page"], told["readme"], " ".join((ROOT / "docs/when.md").read_text().split())):
        assert f"by {min(lost):.2f} to {max(lost):.2f} points" in text


def test_the_report_on_averaging_is_the_one_of_its_kept_runs(tmp_path):
    report = (AVERAGING / "report.md").read_text()
    shutil.copy(AVERAGING / archive.FILE, tmp_path)
    average_report.write(tmp_path, re.search(r"^Written by `(.+)`\.$", report, re.MULTILINE)[1])
    assert (tmp_path / "report.md").read_text() == report


class Page(HTMLParser):
    """A page of the site: its tags, and the files that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("img", "script", "link"):
            self.loaded |= {value for name, value in attributes if name in ("src", "href") and value}


@pytest.mark.long
@pytest.mark.process
def test_the_site_has_every_page_and_picture_swallows_no_placeholder_and_needs_nothing_else(tmp_path):
    """Built with warnings as errors."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # Material's announcement, which would hide the warnings
    done = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "digits" / "report.html").is_file()
    pages = {path: Page(path.read_text()) for path in tmp_path.rglob("*.html")}
    missing, foreign = [], []
    for path, page in pages.items():
        assert page.tags <= set(TAGS.split()), path
        for address in page.loaded:
            file = re.split("[?#]", address)[0]
            if re.match(r"[a-z]+:|//", address):
                foreign.append((path.name, address))
            elif not (tmp_path / file[1:] if file.startswith("/") else path.parent / file).is_file():
                missing.append((path.name, address))
    outside = re.compile(r"(url\(|@import ).?(https?:|//)")
    styles = [path for path in tmp_path.rglob("*.css") if outside.search(path.read_text())]
    assert (missing, foreign, styles) == ([], [], [])
    for page in DOCS:
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
        loaded = pages[(tmp_path / page.name).with_suffix(".html")].loaded
        assert {Path(picture).name for picture in shown} <= {Path(address).name for address in loaded}
