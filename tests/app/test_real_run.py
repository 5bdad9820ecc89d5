"""The two-minute card with the real trainer: QLoRA of the tiny model, from the click to the end."""

from __future__ import annotations

import json
import re

import pytest

from gradio_app.running.store import RunStore
from gradio_app.settings import Settings
from tests.app.browsing import screenshot

# The trainer loads torch, measures the base, trains and measures again; the machine may be busy.
MINUTES = 3 * 60_000


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="real")


def test_the_card_trains_a_model(site, visit):
    page = visit(site.url)
    page.get_by_role("button", name="Start the demo").click()
    page.wait_for_url(re.compile(r"/run\?run="))
    status = page.get_by_role("status")
    status.get_by_text("Preparing").first.wait_for()
    status.get_by_text(re.compile("Training|Finished")).first.wait_for(timeout=MINUTES)
    status.get_by_text("Finished").wait_for(timeout=MINUTES)
    page.get_by_text("step 12 of 12").wait_for()
    said = page.locator("#run-state").inner_text()
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", said).groups())
    assert after < before / 2
    page.locator("#loss-plot svg.marks").wait_for()
    page.get_by_role("cell", name="The class `Decimal` is provided").first.wait_for()
    page.get_by_role("log").get_by_text("28 layers: nf4").wait_for()
    screenshot(page, "run-finished")
    page.get_by_role("tab", name="Recipe").click()
    page.locator("#recipe-text").get_by_text("lightning_peft.QLoRAStrategy").wait_for()
    page.locator("#recipe-facts").get_by_text(re.compile("fingerprint")).wait_for()
    settings = Settings.on_this_machine(site.runs, site.data, None)
    (run,) = RunStore(settings).list("local")
    result = json.loads(run.folder.result.read_text())
    assert (result["method"], result["steps"]) == ("qlora", 12)
    names = [checkpoint.name for checkpoint in run.checkpoints()]
    assert names[0] == "best"
    assert (run.checkpoints()[0].folder / "adapter_config.json").is_file()
    # Nothing but the start is in the log of the start: no bar that grows with the run.
    assert (run.folder.path / "start.log").stat().st_size < 20_000
