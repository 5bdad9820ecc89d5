"""The store of runs: who sees which, in which state, and what may be done to them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict

import psutil
import pytest

from gradio_app.errors import UserError
from gradio_app.runs.environment import training_environment
from gradio_app.runs.store import RunStore, checked_name
from lightning_peft.runs.status import Status, write_json
from tests.app.runs import recipe, save_adapter, settings


@pytest.fixture
def store(tmp_path):
    return RunStore(settings(tmp_path))


def written(folder, **changes):
    """Writes a status as a process does; by default one that is this test's, and alive."""
    me = psutil.Process()
    status = Status(
        state="running", pid=me.pid, process_started=me.create_time(), started=time.time()
    )
    content = {**asdict(status), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "status.json", content)


def test_a_new_run_is_on_disk_and_belongs_to_who_asked(store):
    run = store.create("local", recipe(steps=3), "My <first> run")
    assert run.status.state == "queued"
    assert run.name == "My <first> run"
    assert run.recipe_text == recipe(steps=3)
    assert json.loads((run.folder.path / "app.json").read_text())["owner"] == "local"
    again = RunStore(store.settings)
    assert [found.id for found in again.list("local")] == [run.id]
    assert again.list("v-somebody") == []


@pytest.mark.parametrize("run_id", ["", "..", "../runs", "A", "x" * 81, None, 3, "no-such-run"])
def test_an_unknown_or_malformed_id_is_refused(store, run_id):
    with pytest.raises(UserError) as refusal:
        store.get("local", run_id)
    assert refusal.value.key == "errors.no_such_run"


def test_what_belongs_to_others_is_refused_like_what_does_not_exist(store):
    run = store.create("v-one", recipe(), "mine")
    asks = {
        "get": lambda: store.get("v-two", run.id),
        "delete": lambda: store.delete("v-two", run.id),
        "describe": lambda: store.describe("v-two", run.id, "yours", "a", "b"),
        "rename": lambda: store.rename("v-two", run.id, "yours"),
        "mark": lambda: store.mark_stopped("v-two", run.id),
    }
    for ask in asks.values():
        with pytest.raises(UserError) as refusal:
            ask()
        assert refusal.value.key == "errors.no_such_run"
    assert store.get("v-one", run.id).name == "mine"


def test_runs_of_the_command_line_are_the_local_owners(store):
    written(store.root / "20260101-000000-sft-lora-ab12")
    (run,) = store.list("local")
    assert run.name == run.id
    assert run.active
    assert store.rename("local", run.id, "named").name == "named"


def test_a_process_that_is_gone_or_another_is_a_crash(store):
    for name, changes in {"gone": {"pid": 2**22 + 1}, "other": {"process_started": 1.0}}.items():
        written(store.root / name, **changes)
        assert store.get("local", name).status.state == "crashed"
        assert store.mark_stopped("local", name).status.state == "stopped"
    written(store.root / "alive")
    with pytest.raises(UserError):
        store.mark_stopped("local", "alive")


def test_a_stop_at_once_that_left_no_word_is_no_crash(store):
    run = store.create("local", recipe(), "a")
    store.update_metadata(run, launched=time.time() - 1, kill_asked=time.time())
    written(run.folder.path, pid=2**22 + 1)
    assert store.get("local", run.id).status.state == "stopped"


def test_a_start_that_left_no_word_has_failed(store):
    run = store.create("local", recipe(), "a")
    # It is launched, and its process is not there yet; then it never comes.
    run = store.update_metadata(run, launched=time.time())
    assert (run.status.state, run.status.phase) == ("preparing", "starting")
    run = store.update_metadata(run, launched=time.time() - 10)
    assert (run.status.state, run.status.phase) == ("failed", "failed before it began")


def test_a_run_that_goes_on_is_not_taken_for_what_it_was(store):
    run = store.create("local", recipe(), "a")
    written(run.folder.path, state="stopped", step=7, started=time.time() - 60)
    run = store.update_metadata(run, waiting=time.time(), resume=True, from_step=7)
    assert (run.status.state, run.status.step) == ("queued", 7)
    me = {"pid": os.getpid(), "created": psutil.Process().create_time()}
    write_json(run.folder.path / "proc.json", me)
    run = store.update_metadata(run, waiting=None, launched=time.time() - 10)
    assert (run.status.state, run.status.step) == ("preparing", 7)


def test_only_what_rests_is_deleted_and_nothing_outside(store, tmp_path):
    run = store.create("local", recipe(), "a")
    store.delete("local", run.id)
    assert not run.folder.path.exists()
    assert (store.list("local"), [one.id for one in store.deleted("local")]) == ([], [run.id])
    assert store.deleted("v-other") == []
    for owner, name in (("v-other", run.id), ("local", f"../{run.id}"), ("local", "none")):
        with pytest.raises(UserError, match="errors.no_such_run"):
            store.restore(owner, name)
        with pytest.raises(UserError, match="errors.no_such_run"):
            store.erase_now(owner, name)
    assert store.restore("local", run.id).name == "a"
    store.delete("local", run.id)
    store.erase_deleted()
    assert store.deleted("local")
    store.erase_deleted(seconds=0)
    assert store.deleted("local") == []
    other = store.create("local", recipe(), "b")
    store.delete("local", other.id)
    store.erase_now("local", other.id)
    assert not list((store.root / ".deleted").iterdir())
    written(store.root / "alive")
    with pytest.raises(UserError) as refusal:
        store.delete("local", "alive")
    assert refusal.value.key == "run.refused_active"
    outside = tmp_path / "outside"
    written(outside, state="finished")
    (store.root / "link").symlink_to(outside)
    with pytest.raises(UserError):
        store.delete("local", "link")
    assert (outside / "status.json").is_file()


def test_a_run_of_a_name_that_was_deleted_before_is_deleted_too(store):
    for step in (1, 2):
        written(store.root / "my-run", state="finished", step=step, pid=2**22 + 1)
        store.delete("local", "my-run")
    steps = {run.id: run.status.step for run in store.deleted("local")}
    assert steps == {"my-run": 1, "my-run-2": 2}
    written(store.root / "my-run", state="finished")
    with pytest.raises(UserError, match="run.refused_restore"):
        store.restore("local", "my-run")
    assert store.restore("local", "my-run-2").status.step == 2


def test_broken_files_hide_nothing_else(store):
    good = store.create("local", recipe(), "good")
    for name, text in {"list": "[]", "words": "{", "kinds": '{"waiting": "soon"}'}.items():
        folder = store.root / name
        folder.mkdir()
        (folder / "app.json").write_text(text)
    (store.root / "status").mkdir()
    (store.root / "status" / "status.json").write_text("[1]")
    assert good.id in [run.id for run in store.list("local")]
    assert store.get("local", "status").status.state == "failed"


def test_names_are_one_line_without_secrets():
    assert checked_name("  a\n b\x00 \u202e ") == "a b"
    assert len(checked_name("x" * 500)) == 80
    assert "hf_" not in checked_name("hf_abcdefghijk")
    with pytest.raises(UserError):
        checked_name(" \n ")


def test_names_of_new_runs_tags_and_notes(store):
    assert store.distinct_name("local", "demo") == "demo"
    first = store.create("local", recipe(), "demo")
    second = store.create("local", recipe(), store.distinct_name("local", "demo"))
    assert (second.name, store.distinct_name("local", "demo")) == ("demo-2", "demo-3")
    assert store.distinct_name("v-one", "demo") == "demo"
    long = store.create("local", recipe(), "x" * 80)
    assert store.distinct_name("local", long.name) == "x" * 75 + "-2"
    tags = " #Good  run, base ,,base, hf_abcdefghijk, \u202e"
    kept = store.describe("local", first.id, "demo", tags, "one\r\ntwo\x00 hf_abcdefghijk").metadata
    assert kept.tags == ("Good-run", "base", "[hidden]")
    assert kept.notes == "one\ntwo [hidden]"
    assert RunStore(store.settings).get("local", first.id).metadata == kept
    with pytest.raises(UserError) as refusal:
        store.describe("local", first.id, "demo", ",".join(map(str, range(11))), "")
    assert refusal.value.key == "run.refused_tags"
    for text in ('{"tags": 3}', '{"tags": [3]}', '{"notes": []}'):
        (second.folder.path / "app.json").write_text(text)
        assert [run.id for run in store.list("local")] == [long.id, first.id]


def test_checkpoints_are_those_with_adapters_the_best_first(store):
    run = store.create("local", recipe(), "a")
    for name, step in {"last": 12, "best": 8, "interrupted": 10}.items():
        save_adapter(run.folder, name, step)
    (run.folder.checkpoints / "adapters" / "empty").mkdir()
    found = [(one.name, one.step) for one in run.checkpoints()]
    assert found == [("best", 8), ("last", 12), ("interrupted", 10)]


def test_the_token_of_a_spaces_owner_stays_with_the_server(store, tmp_path):
    outer = {
        "PATH": "/bin",
        "HF_TOKEN": "x",
        "HF_HOME": "/h",
        "AWS_SECRET": "y",
        "WANDB_API_KEY": "z",
    }
    local = training_environment(settings(tmp_path), outer)
    assert (local["HF_TOKEN"], local["WANDB_API_KEY"]) == ("x", "z")
    assert "AWS_SECRET" not in local
    assert local["OMP_WAIT_POLICY"] == "PASSIVE"
    chosen = training_environment(settings(tmp_path), {"OMP_WAIT_POLICY": "ACTIVE"})
    assert chosen["OMP_WAIT_POLICY"] == "ACTIVE"
    space = training_environment(settings(tmp_path, space=True), outer)
    assert space["HF_HOME"] == "/h"
    assert not {"HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET"} & set(space)
