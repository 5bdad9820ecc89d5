"""Sweeps on the page: values typed in the form, trials in a table and as parallel coordinates."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, replace

import pytest

from gradio_app.errors import UserError
from gradio_app.experiments.sweeps import SweepRequest, swept_fields, tried_values
from gradio_app.pages.new import sweep
from gradio_app.pages.parallel import Line, parallel_coordinates
from gradio_app.pages.run.actions import available_actions
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.fields import BY_PATH
from gradio_app.runs.local import START_LOG, LocalExecutor
from gradio_app.runs.store import RunStore
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import Status
from tests.app.browsing import PHONE, assert_readable, open_new_run, overflow, screenshot
from tests.app.runs import settings, until

RANK, RATE = "trainer.strategy.init_args.r", "model.init_args.learning_rate"
CLIP, QUANT = "trainer.gradient_clip_val", "trainer.strategy.init_args.bnb_4bit_quant_type"
MINUTES = 6 * 60_000


@pytest.mark.parametrize(
    ("path", "typed", "found"),
    [
        (RANK, "8, 16,16", ("8,16", 2)),
        (RATE, "0,001; 2e-4", ("1e-3,2e-4", 2)),
        (RATE, "1e-5..1e-3:log", ("1e-5..1e-3:log", None)),
        ("trainer.strategy.init_args.use_dora", "true,false", ("true,false", 2)),
        ("data.init_args.max_length", "null, 64", ("null,64", 2)),
        (RANK, "8,16", ("8,16", 2)),
        (CLIP, "0,1", ("0.0,1.0", 2)),
    ],
)
def test_values_are_read_as_the_form_reads_them(path, typed, found):
    assert tried_values(BY_PATH[path], typed) == found


def test_one_comma_between_digits_is_of_a_number_where_numbers_have_commas():
    assert tried_values(BY_PATH[CLIP], "0,1", comma=True) == ("0.1", 1)
    assert tried_values(BY_PATH[CLIP], "0, 1", comma=True) == ("0.0,1.0", 2)
    assert tried_values(BY_PATH[CLIP], "0,1..0,5", comma=True) == ("0.1..0.5", None)
    assert tried_values(BY_PATH[RANK], "8,16", comma=True) == ("8,16", 2)
    given = ("tpe", "7", "none", CLIP, "0,1;1", RATE, "1e-5..0,01", "", "")
    shown = sweep._count(base_recipe("sft"), given, Texts("de"))
    assert "7 Versuche" in shown
    assert ": 0,1; 1,0 \u00b7 " in shown
    assert ": 1e-5..0,01" in shown


@pytest.mark.parametrize(
    "typed", ["0", "eight", "8..0", "64..8", "8..8", "null..8", "8,--run_dir=/tmp", " , "]
)
def test_values_that_a_setting_does_not_take_are_refused(typed):
    with pytest.raises(UserError):
        tried_values(BY_PATH[RANK], typed)


def test_what_is_tried_is_counted_and_what_cannot_be_is_refused():
    content = base_recipe("sft", "lora")

    def requested(*given):
        return sweep._requested(content, given, Texts())

    both = (RANK, "8,16", RATE, "1e-4;1e-3;1e-2", "", "")
    request = SweepRequest({RANK: "8,16", RATE: "1e-4,1e-3,0.01"}, "grid", None, "none")
    assert requested("grid", "7", "none", *both) == (request, 6)
    words = request.words()
    assert words[:2] == ["--set", f"{RANK}=8,16"]
    found, _ = requested("tpe", "12", "median", RATE, "1e-5..1e-2:log", "", "")
    assert found is not None
    assert found.words()[2:] == ["--sampler=tpe", "--trials=12", "--pruner=median"]
    for given, key in (
        (("grid", "", "none", RATE, "1e-5..1e-2"), "new.sweep_range"),
        (("tpe", "", "none", RANK, "8,16"), "new.sweep_trials"),
        (("grid", "", "none", RANK, "8", RANK, "16"), "new.sweep_twice"),
        (("grid", "", "none", "trainer.logger", "x"), "new.sweep_unknown"),
        (("grid", "", "none", "data.init_args.encoding", "x"), "new.sweep_unknown"),
        (("grid", "", "none", QUANT, "nf4,fp4"), "new.sweep_unknown"),
        (("grid", "", "none", RANK, "0"), "checks.range"),
    ):
        with pytest.raises(UserError) as refused:
            requested(*given)
        assert key in refused.value.reasons | {refused.value.key}
    # Places of files are none of them, nor what holds for all trials.
    paths = {one.path for one in swept_fields(base_recipe("sft"))}
    assert {RANK, RATE, "data.init_args.batch_size"} <= paths
    assert not {path for path in paths if re.search("callbacks|data.data|logger|devices", path)}


@pytest.mark.parametrize("kind", ["sweep", "fit"])
def test_what_the_command_line_began_goes_on_there(kind, tmp_path):
    begun = tmp_path / "elsewhere"
    begun.mkdir()
    show = "import os, sys; print(os.getcwd(), *sys.argv[1:])"
    made = replace(settings(tmp_path), command=(sys.executable, "-c", show))
    folder = RunFolder.at(made.runs / "20261130-101500-sft-1f0c")
    (folder.checkpoints / "last.ckpt").touch()
    record = {"sweep": folder.sweep, "fit": folder.provenance}[kind]
    folder.write(record, {"directory": str(begun)})
    stopped = Status(state="stopped", kind=kind, step=1, total_steps=4)
    folder.write(folder.status_file, asdict(stopped))
    executor = LocalExecutor(made)
    store = RunStore(made, {"local": executor})
    run = store.get("local", folder.path.name)
    assert run.is_sweep == (kind == "sweep")
    assert run.can_resume
    assert {"resume", "delete"} <= available_actions(run)
    # As the queue does it: once it was launched, its status is not of that process.
    run = store.update_metadata(run, resume=True, launched=time.time() + 60)
    assert run.is_sweep == (kind == "sweep")
    executor.start(run)
    log = folder.path / START_LOG
    assert until(log.read_text).startswith(f"{begun} {kind} --resume={folder.path}")


def test_on_a_space_the_form_says_why_there_are_no_sweeps(space):
    config = space.client().get("/config").text
    assert "Not on a Space, where a run has 10 minutes" in config
    assert "sweep-start" not in config


def test_of_a_sweep_that_cannot_be_prepared_no_run_is_left(tmp_path, monkeypatch):
    studio = Studio(settings(tmp_path))
    try:
        # As where a disk is full.
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        request = SweepRequest({RANK: "8,16"}, "grid", None, "none")
        with pytest.raises(FileNotFoundError):
            studio.start_sweep("local", base_recipe("sft"), "ranks", request)
        assert not studio.store.all()
    finally:
        studio.close()


def test_parallel_coordinates_have_an_axis_for_each_value_and_the_best_on_top():
    lines = [
        Line("Trial 1", [8, "linear", 0.9], False, 0.2),
        Line("Trial 2", [16, "cosine", 0.5], True, 1.0),
        Line("Trial 3", [64, "linear", 0.7], False, 0.5),
    ]
    shown = parallel_coordinates(["Rank", "Schedule", "Loss"], lines, Texts())
    titles = re.findall("<title>(.*?)</title>", shown)
    assert titles == ["Trial 1", "Trial 3", "Trial 2"]
    # At the ends of the first axis, and at the low end of the last.
    paths = re.findall(r'd="M(\S+) (\S+)L.*L(\S+) (\S+)"', shown)
    assert paths[0] == ("0", "1000", "1000", "0")
    assert paths[1][:2] == ("0", "0")
    assert paths[2][2:] == ("1000", "1000")


def test_a_sweep_is_followed_stopped_and_resumed(visit, site, store):
    run = store.create("local", "seed_everything: 0\n", "ranks and rates")
    sets = {RANK: "8,16", RATE: "1e-4,1e-3"}
    run.folder.sweep.write_text(json.dumps({"sets": sets}))
    store.update_metadata(run, command="sweep", waiting=time.time())
    page = visit(f"{site.url}/run?run={run.id}")
    page.get_by_text("2 of 4 trials").wait_for()
    table = page.locator("#sweep-trials")
    assert table.get_by_role("row").count() == 3
    assert page.locator("#sweep-plot path.trial").count() == 2
    assert not page.locator("#run-tabs").is_visible()
    page.get_by_role("button", name="Stop & save").click()
    page.get_by_role("status").get_by_text("Stopped").wait_for()
    page.get_by_role("button", name="Resume", exact=True).click()
    page.get_by_role("status").get_by_text("Best: trial 4 (Rank 16, Learning rate 1e-3)").wait_for()
    assert table.get_by_role("row").count() == 5
    assert table.locator("tr.best").inner_text().split()[:4] == ["4", "16", "1e-3", "0.25"]
    assert page.locator("#sweep-plot path.trial.best title").text_content() == "Trial 4"
    link = page.locator("#run-duplicate a").last.get_attribute("href")
    assert link is not None
    assert link.endswith("runs=trial-4%2Ctrial-3%2Ctrial-2%2Ctrial-1")
    screenshot(page, "run-sweep")
    assert_readable(page)
    page.set_viewport_size(PHONE)
    assert overflow(page) <= 0
    # Its process ends after it has written the result.
    until(lambda: not store.get("local", run.id).active)
    store.delete("local", run.id)


@pytest.mark.long
def test_a_sweep_is_started_from_the_form_and_trained(visit, serve):
    site = serve()
    page = open_new_run(visit, site, "#method")
    steps = page.get_by_role("textbox", name="Maximum steps").or_(
        page.locator("#f-max-steps textarea, #f-max-steps input")
    )
    page.locator("#group-training > button").click()
    steps.first.fill("2")
    steps.first.press("Tab")
    page.goto(page.url.partition("#")[0] + "#review")
    page.locator("#overview .fine").wait_for(timeout=MINUTES)
    page.locator("#sweep > button").click()
    page.locator("#sweep-setting-1 input").click()
    page.get_by_role("option", name="Rank", exact=True).click()
    values = page.locator("#sweep-values-1 :is(input, textarea)")
    values.fill("0, 2")
    values.press("Tab")
    page.locator("#sweep-count").get_by_text("0 lies outside").wait_for()
    values.fill("2, 4")
    values.press("Tab")
    page.locator("#sweep-count").get_by_text("2 trials").wait_for()
    screenshot(page, "new-sweep")
    assert_readable(page)
    page.get_by_role("button", name="Start sweep").click()
    page.wait_for_url(re.compile(r"/run\?run="), timeout=MINUTES)
    page.get_by_role("status").get_by_text("Best: trial").wait_for(timeout=MINUTES)
    assert page.locator("#sweep-plot path.trial").count() == 2
    found = json.loads(next(site.runs.glob("*/trials.json")).read_text())
    assert [row["values"] for row in found["trials"]] == [{"r": 2}, {"r": 4}]
    assert [row["steps"] for row in found["trials"]] == [2, 2]
    until(lambda: page.locator("#sweep-trials tr.best").count() == 1)
