"""The page on which a recipe is made, used as a person would, with the real checks and planner."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import gradio as gr
import pytest
from finished import BASE

from gradio_app.errors import UserError
from gradio_app.experiments.summaries import Summaries
from gradio_app.pages.new import data, memory, model, review
from gradio_app.pages.new.editor import Editor, Session, _replace_content
from gradio_app.recipe.command_worker import CommandResult
from gradio_app.recipe.content import value_at, with_value
from gradio_app.recipe.edits import base_recipe, with_data, with_model
from gradio_app.recipe.presets import DEMO_BASE, THIS_MACHINE
from gradio_app.recipe.preview import DataReport
from gradio_app.runs.store import RunStore
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.data.templates import NAMED
from lightning_peft.demo.real_base import absence_of_smollm2
from tests.app.browsing import (
    PHONE,
    open_new_run,
    overflow,
    screenshot,
    shown_recipe,
    upload_rows,
    violations,
)
from tests.app.runs import erase_runs, settings
from tests.app.test_store import written
from tools.first_run import COUNT_CLICKS

STEPS = ("model", "data", "method", "review")
GOOD = [{"question": f"What is {n} and {n}?", "reply": f"It is {2 * n}."} for n in range(60)]


def wait_for_report(page):
    page.locator("#data-report .fine, #data-report .bad, #data-report .failure").first.wait_for()


def lines(rows) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.mark.parametrize("change", ["content", "asked again"])
def test_what_was_found_of_an_older_recipe_is_not_shown(change):
    session, nothing = Session({}, {}), ["nothing"]

    def answers():
        yield ["busy"]
        if change == "content":
            session.content = {"model": 1}
        else:
            list(session.while_current("review", iter([["newer"]]), nothing))

    shown = list(session.while_current("review", answers(), nothing))
    # Gradio sends the last value again when a generator ends.
    assert shown == [["busy"], nothing]
    assert list(session.while_current("review", iter([["a"], ["b"]]), nothing)) == [["a"], ["b"]]


@pytest.mark.parametrize("session", [Session({}, {}), None, "text"])
def test_of_a_page_that_the_server_has_forgotten_nothing_is_done(session):
    # It would be done with the recipe of a new page instead of what this one shows.
    with pytest.raises(UserError, match="checks.session"):
        Editor.of(SimpleNamespace(studio=None), session, SimpleNamespace(username=None))


@pytest.fixture
def editor(tmp_path):
    studio = SimpleNamespace(settings=settings(tmp_path), summaries=Summaries())
    studio.store = RunStore(studio.settings)
    with gr.Blocks():
        return Editor(studio, Texts())


def test_a_menu_that_loses_the_focus_changes_nothing(editor, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    content = with_model(base_recipe("sft"), "org/model", "f" * 40)
    content = with_data(content, "org/set", hub_config="de", hub_revision="abc")
    problem = UserError("checks.number")
    session = Session(content, content, field_errors={"model.init_args.learning_rate": problem})
    for choose, shown in ((model._choose, "org/model"), (data._choose, "org/set")):
        for given in (shown, f" {shown} ", "", None):
            assert choose(editor, session, given) is content
    _replace_content(session, content, own=False)
    assert session.field_errors
    other = model._choose(editor, session, "org/other")
    assert value_at(other, "model.init_args.revision", None) is None
    other = data._choose(editor, session, "imdb")
    assert value_at(other, "data.init_args", None)["data"] == "imdb"
    assert value_at(other, "data.init_args.hub_config", None) is None
    (editor.studio.settings.data_root / "imdb.csv").write_text("prompt,completion\n")
    with pytest.raises(UserError, match=r"checks\.near.*imdb\.csv"):
        data._choose(editor, session, "imdb")


def test_tokens_that_are_trained_are_those_that_count_in_the_loss(editor):
    content = with_value(base_recipe("sft", small=False), "trainer.max_epochs", 2)
    train = {"rows": 16, "tokens": 5000, "trained_tokens": 1200}
    for counted, label, number in (
        (train, "Tokens trained", "2,400"),
        ({**train, "trained_tokens": 0}, "Tokens read", "10,000"),
    ):
        session = Session(content, content, report=DataReport({"splits": {"train": counted}}))
        shown = review.facts_html(session, editor.t)
        assert label in shown
        assert number in shown


def test_the_disk_that_a_run_needs_has_the_download_of_its_model(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    content, name, t = base_recipe("sft"), "Qwen/Qwen3-0.6B", Texts()
    for place, fetched in (
        (DEMO_BASE, 0),
        (str(tmp_path), 0),
        (name, 2 * 751_632_384),
        ("org/unlisted", None),
        ("unlisted", None),
        ("org/unlisted:file.gguf", None),
    ):
        chosen = with_value(content, "model.init_args.model", place)
        assert memory.fetched_bytes(chosen) == fetched
    assert memory._disk(10**9, 0, tmp_path, t).startswith("1.0 GB of ")
    assert memory._disk(10**9, 2 * 10**9, tmp_path, t).startswith("3.0 GB of ")
    assert memory._disk(10**9, None, tmp_path, t) == ""


def test_a_plan_is_shared_while_its_files_and_what_runs_here_stay_the_same(tmp_path):
    studio, folder = Studio(settings(tmp_path, max_concurrent_runs=0)), tmp_path / "model"
    try:
        content = with_value(base_recipe("sft"), "model.init_args.model", str(folder))

        def states():
            return [memory.machine_state(studio, content, one) for one in (THIS_MACHINE, "24 GB")]

        seen = [states()]
        assert states() == seen[0]
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        seen.append(states())
        written(studio.store.create("local", "seed: 1\n", "a run").folder.path)
        seen.append(states())
        here, there = zip(*seen, strict=True)
        assert [here.index(one) for one in here] == [0, 1, 2]
        assert [there.index(one) for one in there] == [0, 1, 1]
    finally:
        studio.close()
    fits, fits_not = (CommandResult(0, json.dumps({"fits": one})) for one in (True, False))
    assert memory.keeps_plan(THIS_MACHINE, fits)
    assert not memory.keeps_plan(THIS_MACHINE, fits_not)
    assert memory.keeps_plan("24 GB", fits_not)
    assert not memory.keeps_plan("24 GB", CommandResult(2))


def test_own_data_with_bad_rows_is_put_right_and_started(visit, site):
    before = set(site.runs.glob("*/recipe.yaml"))
    page = open_new_run(visit, site, "#data")
    wait_for_report(page)
    bad = [*GOOD[:3], {"question": "empty?", "reply": ""}, *GOOD[3:], GOOD[5]]
    upload_rows(page, "mine <b>.jsonl", bad, "\nno json at all")
    page.get_by_text("mine-b.jsonl").first.wait_for()
    # Only one column has a known name: both are mapped in their order.
    page.locator("#data-report .failure").wait_for()
    mapped = page.locator("#mapped-rows table")
    mapped.get_by_role("cell", name="It is 2.").wait_for()
    assert page.get_by_label("Prompt and completion").is_checked()
    assert mapped.locator("thead th").all_inner_texts() == ["Prompt", "Completion"]
    page.get_by_role("button", name="Apply and read again").click()
    report = page.locator("#data-report")
    report.get_by_text("3 of 63 rows have problems").wait_for()
    assert "What is 3 and 3?" in report.inner_text()
    page.get_by_role("button", name="Search rows").click()
    page.locator("#search-text textarea, #search-text input").fill("is 58 AND")
    page.get_by_role("button", name="Search", exact=True).click()
    found = page.locator("#found-rows")
    found.get_by_text("Rows with “is 58 AND”: 1.").wait_for()
    found.locator("mark").get_by_text("It is 116.").wait_for()
    assert {"Row 4", "Row 63"} <= set(report.locator(".problem strong").all_inner_texts())
    screenshot(page, "new-data-problems")
    page.get_by_role("link", name="Next: Method").click()
    page.get_by_role("link", name="Next: Review").click()
    page.locator("#overview [role=alert]").get_by_text("3 rows have problems").wait_for()
    assert page.get_by_role("button", name="Start training").is_disabled()
    assert set(site.runs.glob("*/recipe.yaml")) == before
    page.locator("#overview").get_by_role("link", name="To the data").first.click()
    page.get_by_label("Skip rows").check()
    report.get_by_text("are skipped").wait_for()
    page.get_by_role("link", name="Review", exact=True).click()
    page.locator("#overview .fine").wait_for()
    recipe = shown_recipe(page)
    assert recipe["data"]["init_args"]["columns"] == {"prompt": "question", "completion": "reply"}
    assert "limit_train_batches" not in recipe["trainer"]
    page.get_by_label("Run name").fill("My own data")
    screenshot(page, "new-review")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(re.compile(r"/run\?run="))
    page.get_by_role("heading", name="My own data").wait_for()


@pytest.mark.long
def test_a_corrected_upload_takes_the_place_of_the_bad_one(visit, site):
    page = open_new_run(visit, site, "#data")
    rows = [{"prompt": row["question"], "completion": row["reply"]} for row in GOOD]
    upload_rows(page, "bad.jsonl", [*rows, {"prompt": "x", "completion": ""}])
    page.locator("#data-report .problem").wait_for()
    upload_rows(page, "good.jsonl", rows)
    page.locator("#data-report .fine").wait_for()
    page.locator("#data-facts").get_by_text("good.jsonl").wait_for()
    mark = page.locator("#data-report .tokens mark").first
    assert "trained:" in mark.inner_text() or "trained:" in mark.text_content()
    assert (
        page.evaluate("e => getComputedStyle(e).textDecorationLine", mark.element_handle())
        == "underline"
    )
    screenshot(page, "new-data")


def test_a_large_file_is_counted_and_stopped_and_holds_up_no_other(visit, site):
    page = open_new_run(visit, site, "#data")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(60_000)]
    upload_rows(page, "large.jsonl", rows)
    report = page.locator("#data-report")
    report.get_by_text(re.compile(r"Checking every row: [\d,]+ of about 60,000")).wait_for()
    # Rows can be seen meanwhile, and what the first ones are like.
    report.get_by_text("Of the first 1,000 rows:").wait_for()
    report.locator("details.rows").get_by_text("What is 7?").wait_for()
    page.get_by_role("button", name="Stop checking").click()
    report.get_by_text("Checking was stopped").wait_for(timeout=10_000)
    assert not page.locator("#stop-checking").is_visible()
    page.get_by_role("button", name="Check again").click()
    report.get_by_text(re.compile("of about 60,000")).wait_for()
    upload_rows(page, "small.jsonl", rows[:40])
    # The larger one is given up, and not waited for.
    report.get_by_text("All 40 rows are usable").wait_for(timeout=20_000)


def test_what_is_refused_is_said_where_it_was_typed(visit, site):
    rows = [{"prompt": row["question"], "completion": row["reply"]} for row in GOOD]
    (site.data / "train.jsonl").write_bytes(lines(rows))
    held = [{"prompt": f"What is {n}?", "completion": "A number."} for n in range(3)]
    (site.data / "held.jsonl").write_bytes(lines(held))
    page = open_new_run(visit, site, "#data")
    wait_for_report(page)
    path = page.locator("#data-place input")
    path.fill("trian.jsonl")
    path.press("Enter")
    page.locator("#data-problem").get_by_text("Did you mean train.jsonl?").wait_for()
    opacity = "e => Number(getComputedStyle(e).opacity)"
    report = page.locator("#data-report").element_handle()
    assert page.evaluate(opacity, report) < 1
    path.fill("train.jsonl")
    path.press("Enter")
    page.locator("#data-report").get_by_text("All 60 rows").wait_for()
    assert page.evaluate(opacity, report) == 1
    assert not page.locator("#data-problem").is_visible()
    page.get_by_role("button", name="Held-out files").click()
    page.locator("#validation-file input").click()
    page.get_by_role("option", name=re.compile("held.jsonl")).click()
    page.locator("#data-report").get_by_text("All 63 rows").wait_for()
    page.get_by_role("link", name="Next: Method").click()
    rate = page.get_by_role("textbox", name="Learning rate")
    rate.fill("500")
    rate.press("Tab")
    field = page.locator("#f-learning-rate.refused")
    field.get_by_text("500 lies outside 0 to 1").wait_for()
    assert field.bounding_box()["width"] > 200
    page.get_by_role("link", name="Next: Review").click()
    page.locator("#overview .stale").wait_for()
    page.locator("#overview").get_by_text("Learning rate: 500 lies outside").wait_for()
    page.go_back()
    # Model and data have changed settings too, which nobody has.
    changed = page.locator("#changed-settings")
    changed.locator(".failure").wait_for()
    assert changed.locator(".changed").count() == 0
    rate.fill("1e-3")
    rate.press("Tab")
    changed.get_by_text("Learning rate: 5e-3 \u2192 1e-3").wait_for()
    page.reload()
    changed.get_by_text("Learning rate: 5e-3 \u2192 1e-3").wait_for()
    assert changed.locator("li").count() == 1


@pytest.fixture
def mine(site):
    """A model on the server, for one test."""
    folder = site.folder / "models" / "mine"
    shutil.copytree(BASE, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.usefixtures("mine")
def test_a_change_of_task_can_be_taken_back_and_a_reload_keeps_where_the_model_is_from(visit, site):
    page = open_new_run(visit, site)
    model = page.locator("#model-choice").get_by_role("combobox")
    model.click()
    page.get_by_role("option", name="mine, on this machine").click()
    chosen = page.locator("#model-facts .chosen").get_by_text("mine")
    chosen.wait_for()
    page.locator("#new-task").get_by_role("combobox").click()
    page.get_by_role("option", name="Classify images").click()
    undo = page.get_by_role("button", name="Back to Chat and instructions")
    undo.wait_for()
    assert not chosen.is_visible()
    undo.click()
    chosen.wait_for()
    assert not undo.is_visible()
    page.reload()
    chosen.wait_for()
    assert model.input_value() == "mine, on this machine"


def test_a_new_run_begins_with_a_model_that_is_here_and_takes_none_that_cannot_be_fetched(
    visit, site
):
    page = visit(f"{site.url}/new#model")
    first = "Tiny demo model" if absence_of_smollm2() else "SmolLM2-135M-Instruct.Q4_1.gguf"
    metadata, problem = page.locator("#model-facts"), page.locator("#model-problem")
    metadata.get_by_text(first).first.wait_for()
    choice = page.locator("#model-choice").get_by_role("combobox")
    choice.click()
    assert page.get_by_role("option").filter(has_text=first).count() == 1
    absent = page.get_by_role("option", name="\u2717").first
    name = absent.inner_text().partition("\u2717 ")[2].partition(":")[0]
    absent.click()
    problem.get_by_text(f"{name} is not on this machine").wait_for()
    screenshot(page, "new-model-offline")
    choice.fill("me/unknown")
    choice.press("Enter")
    problem.get_by_text("me/unknown is not on this machine").wait_for()
    assert first in metadata.inner_text()
    # A recipe can name what is not here; it is said at once, and where it can be changed.
    page.goto(f"{site.url}/new?recipe=sft-lora#review")
    blocked = page.locator("#overview [role=alert]")
    blocked.get_by_text("is not on this machine").wait_for()
    blocked.get_by_role("link", name="To the model").wait_for()
    assert page.get_by_role("button", name="Start training").is_disabled()


# What the way from the first page to the start may take.
MOST_CLICKS, MOST_WORDS = 6, 250


def words_on(page) -> int:
    return len(page.inner_text("body").split())


def test_a_first_run_with_a_model_and_data_of_ones_own_is_short(visit, site, store, mine):
    # Of other tests, which are over.
    erase_runs(store)
    (mine / "chat_template.jinja").write_text(NAMED["plain"])
    rows = [{"prompt": row["question"], "completion": row["reply"]} for row in GOOD]
    (orders := site.data / "orders.jsonl").write_bytes(lines(rows))
    page = visit(site.url)
    page.context.add_init_script(COUNT_CLICKS)
    page.evaluate(COUNT_CLICKS)
    page.get_by_text("No runs yet.").wait_for()
    words = words_on(page)
    page.get_by_role("link", name="Choose data").click()
    metadata, report = page.locator("#model-facts"), page.locator("#data-report")
    metadata.locator(".chosen").wait_for()
    page.locator("#model-choice").get_by_role("combobox").click()
    page.get_by_role("option", name="mine, on this machine").click()
    metadata.get_by_text("Weights: ").wait_for()
    # The example belongs to the demo model.
    blocked = page.locator("#overview [role=alert]")
    blocked.get_by_text("No data is chosen").wait_for()
    assert blocked.locator("li").count() == 1
    assert page.get_by_role("button", name="Start training").is_disabled()
    assert "data" not in shown_recipe(page)["data"]["init_args"]
    # So it stays when the page is opened again.
    page.reload()
    blocked.get_by_role("link", name="To the data").wait_for()
    page.locator("#data-place").get_by_role("combobox").click()
    page.get_by_role("option", name="orders.jsonl").click()
    report.get_by_text("All 60 rows are usable").wait_for()
    page.locator("#overview .fine").wait_for()
    strip = page.locator("#start-strip")
    memory = strip.get_by_text(re.compile(r"^[\d.]+ [GM]B of [\d.]+ GB$")).first
    memory.wait_for(timeout=90_000)
    strip.get_by_text("calculated").first.wait_for()
    start = page.get_by_role("button", name="Start training")
    assert start.is_enabled()
    screenshot(page, "new-start")
    words += words_on(page)
    start.click()
    page.wait_for_url(re.compile(r"/run\?run="))
    orders.unlink()
    clicks = int(page.evaluate("sessionStorage.clicks"))
    assert (clicks <= MOST_CLICKS, words <= MOST_WORDS) == (True, True), (clicks, words)


def test_an_address_with_a_slash_finds_its_page(visit, site):
    page = visit(f"{site.url}/de/new?recipe=small/text-classification")
    page.wait_for_url(re.compile(r"/de-new"))
    page.get_by_role("heading", name="Neuer Lauf").wait_for()


def test_checkboxes_have_room_for_their_words(visit, site):
    page = open_new_run(visit, site, "#method", viewport={"width": 1440, "height": 900})
    for group in ("adapter", "validation", "keeping", "rows"):
        page.locator(f"#group-{group} > button").click()
    for name in ("use-rslora", "use-dora", "stopearly", "bestcheckpoint-save-last", "streaming"):
        assert page.locator(f"#f-{name}").bounding_box()["width"] >= 200, name


@pytest.mark.long
def test_rewards_are_ticked_and_one_is_needed(visit, site):
    page = visit(f"{site.url}/new?recipe=small/grpo#method")
    one, other = page.get_by_label("word_overlap"), page.get_by_label("json_exactness")
    page.locator("#f-rewards label.selected").wait_for()
    assert one.is_checked()
    other.check()
    changed = page.locator("#changed-settings")
    changed.get_by_text("word_overlap \u2192 json_exactness, word_overlap").wait_for()
    one.uncheck()
    changed.get_by_text("word_overlap \u2192 json_exactness").wait_for()
    other.uncheck()
    page.locator("#f-rewards.refused").wait_for()
    changed.get_by_text("Rewards: a value is needed.").wait_for()
    page.locator("#group-training button").first.click()
    page.get_by_role("textbox", name="Temperature").wait_for()
    assert not page.get_by_role("textbox", name="Weight of desirable rows").is_visible()
    assert violations(page) == []
    page.goto(f"{site.url}/de-new?recipe=small/kto#method")
    page.locator("#group-training button").first.click()
    page.get_by_role("textbox", name="Gewicht unerwünschter Zeilen").wait_for()
    assert not page.locator("#f-rewards").is_visible()


@pytest.mark.long
def test_what_does_not_fit_is_made_to_fit_by_a_click(visit, site):
    page = open_new_run(visit, site, "#method")
    looked_at_memory = page.locator("#memory .memory")
    looked_at_memory.wait_for()
    page.get_by_role("textbox", name="Batch size").fill("512")
    page.get_by_role("textbox", name="Batch size").press("Tab")
    page.get_by_label("Plan for").fill("1.5GB")
    page.get_by_label("Plan for").press("Enter")
    memory = page.locator("#memory")
    memory.get_by_text("It does not fit.").wait_for()
    fix = memory.get_by_role("button", name="Batch of 1")
    fix.wait_for()
    page.locator("#memory .fixes").scroll_into_view_if_needed()
    screenshot(page, "new-memory")
    fix.click()
    memory.get_by_text("It fits.").wait_for()
    assert page.get_by_role("textbox", name="Batch size").input_value() == "1"
    assert page.get_by_role("textbox", name="Gradient accumulation").input_value() == "512"
    changed = page.locator("#changed-settings")
    changed.get_by_role("button", name="Reset Batch size").click()
    page.wait_for_function(
        "document.querySelector('#f-batch-size input, #f-batch-size textarea').value === '8'"
    )


@pytest.mark.long
def test_a_recipe_is_uploaded_edited_and_kept_through_a_restart(visit, serve):
    site = serve(trainer="fake")
    page = open_new_run(visit, site, "#model")
    page.get_by_role("button", name="Load a recipe").click()
    text = "model: {class_path: os.system, init_args: {command: id}}\ndata: {}\ntrainer: {}"
    hostile = {"name": "a.yaml", "mimeType": "text/yaml", "buffer": text.encode()}
    file = page.locator("#new-recipe-file input[type=file]")
    file.set_input_files(hostile)
    page.locator(".toast-body").get_by_text("os.system").first.wait_for()
    page.goto(f"{site.url}/new?recipe=small/text-classification#review")
    page.locator("#form-yaml pre").get_by_text("TextClassifier").wait_for()
    page.get_by_role("button", name="Edit YAML").click()
    area = page.locator("#yaml-text textarea")
    good = area.input_value()
    area.fill(good.replace("r: 16", "r: !!python/name:os.system"))
    page.get_by_role("button", name="Check and use it").click()
    # Before the first notice goes.
    area.fill(good.replace("data:", "rows:"))
    page.get_by_role("button", name="Check and use it").click()
    page.locator(".toast-body").get_by_text("not valid YAML").first.wait_for()
    page.locator(".toast-count").wait_for()
    # Several notices at once can be read, and used, by everybody.
    assert not violations(page)
    area.fill(good.replace("r: 16", "r: 5").replace("learning_rate: 0.003", "learning_rate: 1e-3"))
    page.get_by_role("button", name="Check and use it").click()
    page.wait_for_function(
        "document.querySelector('#form-yaml pre').innerText.includes('learning_rate: 0.001')"
    )
    assert shown_recipe(page)["trainer"]["strategy"]["init_args"]["r"] == 5
    # The address, which names the recipe as it is in the package, does not take the change back.
    page.reload()
    page.locator("#form-yaml pre").get_by_text("TextClassifier").wait_for()
    assert shown_recipe(page)["trainer"]["strategy"]["init_args"]["r"] == 5
    site.stop()
    site.start()
    page.goto(f"{site.url}/new?again#review")
    page.locator("#form-yaml pre").get_by_text("TextClassifier").wait_for()
    assert shown_recipe(page)["trainer"]["strategy"]["init_args"]["r"] == 5
    page.goto(f"{site.url}/new?from=no-such-run")
    page.locator("#new-notice [role=alert]").wait_for()


@pytest.mark.long
def test_a_download_has_a_size_before_it_begins(visit, serve):
    site = serve(trainer="fake", env={"HF_HUB_OFFLINE": "0"})
    page = open_new_run(visit, site, "#model")
    metadata = page.locator("#model-facts")
    page.locator("#model-choice").get_by_role("combobox").click()
    page.get_by_role("option", name="Qwen3-0.6B: 596 M parameters").click()
    metadata.get_by_text(
        re.compile(r"download is about 1.5 GB; [\d.]+ [GM]B of that disk")
    ).wait_for()
    page.get_by_role("button", name="By name on the Hub").click()
    page.locator("#model-hub-name :is(input, textarea)").fill("me/unknown")
    page.get_by_role("button", name="Use this model").click()
    metadata.get_by_text("size of the download is unknown").wait_for()
    screenshot(page, "new-model-download")


@pytest.mark.long
def test_settings_in_closed_parts_are_those_of_the_recipe(visit, site):
    page = open_new_run(visit, site, "?recipe=forkme#method")
    page.locator("#group-validation > button").click()
    field = page.locator("#f-val-check-interval textarea, #f-val-check-interval input")
    field.wait_for()
    assert field.input_value() == "0.25"
    assert page.get_by_role("textbox", name="Rank").first.input_value() == "16"
    assert page.locator("#method input[value=qlora]").is_checked()
    field.fill("often")
    field.press("Tab")
    page.locator("#changed-settings [role=alert]").get_by_text("often").wait_for()
    field.fill("100")
    field.press("Tab")
    page.locator("#changed-settings").get_by_text("Validate every: 0.25").wait_for()
    page.goto(page.url.replace("#method", "#review"))
    page.wait_for_function(
        "document.querySelector('#form-yaml pre').innerText.includes('val_check_interval: 100')"
    )


def test_the_keyboard_is_enough(visit, site):
    page = open_new_run(visit, site, "#model")
    seen = []
    for step in STEPS[1:]:
        for _ in range(120):
            page.keyboard.press("Tab")
            text = page.evaluate("document.activeElement.innerText || ''").strip()
            if text.startswith("Next:"):
                break
        page.keyboard.press("Enter")
        page.wait_for_function(f"document.activeElement.id === 'heading-{step}'")
        seen.append(step)
        assert page.locator(f"#step-{step}").is_visible()
    page.go_back()
    page.wait_for_function("document.getElementById('page').dataset.step === 'method'")
    assert seen == list(STEPS[1:])


@pytest.mark.long
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_step(visit, site, theme):
    page = open_new_run(visit, site, f"?__theme={theme}#all")
    wait_for_report(page)
    page.locator("#memory .memory").wait_for()
    assert violations(page) == []
    for step in STEPS:
        page.goto(page.url.partition("#")[0] + f"#{step}")
        screenshot(page, f"new-{step}-{theme}")


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
def test_a_phone_needs_no_scrolling_sideways(visit, site, step):
    page = open_new_run(visit, site, f"#{step}", viewport=PHONE)
    wait_for_report(page) if step == "data" else None
    assert overflow(page) <= 0


@pytest.mark.long
def test_german_says_the_same(visit, site):
    page = visit(f"{site.url}/de-new?recipe=small/sft#review")
    page.locator("#overview .fine").wait_for(timeout=90_000)
    page.get_by_role("button", name="Training starten").wait_for()
