"""A visitor's own rows with the real trainer, to the end, and once more with changes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from gradio_app.runs.store import RunStore
from gradio_app.settings import Settings
from tests.app.browsing import open_new_run, upload_rows
from tests.app.test_real_run import MINUTES

pytestmark = pytest.mark.long

GOOD = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
ROWS = [*GOOD[:3], {"prompt": "empty?", "completion": ""}, *GOOD[3:]]


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="real")


@pytest.fixture(scope="module")
def store(site) -> RunStore:
    return RunStore(Settings.on_this_machine(site.runs, site.data, site.folder / "models"))


def started(page, name: str) -> None:
    """Goes to the review, and from there to the run, until that is finished."""
    page.goto(page.url.partition("#")[0] + "#review")
    page.locator("#overview .fine").wait_for()
    page.get_by_label("Run name").fill(name)
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(re.compile(r"/run\?run="))
    page.get_by_role("heading", name=name).wait_for()
    page.get_by_role("status").get_by_text("Finished").wait_for(timeout=MINUTES)


def left_out_of(page) -> list[dict]:
    page.get_by_role("tab", name="Recipe").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="skipped rows").click()
    return [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]


def test_bad_rows_are_left_out_and_reported_and_a_duplicate_does_the_same(site, store, visit):
    page = open_new_run(visit, site, "#data")
    upload_rows(page, "mine.jsonl", ROWS, "\nno json at all")
    report = page.locator("#data-report")
    report.get_by_text("2 of 42 rows have problems").wait_for()
    page.get_by_label("Skip rows").check()
    report.get_by_text("are skipped").wait_for()
    started(page, "The first")
    rows = left_out_of(page)
    assert len(rows) == 2
    assert "empty completion" in json.dumps(rows)
    (first,) = store.list("local")
    recipe = yaml.safe_load(first.recipe_text)
    assert recipe["data"]["init_args"]["skip_bad_rows"] == str(first.folder.path / "left-out.jsonl")
    _duplicated(site, store, visit, first)


def _duplicated(site, store, visit, first) -> None:
    """The recipe of a run is resolved: with absolute paths, and with all that it left to others."""
    page = visit(f"{site.url}/new?from={first.id}#all")
    page.locator("#data-facts").get_by_text("mine.jsonl").wait_for()
    page.locator("#new-copied").get_by_text(f"Copy of {first.name}.").wait_for()
    assert page.get_by_label("Run name").input_value() == f"{first.name}-2"
    page.locator("#model-facts").get_by_text("Tiny demo model").wait_for()
    page.locator("#data-report").get_by_text("are skipped").wait_for()
    page.locator("#memory .memory").wait_for()
    assert page.get_by_label("Skip rows").is_checked()
    assert page.locator("#new-notice [role=alert]").count() == 0
    assert page.get_by_role("button", name="Reset").count() == 0
    assert page.locator("#method input[value=lora]").is_checked()
    recipe = yaml.safe_load(first.recipe_text)
    strategy = recipe["trainer"]["strategy"]["init_args"]
    for label, value in (
        ("Rank", strategy["r"]),
        ("Batch size", recipe["data"]["init_args"]["batch_size"]),
        ("Epochs", recipe["trainer"]["max_epochs"]),
    ):
        box = page.get_by_role("textbox", name=label).first
        assert box.input_value() == str(value)
    box = page.get_by_role("textbox", name="Rank").first
    box.fill("4")
    box.press("Tab")
    page.locator("#changed-settings").get_by_text(f"{strategy['r']} \u2192 4").wait_for()
    started(page, "The second")
    second = store.list("local")[0]
    assert second.name == "The second"
    again = yaml.safe_load(second.recipe_text)
    assert again["trainer"]["strategy"]["init_args"].pop("r") == 4
    strategy.pop("r")
    places = [one["data"]["init_args"].pop("skip_bad_rows") for one in (recipe, again)]
    # Each run has its own report, and nothing else differs.
    assert places == [str(one.folder.path / "left-out.jsonl") for one in (first, second)]
    assert again == recipe
    assert len(left_out_of(page)) == 2
