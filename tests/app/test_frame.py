"""The frame of all pages: it opens, in both languages, for everyone, and keeps to itself."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from pathlib import Path

import pytest

from gradio_app.texts import LANGUAGES, route
from tests.app.browsing import PHONE, overflow, violations
from tests.app.servers import environment

PAGES = ["", "new", "compare", "help"]
TEXTS = Path(__file__).parents[2] / "gradio_app" / "texts"


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="fake")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_in_every_language_without_errors(site, visit, page, language):
    opened = visit(f"{site.url}/{route(page, language)}")
    opened.locator("nav.head .links [aria-current=page]").wait_for()
    heading = opened.locator("h1").inner_text()
    assert opened.evaluate("document.documentElement.lang") == language
    opened.wait_for_function(f"document.title.includes({json.dumps(heading)})")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing_serious(site, visit, page, theme):
    opened = visit(f"{site.url}/{page}?__theme={theme}")
    opened.locator("h1").wait_for()
    assert violations(opened) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_phone_needs_no_scrolling_sideways(site, visit, page):
    opened = visit(f"{site.url}/{page}", viewport=PHONE)
    opened.locator("h1").wait_for()
    assert overflow(opened) <= 0


def test_light_and_dark_are_remembered(site, visit):
    page = visit(site.url, color_scheme="light")
    page.get_by_role("button", name="Light or dark").click()
    page.wait_for_function("document.body.classList.contains('dark')")
    page.reload()
    page.wait_for_function("document.body.classList.contains('dark')")


def test_all_languages_have_the_same_texts_with_the_same_values():
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    areas = {file.name for file in (TEXTS / "en").glob("*.json")}
    for language in LANGUAGES:
        assert {file.name for file in (TEXTS / language).glob("*.json")} == areas
    for area in areas:
        english = json.loads((TEXTS / "en" / area).read_text())
        for language in set(LANGUAGES) - {"en"}:
            other = json.loads((TEXTS / language / area).read_text())
            assert list(other) == list(english), area
            for key, text in english.items():
                assert text.strip(), (area, key)
                assert other[key].strip(), (area, key)
                assert fields(text) == fields(other[key]), (area, key)


def test_the_web_process_never_imports_torch(tmp_path):
    source = """
import sys
from pathlib import Path
from gradio_app.settings import Settings
from gradio_app.serving import build, prepare_environment
from gradio_app.studio import Studio
prepare_environment()
build(Studio(Settings.on_this_machine(Path("runs"), Path("."), None)))
print(sorted({"torch", "transformers", "lightning", "pytorch_lightning"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
