"""The first page, as a person uses it: start the demo, see the runs, put the line in order."""

from __future__ import annotations

import re

import pytest
import yaml

from gradio_app.pages import home
from gradio_app.pages.templating import render
from gradio_app.recipe import edits
from gradio_app.recipe.edits import demo_recipe
from gradio_app.runs.formatting import format_bytes
from gradio_app.runs.machine import Machine
from gradio_app.runs.store import RunStore
from gradio_app.texts import LANGUAGES, Texts
from lightning_peft.demo.real_base import SMOLLM2_PLACE, absence_of_smollm2
from tests.app.browsing import PHONE, assert_readable, screenshot, violations
from tests.app.runs import queued, recipe, settings

HOSTILE = '<img src=x onerror="window.hacked=1">'


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="fake")


def test_from_the_card_to_the_end_of_the_run_and_back(site, store, visit):
    page = visit(site.url)
    page.get_by_text("No runs yet.").wait_for()
    page.get_by_text("No NVIDIA GPU").or_(page.get_by_text("of GPU memory")).first.wait_for()
    absent = absence_of_smollm2()
    said = "SmolLM2 learns" if absent is None else f"The real model is not installed: {absent}"
    assert said in page.locator("#cards").inner_text()
    screenshot(page, "home-empty")
    page.get_by_role("button", name="Start the demo").click()
    page.wait_for_url(re.compile(r"/run\?run="))
    page.get_by_role("status").get_by_text("Finished").wait_for()
    page.get_by_role("heading", name="Two-minute demo").wait_for()
    page.get_by_role("button", name="Open playground").wait_for()
    page.wait_for_function("document.title.startsWith('100 %')")
    page.get_by_role("link", name="Runs", exact=True).click()
    row = page.get_by_role("row", name="Two-minute demo")
    row.get_by_text("Finished").wait_for()
    assert row.get_by_text("CausalLM QLoRA").is_visible()
    assert row.get_by_text("0.7634").is_visible()
    (run,) = store.list("local")
    row.get_by_role("button", name="Delete Two-minute demo").click()
    # The question names the run and its size, and stays while the list is sent again.
    size = format_bytes(run.bytes, Texts())
    words = f"Delete Two-minute demo with its checkpoints and metrics ({size})"
    row.get_by_text(words).wait_for()
    store.rename("local", run.id, "Two-minute demo 2")
    asked = row.get_by_text("Delete Two-minute demo 2 with its checkpoints and metrics")
    asked.wait_for()
    row.get_by_role("button", name="No, keep it").click()
    asked.wait_for(state="hidden")
    row.get_by_role("button", name="Delete Two-minute demo").click()
    row.get_by_role("button", name="Yes, delete it").click()
    page.get_by_text("No runs yet.").wait_for()
    assert not run.folder.path.exists()


def test_the_line_is_put_in_order_and_left(site, store, visit):
    first = queued(store, "long", steps=4_000)
    names = ["second", HOSTILE, "fourth"]
    for name in names:
        queued(store, name, steps=4_000)
    page = visit(site.url)
    page.locator("#running-now").get_by_role("link", name="long").wait_for()
    items = page.locator("ol.line li")
    items.nth(2).wait_for()
    screenshot(page, "home-line")
    assert violations(page) == []
    page.get_by_role("button", name="Move fourth forward").click()
    items.nth(1).get_by_text("fourth").wait_for()
    assert items.nth(2).get_by_text(HOSTILE).is_visible()
    page.get_by_role("button", name="Remove second from the queue").click()
    items.nth(0).get_by_text("fourth").wait_for()
    assert items.count() == 2
    page.get_by_role("row", name="second").get_by_text("Queued").wait_for()
    assert page.evaluate("window.hacked") is None
    # Every other page says it in its head.
    page.get_by_role("link", name="Help").click()
    page.locator("#now").get_by_text("1 running, 2 queued").wait_for()
    page.locator("#now").get_by_role("link", name=re.compile("long, ")).click()
    page.get_by_role("heading", name="long").wait_for()
    # The page of the run that goes on does not say it again.
    page.locator("#now").get_by_text("2 queued").wait_for()
    assert "running" not in page.locator("#now").inner_text()
    for run in store.list("local"):
        if run.waiting:
            store.update_metadata(run, waiting=None)
    page.get_by_role("button", name="Stop & save").click()
    page.get_by_role("status").get_by_text(re.compile(r"Stopped at step \d+")).wait_for()
    assert store.get("local", first.id).can_resume


def test_other_languages_phones_and_the_dark(site, store, visit):
    store.create("local", recipe(), "a name that is so long that it has to be broken into lines")
    page = visit(f"{site.url}/de?__theme=dark", viewport=PHONE)
    page.get_by_role("link", name="Mit QLoRA beginnen").wait_for()
    page.locator(".badge").get_by_text("In der Warteschlange").first.wait_for()
    assert_readable(page)
    screenshot(page, "home-phone-dark")
    link = page.get_by_role("link", name="Mit QLoRA beginnen").get_attribute("href")
    assert link == "./de-new?method=qlora"


def test_the_demos_recipe_is_that_of_the_real_model_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(edits, "absence_of_smollm2", lambda: None)
    content = yaml.safe_load(demo_recipe())
    assert content["trainer"]["strategy"]["class_path"] == "lightning_peft.QLoRAStrategy"
    given = content["trainer"]["strategy"]["init_args"]
    assert (given["r"], given["lora_dropout"], given["verify"]) == (16, 0.0, "cheap")
    assert content["model"]["init_args"]["model"] == SMOLLM2_PLACE
    assert content["data"]["init_args"]["data"] == "recipe:small/data/orders.jsonl"
    assert [one["class_path"].rpartition(".")[2] for one in content["trainer"]["callbacks"]] == [
        *("BestCheckpoint", "LogSamples")
    ]


def test_the_demos_recipe_is_one_that_lies_over_the_other(monkeypatch):
    monkeypatch.setattr(edits, "absence_of_smollm2", lambda: "pip install it")
    content = yaml.safe_load(demo_recipe())
    assert content["trainer"]["strategy"]["class_path"] == "lightning_peft.QLoRAStrategy"
    assert content["trainer"]["limit_train_batches"] == 12
    assert content["model"]["class_path"] == "lightning_peft.tasks.CausalLM"
    assert content["model"]["init_args"]["model"] == "package:demo/base"


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_said_of_machines(language):
    t = Texts(language)
    card = Machine("NVIDIA <b>", 24 * 10**9, 64 * 10**9, 32 * 10**9, 16)
    assert "NVIDIA &lt;b&gt;" in home.machine_summary(card, t)
    assert t.localized("24.0 GB") in home.machine_summary(card, t)
    unknown = Machine("NVIDIA", 0, 64 * 10**9, 32 * 10**9, 16)
    assert t("home.fits_unknown") in home.machine_summary(unknown, t)
    assert t("home.fits_little") in home.machine_summary(Machine(None, 0, 10**9, 10**8, 1), t)
    assert "why-not" in render("home.card", t, name="big", link="./new", gpu=None)
    assert "why-not" not in render("home.card", t, name="big", link="./new", gpu="NVIDIA")


def test_the_list_comes_in_pages(tmp_path):
    store = RunStore(settings(tmp_path))
    for place in range(23):
        store.create("local", recipe(), f"run {place}")
    runs, t = store.list("local"), Texts()
    assert [len(home.RunPage.of(runs, page).runs) for page in (1, 2, 3)] == [10, 10, 3]
    assert home.RunPage.of(runs, 99).number == 3
    assert home.RunPage.of(runs, -1).number == 1
    assert "Page 2 of 3" in home.run_lists(home.RunPage.of(runs, 2), [], t)
    assert "Someone else" in home.run_lists(home.RunPage.of([], 1), [None], t)
