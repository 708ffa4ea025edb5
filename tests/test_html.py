"""The pages for reviewers: nothing fetched from another host, every page listed, no dead link between them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import walkthrough
from bs4 import BeautifulSoup
from conftest import ROOT
from pages import write_pages
from walkthrough import NOTEBOOKS

IN_CSS = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")
FETCHED = {  # what a browser fetches by itself; an ordinary link waits for a click
    "src": "[src]",
    "href": "link[href], image[href], use[href]",
    "srcset": "[srcset]",
    "data": "object[data]",
    "poster": "[poster]",
}


def fetched(soup: BeautifulSoup) -> list[str]:
    """Every address that a browser would ask for when it opens this page, other than what the page itself holds."""
    addresses = [element[name] for name, selector in FETCHED.items() for element in soup.select(selector)]
    styles = [style.get_text() for style in soup("style")] + [element["style"] for element in soup.select("[style]")]
    addresses += [match[1] or match[2] for style in styles for match in IN_CSS.finditer(style)]
    for script in soup("script"):
        addresses += re.findall(r"""(?:https?:)?//[\w.-]+\.\w+/[^\s"'`]*""", script.get_text())
    return [address for address in addresses if not address.startswith(("data:", "#"))]


@functools.cache
def parsed(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(), "html.parser")


def dead(page: Path) -> list[str]:
    """Links of a page to files, or to places in pages, that are not there."""
    found = []
    for anchor in parsed(page).select("a[href]"):
        url = urlsplit(anchor["href"])
        if url.scheme in ("https", "mailto"):
            continue
        target = (page.parent / unquote(url.path)).resolve() if url.path else page
        place = unquote(url.fragment) if target.suffix == ".html" else ""
        if not target.exists() or (place and not parsed(target).find(id=place)):
            found.append(anchor["href"])
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write_pages(NOTEBOOKS, folder)
    return folder


def test_every_notebook_has_its_page(site):
    assert sorted(path.name for path in site.iterdir()) == sorted(
        ["index.html", *(f"{path.stem}.html" for path in NOTEBOOKS)]
    )


def test_pages_fetch_nothing_and_run_nothing(site):
    for page in site.iterdir():
        assert fetched(parsed(page)) == [], page.name
        assert not parsed(page)("script"), page.name


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.1.10/require.min.js"></script>',
        '<script type="module">const mermaid = (await import("https://cdn.example/mermaid.mjs")).default;</script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<style>@import "https://fonts.example/css";</style>',
        "<style>@font-face { src: url(https://fonts.example/a.woff2) }</style>",
        "<p style=\"background: url('http://cdn.example/a.png')\">",
        '<img src="figure.png">',
    ],
)
def test_an_address_that_would_be_fetched_is_found(html):
    assert len(fetched(BeautifulSoup(html, "html.parser"))) == 1


def test_the_stock_template_would_not_pass():
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter(template_name="lab").from_notebook_node(nbformat.v4.new_notebook())
    hosts = {urlsplit(address).netloc for address in fetched(BeautifulSoup(html, "html.parser"))}
    assert "cdnjs.cloudflare.com" in hosts


def test_the_index_lists_all_notebooks_in_order_with_title_and_answer(site):
    index = parsed(site / "index.html")
    entries = index.select("ol > li")
    assert [entry.a["href"] for entry in entries] == [f"{path.stem}.html" for path in NOTEBOOKS]
    for entry, path in zip(entries, NOTEBOOKS):
        first = nbformat.read(path, as_version=4).cells[0].source
        title, answer = re.search(r"^# (.+)$", first, flags=re.M)[1], re.search(r"^> (.+)$", first, flags=re.M)[1]
        assert entry.a.get_text() == f"{path.stem[:2]}. {title}"
        assert entry.p.get_text() == answer.replace("`", "")


def test_links_between_pages_and_to_files_resolve(site):
    assert {page.name: links for page in site.iterdir() if (links := dead(page))} == {}


def test_each_page_leads_to_the_index_and_to_its_neighbours(site):
    pages = [f"{path.stem}.html" for path in NOTEBOOKS]
    for before, name, after in zip([None, *pages], pages, [*pages[1:], None]):
        nav = parsed(site / name).nav
        assert [a["href"] for a in nav("a")] == [href for href in ("index.html", before, after) if href]


def notebook(path: Path, text: str, **metadata) -> Path:
    cells = [nbformat.v4.new_markdown_cell(text)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def test_links_follow_the_pages_that_exist(tmp_path):
    """Of two notebooks that are linked only one was executed: it has a page, the other is linked as a notebook."""
    text = "# T\n\n[a](00_start_here.ipynb#3.-Why) [b](01_reproduce_the_keyerror.ipynb) [c](../tests/README.md) [d](#T)"
    path = notebook(tmp_path / "00_start_here.ipynb", text)
    _, page = write_pages([path], tmp_path / "site")
    links = [a["href"] for a in parsed(page).select(".jp-Cell p a")]
    assert (links[0], links[3]) == ("00_start_here.html#3.-Why", "#T")
    assert [(page.parent / unquote(link)).resolve() for link in links[1:3]] == [NOTEBOOKS[1], ROOT / "tests" / "README.md"]


def test_a_dead_link_between_pages_is_found(tmp_path):
    path = notebook(tmp_path / "00_start_here.ipynb", "# T\n\n[a](00_start_here.ipynb#Nothing) [b](../nothing.md)")
    _, page = write_pages([path], tmp_path)
    assert len(dead(page)) == 2


def test_pictures_are_put_into_the_page(tmp_path):
    path = notebook(tmp_path / "00_x.ipynb", "# T\n\n![figure](../data/figures/layers_and_stages.png)")
    _, page = write_pages([path], tmp_path)
    assert parsed(page).img["src"].startswith("data:image/png;base64,")


def test_the_index_says_how_the_run_ended(tmp_path):
    run = {"seconds": 12.3, "passed": 3, "expected": 4, "error": "KeyError: <'x'>", "finished": "2026-01-02 03:04 UTC"}
    write_pages([notebook(tmp_path / "00_x.ipynb", "# T\n\n> A.", glmpp=run)], tmp_path)
    entry = parsed(tmp_path / "index.html").li
    text = " ".join(entry.get_text().split())
    assert text == "00. T A. 12 s · 3 of 4 verdicts passed · 2026-01-02 03:04 UTC Failed: KeyError: <'x'>"


@pytest.mark.notebooks
def test_a_run_of_one_notebook_keeps_the_pages_of_the_others(tmp_path, monkeypatch):
    folder, build = tmp_path / "notebooks", tmp_path / "build"
    folder.mkdir()
    paths = [notebook(folder / name, f"# {name}\n\n> A.") for name in ("00_a.ipynb", "01_b.ipynb", "02_c.ipynb")]
    for path in paths:
        unexecuted = nbformat.read(path, as_version=4)
        unexecuted.cells.append(nbformat.v4.new_code_cell("print('two: expected 2, got 2, match: True')"))
        nbformat.write(unexecuted, path)
    monkeypatch.setattr(walkthrough, "BUILD", build)
    monkeypatch.setattr(walkthrough, "NOTEBOOKS", paths)
    listed, neighbours = [], []
    for path in (paths[2], paths[0]):
        monkeypatch.setattr("sys.argv", ["walkthrough.py", str(path)])
        assert walkthrough.main() == 0
        html = [BeautifulSoup((build / name).read_text(), "html.parser") for name in ("index.html", "02_c.html")]
        listed.append([entry.a["href"] for entry in html[0].select("ol > li")])
        neighbours.append([a["href"] for a in html[1].nav("a")])
    assert listed == [["02_c.html"], ["00_a.html", "02_c.html"]]
    assert neighbours == [["index.html"], ["index.html", "00_a.html"]]
    assert "glmpp" not in nbformat.read(paths[0], as_version=4).metadata


def test_a_folded_answer_stays_folded(site):
    """Markdown between <details> and </details> is one fold, not an empty one with its text laid open below."""
    folds = parsed(site / "00_start_here.html")("details")
    assert len(folds) == 1 and "Between the first" in folds[0].get_text()
