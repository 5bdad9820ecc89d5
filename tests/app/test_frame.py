"""The frame of all pages: it opens, in both languages, for everyone, and keeps to itself."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from pathlib import Path

import gradio as gr
import pytest

from gradio_app.middleware import language_of, localized
from gradio_app.pages.layout import page_title
from gradio_app.texts import LANGUAGES, Texts
from lightning_peft.compat.gradio import CLOSED_SESSION_AGE, MAX_SESSIONS, CompactSessions
from tests.app.browsing import PHONE, not_german, overflow, violations
from tests.app.servers import environment

PAGES = ["", "new", "compare", "help"]
LONGEST_SENTENCE = 20
TEXTS = Path(__file__).parents[2] / "gradio_app" / "texts"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_can_be_read_by_everyone(site, visit, page):
    opened = visit(f"{site.url}/{page}", color_scheme="light")
    wait_for_title(opened, page, "en")
    assert opened.evaluate("document.documentElement.lang") == "en"
    assert violations(opened) == []
    opened.get_by_role("button", name="Toggle dark mode").click()
    opened.wait_for_function("document.body.classList.contains('dark')")
    assert violations(opened) == []
    opened.set_viewport_size(PHONE)
    assert overflow(opened) <= 0
    # Light or dark is remembered, and the other language is a link away.
    opened.get_by_role("link", name="Deutsch").click()
    wait_for_title(opened, page, "de")
    assert opened.evaluate("document.documentElement.lang") == "de"
    assert opened.evaluate("document.body.classList.contains('dark')")
    assert overflow(opened) <= 0


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "page",
    [
        "",
        "new?recipe=small/sft#all",
        pytest.param("compare", marks=LONG),
        pytest.param("help", marks=LONG),
    ],
)
def test_german_pages_are_german(site, visit, page):
    # Also for a browser that is not.
    opened = visit(f"{site.url}/{'de-' if page else 'de'}{page}", locale="en-US")
    opened.locator("h1").first.wait_for()
    if page.startswith("new"):
        opened.locator("#overview .fine, #overview .busy").first.wait_for(timeout=180_000)
        for part in opened.locator(".label-wrap").all():
            if part.is_visible() and "open" not in part.get_attribute("class").split():
                part.click()
        opened.get_by_text("Datei hier ablegen").first.wait_for()
        opened.get_by_label("Datei hochladen").first.wait_for(state="attached")
        assert opened.locator("#f-warmup :is(input, textarea)").input_value() == "0,03"
    assert not_german(opened, "#data-report, #mapped-rows td, table.runs tbody th") == []
    assert opened.evaluate("document.documentElement.lang") == "de"


def wait_for_title(opened, page, language):
    opened.locator("nav.head [aria-current=page]").first.wait_for()
    opened.locator("h1").first.wait_for()
    wanted = page_title(Texts(language), page)
    opened.wait_for_function(f"document.title === {json.dumps(wanted)}")


def test_all_languages_have_the_same_texts_with_the_same_values():
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    def once(pairs: list[tuple[str, str]]) -> dict[str, str]:
        assert len({key for key, _ in pairs}) == len(pairs), pairs
        return dict(pairs)

    areas = {file.name for file in (TEXTS / "en").glob("*.json")}
    for language in LANGUAGES:
        assert {file.name for file in (TEXTS / language).glob("*.json")} == areas
    for area in areas:
        english = json.loads((TEXTS / "en" / area).read_text(), object_pairs_hook=once)
        for language in set(LANGUAGES) - {"en"}:
            other = json.loads((TEXTS / language / area).read_text(), object_pairs_hook=once)
            assert list(other) == list(english), area
            for key, text in english.items():
                assert text.strip(), (area, key)
                assert other[key].strip(), (area, key)
                assert fields(text) == fields(other[key]), (area, key)


def test_sentences_are_short():
    long = [
        (language, area.stem, key, sentence)
        for language in LANGUAGES
        for area in (TEXTS / language).glob("*.json")
        for key, text in json.loads(area.read_text()).items()
        for sentence in re.split(r"(?<=[.!?])\s+|\n", text)
        if len(sentence.split()) > LONGEST_SENTENCE
    ]
    assert long == []


def test_the_language_of_a_page_is_that_of_its_address():
    places = ["/", "/new", "/de", "/de-new", "/proxy/de-run/", "/deutsch", "/en-de"]
    assert [language_of(one) for one in places] == ["en", "en", "de", "de", "de", "en", "en"]
    made = localized(b"<html><head><title>x</title></head><body><head></body></html>", "de")
    assert made.startswith(b"<html><head><script>")
    assert made.count(b"<script>") == 1
    assert b"documentElement.lang = 'de'" in made


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


def test_pages_that_were_closed_are_forgotten_and_others_are_not():
    with gr.Blocks() as demo:
        gr.State("")
    states = CompactSessions()
    states.set_blocks(demo)
    for name in ("closed", "open", "just closed"):
        states[name].is_closed = "closed" in name
    for name in ("closed", "open"):
        states.time_last_used[name] -= 2 * CLOSED_SESSION_AGE
    states.delete_all_expired_state()
    assert list(states.session_data) == ["open", "just closed"]
    assert set(states.time_last_used) == set(states.session_data)
    for number in range(MAX_SESSIONS + 10):
        assert states[f"caller {number}"].config_values == {}
    assert len(states.session_data) == MAX_SESSIONS


def test_each_rule_for_the_dark_has_one_selector():
    """Gradio sets the ``.dark`` of a list's first selector before its own, and of no other."""
    rules = [
        (file.name, selectors.strip())
        for file in (TEXTS.parent / "assets").glob("*.css")
        for selectors in re.findall(
            r"([^{}]+)\{", re.sub(r"/\*.*?\*/", "", file.read_text(), flags=re.S)
        )
    ]
    assert len(rules) > 200
    assert not [rule for rule in rules if ".dark" in rule[1] and "," in rule[1]]
