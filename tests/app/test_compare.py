"""Comparison of runs, on the page and in numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gradio_app.compare.recipe_diff import differences
from gradio_app.compare.results import comparable, compare_answers, loss_curve
from gradio_app.compare.selection import MAX_RUNS, RunSelection, parse_ids, select_runs
from gradio_app.pages import compare
from gradio_app.runs.metrics import Metrics
from gradio_app.runs.outcomes import outcome_of
from gradio_app.runs.store import RunStore
from gradio_app.texts import Texts
from tests.app.browsing import PHONE, assert_readable, screenshot, violations
from tests.app.runs import FAKE, recipe, settings
from tests.app.servers import environment

HOSTILE = "<img src=x onerror=document.title='taken'>"


def finished(store, folder, name, owner="local", **fake):
    """Returns a run that the fake has carried out."""
    run = store.create(owner, recipe(seconds=0.001, **fake), name)
    words = [sys.executable, FAKE, "fit", f"--run_dir={run.folder.path}"]
    subprocess.run(words, check=True, capture_output=True, env=environment(folder))
    return store.update_metadata(run, launched=0.0)


@pytest.fixture
def store(tmp_path):
    return RunStore(settings(tmp_path))


# --- in numbers --------------------------------------------------------------------------------


def test_settings_that_differ_are_reported_by_path():
    one = "run_dir: a\ntrainer: {max_steps: 5, callbacks: [{class_path: x.Stop}]}\nseed: 1\n"
    other = (
        "run_dir: b\ntrainer: {max_steps: 9, callbacks: [{class_path: x.Log, init_args: {n: 2}}, "
        "{class_path: y.Stop}]}\nseed: true\n"
    )
    found = differences([one, other])
    assert dict(found.rows) == {
        "trainer.max_steps": ("5", "9"),
        "trainer.callbacks.Stop.class_path": ("x.Stop", "y.Stop"),
        "trainer.callbacks.Log.class_path": (None, "x.Log"),
        "trainer.callbacks.Log.init_args.n": (None, "2"),
        # One and true are equal to Python, and not to a recipe.
        "seed": ("1", "true"),
    }
    assert found.same == 0
    assert differences([one, one]).same == 3
    broken = differences([one, "a: [", "- a list"])
    assert broken.unreadable == (1, 2)


def test_what_an_address_names_is_looked_up_for_its_owner(store):
    mine = [store.create("local", recipe(), f"mine {n}").id for n in range(MAX_RUNS + 1)]
    foreign = store.create("v-somebody", recipe(), "secret").id
    named = parse_ids(f"{mine[0]}, {mine[0]},,{foreign},../{mine[1]},")
    found = select_runs(store, "local", named)
    assert [run.id for run in found.runs] == [mine[0]]
    assert found.missing == (foreign, f"../{mine[1]}")
    assert not found.too_many
    many = select_runs(store, "local", mine)
    assert len(many.runs) == MAX_RUNS
    assert many.too_many
    assert select_runs(store, "local", [{"a": 1}, None]).runs == ()


def test_curves_outcomes_and_samples(store, tmp_path):
    one = finished(store, tmp_path, "one", steps=20, validate_every=5)
    other = finished(store, tmp_path, "other", steps=30, prompt="Why?")
    metrics = Metrics(one.folder.metrics).refresh()
    steps = loss_curve(metrics, "val_loss", "step")
    assert [x for x, _ in steps] == [0, 5, 10, 15, 20]
    minutes = loss_curve(metrics, "val_loss", "minutes")
    assert [value for _, value in minutes] == [value for _, value in steps]
    assert minutes[0][0] == 0
    assert sorted(minutes) == minutes
    outcome = outcome_of(one, metrics)
    assert outcome.before == {"val_loss": 3.15}
    assert outcome.after["val_loss"] == pytest.approx(steps[-1][1])
    assert (outcome.steps, outcome.seconds) == (20, 2.5)
    # What one of them was asked alone is not compared.
    assert compare_answers([one, other]) == []
    again = finished(store, tmp_path, "again", steps=10)
    said = compare_answers([one, other, again])
    assert [row.prompt for row in said] == ["What colour is the sky?"]
    assert said[0].answers == ("blue, as all know", None, "blue, as all know")
    turns = [{"role": "system", "content": "What"}, {"role": "user", "content": "the sky?"}]
    row = [*turns, {"role": "assistant", "content": said[0].expected}]
    again.folder.write(again.folder.prompts, {"held_out": [row]})
    shown = compare.samples(RunSelection((one, other, again)), Texts())
    assert '<span class="role">System</span> What</div>' in shown
    assert '<span class="role">User</span> the sky?</div>' in shown
    # A run that is going on has no result yet, and its last validation counts.
    one.folder.result.unlink()
    assert outcome_of(one, metrics).before == {"val_loss": 3.15}
    assert outcome_of(one, metrics).after == {"val_loss": steps[-1][1]}


def test_only_runs_on_the_same_rows_are_ranked(store):
    def validated(**changes):
        run = store.create("local", changes.pop("recipe", recipe()), "a run")
        counts = {"rows": 17, "tokens": 900, "trained_tokens": 310}
        encoding = {"tokenizer": "6ff5", "chat_template": "plain", "max_length": 512}
        record = {
            "data": "/one/rows.jsonl",
            "rows": 320,
            "split_by": {"by": "content", "seed": 0, "shares": {"validation": 0.05}},
            "splits": {"train": {"rows": 303}, "validation": counts},
            "settings": {
                "encoding": {**encoding, "max_length": 512, **changes.pop("encoding", {})}
            },
            **changes,
        }
        identity = {"name_or_path": changes.pop("base", "a/base"), **changes.pop("identity", {})}
        base = {"model": identity}
        run.folder.write(run.folder.provenance, {"data": record, "base": base})
        return run

    one = validated()
    # Elsewhere on disk, with another longest row and other training rows: validated on the same.
    same = validated(data="/two/rows.jsonl", encoding={"max_length": 1024})
    assert comparable([one, same])
    limited = "trainer: {limit_val_batches: 2}\n"
    others = [
        validated(base="another/base"),
        validated(data="/one/demo.jsonl"),
        validated(splits={"validation": {"rows": 17, "tokens": 901, "trained_tokens": 310}}),
        validated(split_by={"by": "content", "seed": 1, "shares": {"validation": 0.05}}),
        validated(encoding={"tokenizer": "other"}),
        validated(encoding={"system_prompt": "Be brief."}),
        validated(recipe=limited),
        store.create("local", recipe(), "has not begun"),
    ]
    for other in others:
        assert not comparable([one, same, other])
    assert comparable([others[6], validated(recipe=limited)])
    commits = [validated(identity={"revision": letter * 40}) for letter in "aab"]
    assert comparable(commits[:2])
    assert not comparable(commits[1:])
    files = [validated(identity={"gguf_sha256": letter}) for letter in "ab"]
    assert not comparable(files)
    # Checksums say it of bases without a name, and of one that lies in two places.
    sums = {"fingerprint": "1", "left_out": []}
    assert not comparable([validated(base="") for _ in "ab"])
    assert comparable([validated(base=name, identity=sums) for name in ("", "/a/copy")])
    assert not comparable([validated(identity={**sums, "fingerprint": one}) for one in "12"])
    heads = [{**sums, "fingerprint": one, "left_out": [one]} for one in "12"]
    assert comparable([validated(identity=one) for one in heads])
    curves = {"A one": [(0.0, 3.0), (5.0, 1.0)], "B other": [(0.0, 3.0), (5.0, 0.5)]}
    ranked = compare.summary(curves, "val_loss", "step", True, Texts())
    assert "Lowest at the end: B other, Validation loss 0.5." in ranked
    unranked = compare.summary(curves, "val_loss", "step", False, Texts())
    assert "Lowest" not in unranked
    assert "Not ranked" in unranked
    curves["A one"][-1] = (5.0, 0.50001)
    equal = compare.summary(curves, "val_loss", "step", True, Texts())
    assert "A one" in equal
    assert "Lowest at the end" not in equal


def test_settings_have_the_names_of_the_form(store):
    one = store.create("local", "model: {init_args: {learning_rate: 1e-4}}\nfake: {a: 1}\n", "one")
    other = store.create("local", "model: {init_args: {learning_rate: 2e-4}}\nfake: {a: 2}\n", "b")
    shown = compare.settings_diff(select_runs(store, "local", [one.id, other.id]), Texts())
    assert 'role="region" aria-label="Settings that differ"' in shown
    assert '<span title="model.init_args.learning_rate">Learning rate</span>' in shown
    assert '<span title="fake.a">Fake a</span>' in shown
    assert shown.index("Learning rate") < shown.index("Fake a")
    seeds = [f"model: {{seed: {n}}}\ndata: {{seed: {n}}}\n" for n in (1, 2)]
    runs = [store.create("local", seed, "seeds").id for seed in seeds]
    shown = compare.settings_diff(select_runs(store, "local", runs), Texts())
    for part in ("model", "data"):
        assert f">Seed <small>{part}.seed</small></span>" in shown


def test_long_curves_are_thinned(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = "".join(
        f'{{"step": {n}, "train_loss": {n % 7}, "time": {1000 + n}}}\n' for n in range(3000)
    )
    file.write_text(rows)
    for axis, last in (("step", 2999), ("minutes", 2999 / 60)):
        points = loss_curve(Metrics(file).refresh(), "train_loss", axis)
        assert len(points) <= 500
        assert points[-1][0] == pytest.approx(last)


# --- on the page -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(serve):
    return serve(trainer="fake")


def test_two_runs_are_picked_and_the_address_keeps_them(site, visit):
    page = visit(f"{site.url}/compare")
    page.get_by_text("Two runs are needed").wait_for()
    store = RunStore(settings(site.folder))
    one = finished(store, site.folder, f"one {HOSTILE}", steps=12, generated=HOSTILE)
    other = finished(store, site.folder, "other", steps=20, alert="overfitting", validate_every=4)
    secret = store.create("v-somebody", recipe(), "secret name")
    page.reload()
    page.get_by_text("Pick two runs", exact=True).wait_for()
    assert violations(page) == []
    screenshot(page, "compare-empty")
    picker = page.get_by_label("Runs", exact=True)
    picker.click()
    page.get_by_role("option", name="other").click()
    page.get_by_text("Pick one more run").wait_for()
    picker.click()
    page.get_by_role("option", name="one").click()
    page.get_by_role("heading", name="Settings that differ").wait_for()
    page.keyboard.press("Escape")
    assert page.url.endswith(f"/compare?runs={other.id},{one.id}")
    page.reload()
    page.get_by_role("row", name="Fake steps").get_by_role("cell", name="12").wait_for()
    page.get_by_text("Lowest at the end: A other").wait_for()
    page.get_by_role("heading", name="Sample answers").wait_for()
    assert page.get_by_role("cell", name=HOSTILE).count() == 2
    assert page.get_by_role("columnheader", name="0 of 1 as expected").count() == 2
    page.get_by_role("radio", name="Minutes").check()
    page.get_by_text("at minute").first.wait_for()
    page.get_by_role("radio", name="Training loss").check()
    page.get_by_text("Training loss 0.").wait_for()
    page.locator("#compare-plot svg.marks").wait_for()
    screenshot(page, "compare-runs")
    page.set_viewport_size(PHONE)
    for theme in ("light", "dark"):
        query = f"{one.id},{other.id},{secret.id}"
        page.goto(f"{site.url}/compare?runs={query}&__theme={theme}")
        page.get_by_role("alert").get_by_text(f"cannot be shown: {secret.id}").wait_for()
        page.locator("#compare-plot svg.marks").wait_for()
        assert_readable(page)
        screenshot(page, f"compare-phone-{theme}")
    assert "secret name" not in page.content()
    assert page.title() != "taken"
    page.goto(f"{site.url}/de-compare?runs={one.id}")
    page.get_by_text("Wählen Sie noch einen Lauf").wait_for()
    page.goto(f"{site.url}/run?run={one.id}")
    page.get_by_role("link", name="Compare with another").click()
    page.get_by_text("Pick one more run").wait_for()
