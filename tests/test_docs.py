"""The README and the pages in docs/: what they point to exists."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page):
    text = page.read_text()
    named = re.findall(r"`((?:tests|scripts|configs|results)/[\w/.-]+\.\w+)`", text)
    named += [f"tests/{name}" for name in re.findall(r"`((?:data/|models/)?test_\w+\.py)`", text)]
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_example_of_merging_runs():
    (example,) = python_blocks("docs/routing.md")
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["logits"].shape == (2, 10)


def test_the_readme_s_results_are_those_of_the_report():
    report = (ROOT / "results" / "digits" / "report.md").read_text()
    results = re.findall(r"([\d.]+) ± ([\d.]+) %", (ROOT / "README.md").read_text())
    assert len(results) == 4
    assert not [(mean, deviation) for mean, deviation in results if f"{mean}% ± {deviation}%" not in report]
