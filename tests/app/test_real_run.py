"""The real trainer: QLoRA of the tiny model, and what is taken along."""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from finished import BASE
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.runs.formatting import format_bytes
from gradio_app.runs.store import RunStore
from gradio_app.settings import Settings
from gradio_app.texts import Texts
from tests.app.browsing import not_german, open_context, screenshot, violations

# The trainer loads torch, measures the base, trains and measures again; the machine may be busy.
MINUTES = 3 * 60_000


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="real")


# How many points each line of the loss plot has, a few times a second.
COUNT = """
() => {
  window.grown = [];
  setInterval(() => {
    const lines = [...document.querySelectorAll('#loss-plot path.line')];
    window.grown.push(lines.map((line) => line.getAttribute('d').split('L').length));
  }, 200);
}
"""


@pytest.fixture(scope="module")
def opened(site, browser):
    """The page of a run, open from the click to the end."""
    store = RunStore(Settings.on_this_machine(site.runs, site.data, None))
    run = store.create("local", dump_yaml(base_recipe("sft", "qlora")), "Tiny")
    context = open_context(browser)
    page = context.new_page()
    page.goto(f"{site.url}/run?run={run.id}")
    page.get_by_role("button", name="Start", exact=True).click()
    page.evaluate(COUNT)
    status = page.get_by_role("status")
    status.get_by_text("Preparing").first.wait_for()
    page.locator("#loss-plot .empty").wait_for()
    status.get_by_text(re.compile("Training|Finished")).first.wait_for(timeout=MINUTES)
    status.get_by_text("Finished").wait_for(timeout=MINUTES)
    yield page
    context.close()


@pytest.fixture(scope="module")
def trained(site, opened):
    """That run."""
    name = opened.url.partition("run=")[2]
    return RunStore(Settings.on_this_machine(site.runs, site.data, None)).get("local", name)


def ticks(page, axis):
    return [float(one) for one in page.locator(f"#loss-plot .{axis}-tick").all_text_contents()]


def test_a_page_opened_before_the_first_step_draws_the_loss(opened, trained):
    page, plot = opened, opened.locator("#loss-plot")
    metrics = list(trained.folder.rows(trained.folder.metrics))
    losses = [row["train_loss"] for row in metrics if "train_loss" in row]
    validations = [row["val_loss"] for row in metrics if "val_loss" in row]
    # The last count may be older than what the page shows by now.
    page.wait_for_function(f"'{len(losses)},{len(validations)}' === `${{window.grown.at(-1)}}`")
    grown = [counts for counts in page.evaluate("window.grown") if counts]
    # The base is measured first: a point of one line, before or just as the other begins.
    assert grown[0][-1] == 1
    assert len(set(map(tuple, grown))) > 2
    assert page.locator("#loss-plot path.line").count() == 2
    assert len(losses) == 12
    across, up = ticks(page, "x"), ticks(page, "y")
    assert across == [0, 2, 4, 6, 8, 10, 12]
    assert up == sorted(up, reverse=True) or up == sorted(up)
    assert min(up) <= min(losses + validations) < max(losses + validations) <= max(up)
    linear = plot.locator("path.line").first.get_attribute("d")
    page.get_by_label("Logarithmic").check()
    page.wait_for_function(
        f"document.querySelector('#loss-plot path.line').getAttribute('d') !== '{linear}'"
    )
    # The title is still that of the numbers, and so are the ticks; equal ratios are equally far.
    assert plot.locator(".y-title").inner_text() == "Loss"
    up = ticks(page, "y")
    assert {1.0, 2.0} <= set(up)
    assert min(up) > 0
    first = float(plot.locator("path.line").first.get_attribute("d")[1:].split("L")[0].split()[1])
    low, high = math.log(min(up)), math.log(max(up))
    assert first / 1000 == pytest.approx(1 - (math.log(losses[0]) - low) / (high - low), abs=2e-3)
    page.get_by_label("Logarithmic").uncheck()
    page.wait_for_function(
        f"document.querySelector('#loss-plot path.line').getAttribute('d') === '{linear}'"
    )
    # Twelve points are not a trend.
    assert not re.search("falling|rising", page.locator("#run-numbers").inner_text())
    # The button in the head turns the whole page dark, plot and log with it.
    tick = plot.locator(".y-tick").first
    light = {where: looks(where) for where in (tick, page.locator("#run-log pre"))}
    page.get_by_role("button", name="Toggle dark mode").click()
    page.wait_for_function("document.body.classList.contains('dark')")
    dark = {where: looks(where) for where in light}
    for where in light:
        assert light[where] != dark[where]
    assert violations(page) == []


def looks(where):
    return where.evaluate(
        "(one) => { const s = getComputedStyle(one); return s.fill + s.color + s.backgroundColor; }"
    )


def test_the_page_of_a_run_is_german(site, visit, trained):
    page = visit(f"{site.url}/de-run?run={trained.id}")
    page.locator("#loss-plot svg.marks").wait_for()
    numbers = page.locator("#run-numbers")
    for name in ("Token-Genauigkeit", "Perplexität", "Spitzenspeicher"):
        numbers.get_by_text(name).wait_for()
    data = "#run-log, #run-samples td, #run-samples th, #head"
    assert not_german(page, data) == []
    said = page.locator("#run-state").inner_text()
    assert re.search(r"Validierungsverlust \d,\d+ vor, \d,\d+ nach", said)
    ticks = page.locator("#loss-plot .y-tick").all_text_contents()
    assert any("," in tick for tick in ticks)
    assert not any("." in tick for tick in ticks)
    for tab in ("Export", "Playground"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(1_500)
        assert not_german(page, f"{data}, #try-system-prompt, #try-prompts") == []


def test_the_page_shows_what_a_run_has_learnt(site, visit, trained):
    page = visit(f"{site.url}/run?run={trained.id}")
    page.get_by_role("status").get_by_text("Finished").wait_for()
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
    page.locator("#recipe-facts summary").last.click()
    page.locator("#recipe-facts").get_by_text(re.compile("fingerprint")).wait_for()
    run = trained
    result = json.loads(run.folder.result.read_text())
    assert (result["method"], result["steps"]) == ("qlora", 12)
    prompts = json.loads(run.folder.prompts.read_text())
    assert prompts["system"] == {"text": "", "rows": 0, "of": 2638}
    assert prompts["held_out"][0][0]["content"] == "Which module provides the class `Decimal`?"
    names = [checkpoint.name for checkpoint in run.checkpoints()]
    assert names[0] == "best"
    assert (run.checkpoints()[0].folder / "adapter_config.json").is_file()
    # Nothing but the start is in the log of the start: no bar that grows with the run.
    assert (run.folder.path / "start.log").stat().st_size < 20_000


@pytest.mark.long
def test_a_ruined_run_says_so_and_what_helps(site, visit):
    """With a learning rate of 1 the last losses fall, from far above what the base had."""
    store = RunStore(Settings.on_this_machine(site.runs, site.data, None))
    recipe = base_recipe("sft", "qlora")
    recipe["model"]["init_args"]["learning_rate"] = 1.0
    run = store.create("local", yaml.safe_dump(recipe), "ruined")
    page = visit(f"{site.url}/run?run={run.id}")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text(re.compile(r"(row|batch) \d+ of \d+")).wait_for(timeout=MINUTES)
    page.get_by_role("status").get_by_text("Finished, but worse").wait_for(timeout=MINUTES)
    alert = page.locator("#run-verdict [role=alert]")
    said = re.search(r"loss ([\d.]+) before training, ([\d.]+) after", alert.inner_text())
    before, after = map(float, said.groups())
    assert after > 1.5 * before
    assert "it was 1. Try 0.1" in alert.inner_text()
    assert "falling" not in page.locator("#run-numbers").inner_text()
    alert.get_by_role("link", name="Duplicate").click()
    page.locator("#new-copied").get_by_text("Copy of ruined.").wait_for()
    page.get_by_role("textbox", name="Learning rate").wait_for()


@pytest.mark.long
def test_a_stop_in_the_middle_of_a_validation(site, visit):
    store = RunStore(Settings.on_this_machine(site.runs, site.data, None))
    recipe = base_recipe("sft", "qlora")
    recipe["trainer"] |= {"val_check_interval": 4, "limit_val_batches": 1.0}
    recipe["data"]["init_args"]["batch_size"] = 1
    run = store.create("local", yaml.safe_dump(recipe), "stopped in between")
    page = visit(f"{site.url}/run?run={run.id}")
    page.get_by_role("button", name="Start", exact=True).click()
    status = page.get_by_role("status")
    status.get_by_text(re.compile(r"Validating, row \d+ of 200")).wait_for(timeout=MINUTES)
    page.get_by_role("button", name="Stop & save").click()
    status.get_by_text("Stopped at step 4").wait_for()
    rows = list(run.folder.rows(run.folder.metrics))
    losses = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    assert [row["step"] for row in rows if "val_loss" in row] == [0]
    page.get_by_role("button", name="Resume from step 4").click()
    status.get_by_text("Finished").wait_for(timeout=MINUTES)
    rows = list(run.folder.rows(run.folder.metrics))
    assert [(r["step"], r["train_loss"]) for r in rows if "train_loss" in r][:4] == losses
    result = json.loads(run.folder.result.read_text())
    # Two sessions, of which the second alone took less.
    begun = store.get("local", run.id).status.started
    assert result["seconds"] > rows[-1]["time"] - begun


IDS = torch.arange(5, 45)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.fixture(scope="module")
def expected(trained):
    """What the model says as it was trained: the base in NF4, loaded by plain PEFT."""
    adapter = trained.checkpoints()[0].folder
    given = json.loads((adapter / "provenance.json").read_text())["quantization"]
    base = AutoModelForCausalLM.from_pretrained(
        BASE, quantization_config=BitsAndBytesConfig(**given)
    )
    before = logits(base)
    after = logits(PeftModel.from_pretrained(base, adapter))
    return before, after


def exported(page, site, run, kind, folder: Path, measured: bool = False) -> Path:
    """Makes an export on the page, downloads it, and returns the folder in the zip."""
    page.get_by_role("radio", name=kind, exact=True).check()
    if measured:
        page.get_by_label("Compare its outputs").check()
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text("Exporting").wait_for()
    article = page.locator("#export-list article", has=page.get_by_role("heading", name=kind))
    article.get_by_text("Ready").wait_for(timeout=MINUTES)
    with page.expect_download() as download:
        article.get_by_role("button", name="Download zip").click()
    folder.mkdir(exist_ok=True)
    download.value.save_as(folder / "got.zip")
    with zipfile.ZipFile(folder / "got.zip") as packed:
        packed.extractall(folder / "got")
    (made,) = (folder / "got").iterdir()
    # The button says how large that is.
    files = [file for file in made.rglob("*") if file.is_file() and file.name != "recipe.yaml"]
    total = sum(file.stat().st_size for file in files)
    assert f"Download zip ({format_bytes(total, Texts())})" in article.inner_text()
    return made


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.long
def test_the_merged_model_is_the_base_with_its_adapter(site, visit, trained, expected, tmp_path):
    page = visit(f"{site.url}/run?run={trained.id}")
    page.get_by_role("tab", name="Export").click()
    made = exported(page, site, trained, "Merged model", tmp_path, measured=True)
    page.get_by_text("against the trained model").wait_for()
    screenshot(page, "export-merged")
    before, after = expected
    found = logits(AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32))
    assert difference(found, after) < 0.02
    assert difference(before, after) > 0.1
    card = (made / "README.md").read_text()
    assert_reported(card, trained)
    assert "| dequantized (this folder) |" in card


def assert_reported(card: str, run) -> None:
    """Holds that a card says base, data and numbers, and no place of this machine."""
    metadata = json.loads((run.checkpoints()[0].folder / "provenance.json").read_text())
    metrics = metadata["metrics"]
    before, after = metrics["before"]["val_loss"], metrics["after"]["val_loss"]
    rows = [
        ("base", "`base`"),
        ("fingerprint of the base", f"`{metadata['base']['fingerprint']}`"),
        ("data", "`instructions.jsonl`"),
        ("rows", "`2838`"),
        ("rows for train", "`2638`"),
        ("tokenizer", "`base`"),
        ("val_loss", f"{before:.4g} | {after:.4g}"),
        ("recipe sha256", f"`{metadata['recipe_sha256']}`"),
    ]
    for name, value in rows:
        assert f"| {name} | {value} |" in card
    assert str(BASE.parent) not in card
    assert str(run.folder.path) not in card


@pytest.mark.long
def test_a_smaller_model_and_what_other_programs_take(site, visit, trained, expected, tmp_path):
    page = visit(f"{site.url}/run?run={trained.id}")
    page.get_by_role("tab", name="Export").click()
    before, after = expected
    made = exported(page, site, trained, "Quantized model", tmp_path / "8", measured=True)
    found = logits(AutoModelForCausalLM.from_pretrained(made))
    assert difference(found, after) < 0.1 < difference(before, after)
    assert "The linear layers are 8-bit" in (made / "README.md").read_text()
    page.get_by_label("Name of the base on the Hub").fill("org/base")
    made = exported(page, site, trained, "For vLLM", tmp_path / "vllm")
    page.locator("#export-list code").get_by_text("vllm serve org/base").first.wait_for()
    for file in made.rglob("*"):
        # The recipe is that of the run, as it was run here.
        if file.suffix in (".json", ".md"):
            assert str(BASE.parent) not in file.read_text()
    (card,) = made.rglob("README.md")
    assert_reported(card.read_text().replace("`org/base`", "`base`"), trained)
    made = exported(page, site, trained, "For Ollama", tmp_path / "ollama")
    assert "FROM" in (made / "Modelfile").read_text()
    page.locator("#export-list code").get_by_text("ollama create").first.wait_for()
    assert violations(page) == []
    screenshot(page, "export-programs")
