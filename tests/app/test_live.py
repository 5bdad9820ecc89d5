"""The page of a run, as a person uses it, while the run and the server come and go."""

from __future__ import annotations

import json
import re
import signal
from types import SimpleNamespace

import pytest

from gradio_app.pages.run.view import requested_run_id
from tests.app.browsing import PHONE, assert_readable, screenshot, violations
from tests.app.runs import queued, recipe, until

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
LONG = {"steps": 4_000, "validate_every": 20}


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="fake")


@pytest.fixture
def running(store):
    """Makes runs that are at work; they are ended with the test."""
    made = []

    def running(name, **fake):
        run = queued(store, name, **{**LONG, **fake})
        made.append(run)
        until(lambda: store.get("local", run.id).status.step > 3)
        return run

    yield running
    for run in made:
        if store.get("local", run.id).active:
            store.executors["local"].kill(store.get("local", run.id))
            until(lambda run=run: not store.get("local", run.id).active)


def address(site, run, language=""):
    return f"{site.url}/{language}run?run={run.id}"


def state(page):
    return page.get_by_role("status")


def step_of(page):
    found = re.search(r"step (\d+)", page.locator("body").inner_text())
    return int(found.group(1)) if found else 0


def test_a_run_outlives_reload_and_server_and_goes_on_where_it_stopped(site, store, visit, running):
    run = running("survivor", alert="overfitting")
    page = visit(address(site, run))
    state(page).get_by_text("Running").wait_for()
    page.get_by_text("You can close this tab").wait_for()
    page.locator("#loss-plot svg.marks").wait_for()
    page.get_by_role("log").get_by_text("trainable 315,392").wait_for()
    page.get_by_role("alert").get_by_text("The validation loss rises").wait_for()
    german = visit(f"{site.url}/de-run?run={run.id}")
    german.get_by_role("alert").get_by_text("2-mal in Folge gestiegen, von 0,9 auf").wait_for()
    german.close()
    page.get_by_role("table").get_by_text("What colour is the sky?").wait_for()
    screenshot(page, "run-running")
    before = step_of(page)
    page.reload()
    until(lambda: step_of(page) > before)
    site.stop(signal.SIGKILL)
    before = until(lambda: store.get("local", run.id).status.step)
    until(lambda: store.get("local", run.id).status.step > before)
    site.start()
    # The page comes back by itself.
    before = store.get("local", run.id).status.step
    until(lambda: step_of(page) > before)
    page.get_by_role("button", name="Stop & save").click()
    state(page).get_by_text(re.compile(r"Stopped at step \d+")).wait_for()
    stopped = store.get("local", run.id).status.step
    # The fake reads again how many steps there are.
    run.folder.recipe.write_text(recipe(steps=stopped + 20))
    page.get_by_role("button", name="Resume").click()
    state(page).get_by_text("Finished").wait_for()
    page.get_by_text(f"step {stopped + 20} of {stopped + 20}").wait_for()
    assert f"Training starts at step {stopped}." in run.folder.events.read_text()
    page.get_by_role("button", name="Open playground").click()
    page.get_by_role("tab", name="Playground", selected=True).wait_for()


def test_curves_are_smoothed_and_in_a_table(site, store, visit):
    run = queued(store, "curves", steps=30)
    until(lambda: store.get("local", run.id).status.state == "finished")
    page = visit(address(site, run))
    state(page).get_by_text("Validation loss 3.15 before, 0.6111 after").wait_for()
    page.get_by_text("Training loss: 2.795 at step 1, now 0.5611 at step 30").wait_for()
    page.locator("#loss-plot svg.marks").wait_for()
    page.get_by_label("Strong").check()
    page.get_by_role("button", name="Table").click()
    page.get_by_role("row", name="10 1.245 1.295").wait_for()
    page.locator("#load > button").click()
    page.locator("#load-plots .plot-area").nth(2).wait_for()
    drawn = page.locator("#load-plots .plot-area").all()
    last = [json.loads(one.get_attribute("data-points"))[-1][1] for one in drawn]
    assert last == ["Minutes 15: CPU 80", "Minutes 15: RAM 0.99", "Minutes 15: Tokens 2100"]
    page.get_by_role("tab", name="Recipe").click()
    page.locator("#recipe-text").get_by_text("validate_every").or_(
        page.locator("#recipe-text").get_by_text("steps: 30")
    ).first.wait_for()
    page.get_by_text(f"lightning-peft fit --config {run.folder.recipe}").wait_for()
    page.get_by_text("lightning_peft.tasks.causal_lm.CausalLM", exact=True).wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download recipe.yaml").click()
    assert download.value.path().read_text() == run.folder.recipe.read_text()
    screenshot(page, "run-recipe")
    link = page.get_by_role("link", name="Duplicate").get_attribute("href")
    assert link == f"./new?from={run.id}#method"


def test_a_crash_is_reported_and_set_right(site, store, visit):
    run = queued(store, "Order e-mails", steps=50, die_at=25)
    page = visit(address(site, run))
    state(page).get_by_text("Crashed at step 24").wait_for()
    page.get_by_role("alert").get_by_text("The process was killed").wait_for()
    screenshot(page, "run-crashed")
    # The last checkpoint is that of the last validation.
    page.get_by_role("button", name="Resume from step 20").wait_for()
    page.get_by_role("button", name="Mark as stopped").click()
    state(page).get_by_text("Stopped at step 24").wait_for()
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the run").fill("another name")
    page.get_by_role("button", name="Save the name").click()
    page.get_by_role("heading", name="another name").wait_for()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_text(
        re.compile(r"Delete another name with its checkpoints and metrics \(\d+ kB\)")
    ).wait_for()
    page.get_by_role("button", name="Yes, delete it").click()
    page.get_by_role("heading", name="The run is deleted").wait_for()
    assert not run.folder.path.exists()


def test_a_failure_is_translated_and_hostile_text_is_text(site, store, visit):
    fake = {"error": "OutOfMemoryError", "message": f"CUDA out of memory. {HOSTILE}"}
    texts = {"prompt": HOSTILE, "generated": HOSTILE, "log": f"{HOSTILE} hf_abcdefghijkl"}
    run = queued(store, f"n {HOSTILE}"[:70], steps=9, validate_every=3, fail_at=5, **fake, **texts)
    page = visit(address(site, run))
    state(page).get_by_text("Failed at step 4").wait_for()
    page.get_by_role("alert").get_by_text("The GPU ran out of memory.").wait_for()
    page.get_by_role("log").get_by_text(HOSTILE).wait_for()
    page.get_by_role("cell", name=HOSTILE).first.wait_for()
    page.get_by_text("Technical details").click()
    page.locator("#run-failure details pre").get_by_text(HOSTILE).wait_for()
    assert page.evaluate("window.hacked") is None
    assert "hf_abc" not in page.content()
    assert violations(page) == []
    screenshot(page, "run-failed")


def test_a_run_that_one_cannot_see(site, store, visit):
    foreign = store.create("v-somebody", recipe(), "secret name")
    page = visit(f"{site.url}/run")
    page.get_by_role("heading", name="No run is chosen").wait_for()
    for name in ("no-such-run", "../runs", foreign.id):
        page.goto(f"{site.url}/run?run={name}")
        page.get_by_role("heading", name="There is no such run").wait_for()
        assert "secret name" not in page.content()
    page.get_by_role("link", name="To the runs").click()
    page.get_by_role("heading", name="Runs", exact=True).wait_for()


def test_everyone_can_read_it_on_every_screen(site, visit, running):
    run = running("read in the dark", alert="overfitting", validate_every=3)
    page = visit(address(site, run), viewport=PHONE)
    for theme in ("light", "dark"):
        page.goto(f"{address(site, run)}&__theme={theme}")
        page.locator("#loss-plot svg.marks").wait_for()
        page.get_by_role("alert").first.wait_for()
        assert_readable(page)
        edges = page.locator("dl.numbers").bounding_box()
        assert edges["x"] == PHONE["width"] - edges["x"] - edges["width"] > 8
        screenshot(page, f"run-phone-{theme}")


def test_who_waits_sees_the_place_and_who_stops_at_once_is_asked(site, store, visit, running):
    run = running("first")
    second = queued(store, "second", steps=3)
    page = visit(address(site, second))
    state(page).get_by_text("Position 1 of 1 in the queue").wait_for()
    page.get_by_role("button", name="Remove from queue").click()
    state(page).get_by_text("Not started yet").wait_for()
    page.get_by_role("button", name="Start", exact=True).click()
    state(page).get_by_text("Position 1 of 1 in the queue").wait_for()
    other = visit(address(site, run, "de-"))
    state(other).get_by_text("Läuft").wait_for()
    other.get_by_role("button", name="Sofort anhalten", exact=True).click()
    other.get_by_role("button", name="Nein, behalten").first.click()
    other.get_by_role("button", name="Sofort anhalten", exact=True).click()
    other.get_by_role("button", name="Ja, sofort anhalten").click()
    state(other).get_by_text("Angehalten bei Schritt").wait_for()
    state(page).get_by_text("Finished").wait_for()


@pytest.mark.long
def test_a_run_that_rests_is_seen_to_go_on_elsewhere(site, store, visit, running):
    run = running("in two tabs")
    pages = [visit(address(site, run)) for _ in range(2)]
    pages[0].get_by_role("button", name="Stop & save").click()
    for page in pages:
        state(page).get_by_text(re.compile(r"Stopped at step \d+")).wait_for()
    pages[0].get_by_role("button", name="Resume").click()
    state(pages[1]).get_by_text("Running").wait_for()


def test_a_server_that_has_forgotten_a_page_reads_its_address():
    def request(referer):
        return SimpleNamespace(headers={"referer": referer})

    assert requested_run_id("known", request("http://x/run?run=other")) == "known"
    assert requested_run_id("", request("http://x/de-run?__theme=dark&run=a-b")) == "a-b"
    assert requested_run_id("", request("http://x/run")) == ""
    assert requested_run_id("", SimpleNamespace(headers={})) == ""
