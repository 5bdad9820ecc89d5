"""The first page, as a person uses it: start the demo, see the runs, put the line in order."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from urllib.parse import parse_qs, urlsplit

import gradio as gr
import pytest
import yaml

from gradio_app.experiments.listing import MAX_PICKED, Query, list_runs
from gradio_app.experiments.summaries import Summaries
from gradio_app.pages import home, run_table
from gradio_app.pages.templating import render
from gradio_app.recipe import edits
from gradio_app.recipe.edits import demo_recipe
from gradio_app.redaction import short_name
from gradio_app.runs.formatting import format_bytes
from gradio_app.runs.machine import Machine
from gradio_app.runs.store import RunStore, checked_notes
from gradio_app.studio import Studio
from gradio_app.texts import LANGUAGES, Texts
from lightning_peft.demo.real_base import SMOLLM2_PLACE, absence_of_smollm2
from lightning_peft.runs.status import Status, write_json
from tests.app.browsing import DESKTOP, PHONE, assert_readable, not_german, screenshot, violations
from tests.app.runs import erase_runs, queued, recipe, settings, until
from tests.app.test_store import written

HOSTILE = '<img src=x onerror="window.hacked=1">'


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="fake")


def test_from_the_card_to_the_end_of_the_run_and_back(site, store, visit):
    page = visit(site.url)
    page.get_by_text("No runs yet.").wait_for()
    page.get_by_text("No NVIDIA GPU").or_(page.get_by_text("of GPU memory")).first.wait_for()
    absent = absence_of_smollm2()
    said = "SmolLM2 turns" if absent is None else f"The real model is not installed: {absent}"
    assert said in page.locator("#cards").inner_text()
    screenshot(page, "home-empty")
    page.get_by_role("button", name="Start demo").click()
    page.wait_for_url(re.compile(r"/run\?run="))
    page.get_by_role("status").get_by_text("Finished").wait_for()
    page.get_by_role("heading", name="Two-minute demo").wait_for()
    page.get_by_role("button", name="Open playground").wait_for()
    page.wait_for_function("document.title.startsWith('100 %')")
    page.get_by_role("link", name="Runs", exact=True).click()
    row = page.get_by_role("row", name="Two-minute demo")
    row.get_by_text("Finished").wait_for()
    for shown in ("QLoRA", "Chat and instructions", "0.7634", "Validation loss", "991 MB"):
        assert row.get_by_text(shown, exact=True).is_visible(), shown
    assert row.get_by_text(re.compile("^Rank 16, Learning rate ")).is_visible()
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
    for name in ("second", "fourth"):
        queued(store, name, steps=4_000)
    page = visit(site.url)
    page.locator("#running-now").get_by_role("link", name="long").wait_for()
    items = page.locator("ol.line li")
    items.nth(1).wait_for()
    screenshot(page, "home-line")
    queued(store, HOSTILE, steps=4_000)
    items.nth(2).wait_for()
    assert violations(page) == []
    page.get_by_role("button", name="Move fourth forward").click()
    items.nth(0).get_by_text("fourth").wait_for()
    assert items.nth(2).get_by_text(HOSTILE).is_visible()
    page.get_by_role("button", name="Remove second from the queue").click()
    until(lambda: items.count() == 2)
    items.nth(0).get_by_text("fourth").wait_for()
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
    # Before, there would be nothing to save.
    until(lambda: store.get("local", first.id).status.state == "running")
    page.get_by_role("button", name="Stop & save").click()
    page.get_by_role("status").get_by_text(re.compile(r"Stopped at step \d+")).wait_for()
    assert store.get("local", first.id).can_resume


def finished(store, name, seconds, loss, metric="val_loss"):
    """Returns a run that is over, with a recipe of the form's settings."""
    content = {
        "model": {"class_path": "lightning_peft.tasks.CausalLM", "init_args": {"model": "a/Tiny"}},
        "data": {"init_args": {"data": f"{name}.jsonl", "batch_size": 4}},
        "trainer": {
            "strategy": {"class_path": "lightning_peft.LoRAStrategy", "init_args": {"r": 8}}
        },
    }
    run = store.create("local", yaml.safe_dump(content), name)
    rows = [{"step": 0, metric: 0.1}, {"step": 5, metric: loss}, {"step": 9, metric: loss + 1}]
    for row in rows:
        run.folder.append(run.folder.metrics, row)
    run.folder.write(
        run.folder.result, {"seconds": seconds, "peak_memory": {"process_bytes": 10**9}}
    )
    write_json(run.folder.status_file, asdict(Status(state="finished", started=1.0, updated=2.0)))
    return store.update_metadata(run, launched=0.0)


def test_runs_are_searched_sorted_named_and_tagged(site, store, visit):
    erase_runs(store)
    runs = [
        finished(store, name, *facts) for name, *facts in (("bees", 90, 2.5), ("Ants", 30, 0.5))
    ]
    stopped = store.create("local", recipe(), "cats")
    store.update_metadata(stopped, launched=0.0, kill_asked=1.0)
    page = visit(site.url)
    names = page.locator("table.runs tbody th a")
    page.get_by_role("row", name="bees").get_by_text("Rank 8, Batch size 4").wait_for()
    # Of the cards, warnings alone are left of the texts.
    for text in page.locator("#cards .way p").all():
        assert text.is_visible() == ("warns" in (text.get_attribute("class") or ""))
    assert names.all_inner_texts() == ["cats", "Ants", "bees"]
    for count, name in enumerate(("bees", "Ants"), start=1):
        page.get_by_role("checkbox", name=f"Select {name}").click()
        page.get_by_text(f"{count} selected").wait_for()
    chosen = page.locator(".picked").get_by_role("link", name="Compare").get_attribute("href")
    assert set(parse_qs(urlsplit(chosen).query)["runs"][0].split(",")) == {run.id for run in runs}
    page.get_by_role("button", name="Delete the selected runs").click()
    page.get_by_role("alert").get_by_text("Delete Ants, bees (").wait_for()
    page.get_by_role("button", name="Yes, delete", exact=True).click()
    page.get_by_role("link", name="Ants").wait_for(state="hidden")
    assert names.all_inner_texts() == ["cats"]
    for name in ("bees", "Ants"):
        page.get_by_role("button", name=f"Restore {name}").click()
        page.get_by_role("link", name=name).wait_for()
    for column, wanted in (
        ("Name", ["Ants", "bees", "cats"]),
        ("Best", ["Ants", "bees", "cats"]),
        ("Time", ["Ants", "bees", "cats"]),
    ):
        page.get_by_role("button", name=column, exact=True).click()
        page.get_by_role("columnheader", name=column).locator("[aria-hidden]").wait_for()
        assert names.all_inner_texts() == wanted, column
    page.get_by_role("button", name="Time").click()
    page.locator("th[aria-sort=descending]").wait_for()
    # Without a time it is the last one either way.
    assert names.all_inner_texts() == ["bees", "Ants", "cats"]
    page.wait_for_function("document.activeElement.dataset.run === 'time'")
    page.get_by_role("row", name="bees").get_by_role("button", name="Edit bees").click()
    page.wait_for_function("document.activeElement.value === 'bees'")
    page.get_by_label("Name", exact=True).fill("Bees, rank 8")
    page.get_by_label("Tags").fill("good run, base,good run")
    page.get_by_label("Notes").fill(f"{HOSTILE}\nsecond line")
    page.get_by_role("button", name="Save", exact=True).click()
    row = page.get_by_role("row", name="Bees, rank 8")
    row.get_by_text(HOSTILE).wait_for()
    kept = store.get("local", runs[0].id).metadata
    assert (kept.name, kept.tags) == ("Bees, rank 8", ("good-run", "base"))
    assert kept.notes == f"{HOSTILE}\nsecond line"
    assert page.evaluate("window.hacked") is None
    store.update_metadata(store.get("local", runs[0].id), notes="Half the learning rate")
    row.get_by_role("button", name="#good-run").click()
    page.get_by_role("link", name="Ants").wait_for(state="hidden")
    assert names.all_inner_texts() == ["Bees, rank 8"]
    assert page.get_by_label("Search").input_value() == "#good-run"
    page.get_by_label("Search").fill("tiny ants.jsonl")
    page.get_by_role("link", name="Ants").wait_for()
    assert names.all_inner_texts() == ["Ants"]
    page.get_by_label("Search").fill("nothing of this")
    page.get_by_text("No run matches the search.").wait_for()
    page.get_by_label("Search").fill("")
    page.get_by_role("link", name="Ants").wait_for()
    page.get_by_label("Show", exact=True).click()
    page.get_by_role("option", name="Stopped").click()
    page.get_by_role("link", name="Ants").wait_for(state="hidden")
    assert names.all_inner_texts() == ["cats"]
    page.goto(f"{site.url}/de?__theme=dark")
    page.get_by_role("link", name="Ants").wait_for()
    assert_readable(page)
    assert not_german(page, "table.runs tbody th") == []
    scroll = "document.querySelector('#runs-title').scrollIntoView()"
    page.evaluate(scroll)
    screenshot(page, "home-runs-dark")
    page.set_viewport_size(PHONE)
    assert_readable(page)
    page.evaluate(scroll)
    screenshot(page, "home-runs-phone-dark")
    page.set_viewport_size(DESKTOP)
    page.goto(site.url)
    page.get_by_role("link", name="Ants").wait_for()
    assert violations(page) == []
    page.evaluate(scroll)
    screenshot(page, "home-runs")


def test_what_a_run_is_best_at_and_what_it_is_sorted_by(tmp_path):
    store, summaries = RunStore(settings(tmp_path)), Summaries()
    low, high = finished(store, "low", 5, 0.25), finished(store, "high", 50, 0.75)
    found = summaries.of(low)
    assert (found.model, found.data, found.method, found.task) == (
        "Tiny",
        "low.jsonl",
        "LoRA",
        "sft",
    )
    # The value before training, 0.1, is not one of the run.
    assert (found.metric, found.best, found.seconds, found.memory) == ("val_loss", 0.25, 5, 10**9)
    assert found.settings == (
        ("trainer.strategy.init_args.r", "8"),
        ("data.init_args.batch_size", "4"),
    )
    low.folder.append(low.folder.metrics, {"step": 12, "val_loss": 0.125})
    assert summaries.of(low).best == 0.125
    images = "model: {class_path: lightning_peft.tasks.ImageClassifier}\n"
    for run, accuracy in ((low, 0.5), (high, 0.875)):
        run.folder.recipe.write_text(images)
        for step in (0, 3):
            row = {"step": 20 + step, "val_accuracy": accuracy - step / 100}
            run.folder.append(run.folder.metrics, row)
    assert (summaries.of(high).metric, summaries.of(high).best) == ("val_accuracy", 0.875)
    query = Query().sorted_by("best")
    for asked, wanted in ((query, ["high", "low"]), (query.sorted_by("best"), ["low", "high"])):
        shown = list_runs(store.list("local"), summaries, asked)
        assert [run.name for run, _ in shown.rows] == wanted
    assert query.sorted_by("owner") == query


def test_a_loss_that_is_not_a_number_comes_last(tmp_path):
    store, summaries = RunStore(settings(tmp_path)), Summaries()
    losses = {"three": 3.0, "one": 1.0, "nan": math.nan, "two": 2.0, "inf": math.inf}
    for name, loss in losses.items():
        run = store.create("local", recipe(), name)
        run.folder.append(run.folder.metrics, {"step": 1, "train_loss": loss})
    query = Query().sorted_by("best")
    for asked, wanted in (
        (query, ["one", "two", "three"]),
        (query.sorted_by("best"), ["three", "two", "one"]),
    ):
        rows = list_runs(store.list("local"), summaries, asked).rows
        names = [run.name for run, _ in rows]
        assert names[:3] == wanted
        assert set(names[3:]) == {"nan", "inf"}


def test_notes_keep_words_apart_and_no_control_characters():
    assert checked_notes("10\u00a0% of\tit\u3000end\r\nnext\x1b[1m") == "10 % of it end\nnext[1m"


def test_other_languages_phones_and_the_dark(site, store, visit):
    store.create("local", recipe(), "a name that is so long that it has to be broken into lines")
    page = visit(f"{site.url}/de?__theme=dark", viewport=PHONE)
    page.get_by_role("link", name="QLoRA verwenden").wait_for()
    page.locator(".badge").get_by_text("In der Warteschlange").first.wait_for()
    assert_readable(page)
    screenshot(page, "home-phone-dark")
    link = page.get_by_role("link", name="QLoRA verwenden").get_attribute("href")
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


@pytest.mark.parametrize(("gpu", "key"), [("NVIDIA", "home.big_text"), (None, "home.big_slow")])
def test_the_card_of_qlora_says_where_it_is_slow(gpu, key, monkeypatch, tmp_path):
    found = Machine(gpu, 24 * 10**9, 64 * 10**9, 32 * 10**9, 16)
    monkeypatch.setattr(home, "this_machine", lambda: found)
    studio, t = Studio(settings(tmp_path)), Texts()
    try:
        with gr.Blocks() as page:
            home._cards(studio, t)
    finally:
        studio.close()
    cards = [block.value for block in page.blocks.values() if isinstance(block, gr.HTML)]
    (shown,) = [card for card in cards if t("home.big_title") in card]
    said = [one for one in ("home.big_text", "home.big_slow") if t(one) in shown]
    assert said == [key]
    assert ('<p class="warns">' in shown) == (key == "home.big_slow")


def test_the_list_comes_in_pages(tmp_path):
    store, summaries, t = RunStore(settings(tmp_path)), Summaries(), Texts()
    for place in range(23):
        store.create("local", recipe(), f"run {place}")
    runs = store.list("local")
    pages = [list_runs(runs, summaries, Query(page=page)) for page in (1, 2, 3, 99, -1)]
    assert [(len(one.rows), one.page) for one in pages] == [
        (10, 1),
        (10, 2),
        (3, 3),
        (3, 3),
        (10, 1),
    ]
    assert "Page 2 of 3" in run_table.run_table(pages[1], t)
    assert "Someone else" in render("home.queue", t, runs=[None])


def test_of_a_selection_what_can_be_deleted_is_and_the_rest_says_why(tmp_path):
    studio = Studio(settings(tmp_path))
    try:
        store = studio.store
        written(store.root / "busy")
        one, two, kept = (store.create("local", recipe(), name).id for name in ("a", "b", "c"))
        with gr.Blocks():
            table = run_table.RunTable(studio, Texts())
        picked = Query(picked=frozenset({"busy", one, two}))
        with pytest.warns(UserWarning, match="busy"):
            query, *_ = table._act("local", picked, {"act": "delete_picked", "run": ""})
        assert query.picked == frozenset()
        assert {run.id for run in store.list("local")} == {"busy", kept}
        full = Query(picked=frozenset(f"gone-{n}" for n in range(MAX_PICKED)))
        query, *_ = table._act("local", full, {"act": "pick", "run": kept})
        assert query.picked == {kept}
        assert table._act("local", query, {"act": "delete", "run": kept})[0].picked == frozenset()
        table._act("local", query, {"act": "erase", "run": one})
        assert {run.id for run in store.deleted("local")} == {two, kept}
    finally:
        studio.close()


@pytest.mark.parametrize("folder", ["upload:", "/srv/data/uploads/somebody/"])
def test_an_upload_is_named_as_its_file(folder):
    assert short_name(f"{folder}20261130-350ec5f4-mine-b.jsonl") == "mine-b.jsonl"


def test_names_in_a_narrow_column_are_targets_and_runs_are_deleted_for_good(site, store, visit):
    for name in ("Dachs", "Gone"):
        run = store.create("local", recipe(), name)
        store.update_metadata(run, launched=0.0, kill_asked=1.0)
    page = visit(site.url)
    page.get_by_role("link", name="Dachs").wait_for()
    # As where the other columns are full: a name stands below its checkbox.
    page.add_style_tag(content="table.runs tbody th { display: block; width: 60px; }")
    page.get_by_role("button", name="Delete Gone", exact=True).click()
    page.get_by_role("button", name="Yes, delete it").click()
    gone = page.get_by_role("button", name="Delete Gone for good")
    gone.wait_for()
    assert violations(page) == []
    gone.click()
    page.get_by_role("alert").get_by_text("Delete Gone for good (").wait_for()
    page.get_by_role("button", name="Yes, delete it").click()
    gone.wait_for(state="detached")
    assert "Gone" not in [run.name for run in store.deleted("local")]
