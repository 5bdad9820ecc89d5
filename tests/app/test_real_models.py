"""Models that are none of the list: in a folder, or with code of their own, up to a real run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import own_code
import pytest
from finished import BASE

from gradio_app.runs.store import RunStore
from gradio_app.settings import Settings
from lightning_peft.data.templates import NAMED
from tests.app.browsing import open_new_run, screenshot, shown_recipe, violations

pytestmark = pytest.mark.long

MINUTES = 3 * 60_000
NAME = "me/our"
MARKER = "ran"


@pytest.fixture(scope="module")
def site(serve, tmp_path_factory):
    """A page with folders of models, and a hub from which one model was fetched before."""
    folder = tmp_path_factory.mktemp("site")
    models = folder / "models"
    shutil.copytree(BASE, models / "mine")
    for name in ("cut", "bare"):
        shutil.copytree(BASE, models / name)
    with (models / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    (models / "bare" / "model.safetensors").unlink()
    own_code.write(models / "coded", folder / MARKER)
    shutil.copytree(BASE, folder / "outside")
    (models / "linked").symlink_to(folder / "outside")
    fetched = own_code.fetched(folder / "hf" / "hub", NAME, folder / MARKER)
    for place in (models / "mine", fetched):
        # Or the form would ask which template the answers are to be learnt in.
        (place / "chat_template.jinja").write_text(NAMED["plain"])
    return serve(folder, {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"})


def choose_folder(page, name):
    page.locator("#model-choice").get_by_role("combobox").click()
    page.get_by_role("option", name=f"{name}, on this machine", exact=True).click()


def choose_example(page):
    """Chooses the example, which comes with the demo model alone."""
    page.locator("#data-place").get_by_role("combobox").click()
    page.get_by_role("option", name="Built-in example").click()
    page.locator("#data-report .fine").wait_for(timeout=MINUTES)


def run_of(page, site):
    """Starts a dry run, waits for its end, and returns it."""
    page.get_by_role("button", name="Try 5 steps").click()
    page.wait_for_url(re.compile(r"/run\?run="), timeout=MINUTES)
    page.get_by_role("status").get_by_text("Finished").wait_for(timeout=MINUTES)
    name = page.url.partition("run=")[2].partition("&")[0]
    settings = Settings.on_this_machine(site.runs, site.data, site.folder / "models")
    return RunStore(settings).get("local", name)


def test_a_model_in_a_folder_is_chosen_and_trained(visit, site):
    page = open_new_run(visit, site, "#model")
    refusals = {
        "cut": "model.safetensors is damaged",
        "bare": "holds no weights",
        "coded": "its code is not run from here",
        "linked": "outside",
    }
    for name, reason in refusals.items():
        choose_folder(page, name)
        page.locator("#model-problem").get_by_text(reason).wait_for()
    assert shown_recipe(page)["model"]["init_args"]["model"] == "package:demo/base"
    choose_folder(page, "mine")
    metadata = page.locator("#model-facts")
    metadata.get_by_text("Weights: 9 MB").wait_for()
    screenshot(page, "new-model-folder")
    page.get_by_role("link", name="Next: Data").click()
    choose_example(page)
    page.locator("#data-report .tokens mark").first.wait_for()
    page.get_by_role("link", name="Next: Method").click()
    page.locator("#memory").get_by_text("It fits.").wait_for(timeout=MINUTES)
    page.get_by_role("link", name="Next: Review").click()
    page.locator("#overview .fine").wait_for(timeout=MINUTES)
    run = run_of(page, site)
    result = json.loads(run.folder.result.read_text())
    assert result["steps"] == 5
    base = json.loads(run.folder.provenance.read_text())["base"]["model"]
    assert Path(base["name_or_path"]) == site.folder / "models" / "mine"
    page.get_by_role("tab", name="Recipe").click()
    page.locator("#recipe-facts").get_by_text(base["name_or_path"]).first.wait_for()


def test_a_folder_outside_of_the_root_is_refused_in_a_recipe_too(visit, site):
    page = open_new_run(visit, site, "#review")
    page.locator("#overview .fine").wait_for(timeout=MINUTES)
    page.get_by_role("button", name="Edit YAML").click()
    area = page.locator("#yaml-text textarea")
    text = area.input_value()
    for place in (str(site.folder / "outside"), "../outside"):
        area.fill(text.replace("model: package:demo/base", f"model: {place}"))
        page.get_by_role("button", name="Check and use it").click()
        blocked = page.locator("#overview [role=alert]")
        blocked.get_by_text("is not a model that this page can read").wait_for()
        assert page.get_by_role("button", name="Start training").is_disabled()
    assert "/run" not in page.url


def test_code_of_a_model_is_run_only_once_it_is_confirmed(visit, site):
    marker = site.folder / MARKER
    page = open_new_run(visit, site, "#model")
    page.get_by_role("button", name="By name on the Hub").click()
    page.locator("#model-hub-name :is(input, textarea)").fill(NAME)
    use = page.get_by_role("button", name="Use this model")
    toasts = page.locator(".toast-body")

    def refused(reason):
        use.click()
        toasts.get_by_text(reason).first.wait_for()
        assert shown_recipe(page)["model"]["init_args"]["model"] == "package:demo/base"

    assert violations(page) == []
    refused("cannot be loaded without code that comes with it (configuration_our.py, modeling_our")
    page.get_by_label("Run the code that comes with this model").check()
    refused("40 characters")
    page.locator("#model-revision :is(input, textarea)").fill("main")
    refused("40 characters")
    page.locator("#model-revision :is(input, textarea)").fill(own_code.COMMIT)
    refused(f"Type {NAME} into the field")
    screenshot(page, "new-model-code")
    page.get_by_label("Type the name of the model again").fill(NAME)
    use.click()
    page.locator("#model-facts").get_by_text(f"as of commit {own_code.COMMIT}").wait_for()
    page.get_by_role("link", name="Next: Data").click()
    choose_example(page)
    page.get_by_role("link", name="Next: Method").click()
    page.locator("#memory").get_by_text(
        "Memory planning does not support models with their own code"
    ).wait_for(timeout=MINUTES)
    page.get_by_role("link", name="Next: Review").click()
    page.locator("#overview .fine").wait_for(timeout=MINUTES)
    recipe = shown_recipe(page)
    given = recipe["model"]["init_args"]
    assert (given["trust_remote_code"], given["revision"]) == (True, own_code.COMMIT)
    # Neither the page nor what checks for it has run a line of it.
    assert not marker.exists()
    run = run_of(page, site)
    assert json.loads(run.folder.result.read_text())["steps"] == 5
    lines = marker.read_text().splitlines()
    assert lines
    assert all("lightning_peft" in line and " fit " in line for line in lines)
    assert site.process is not None
    assert str(site.process.pid) not in {line.split()[0] for line in lines}


def test_what_somebody_else_wrote_is_no_leave_to_run_code(visit, site):
    before = (site.folder / MARKER).exists()
    page = open_new_run(visit, site, "#review")
    page.locator("#overview .fine").wait_for(timeout=MINUTES)
    page.get_by_role("button", name="Edit YAML").click()
    area = page.locator("#yaml-text textarea")
    given = f"model: {NAME}\n    revision: {own_code.COMMIT}\n    trust_remote_code: true"
    area.fill(area.input_value().replace("model: package:demo/base", given))
    page.get_by_role("button", name="Check and use it").click()
    page.locator(".toast-body").get_by_text(f"would run code that comes with {NAME}").wait_for()
    page.locator("#overview").get_by_text("cannot be loaded without code").wait_for()
    assert "trust_remote_code" not in page.locator("#form-yaml pre").inner_text()
    assert (site.folder / MARKER).exists() == before
