"""Looking at the page as a person would, with Chromium, and with axe for accessibility."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
# What `make screenshots` sets: the folder in which docs keep them.
SCREENSHOTS = "LIGHTNING_PEFT_SCREENSHOTS"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def chromium() -> str | None:
    """Returns the path of the machine's Chromium or Chrome, if it has one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for found in map(shutil.which, names) if found), None)


def launch(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)


def open_context(browser: Browser, **options: Any) -> BrowserContext:
    """Returns a visitor of their own: cookies and storage are theirs alone."""
    # Colours on their way from light to dark would be judged halfway.
    still = {"reduced_motion": "reduce", "accept_downloads": True}
    made = {"viewport": DESKTOP, "locale": "en-US", **still, **options}
    context = browser.new_context(**made)
    # Generous: on a busy machine everything takes longer, and only a failure waits to the end.
    context.set_default_timeout(60_000)
    return context


class PageMonitor:
    """Keeps what a page must not do: errors in its scripts, requests to other hosts."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.foreign: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._requested)

    def _requested(self, request: Any) -> None:
        here = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:")
        if not request.url.startswith(here):
            self.foreign.append(request.url)


def violations(page: Page) -> list[str]:
    """Returns axe's serious and critical violations on the page, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": {"type": "tag", "values": RULES}}
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {one['help']}: "
        + " | ".join(node["html"][:160] for node in one["nodes"][:4])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def overflow(page: Page) -> int:
    """Returns by how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


def assert_readable(page: Page) -> None:
    """Asserts that everyone can read the page, without scrolling sideways."""
    assert violations(page) == []
    assert overflow(page) <= 0


def open_new_run(visit: Any, site: Any, place: str = "", **options: Any) -> Page:
    """Opens the page of a new run as a new visitor, and waits until it is filled.

    It begins with the toy, whatever is installed, unless ``place`` names another recipe.
    """
    query, hash_, step = place.partition("#")
    if "recipe=" not in query:
        query = f"{query or '?'}&recipe=small/sft"
    page = visit(f"{site.url}/new{query}{hash_}{step}", **options)
    page.locator("#model-facts .chosen").wait_for(state="attached")
    return page


def shown_recipe(page: Page) -> dict[str, Any]:
    """Returns the recipe as the review shows it."""
    return yaml.safe_load(page.locator("#form-yaml pre").inner_text())


def upload_rows(page: Page, name: str, rows: list[Any], more: str = "") -> None:
    """Uploads rows as the data of a new run, and ``more`` after them."""
    content = "\n".join(map(json.dumps, rows)) + more
    file = {"name": name, "mimeType": "application/json", "buffer": content.encode()}
    page.locator("#data-upload input[type=file]").set_input_files(file)


# None of them is a German word too.
_ENGLISH = (
    "the|and|or|of|to|is|are|with|by|your|you|here|this|from|for|file|files|drop|click|upload|clear|"
    "remove|close|cancel|copy|download|share|fullscreen|submit|error|loading|settings|search|rows|"
    "row|steps|accuracy|perplexity|default|undo|retry|textbox"
)
_SHOWN = """(excluded) => {
  const found = [], left = 'pre, code, script, style, [lang=en]' + (excluded && ', ' + excluded);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const of = texts.currentNode.parentElement;
    if (!of.closest(left) && of.checkVisibility()) found.push(texts.currentNode.textContent);
  }
  for (const one of document.querySelectorAll('[aria-label], [title], [placeholder]')) {
    if (one.closest(left) || !one.checkVisibility()) continue;
    for (const name of ['aria-label', 'title', 'placeholder']) {
      if (one.getAttribute(name)) found.push(one.getAttribute(name));
    }
  }
  return found.map((text) => text.trim()).filter(Boolean);
}"""


def not_german(page: Page, excluded: str = "") -> list[str]:
    """Returns the texts of a German page with English words or decimal points.

    Args:
        page: The page.
        excluded: Selectors of what is not the page's own text, such as rows of data.
    """
    decimals = r"(?<![\w.:-])\d+\.(\d\d?|\d{4,})(?![\w.])"
    wrong = re.compile(rf"\b({_ENGLISH})\b|{decimals}", re.IGNORECASE)
    return sorted({text for text in page.evaluate(_SHOWN, excluded) if wrong.search(text)})


def screenshot(page: Page, name: str) -> None:
    """Keeps a picture of the page for the docs, where the caller of the tests wants some."""
    folder = os.environ.get(SCREENSHOTS)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")
