"""Hooks of MkDocs (mkdocs.yml): reports and pictures of results/ become part of the site.

MkDocs knows only files below docs/. Pages link to `../results/…`, as a code host needs it. In the site results/ lies
beside the pages, so such a link loses its `../`, and one from results/ to docs/ its `docs/`. A link to any other file
outside docs/ fails the strict build.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reports and pictures."""
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in (".md", ".png"):
            name = path.relative_to(RESULTS.parent).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Returns the page with links into the site's results/, or out of it."""
    return markdown.replace("](../results/", "](results/").replace("](../docs/", "](../")
