"""Counts the words that each view of the web page shows, in English and German.

``python -m tools.page_words WORDS.json`` starts the page of the checkout that Python imports (so
``PYTHONPATH`` names another one), opens each view in Chromium as a new visitor finds it, with the
toy and its data, a run and nothing unfolded, and writes the counts. Code, rows of data and what is
hidden do not count. ``--before OLDER.json`` also prints both as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

_NEW = "new?recipe=small/sft"
VIEWS = {
    "home": "", "new": _NEW, **{step: f"{_NEW}#{step}" for step in ("model", "data", "method")},
    "review": f"{_NEW}#review", "run": "run?run=a-run", "compare": "compare", "help": "help",
}  # fmt: skip
LANGUAGES = {"en": "", "de": "de-"}
# As generous as the tests of the page: only a failure waits to the end.
_SECONDS = 240
_COUNT = """() => {
  const left = 'pre, code, script, style, .tokens, details.rows, .refusal';
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let words = 0;
  while (texts.nextNode()) {
    const of = texts.currentNode.parentElement;
    if (of.closest(left) || !of.checkVisibility()) continue;
    words += texts.currentNode.textContent.split(/\\s+/).filter(Boolean).length;
  }
  return words;
}"""


def main(arguments: list[str]) -> int:
    """Counts, writes and shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="where the counts are written, as JSON")
    parser.add_argument("--before", type=Path, help="counts of an older checkout, to be shown too")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        counts = _count(Path(folder))
    args.file.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    before = json.loads(args.before.read_text("utf-8")) if args.before else counts
    for view in VIEWS:
        shown = [f"{before[lang][view]} -> {counts[lang][view]}" for lang in LANGUAGES]
        print(f"{view:10}", *(f"{one:>14}" for one in shown))
    return 0


def _count(folder: Path) -> dict[str, dict[str, int]]:
    run = folder / "runs" / "a-run"
    run.mkdir(parents=True)
    about = {"owner": "local", "name": "A run", "created": time.time()}
    (run / "app.json").write_text(json.dumps(about), encoding="utf-8")
    (run / "recipe.yaml").write_text("model: {}\n", encoding="utf-8")
    with page_server(folder) as (url, _), browser() as opened:
        return {
            language: {
                view: _words(opened, f"{url}/{_address(prefix, place)}")
                for view, place in VIEWS.items()
            }
            for language, prefix in LANGUAGES.items()
        }


@contextmanager
def page_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Starts the page with runs and data below ``folder``; yields its address and process."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    words = ["-m", "gradio_app", f"--port={port}", "--no-open", f"--runs={folder / 'runs'}"]
    words += [f"--data-root={folder}", f"--models={folder}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *words], stdout=log, stderr=log, env=environment, cwd=folder
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, server)
        yield url, server
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def browser() -> Iterator[Any]:
    """Yields a Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)))
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


def _address(prefix: str, place: str) -> str:
    return f"{prefix}{place}" if place else prefix.rstrip("-")


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError("the page did not start")


def words_shown(page: Any) -> int:
    """Returns the words of a page that somebody sees, once their number stays."""
    before, count = -1, int(page.evaluate(_COUNT))
    while count != before:
        page.wait_for_timeout(2_000)
        before, count = count, int(page.evaluate(_COUNT))
    return count


def _words(browser: Any, url: str) -> int:
    """Returns the words of a view once it has what it asks the server for."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(_SECONDS * 1000)
    page.goto(url)
    page.locator("h1, h2").first.wait_for()
    if "new" in url:
        page.locator("#model-facts .chosen").wait_for(state="attached")
        page.locator("#overview .fine").wait_for(state="attached")
        page.locator("#memory .memory").wait_for(state="attached")
    count = words_shown(page)
    page.close()
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
