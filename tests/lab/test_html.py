"""The pages for reviewers, opened as files on a phone, in light and in dark."""

from __future__ import annotations

import pytest
from pages import write_pages
from walkthrough import NOTEBOOKS

PHONE = {"width": 390, "height": 844}
NAMES = ["index", *(path.stem for path in NOTEBOOKS)]

# The smallest letter of the page, leaving out what is not shown.
SMALLEST_FONT = """() => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let smallest = [Infinity, ""];
  while (texts.nextNode()) {
    const { textContent, parentElement } = texts.currentNode;
    if (!textContent.trim() || !parentElement.checkVisibility()) continue;
    const size = parseFloat(getComputedStyle(parentElement).fontSize);
    if (size < smallest[0]) smallest = [size, textContent.trim().slice(0, 80)];
  }
  return smallest;
}"""
IMAGES = "images => images.map(image => [image.alt, image.complete && image.naturalWidth])"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    write_pages(NOTEBOOKS, folder)
    return folder


@pytest.fixture
def phone(browser, request):
    """A page of a phone's size, and every address that it asks for."""
    theme = getattr(request, "param", "light")
    context = browser.new_context(viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True, color_scheme=theme)
    page = context.new_page()
    page.addresses = []
    page.on("request", lambda asked: page.addresses.append(asked.url))
    yield page
    context.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phone", ["light", "dark"], indirect=True)
def test_page_reads_on_a_phone_and_asks_nobody(phone, site, shots, name, request):
    phone.goto((site / f"{name}.html").as_uri())
    assert [address for address in phone.addresses if not address.startswith(("file:", "data:", "blob:"))] == []
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert [alt for alt, width in phone.eval_on_selector_all("img", IMAGES) if not width] == []
    size, text = phone.evaluate(SMALLEST_FONT)
    assert size >= 14, f"{size} px: {text}"
    theme = request.node.callspec.params["phone"]
    phone.screenshot(path=shots / f"phone-{theme}-{name}.png", full_page=name == "index")


def test_from_the_index_through_all_pages_and_back(phone, site):
    phone.goto((site / "index.html").as_uri())
    phone.locator("ol a").first.click()
    for path in NOTEBOOKS[1:]:
        phone.locator("nav a[rel=next]").first.click()
        phone.wait_for_url(f"**/{path.stem}.html")
    assert phone.locator("nav a[rel=next]").count() == 0
    phone.locator("nav a", has_text="All notebooks").first.click()
    phone.wait_for_url("**/index.html")


def test_a_request_to_another_host_is_seen(phone, tmp_path):
    (tmp_path / "page.html").write_text('<script src="https://example.invalid/require.js"></script>')
    phone.goto((tmp_path / "page.html").as_uri())
    assert "https://example.invalid/require.js" in phone.addresses


def test_a_page_that_is_too_wide_is_seen(phone, tmp_path):
    (tmp_path / "page.html").write_text(
        '<meta name="viewport" content="width=device-width"><pre style="width: 800px">x</pre>'
    )
    phone.goto((tmp_path / "page.html").as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") > PHONE["width"]


@pytest.mark.parametrize("name", ["index", "00_start_here"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_fits_a_desktop(browser, site, shots, name, theme):
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=theme)
    page.goto((site / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    page.screenshot(path=shots / f"desktop-{theme}-{name}.png", full_page=True)
    page.close()
