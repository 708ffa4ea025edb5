"""HTML for reviewers: one page for each executed notebook, and an index of them.

A page stands alone: images inside it, no script, nothing fetched from anywhere; it can be sent by mail and read on a phone.
"""

from __future__ import annotations

import base64
import mimetypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import nbformat
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
TEMPLATES = ROOT / "tools" / "templates"


@dataclass
class Page:
    """What the index says about a notebook; `run` is what the walkthrough noted of its execution, if it was executed."""

    name: str
    notebook: nbformat.NotebookNode
    title: str
    answer: str
    run: dict[str, Any] | None

    @classmethod
    def of(cls, path: Path) -> Page:
        """The title is the H1 of the first cell, the answer its blockquote."""
        notebook = nbformat.read(path, as_version=4)
        opening = BeautifulSoup(markdown2html(notebook.cells[0].source), "html.parser")
        for anchor in opening.select("a.anchor-link"):
            anchor.decompose()
        title, answer = opening.h1, opening.select_one("blockquote p")
        return cls(
            path.stem,
            notebook,
            title.get_text() if title else path.stem,
            answer.decode_contents() if answer else "",
            notebook.metadata.get("glmpp"),
        )

    @property
    def number(self) -> str:
        return self.name.split("_")[0]

    @property
    def short(self) -> str:
        """For links between pages: the file's name in words."""
        return self.name.replace("_", " ")

    @property
    def href(self) -> str:
        return f"{self.name}.html"


def write_pages(notebooks: list[Path], folder: Path) -> list[Path]:
    """Write a page for each notebook and index.html; returns their paths, the index first.

    Args:
        notebooks: executed notebooks, in the order of the index. Links in them count from the folder `notebooks`.
        folder: where the pages go. Files that have no page are linked where they lie, relative to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pages = [Page.of(path) for path in notebooks]
    names = {page.name for page in pages}
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(TEMPLATES)])
    written = []
    for page, previous, following in zip(pages, [None, *pages], [*pages[1:], None]):
        resources = {"metadata": {"name": page.title}, "previous": previous, "next": following}
        html, _ = exporter.from_notebook_node(page.notebook, resources)
        written.append(folder / page.href)
        written[-1].write_text(_standalone(html, ".jp-Cell", names, folder), encoding="utf-8")
    files = [("README", "../README.md"), ("what is promised, and which test holds it", "../tests/README.md")]
    template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True).get_template("index.html.j2")
    index = folder / "index.html"
    html = template.render(pages=pages, files=files)
    index.write_text(_standalone(html, ":is(li p, footer)", names, folder), encoding="utf-8")
    return [index, *written]


def _standalone(html: str, selector: str, names: set[str], folder: Path) -> str:
    """Links and images as they stand in a notebook, made right for a page in `folder` that may be carried elsewhere."""
    soup = BeautifulSoup(html, "html.parser")
    for anchor in soup.select(f"{selector} a[href]"):
        if not (target := _local(anchor["href"])):
            continue
        if target.parent == NOTEBOOKS and target.suffix == ".ipynb" and target.stem in names:
            path = f"{target.stem}.html"
        else:
            path = quote(Path(os.path.relpath(target, folder)).as_posix())
        anchor["href"] = urlunsplit(urlsplit(anchor["href"])._replace(path=path))
    # nbconvert's embed_images parses every piece of HTML for itself, which ends a <details> before its Markdown.
    for image in soup.select(f"{selector} img[src]"):
        if target := _local(image["src"]):
            kind, _ = mimetypes.guess_type(target.name)
            image["src"] = f"data:{kind};base64,{base64.b64encode(target.read_bytes()).decode()}"
    return str(soup)


def _local(address: str) -> Path | None:
    """The file that an address in a notebook means, None for other hosts and for places on the same page."""
    url = urlsplit(address)
    if url.scheme or url.netloc or not url.path:
        return None
    return Path(os.path.normpath(NOTEBOOKS / unquote(url.path)))
