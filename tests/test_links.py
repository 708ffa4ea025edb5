"""Every link of the notebooks and of the Markdown files leads somewhere: to a file of the repository, to a heading in it."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from markdown_it import MarkdownIt

DOCUMENTS = [
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "README.md",
    ROOT / "upstream" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for path in (ROOT / "data").rglob("*.md") if "generated" not in path.parts),
]


@functools.cache
def rendered(document: Path) -> BeautifulSoup:
    """The Markdown of a document as HTML: what is code, and what is a link, is the parser's business."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    texts = [document.read_text(encoding="utf-8")]
    if document.suffix == ".ipynb":
        texts = [cell.source for cell in nbformat.read(document, as_version=4).cells if cell.cell_type == "markdown"]
    return BeautifulSoup("".join(map(markdown.render, texts)), "html.parser")


def anchors(document: Path) -> set[str]:
    """Fragments that lead to a heading: as JupyterLab makes them in a notebook, as code hosts make them in a .md file."""
    headings = [heading.get_text() for heading in rendered(document)(re.compile("^h[1-6]$"))]
    if document.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    found: set[str] = set()
    for heading in headings:
        slug = unique = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        again = 0
        while unique in found:  # the second heading of the same text is heading-1
            again += 1
            unique = f"{slug}-{again}"
        found.add(unique)
    return found


def links(document: Path) -> list[str]:
    page = rendered(document)
    return [a["href"] for a in page("a", href=True)] + [image["src"] for image in page("img", src=True)]


def fault(document: Path, link: str, root: Path = ROOT) -> str | None:
    """What is wrong with a link of a document, None if nothing is. Other hosts are not asked."""
    url = urlsplit(link)
    if url.scheme or url.netloc:
        well_formed = url.scheme == "https" and re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", url.netloc)
        return None if well_formed and not re.search(r"\s", unquote(link)) else f"{link}: not an https address"
    target = (document.parent / unquote(url.path)).resolve() if url.path else document
    if url.path.startswith("/") or not target.is_relative_to(root):
        return f"{link}: not a path in the repository"
    if not target.exists():
        return f"{link}: no such file"
    if url.fragment and target.suffix in (".md", ".ipynb") and unquote(url.fragment) not in anchors(target):
        return f"{link}: no such heading"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document):
    assert [found for link in links(document) if (found := fault(document, link))] == []


def test_there_are_links_to_check():
    assert sum(len(links(document)) for document in DOCUMENTS) > 30
    assert all(links(path) for path in DOCUMENTS if path.suffix == ".ipynb")


def test_no_link_leads_to_a_file_that_git_ignores():
    """Such a file is there for whoever has made it, and dead for everybody else."""
    targets = {
        str((document.parent / unquote(url.path)).resolve())
        for document in DOCUMENTS
        for url in map(urlsplit, links(document))
        if url.path and not url.scheme
    }
    command = ["git", "check-ignore", *sorted(targets)]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.stdout.split() == []


@pytest.fixture
def repository(tmp_path) -> Path:
    cells = [nbformat.v4.new_markdown_cell("# A title\n\n## 2. The `skip`, again")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    (tmp_path / "two.md").write_text("# `glmpp check`: what?\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n")
    return tmp_path


@pytest.mark.parametrize(
    "link",
    [
        "one.ipynb",
        "one.ipynb#A-title",
        "one.ipynb#2.-The-skip,-again",
        "two.md#glmpp-check-what",
        "two.md#same",
        "two.md#same-1",
        "https://github.com/vllm-project/vllm/pull/42944",
        "#glmpp-check-what",
    ],
)
def test_a_good_link_passes(repository, link):
    assert fault(repository / "two.md", link, repository) is None


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("three.md", "no such file"),
        ("sub/one.ipynb", "no such file"),
        ("one.ipynb#a-title", "no such heading"),
        ("two.md#no-heading", "no such heading"),
        ("two.md#same-2", "no such heading"),
        ("#nothing", "no such heading"),
        ("../outside.md", "not a path in the repository"),
        ("/one.ipynb", "not a path in the repository"),
        ("http://example.org/", "not an https address"),
        ("https://example", "not an https address"),
        ("https://example.org/a%20b", "not an https address"),
        ("htps://example.org/", "not an https address"),
    ],
)
def test_a_bad_link_is_found(repository, link, why):
    assert why in fault(repository / "two.md", link, repository)


def test_links_are_found_wherever_markdown_allows_them(tmp_path):
    lines = ["[a](a.md) ![b](b.png) <https://c.example>", "", "|t|", "|-|", "|[d](d.md)|", ""]
    lines += ["<a href='e.md'>e</a> [f][f] `[g](g.md)`", "", "[f]: f.md", "", "    [h](h.md)"]
    (tmp_path / "x.md").write_text("\n".join(lines))
    assert sorted(links(tmp_path / "x.md")) == ["a.md", "b.png", "d.md", "e.md", "f.md", "https://c.example"]
